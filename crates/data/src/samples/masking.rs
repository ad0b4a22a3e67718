//! Masked-LM masking, keyed by seed, epoch and sample: the same mask on every rank, thread and
//! resumed run.
//!
//! Each maskable position is chosen with `probability` (15 %); of the chosen ones 80 % become
//! `[MASK]`, 10 % a random entry of the vocabulary that is not special, 10 % stay. Labels hold the
//! original token where chosen, [`IGNORED`] elsewhere. Special tokens (`[UNK]` among them) are
//! never chosen. If chance chose no position, one is taken at random, so that each sample counts in
//! the loss; only a sample without any maskable token has none.
//!
//! Probabilities are held in 1/65 536: 15 % is 9 830/65 536. Positions are chosen 64 at a time,
//! without a branch for each.
//! Source: Devlin et al., "BERT" (2018), section 3.1.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::batches::IGNORED;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::format::{Continuations, SpecialTokens};
use crate::order::Sample;
use crate::random::{below, high_half, RandomStream};

const PURPOSE_CHOICE: u64 = 0x6D61_736B_0000_0001; // "mask", version 1
const PURPOSE_REPLACEMENT: u64 = 0x7265_706C_0000_0001; // "repl", version 1
const PURPOSE_FALLBACK: u64 = 0x6F6E_6500_0000_0001; // "one", version 1

/// The unit of probabilities.
const ONE: u32 = 1 << 16;

/// Random draws of a replacement token before `[MASK]` is taken; only a vocabulary of almost
/// nothing but special tokens needs more.
const DRAWS_MAX: usize = 64;

/// How masks are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Masking {
    /// Probability that a position is chosen.
    pub probability: f64,
    /// Share of the chosen positions that become `[MASK]`.
    pub mask_share: f64,
    /// Share of the chosen positions that become a random token.
    pub random_share: f64,
    /// Words are chosen with `probability`, not tokens: all tokens of a chosen word are, and each
    /// of them is replaced or kept for itself. Needs a tokenizer that marks where words begin or go
    /// on.
    pub whole_words: bool,
}

impl Default for Masking {
    /// BERT's: 15 %, of these 80 % masked, 10 % random, 10 % kept.
    fn default() -> Self {
        Masking { probability: 0.15, mask_share: 0.8, random_share: 0.1, whole_words: false }
    }
}

/// [`Masking`] for one vocabulary, checked and ready to run.
#[derive(Clone, Debug)]
pub struct Masker {
    chosen_below: u32,
    mask_below: u32,
    random_below: u32,
    vocab_size: u32,
    special: SpecialTokens,
    mask: i64,
    /// The largest special token: ids above it need no closer look.
    special_max: i64,
    /// For whole words.
    words: Option<Arc<Continuations>>,
}

/// A vocabulary lacks what masking needs.
pub(crate) fn missing(token: &'static str) -> Error {
    let reason = "masked training needs it: take another tokenizer, or train on the next token";
    Error::option(token, "not in the vocabulary", reason)
}

impl Masker {
    /// Checks the options against a vocabulary.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for probabilities outside 0..=1, a probability of 0, or shares that
    /// exceed 1 together, or a vocabulary without `[MASK]`.
    pub fn new(masking: Masking, vocab_size: u32, special: SpecialTokens) -> Result<Self> {
        let Masking { probability, mask_share, random_share, whole_words: _ } = masking;
        let mask = special.mask.ok_or_else(|| missing("[MASK]"))?;
        if !(probability > 0.0 && probability <= 1.0) {
            let reason = "it must be above 0 and at most 1 (BERT: 0.15)";
            return Err(Error::option("masking.probability", probability, reason));
        }
        for (option, share) in
            [("masking.mask_share", mask_share), ("masking.random_share", random_share)]
        {
            if !(0.0..=1.0).contains(&share) || mask_share + random_share > 1.0 + 1e-9 {
                let reason = "shares must be at least 0 and at most 1 together (BERT: 0.8 and 0.1)";
                return Err(Error::option(option, share, reason));
            }
        }
        Ok(Masker {
            chosen_below: in_65536ths(probability).max(1),
            mask_below: in_65536ths(mask_share),
            random_below: in_65536ths(mask_share + random_share),
            vocab_size,
            special,
            mask: i64::from(mask),
            special_max: special.all().map(i64::from).max().unwrap_or(-1),
            words: None,
        })
    }

    /// Masks whole words from now on.
    #[must_use]
    pub fn with_words(mut self, words: Continuations) -> Self {
        self.words = Some(Arc::new(words));
        self
    }

