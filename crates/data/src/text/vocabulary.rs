//! Training a `WordPiece` vocabulary, so that the same text gives the same vocabulary everywhere.
//!
//! The `tokenizers` crate trains `WordPiece` with its byte-pair trainer. That numbers continuation
//! pieces (`##e`) in the order of a hash map, which differs from run to run, and breaks ties by
//! number. Here all single characters are therefore given to it in order, as fixed entries; what is
//! left for it to do are the merges, which it ranks by count and number.
//! Source: `tokenizers` 0.22, `models/bpe/trainer.rs` and `models/wordpiece/trainer.rs`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::split::{normalizer, tokenizer_error};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::format::SpecialTokens;
use crate::progress::{Event, Progress, Stage};
use crate::threads::in_pool;

/// The special tokens; their place is their id.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Their ids.
pub(crate) const UNK: u32 = 1;
pub(crate) const CLS: u32 = 2;
pub(crate) const SEP: u32 = 3;
pub(crate) const SPECIAL_IDS: SpecialTokens = SpecialTokens::bert(0, UNK, CLS, SEP, 4);

/// Fewer entries would hold little more than the letters.
pub(crate) const VOCAB_SIZE_MIN: u32 = 64;

const CONTINUATION: &str = "##";

/// `WordPiece` takes longer words for `[UNK]`.
const WORD_CHARS_MAX: usize = 100;

/// Characters beyond the most frequent ones become `[UNK]`; BERT's own limit.
const ALPHABET_MAX: usize = 1000;

/// Words that a vocabulary is trained on, at most, or four for each of its entries: the most
/// frequent ones. The trainer's time grows with them, and a word that is rarer than so many others
/// decides about no piece.
const WORDS_MAX: usize = 1 << 16;

/// The trainer counts pairs in `i32`; counts are scaled down to stay below.
const COUNT_SUM_MAX: u64 = 1 << 31;

/// A word holds the same pair at most so often in text that is language; longer runs are rare
/// enough not to matter.
const LETTER_PAIRS: u64 = 4;

/// Whether a vocabulary can have so few entries.
pub(crate) fn check_size(vocab_size: u32) -> Result<()> {
    if vocab_size < VOCAB_SIZE_MIN {
        let reason = format!("at least {VOCAB_SIZE_MIN} entries are needed for the letters");
        return Err(Error::option("vocab_size", vocab_size, reason));
    }
    Ok(())
}

/// How often each word occurs.
pub(crate) type WordCounts = BTreeMap<String, u64>;

/// A trained tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct TrainedVocabulary {
    pub(crate) model: WordPiece,
    pub(crate) size: u32,
    /// `tokenizer.json`
    pub(crate) json: String,
}

/// Trains a vocabulary of at most `vocab_size` entries; a small text yields fewer.
pub(crate) fn train(
    counts: &WordCounts,
    vocab_size: u32,
    min_frequency: u64,
    lowercase: bool,
) -> Result<TrainedVocabulary> {
    let alphabet = alphabet(counts, vocab_size);
    let usable = |word: &str| {
        word.chars().count() <= WORD_CHARS_MAX
            && word.chars().all(|c| alphabet.binary_search(&c).is_ok())
    };
    let mut counts: Vec<(&str, u64)> = counts
        .iter()
        .filter(|(word, _)| usable(word))
        .map(|(word, &count)| (word.as_str(), count))
        .collect();
    let words_max = WORDS_MAX.max(to_usize(u64::from(vocab_size)).saturating_mul(4));
    if counts.len() > words_max {
        counts.select_nth_unstable_by_key(words_max, |&(word, count)| (Reverse(count), word));
        counts.truncate(words_max);
        counts.sort_unstable();
    }
    let mut continuations: Vec<char> =
        counts.iter().flat_map(|(word, _)| word.chars().skip(1)).collect();
    continuations.sort_unstable();
    continuations.dedup();
    let fixed = SPECIAL
        .iter()
        .map(ToString::to_string)
        .chain(alphabet.iter().map(ToString::to_string))
        .chain(continuations.iter().map(|c| format!("{CONTINUATION}{c}")))
        .map(|content| AddedToken::from(content, true))
        .collect();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(to_usize(u64::from(vocab_size)))
        .min_frequency(min_frequency)
        .special_tokens(fixed)
        .continuing_subword_prefix(CONTINUATION.to_owned())
        .build();
    let total: u64 = counts.iter().map(|(_, count)| count * LETTER_PAIRS).sum();
    let scale = total.div_ceil(COUNT_SUM_MAX).max(1);
    let scaled = counts.iter().map(|&(word, count)| (word.into(), (count / scale).max(1)));
    let mut bpe = BPE::default();
    trainer
        .do_train(&scaled.collect(), &mut bpe)
        .map_err(tokenizer_error("train the vocabulary"))?;
    finish(WordPiece::from_bpe(&bpe), lowercase)
}

/// What a vocabulary is to be like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WantedVocabulary {
    pub(crate) vocab_size: u32,
    pub(crate) min_frequency: u64,
    pub(crate) lowercase: bool,
}

