//! The GPT example on every mesh: losses and weights are those of one process.

#![expect(clippy::print_stdout, reason = "how close the numbers are is worth seeing")]
#![expect(clippy::float_cmp, reason = "the same bits")]

#[path = "../examples/gpt/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod gpt;
#[path = "gpt/training.rs"]
mod training;

use gpt::config::Config;
use training::{apart, config, Job, Trained};

/// Four blocks, so that there may be four stages; twelve heads, a width and tokens that three and four ranks divide, and a vocabulary that neither does.
const GPT2: &str = r#""model": { "model_type": "gpt2", "vocab_size": 101, "n_positions": 24, "n_embd": 48, "n_layer": 4, "n_head": 12,
    "initializer_range": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1 }"#;
const LLAMA: &str = r#""model": { "model_type": "llama", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
    "num_attention_heads": 12, "num_key_value_heads": 6, "max_position_embeddings": 24, "initializer_range": 0.1, "resid_pdrop": 0.1 }"#;
/// The bias of the keys has no gradient but rounding: see `scripts/gpt_fixtures.py` on eps.
const OPTIMIZER: &str = r#""optimizer": { "lr": 5e-3, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "schedule": "constant" }"#;
const STEPS: u64 = 3;
const SAMPLES: usize = 12;

/// Sizes of dp, tp, pp and cp.
type Sizes = [usize; 4];

fn base(model: &str) -> Config {
    let mut config = config(&format!("{{ {model}, {OPTIMIZER} }}"));
    config.train.steps = STEPS;
    config
}

/// Micro-batches a step over all ranks are twelve, of one sample: as many as any of these meshes can share.
fn job(config: Config, dp: usize) -> Job {
    let micro_batches = SAMPLES / dp;
    Job {
        config,
        global_batch: SAMPLES,
        micro_batches,
        new_tokens: 4,
        prompts: vec![vec![7, 60]],
        ..Job::default()
    }
}

fn alone(model: &str, attention_dropout: f64) -> Trained {
    let mut config = base(model);
    config.model.attn_pdrop = attention_dropout;
    job(config, 1).run(1)
}

/// All meshes of so many ranks.
fn meshes(ranks: usize) -> Vec<Sizes> {
    let mut all = Vec::new();
    for dp in 1..=ranks {
        for tp in 1..=ranks / dp {
            for pp in 1..=ranks / dp / tp {
                let cp = ranks / dp / tp / pp;
                if dp * tp * pp * cp == ranks {
                    all.push([dp, tp, pp, cp]);
                }
            }
        }
    }
    all
}

/// The mesh's losses to 1e-5 and weights to 1e-4 of those of one process. Sums are in another order, so that a token's loss is off by some 1e-6 of it as in
/// `gpt_parity`; Adam's eps of 1e-5 keeps roundings of gradients below 1e-5 of them from becoming steps.
fn check(model: &str, sizes: Sizes, zero: u8, changed: impl Fn(&mut Config), one: &Trained) {
    let [dp, tp, pp, cp] = sizes;
    let mut config = base(model);
    config.mesh.dp = Some(dp);
    (config.mesh.tp, config.mesh.pp, config.mesh.cp) = (tp, pp, cp);
    config.ddp.zero = zero;
    changed(&mut config);
    let what = format!("dp {dp} tp {tp} pp {pp} cp {cp} zero {zero} {:?}", config.mesh);
    let trained = job(config, dp).run(dp * tp * pp * cp);
    for (ours, theirs) in trained.losses.iter().zip(&one.losses) {
        let error = (ours - theirs).abs() / theirs;
        assert!(error < 1e-5, "{what}: losses {:?} and {:?}", trained.losses, one.losses);
    }
    // Of the whole model, on every mesh; the parts' squares are summed apart.
    for (ours, theirs) in trained.norms.iter().zip(&one.norms) {
        let error = (ours - theirs).abs() / theirs;
        assert!(error < 1e-4, "{what}: norms {:?} and {:?}", trained.norms, one.norms);
    }
    let (worst, at) = apart(&trained.weights, &one.weights);
    println!("{what}: weights within {worst:.1e} ({at})");
    assert!(worst < 1e-4, "{what}: {at} is off by {worst:.1e}");
    assert_eq!(trained.greedy, one.greedy, "{what}");
}

#[test]
fn meshes_of_up_to_four_ranks_train_gpt2_as_one_process_does() {
    let one = alone(GPT2, 0.1);
    let schedules = ["gpipe", "1f1b", "zb-h1"];
    for (number, sizes) in (2..=4).flat_map(meshes).enumerate() {
        let changed = |config: &mut Config| {
            config.model.attn_pdrop = 0.1;
            config.mesh.sequence_parallel = number % 2 == 0;
            config.mesh.schedule = schedules[number % schedules.len()].into();
        };
        check(GPT2, sizes, [0, 1, 3][number % 3], changed, &one);
    }
}

#[test]
fn meshes_of_four_ranks_train_llama_as_one_process_does_in_every_stage_of_zero() {
    let one = alone(LLAMA, 0.0);
    for (number, sizes) in [[2, 2, 1, 1], [1, 2, 2, 1], [2, 1, 2, 1], [2, 1, 1, 2], [1, 1, 2, 2]]
        .into_iter()
        .enumerate()
    {
        for zero in [0, 1, 3] {
            let changed = |config: &mut Config| {
                config.mesh.sequence_parallel = number % 2 == 0;
            };
            check(LLAMA, sizes, zero, changed, &one);
        }
    }
}

#[test]
fn eight_ranks_on_three_axes_and_chunks_of_two_blocks_train_as_one_process_does() {
    let one = alone(LLAMA, 0.0);
    check(LLAMA, [2, 2, 2, 1], 1, |config| config.mesh.sequence_parallel = true, &one);
    check(LLAMA, [1, 2, 2, 2], 3, |_| {}, &one);
    let interleaved = |config: &mut Config| config.mesh.schedule = "interleaved:2".into();
    check(LLAMA, [2, 1, 2, 1], 0, interleaved, &one);
    let tied = alone(GPT2, 0.0);
    check(GPT2, [1, 2, 2, 1], 1, interleaved, &tied);
}

#[test]
fn two_runs_have_the_same_bits() {
    let mut config = base(GPT2);
    (config.mesh.tp, config.mesh.pp) = (2, 2);
    config.mesh.sequence_parallel = true;
    let job = job(config, 1);
    let (first, second) = (job.run(4), job.run(4));
    assert_eq!(first.losses, second.losses);
    assert_eq!(apart(&first.weights, &second.weights).0, 0.0);
}