    /// Masks `input_ids` in place and writes `labels`. Both have the sample's length. Gives the
    /// number of labels that are not [`IGNORED`].
    ///
    /// # Determinism
    /// A pure function of the arguments.
    pub fn apply(
        &self,
        seed: u64,
        sample: Sample,
        input_ids: &mut [i64],
        labels: &mut [i64],
    ) -> usize {
        debug_assert_eq!(input_ids.len(), labels.len());
        let key = [seed, sample.epoch, sample.id];
        let mut choice = RandomStream::keyed(PURPOSE_CHOICE, &key);
        let mut replacement = RandomStream::keyed(PURPOSE_REPLACEMENT, &key);
        labels.fill(IGNORED);
        if let Some(words) = &self.words {
            self.apply_to_words(&key, words, input_ids, labels);
            return labels.iter().filter(|&&label| label != IGNORED).count();
        }
        let mut chosen_count = 0;
        for (ids, marks) in input_ids.chunks_mut(64).zip(labels.chunks_mut(64)) {
            let mut chosen = self.choose_64(&mut choice);
            while chosen != 0 {
                let at = chosen.trailing_zeros() as usize;
                chosen &= chosen - 1;
                if at >= ids.len() {
                    break;
                }
                let id = ids[at];
                if !self.is_special(id) {
                    marks[at] = id;
                    ids[at] = self.replace(id, &mut replacement);
                    chosen_count += 1;
                }
            }
        }
        if chosen_count == 0 {
            self.choose_one(&key, input_ids, labels, &mut replacement);
            return labels.iter().filter(|&&label| label != IGNORED).count();
        }
        chosen_count
    }

    fn apply_to_words(
        &self,
        key: &[u64; 3],
        words: &Continuations,
        input_ids: &mut [i64],
        labels: &mut [i64],
    ) {
        let mut choice = RandomStream::keyed(PURPOSE_CHOICE, key);
        let mut replacement = RandomStream::keyed(PURPOSE_REPLACEMENT, key);
        // Whether the current word is chosen; `None` between words.
        let mut word = None;
        let mut any = false;
        for (ids, marks) in input_ids.chunks_mut(64).zip(labels.chunks_mut(64)) {
            let chosen = self.choose_64(&mut choice);
            for (at, (id, mark)) in ids.iter_mut().zip(marks).enumerate() {
                if self.is_special(*id) {
                    word = None;
                    continue;
                }
                let is_chosen = match word {
                    Some(is_chosen) if words.continues(*id) => is_chosen,
                    _ => chosen >> at & 1 == 1,
                };
                word = Some(is_chosen);
                if is_chosen {
                    *mark = *id;
                    *id = self.replace(*id, &mut replacement);
                    any = true;
                }
            }
        }
        if any {
            return;
        }
        // One word, by the place of one of its tokens.
        self.choose_one(key, input_ids, labels, &mut replacement);
        let Some(at) = labels.iter().position(|&label| label != IGNORED) else { return };
        let is_inside = |id: i64| !self.is_special(id) && words.continues(id);
        let original = labels[at];
        let mut first = at;
        // The chosen token itself may have been replaced: ask what it was.
        let mut goes_back = words.continues(original);
        while goes_back && first > 0 && !self.is_special(input_ids[first - 1]) {
            first -= 1;
            goes_back = words.continues(input_ids[first]);
        }
        let mut end = at + 1;
        while end < input_ids.len() && is_inside(input_ids[end]) {
            end += 1;
        }
        for place in (first..at).chain(at + 1..end) {
            labels[place] = input_ids[place];
            input_ids[place] = self.replace(input_ids[place], &mut replacement);
        }
    }

    #[inline]
    fn is_special(&self, id: i64) -> bool {
        id <= self.special_max && self.special.contains(id)
    }

    /// 64 bits, each set with the probability that a position is chosen.
    ///
    /// Bit by bit of the probability in binary, from its last place to its first: a random word
    /// halves what was so far (`&`), and adds one half where the place holds a 1 (`|`).
    fn choose_64(&self, stream: &mut RandomStream) -> u64 {
        if self.chosen_below >= ONE {
            return u64::MAX;
        }
        let first_place = self.chosen_below.trailing_zeros();
        (first_place..ONE.trailing_zeros()).fold(0, |bits, place| {
            let word = stream.next();
            if self.chosen_below >> place & 1 == 1 {
                bits | word
            } else {
                bits & word
            }
        })
    }

    /// Chooses one of the maskable positions, each with the same probability.
    fn choose_one(
        &self,
        key: &[u64; 3],
        input_ids: &mut [i64],
        labels: &mut [i64],
        replacement: &mut RandomStream,
    ) {
        let maskable = input_ids.iter().filter(|&&id| !self.is_special(id)).count();
        if maskable == 0 {
            return;
        }
        let random = RandomStream::keyed(PURPOSE_FALLBACK, key).next();
        let nth = to_usize(random % to_u64(maskable));
        let mut positions = (0..input_ids.len()).filter(|&at| !self.is_special(input_ids[at]));
        if let Some(at) = positions.nth(nth) {
            labels[at] = input_ids[at];
            input_ids[at] = self.replace(input_ids[at], replacement);
        }
    }

