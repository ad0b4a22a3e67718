//! How layers are cut into stages: by cost, evenly, and by the user's numbers.

use super::gpt::batching::{Batching, Cut};
use super::gpt::config::Config;
use super::gpt::stages::{cut, described, Costs, Stages};

fn blocks(how: &str, layers: i64, stages: usize, costs: Costs) -> Result<Vec<usize>, String> {
    let mut config = Config::default();
    config.model.num_hidden_layers = layers;
    let how: Stages = how.parse()?;
    cut(&config.model, (&how, stages), costs).map_err(|error| error.to_string())
}

const FLAT: Costs = Costs { embedding: 0.0, block: 1.0, head: 0.0 };

#[test]
fn a_head_that_takes_as_long_as_five_blocks_gets_fewer_beside_it() {
    let costs = Costs { embedding: 0.2, block: 1.0, head: 5.4 };
    assert_eq!(blocks("auto", 12, 2, costs), Ok(vec![9, 3]));
    assert_eq!(blocks("measured", 12, 4, costs), Ok(vec![4, 4, 4, 0]));
    assert_eq!(blocks("even", 12, 2, costs), Ok(vec![6, 6]));
    assert_eq!(blocks("even", 7, 3, costs), Ok(vec![3, 2, 2]));
    // Every stage has something: the embedding alone, blocks, the head alone.
    assert_eq!(blocks("auto", 1, 3, FLAT), Ok(vec![0, 1, 0]));
    assert_eq!(blocks("auto", 12, 1, costs), Ok(vec![12]));
}

#[test]
fn the_users_numbers_are_taken_or_refused_with_what_would_do() {
    assert_eq!(blocks("5,7", 12, 2, FLAT), Ok(vec![5, 7]));
    assert_eq!(blocks("0, 12 ,0", 12, 3, FLAT), Ok(vec![0, 12, 0]));
    for (how, layers, stages, expected) in [
        ("5,6", 12, 2, "are 11 blocks and model.num_hidden_layers is 12"),
        ("5,7", 12, 4, "has 2 numbers and the pipeline 4 stages"),
        ("6,0,6", 12, 3, "leaves stage 1 without layers"),
        (
            "auto",
            2,
            5,
            "5 stages are more than model.num_hidden_layers (2), the embedding and the head",
        ),
        ("even", 2, 3, "3 stages are more than model.num_hidden_layers (2)"),
        ("5;7", 12, 2, "there are auto, even, measured, and numbers of blocks such as 5,7"),
    ] {
        let error = blocks(how, layers, stages, FLAT).expect_err(how);
        assert!(error.contains(expected), "{how}: {error}");
    }
}

/// Of GPT-2 small the products of the head are 50 257 × 768 weights, those of a block 12 × 768²: 5.5 times as many.
#[test]
fn costs_follow_the_dimensions() {
    let mut config = Config::default();
    config.data.sequence_length = 1024;
    let batching = Batching { global_batch: 8, micro_batch: 1, accumulate: 8, cut: Cut::Parts };
    let of = |of: &Config| {
        let mesh = of.mesh.of_world(1).expect("one rank");
        Costs::of(of, &mesh, batching)
    };
    let small = of(&config);
    assert!((3.0..6.0).contains(&(small.head / small.block)), "{small:?}");
    assert!(small.embedding < small.block, "{small:?}");
    config.model.vocab_size = 512;
    let few_words = of(&config);
    assert!(few_words.head < few_words.block, "{few_words:?}");
    config.train.recompute = true;
    assert!(of(&config).block > few_words.block);
}

#[test]
fn a_cut_reads_as_what_each_stage_has() {
    assert_eq!(described(&[0, 1, 3]), "embedding | 1 block | 3 blocks + head");
    assert_eq!(described(&[4, 0]), "embedding + 4 blocks | head");
}