/// Trains a vocabulary on one thread and tells how it goes.
///
/// The trainer splits each of its thousands of merges over the pool: on a busy machine it waits for
/// a thread each time. Alone it needs less processor time in all.
pub(crate) fn train_alone(
    counts: &WordCounts,
    wanted: WantedVocabulary,
    progress: &dyn Progress,
) -> Result<TrainedVocabulary> {
    let WantedVocabulary { vocab_size, min_frequency, lowercase } = wanted;
    progress.report(Event::Begin { stage: Stage::Training, total_bytes: 0 });
    let work = || train(counts, vocab_size, min_frequency, lowercase);
    let vocabulary = in_pool(Some(NonZeroUsize::MIN), work)??;
    progress.report(Event::End { stage: Stage::Training });
    if vocabulary.size < vocab_size {
        progress.report(Event::Notice(&format!(
            "the text yields a vocabulary of {} entries, fewer than the {vocab_size} asked for",
            vocabulary.size
        )));
    }
    Ok(vocabulary)
}

/// The most frequent characters, in the order of their code points.
fn alphabet(counts: &WordCounts, vocab_size: u32) -> Vec<char> {
    let mut frequencies: BTreeMap<char, u64> = BTreeMap::new();
    for (word, count) in counts {
        for character in word.chars() {
            *frequencies.entry(character).or_default() += count;
        }
    }
    let mut ranked: Vec<(u64, char)> = frequencies.into_iter().map(|(c, n)| (n, c)).collect();
    ranked.sort_by_key(|&(count, character)| (Reverse(count), character));
    // Each character takes up to two entries; half the vocabulary is kept for longer pieces.
    ranked.truncate(ALPHABET_MAX.min(to_usize(u64::from(vocab_size / 4))));
    let mut alphabet: Vec<char> = ranked.into_iter().map(|(_, character)| character).collect();
    alphabet.sort_unstable();
    alphabet
}

/// Wraps the model in a tokenizer that other programs can use.
fn finish(model: WordPiece, lowercase: bool) -> Result<TrainedVocabulary> {
    let mut tokenizer = Tokenizer::new(model.clone());
    let [cls, sep] = [("[CLS]", CLS), ("[SEP]", SEP)];
    tokenizer
        .with_normalizer(Some(normalizer(lowercase)))
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_post_processor(Some(BertProcessing::new(
            (sep.0.to_owned(), sep.1),
            (cls.0.to_owned(), cls.1),
        )))
        .with_decoder(Some(WordPieceDecoder::default()));
    let special = SPECIAL.map(|content| AddedToken::from(content, true));
    tokenizer.add_special_tokens(&special);
    let size = tokenizer.get_vocab_size(true);
    for (id, token) in (0..).zip(SPECIAL) {
        if tokenizer.token_to_id(token) != Some(id) {
            let message = format!("{token} has id {:?}", tokenizer.token_to_id(token));
            return Err(Error::Tokenizer { action: "number the special tokens", message });
        }
    }
    let json = tokenizer.to_string(true).map_err(tokenizer_error("write the tokenizer"))?;
    let size = u32::try_from(to_u64(size)).unwrap_or(u32::MAX);
    Ok(TrainedVocabulary { model, size, json })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::Model;

    fn counts(text: &str) -> WordCounts {
        let mut counts = WordCounts::new();
        super::super::split::for_each(text, true, |word: &str| {
            *counts.entry(word.to_owned()).or_default() += 1;
            Ok(())
        })
        .unwrap();
        counts
    }

    const TEXT: &str = "the cat sat on the mat and the other cats sang while another one slept under the
        wooden table; nobody knew whether weather or feather mattered, rather than the father of the others";

    #[test]
    fn training_again_gives_the_same_vocabulary() {
        // Hash maps are seeded anew for each training, so eight would differ if order mattered.
        let first = train(&counts(TEXT), 200, 0, true).unwrap();
        for _ in 0..8 {
            assert_eq!(train(&counts(TEXT), 200, 0, true).unwrap().json, first.json);
        }
    }

    #[test]
    fn of_very_many_words_the_most_frequent_are_learnt_from() {
        let rare = (0..WORDS_MAX + 500).map(|number| (format!("zz{number}"), 1));
        let mut counts: WordCounts = rare.collect();
        counts.insert("frequent".to_owned(), 1_000_000);
        let first = train(&counts, 300, 2, true).unwrap();
        assert!(first.model.token_to_id("frequent").is_some());
        assert_eq!(train(&counts, 300, 2, true).unwrap().json, first.json);
    }

    #[test]
    fn special_tokens_come_first_and_frequent_words_are_whole() {
        let vocabulary = train(&counts(TEXT), 200, 0, true).unwrap();
        for (id, token) in (0..).zip(SPECIAL) {
            assert_eq!(vocabulary.model.token_to_id(token), Some(id));
        }
        assert!(vocabulary.model.token_to_id("the").is_some());
        assert!(vocabulary.model.token_to_id("##er").is_some());
        assert!(vocabulary.size <= 200);
    }

    #[test]
    fn a_small_vocabulary_stays_within_its_size() {
        let many: String = ('\u{4e00}'..'\u{5e00}').map(|c| format!("{c}a ")).collect();
        for vocab_size in [VOCAB_SIZE_MIN, 100, 1000] {
            let vocabulary = train(&counts(&many), vocab_size, 0, true).unwrap();
            assert!(vocabulary.size <= vocab_size, "{} of {vocab_size}", vocabulary.size);
        }
    }

    #[test]
    fn a_text_of_few_words_yields_fewer_entries() {
        let vocabulary = train(&counts("a b a b ab"), 8192, 0, true).unwrap();
        assert!(vocabulary.size < 20, "{}", vocabulary.size);
    }
}