    #[inline]
    fn replace(&self, original: i64, stream: &mut RandomStream) -> i64 {
        let word = stream.next();
        let draw = u32::from((word & 0xFFFF) as u16);
        let candidate = i64::from(below(high_half(word), self.vocab_size));
        // These are selections, not branches: chance decides, so that a processor would often guess
        // a branch wrong.
        let changed = if draw < self.mask_below { self.mask } else { candidate };
        let result = if draw >= self.random_below { original } else { changed };
        let is_random = (draw >= self.mask_below) & (draw < self.random_below);
        if is_random & (candidate <= self.special_max) {
            return self.draw_again(candidate, stream);
        }
        result
    }

    /// A random token that is not special, beginning with `candidate`.
    #[cold]
    fn draw_again(&self, candidate: i64, stream: &mut RandomStream) -> i64 {
        let mut drawn = candidate;
        for _ in 0..DRAWS_MAX {
            if !self.is_special(drawn) {
                return drawn;
            }
            drawn = i64::from(below(high_half(stream.next()), self.vocab_size));
        }
        self.mask
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the argument is between 0 and 1, up to rounding"
)]
fn in_65536ths(probability: f64) -> u32 {
    (probability * f64::from(ONE)).round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a mask chose, and what stands there.
    fn masked(masker: &Masker, seed: u64, sample: Sample) -> Vec<(usize, i64)> {
        let mut ids: Vec<i64> = (0..100).map(|at| 5 + at * 17 % 490).collect();
        let mut labels = vec![0; ids.len()];
        let count = masker.apply(seed, sample, &mut ids, &mut labels);
        let chosen: Vec<(usize, i64)> =
            (0..ids.len()).filter(|&at| labels[at] != IGNORED).map(|at| (at, ids[at])).collect();
        assert_eq!(chosen.len(), count);
        chosen
    }

    #[test]
    fn masks_are_frozen() {
        let special = SpecialTokens::bert(0, 1, 2, 3, 4);
        let masker = Masker::new(Masking::default(), 500, special).unwrap();
        let sample = Sample { epoch: 3, id: 12_345 };
        // So rare that chance chooses none: one is taken.
        let rare = Masking { probability: 1e-5, ..Default::default() };
        let rare = Masker::new(rare, 500, special).unwrap();
        let random = Masking { mask_share: 0.0, random_share: 1.0, ..Default::default() };
        let random = Masker::new(random, 500, special).unwrap();
        let all = [&masker, &rare, &random].map(|masker| masked(masker, 42, sample));
        assert_eq!(all, [&FROZEN[..], &FROZEN_ONE, &FROZEN_RANDOM], "{CHANGED}");
    }

    #[test]
    fn masks_of_whole_words_are_frozen() {
        let special = SpecialTokens::bert(0, 1, 2, 3, 4);
        let sample = Sample { epoch: 3, id: 12_345 };
        let rare = Masking { probability: 1e-5, ..Default::default() };
        let all = [Masking::default(), rare].map(|masking| {
            let words = Continuations::from_fn(500, |id| id % 5 < 3);
            let masker = Masker::new(masking, 500, special).unwrap().with_words(words);
            masked(&masker, 42, sample)
        });
        assert_eq!(all, [&FROZEN_WORDS[..], &FROZEN_WORD], "{CHANGED}");
    }

    const CHANGED: &str = "masks changed: make a new version";
    const FROZEN_WORDS: [(usize, i64); 13] = [
        (7, 4),
        (8, 204),
        (17, 4),
        (18, 4),
        (24, 296),
        (25, 426),
        (26, 4),
        (29, 4),
        (30, 4),
        (31, 4),
        (89, 48),
        (90, 29),
        (91, 139),
    ];
    const FROZEN_WORD: [(usize, i64); 2] = [(2, 4), (3, 204)];

    const FROZEN: [(usize, i64); 14] = [
        (7, 4),
        (10, 204),
        (17, 4),
        (24, 4),
        (29, 296),
        (31, 426),
        (35, 4),
        (45, 4),
        (65, 4),
        (70, 4),
        (76, 317),
        (81, 29),
        (89, 139),
        (93, 4),
    ];
    const FROZEN_ONE: [(usize, i64); 1] = [(2, 4)];
    const FROZEN_RANDOM: [(usize, i64); 14] = [
        (7, 429),
        (10, 204),
        (17, 144),
        (24, 112),
        (29, 296),
        (31, 426),
        (35, 54),
        (45, 449),
        (65, 125),
        (70, 330),
        (76, 473),
        (81, 29),
        (89, 139),
        (93, 26),
    ];
}
