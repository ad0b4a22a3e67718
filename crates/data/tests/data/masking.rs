//! Masks: how many, of what kind, and that they depend on nothing but seed, epoch and sample.

use std::sync::Arc;

use phalanx_data::batches::{Rows, Scratch};
use phalanx_data::fingerprint::Fingerprint;
use phalanx_data::format::SpecialTokens;
use phalanx_data::order::Sample;
use phalanx_data::samples::Masker;
use phalanx_data::{
    Access, Column, Loader, LoaderOptions, MaskedText, Masking, Result, Samples, IGNORED,
};

use crate::support::{special_id, write_tokens, SPECIAL};

const VOCAB_SIZE: u32 = 1000;
const LEN: usize = 128;

fn row(id: u64) -> Vec<i64> {
    let mut row: Vec<i64> = (0..LEN as u64)
        .map(|at| 5 + ((id * 7919 + at * 104_729) % u64::from(VOCAB_SIZE - 5)).cast_signed())
        .collect();
    row[0] = special_id(SPECIAL.cls);
    row[40] = special_id(SPECIAL.unk);
    row[77] = special_id(SPECIAL.sep);
    row[LEN - 2] = special_id(SPECIAL.sep);
    row[LEN - 1] = special_id(SPECIAL.pad);
    row
}

fn apply(masking: Masking, seed: u64, sample: Sample) -> (Vec<i64>, Vec<i64>) {
    let masker = Masker::new(masking, VOCAB_SIZE, SPECIAL).unwrap();
    let (mut ids, mut labels) = (row(sample.id), vec![7; LEN]);
    masker.apply(seed, sample, &mut ids, &mut labels);
    (ids, labels)
}

/// Whether `count` of `of` agrees with `probability` within five standard deviations.
#[expect(clippy::cast_precision_loss, reason = "a statistic")]
fn agrees(count: usize, of: usize, probability: f64) -> bool {
    let expected = of as f64 * probability;
    (count as f64 - expected).abs() < 5.0 * (expected * (1.0 - probability)).sqrt()
}

#[test]
fn shares_are_those_of_bert() {
    let (mut maskable, mut chosen, mut masked, mut kept, mut random) = (0, 0, 0, 0, 0);
    let mut by_position = [0; LEN];
    let mut random_tokens = Vec::new();
    for id in 0..4000 {
        let original = row(id);
        let (ids, labels) = apply(Masking::default(), 1, Sample { epoch: 0, id });
        for at in 0..LEN {
            if SPECIAL.contains(original[at]) {
                assert_eq!((ids[at], labels[at]), (original[at], IGNORED), "special tokens stay");
                continue;
            }
            maskable += 1;
            if labels[at] == IGNORED {
                assert_eq!(ids[at], original[at]);
                continue;
            }
            assert_eq!(labels[at], original[at]);
            chosen += 1;
            by_position[at] += 1;
            match ids[at] {
                id if id == special_id(SPECIAL.mask) => masked += 1,
                id if id == original[at] => kept += 1,
                id => {
                    assert!((5..i64::from(VOCAB_SIZE)).contains(&id));
                    random += 1;
                    random_tokens.push(id);
                }
            }
        }
    }
    assert!(agrees(chosen, maskable, 9830.0 / 65536.0), "{chosen} of {maskable}");
    assert!(agrees(masked, chosen, 0.8), "{masked} of {chosen} masked");
    assert!(agrees(random, chosen, 0.1), "{random} of {chosen} random");
    assert!(agrees(kept, chosen, 0.1), "{kept} of {chosen} kept");
    let ordinary = by_position.iter().filter(|&&count| count > 0).count();
    assert_eq!(ordinary, LEN - 5, "every ordinary position is chosen some time");
    for &count in by_position.iter().filter(|&&count| count > 0) {
        assert!(agrees(count, 4000, 0.15), "{count} of 4000 at one position");
    }
    random_tokens.sort_unstable();
    random_tokens.dedup();
    assert!(random_tokens.len() > 980, "{} different random tokens", random_tokens.len());
}

#[test]
fn masks_follow_seed_epoch_and_sample_and_nothing_else() {
    let sample = Sample { epoch: 3, id: 17 };
    let one = apply(Masking::default(), 5, sample);
    let _other = apply(Masking::default(), 5, Sample { epoch: 3, id: 18 });
    assert_eq!(one, apply(Masking::default(), 5, sample));
    let chosen = |(_, labels): (Vec<i64>, Vec<i64>)| -> Vec<bool> {
        labels.iter().map(|&label| label != IGNORED).collect()
    };
    let one = chosen(one);
    assert_ne!(one, chosen(apply(Masking::default(), 6, sample)));
    assert_ne!(one, chosen(apply(Masking::default(), 5, Sample { epoch: 4, id: 17 })));
    assert_ne!(one, chosen(apply(Masking::default(), 5, Sample { epoch: 3, id: 18 })));
}

