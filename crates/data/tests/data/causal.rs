//! Samples for the next token: packed, with documents told apart; and whole-word masks.

use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{Continuations, SpecialTokens, TokenStream, Tokens};
use phalanx_data::order::Sample;
use phalanx_data::samples::{Documents, Masker};
use phalanx_data::{
    Access, CausalText, Loader, LoaderOptions, Masking, Order, Samples, Tail, IGNORED,
};

use crate::support::{special_id, write_tokens, SPECIAL};

const LEN: usize = 33;

fn batches(documents: Documents) -> (Vec<i64>, Vec<[Vec<i64>; 4]>) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 40, 500, 2000);
    let stream = Arc::new(TokenStream::open(&target, Access::Read).unwrap());
    let mut tokens = vec![0; usize::try_from(stream.token_count()).unwrap()];
    stream.read(0, &mut tokens, &mut Scratch::default(), &"all").unwrap();
    let samples = Arc::new(CausalText::new(stream, LEN, documents).unwrap());
    assert_eq!(samples.sample_count(), (tokens.len() as u64 - 1) / LEN as u64);
    let options = LoaderOptions {
        order: Order::Sequential,
        tail: Tail::Exact,
        epochs: Some(1),
        global_batch: 4,
        ..Default::default()
    };
    let mut loader = Loader::new(samples, options).unwrap();
    let mut rows = Vec::new();
    for step in loader.steps() {
        for batch in &step.unwrap().micro_batches {
            let column = |name| batch.get::<i64>(name).unwrap_or_default();
            let columns = ["input_ids", "labels", "position_ids", "document_ids"].map(column);
            rows.extend((0..batch.rows()).map(|at| {
                columns.map(|all| {
                    let row = all.get(at * LEN..(at + 1) * LEN);
                    row.unwrap_or_default().to_vec()
                })
            }));
        }
    }
    (tokens, rows)
}

#[test]
fn labels_are_the_next_tokens_and_nothing_is_left_out() {
    let (tokens, rows) = batches(Documents::Joined);
    let inputs: Vec<i64> = rows.iter().flat_map(|row| row[0].clone()).collect();
    let labels: Vec<i64> = rows.iter().flat_map(|row| row[1].clone()).collect();
    assert_eq!(inputs, tokens[..inputs.len()]);
    assert_eq!(labels, tokens[1..=labels.len()]);
    assert!(tokens.len() - inputs.len() <= LEN + 1, "at most a sample is left");
    assert!(rows[0][2].is_empty() && rows[0][3].is_empty());
}

#[test]
fn documents_are_told_apart() {
    let (tokens, rows) = batches(Documents::Apart);
    let end = special_id(SPECIAL.sep);
    let mut several = 0;
    for (number, [inputs, labels, positions, documents]) in rows.iter().enumerate() {
        let mut expected = (0, 0);
        for at in 0..LEN {
            assert_eq!((positions[at], documents[at]), expected);
            let next = tokens[number * LEN + at + 1];
            let label = if inputs[at] == end { IGNORED } else { next };
            assert_eq!(labels[at], label);
            expected =
                if inputs[at] == end { (0, expected.1 + 1) } else { (expected.0 + 1, expected.1) };
        }
        several += usize::from(documents[LEN - 1] > 0);
    }
    assert!(several > 5, "samples with several documents are covered");
}

#[test]
fn whole_words_are_masked_or_left_alone() {
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    // Every token from 300 on continues a word.
    let words = Continuations::from_fn(500, |id| id >= 300);
    let masking = Masking { whole_words: true, ..Default::default() };
    let masker = Masker::new(masking, 500, special).unwrap().with_words(words.clone());
    let (mut chosen, mut tokens) = (0_u64, 0_u64);
    for id in 0..2000_u64 {
        let row = (0..150).map(|at| 5 + (id * 37 + at * at * 131 + at * 7) % 495);
        let original: Vec<i64> =
            [2].into_iter().chain(row).chain([3]).map(u64::cast_signed).collect();
        let (mut ids, mut labels) = (original.clone(), vec![0; original.len()]);
        masker.apply(9, Sample { epoch: 0, id }, &mut ids, &mut labels);
        assert_eq!((labels[0], labels[151]), (IGNORED, IGNORED));
        for at in 1..151 {
            let is_chosen = labels[at] != IGNORED;
            assert!(!is_chosen || labels[at] == original[at]);
            assert!(is_chosen || ids[at] == original[at]);
            let follows = at > 1 && words.continues(original[at]);
            assert!(!follows || is_chosen == (labels[at - 1] != IGNORED), "sample {id} at {at}");
            chosen += u64::from(is_chosen);
            tokens += 1;
        }
    }
    let percent = chosen * 1000 / tokens;
    assert!((145..=155).contains(&percent), "{percent} tokens of 1000 are chosen");

    // A sample so short that chance chooses nothing has one whole word chosen.
    let mut forced = 0;
    for id in 0..200 {
        let original = [2, 10, 310, 320, 11, 330, 3];
        let (mut ids, mut labels) = (original, [0; 7]);
        masker.apply(9, Sample { epoch: 1, id }, &mut ids, &mut labels);
        let is_chosen = labels.map(|label| label != IGNORED);
        assert!(is_chosen[1..4] == [is_chosen[1]; 3] && is_chosen[4] == is_chosen[5], "{labels:?}");
        assert!(is_chosen[1] || is_chosen[4]);
        forced += usize::from(is_chosen[1] != is_chosen[4]);
    }
    assert!(forced > 100);
}
