//! `tokenizer.json`: which tokens of a vocabulary go on with a word that a token before them began.

use std::borrow::Cow;
use std::path::Path;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};

/// The tokenizer of a prepared folder.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";

/// What an index says of the tokenizer that its tokens were made with.
pub(crate) fn fingerprint_of(tokenizer_json: &[u8]) -> Fingerprint {
    Fingerprinter::new(TOKENIZER_FILE).bytes(tokenizer_json).finish()
}

/// One bit for each token: set if it continues a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuations {
    bits: Vec<u64>,
}

/// What is looked at of a `tokenizer.json`. The rest is passed over.
#[derive(Deserialize)]
struct TokenizerFile<'a> {
    #[serde(borrow)]
    model: TokenizerModel<'a>,
}

#[derive(Deserialize)]
struct TokenizerModel<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    continuing_subword_prefix: Option<Cow<'a, str>>,
    /// Read when the rest is known, entry by entry: all at once it would take many times its size.
    #[serde(borrow)]
    vocab: Option<&'a RawValue>,
}

/// The entries of a vocabulary: names and numbers, or a list of pieces and scores.
struct VocabularyReader<'a> {
    words: &'a mut Continuations,
    vocab_size: u32,
    marks: Marks<'a>,
}

impl<'de> DeserializeSeed<'de> for VocabularyReader<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> std::result::Result<(), D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for VocabularyReader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("tokens and their numbers, or a list of pieces")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some((token, id)) = map.next_entry::<Token, u64>()? {
            if id >= to_u64(self.words.bits.len()) * 64 && id < u64::from(self.vocab_size) {
                return Err(A::Error::custom(format!("token number {id} of so few tokens")));
            }
            self.words.set(id, continues(&token.0, &self.marks));
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        let mut id = 0;
        while let Some((piece, _)) = list.next_element::<(Token, IgnoredAny)>()? {
            self.words.set(id, continues(&piece.0, &self.marks));
            id += 1;
        }
        Ok(())
    }
}

/// A token's text; one at a time.
#[derive(Deserialize)]
struct Token(String);

/// How a vocabulary marks words.
enum Marks<'a> {
    /// Tokens that go on begin with this (`##`).
    Continuing(&'a str),
    /// Tokens that begin a word begin with one of these (`Ġ`, `▁`); others go on, if they are
    /// letters or digits.
    Beginning,
}

impl Continuations {
    /// From a `tokenizer.json`: WordPiece by its prefix of continuing tokens, BPE and Unigram by
    /// their marks of beginning ones. Errors call it `path`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a tokenizer that has no such marks, or a file that is none.
    pub(crate) fn of_json(text: &[u8], vocab_size: u32, path: &Path) -> Result<Self> {
        let failed = |message: &str| failed(path, message);
        let TokenizerFile { model } =
            serde_json::from_slice(text).map_err(|error| failed(&error.to_string()))?;
        let marks = match model.kind.as_deref() {
            Some("WordPiece") => {
                Marks::Continuing(model.continuing_subword_prefix.as_deref().unwrap_or("##"))
            }
            Some("BPE" | "Unigram") => Marks::Beginning,
            _ => return Err(failed("a model of WordPiece, BPE or Unigram is needed")),
        };
        // Numbers follow each other, and each takes some bytes of the text.
        let numbers = vocab_size.min(u32::try_from(text.len()).unwrap_or(u32::MAX));
        let mut words = Continuations::none(numbers);
        let vocabulary = model.vocab.map_or("null", RawValue::get);
        let entries = VocabularyReader { words: &mut words, vocab_size, marks };
        let read = entries.deserialize(&mut serde_json::Deserializer::from_str(vocabulary));
        read.map_err(|error| failed(&format!("its vocabulary: {error}")))?;
        if words.bits.iter().all(|&bits| bits == 0) {
            return Err(failed("no token of its vocabulary continues a word"));
        }
        Ok(words)
    }