#[test]
fn masks_of_neighbouring_samples_and_epochs_are_independent() {
    // Two independent masks share 2.25 % of the positions.
    let shared = |a: Sample, b: Sample| {
        let (a, b) = (apply(Masking::default(), 1, a).1, apply(Masking::default(), 1, b).1);
        (1..40).filter(|&at| a[at] != IGNORED && b[at] != IGNORED).count()
    };
    let (mut samples, mut epochs) = (0, 0);
    for id in 0..2000 {
        samples += shared(Sample { epoch: 0, id }, Sample { epoch: 0, id: id + 1 });
        epochs += shared(Sample { epoch: 0, id }, Sample { epoch: 1, id });
    }
    assert!(agrees(samples, 2000 * 39, 0.15 * 0.15), "{samples}");
    assert!(agrees(epochs, 2000 * 39, 0.15 * 0.15), "{epochs}");
}

#[test]
fn at_least_one_position_is_chosen_if_there_is_one() {
    let rare = Masking { probability: 1e-4, ..Masking::default() };
    let mut positions = Vec::new();
    for id in 0..400 {
        let (_, labels) = apply(rare, 1, Sample { epoch: 0, id });
        let chosen: Vec<usize> = (0..LEN).filter(|&at| labels[at] != IGNORED).collect();
        assert!(!chosen.is_empty());
        positions.extend(chosen);
    }
    positions.sort_unstable();
    positions.dedup();
    assert!(positions.len() > 90, "the one is not always the same: {}", positions.len());

    let masker = Masker::new(Masking::default(), VOCAB_SIZE, SPECIAL).unwrap();
    let (mut ids, mut labels) = ([2, 1, 1, 3], [0; 4]);
    masker.apply(1, Sample::default(), &mut ids, &mut labels);
    assert_eq!((ids, labels), ([2, 1, 1, 3], [IGNORED; 4]), "nothing to choose");
}

#[test]
fn extremes_of_the_shares_are_exact() {
    let all = Masking { probability: 1.0, mask_share: 1.0, random_share: 0.0, whole_words: false };
    let (ids, labels) = apply(all, 1, Sample::default());
    let original = row(0);
    for at in 0..LEN {
        if SPECIAL.contains(original[at]) {
            assert_eq!(labels[at], IGNORED);
        } else {
            assert_eq!((ids[at], labels[at]), (special_id(SPECIAL.mask), original[at]));
        }
    }
    let keep = Masking { probability: 0.5, mask_share: 0.0, random_share: 0.0, whole_words: false };
    assert_eq!(apply(keep, 1, Sample::default()).0, original);
    // A vocabulary of special tokens has no random token to offer.
    let tiny = SpecialTokens::bert(0, 1, 2, 3, 4);
    let random =
        Masking { probability: 1.0, mask_share: 0.0, random_share: 1.0, whole_words: false };
    let masker = Masker::new(random, 5, tiny).unwrap();
    let (mut ids, mut labels) = ([2, 6, 3], [0; 3]);
    masker.apply(1, Sample::default(), &mut ids, &mut labels);
    assert_eq!(ids, [2, 4, 3]);
}

#[test]
fn masking_that_cannot_be_is_refused() {
    let bad = [
        Masking { probability: 0.0, ..Masking::default() },
        Masking { probability: 1.5, ..Masking::default() },
        Masking { probability: f64::NAN, ..Masking::default() },
        Masking { mask_share: 0.8, random_share: 0.3, ..Masking::default() },
        Masking { random_share: -0.1, ..Masking::default() },
        Masking { mask_share: f64::NAN, ..Masking::default() },
    ];
    for masking in bad {
        let error = Masker::new(masking, VOCAB_SIZE, SPECIAL).unwrap_err().to_string();
        assert!(error.starts_with("masking."), "{error}");
    }
}

/// Masked text of which somebody leaves out the first half of every row.
struct Halved(MaskedText);

impl Samples for Halved {
    fn sample_count(&self) -> u64 {
        self.0.sample_count()
    }

    fn columns(&self) -> &[Column] {
        self.0.columns()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint()
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        self.0.fill(seed, rows, scratch)?;
        let len = rows.row_elements(1);
        for row in rows.column::<i64>(1)?.chunks_mut(len) {
            row[..len / 2].fill(IGNORED);
        }
        Ok(())
    }
}

#[test]
fn labels_are_counted_as_they_are_whoever_has_changed_them() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 200, 500, 1 << 30);
    let masked = || MaskedText::open(&target, 34, Masking::default(), Access::Read).unwrap();
    let all: [Arc<dyn Samples>; 2] = [Arc::new(masked()), Arc::new(Halved(masked()))];
    let counts = all.map(|samples| {
        let mut loader = Loader::new(samples, LoaderOptions::default()).unwrap();
        let step = loader.next_step().unwrap();
        let labels = step.micro_batches[0].labels();
        let counted = labels.iter().filter(|&&label| label != IGNORED).count();
        assert_eq!(step.label_count(), counted);
        counted
    });
    assert!(counts[1] > 0 && counts[1] < counts[0], "{counts:?}");
}