    /// From the tokens themselves: those for which `continues` says so.
    pub fn from_fn(vocab_size: u32, continues: impl Fn(u32) -> bool) -> Self {
        let mut words = Continuations::none(vocab_size);
        for id in 0..vocab_size {
            words.set(u64::from(id), continues(id));
        }
        words
    }

    fn none(vocab_size: u32) -> Self {
        Continuations { bits: vec![0; to_usize(u64::from(vocab_size)).div_ceil(64)] }
    }

    fn set(&mut self, id: u64, continues: bool) {
        if let Some(bits) = self.bits.get_mut(to_usize(id / 64)) {
            *bits |= u64::from(continues) << (id % 64);
        }
    }

    /// Whether token `id` goes on with a word.
    #[inline]
    pub fn continues(&self, id: i64) -> bool {
        let Ok(id) = usize::try_from(id) else { return false };
        self.bits.get(id / 64).is_some_and(|bits| bits >> (id % 64) & 1 == 1)
    }

    /// Identifies it: masks depend on it.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let sum = Fingerprinter::new("continuations 1");
        self.bits.iter().fold(sum, |sum, &bits| sum.number(bits)).finish()
    }
}

pub(crate) fn failed(path: &Path, message: &str) -> Error {
    Error::Tokenizer {
        action: "find the words for whole-word masking",
        message: format!("{}: {message}", path.display()),
    }
}

fn continues(token: &str, marks: &Marks<'_>) -> bool {
    match marks {
        Marks::Continuing(prefix) => token.len() > prefix.len() && token.starts_with(prefix),
        Marks::Beginning => {
            // Bytes that are no letters of their own are shown by letters in byte-level
            // vocabularies.
            let begins =
                |c: char| matches!(c, 'Ġ' | '▁' | 'Ċ' | 'ĉ' | ' ') || c.is_ascii_punctuation();
            token.chars().next().is_some_and(|first| !begins(first)) && !is_special(token)
        }
    }
}

fn is_special(token: &str) -> bool {
    token.len() > 2
        && (token.starts_with('<') && token.ends_with('>')
            || token.starts_with('[') && token.ends_with(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Continuations> {
        Continuations::of_json(json.as_bytes(), 100, Path::new("tokenizer.json"))
    }

    fn continuing(words: &Continuations) -> Vec<i64> {
        (-1..200).filter(|&id| words.continues(id)).collect()
    }

    #[test]
    fn each_kind_of_vocabulary_marks_words_in_its_own_way() {
        let pieces = r###"{"model": {"type": "WordPiece", "continuing_subword_prefix": "##",
            "vocab": {"[CLS]": 0, "run": 1, "##ning": 2, "##s": 70, "##": 5, "far": 4000}}}"###;
        assert_eq!(continuing(&of(pieces).unwrap()), [2, 70]);
        let bpe = r#"{"model": {"type": "BPE",
            "vocab": {"<|endoftext|>": 0, "Ġrun": 1, "ning": 2, ",": 3, "Ċ": 4, "Ġ": 5}}}"#;
        assert_eq!(continuing(&of(bpe).unwrap()), [2]);
        let unigram = r#"{"model": {"type": "Unigram",
            "vocab": [["<unk>", 0.0], ["▁run", -1.0], ["ning", -2.0], [".", -3.0]]}}"#;
        assert_eq!(continuing(&of(unigram).unwrap()), [2]);
    }

    #[test]
    fn the_fingerprint_is_frozen() {
        let words = Continuations::from_fn(100, |id| id % 7 < 3);
        assert_eq!(
            words.fingerprint().to_string(),
            "ffcae450ad6796c6",
            "states of masked runs hold it"
        );
    }

    #[test]
    fn tokenizers_without_words_are_refused() {
        for json in [
            "{",
            "{}",
            r#"{"model": {"type": "WordLevel", "vocab": {"a": 1}}}"#,
            r#"{"model": {"type": "WordPiece", "vocab": {"a": 1}}}"#,
            r#"{"model": {"type": "WordPiece", "vocab": {"a": "b"}}}"#,
        ] {
            let error = of(json).unwrap_err().to_string();
            assert!(error.contains("whole-word masking"), "{error}");
        }
    }
}
