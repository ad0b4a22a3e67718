//! Text to words as BERT does it: clean, lower case, accents off, split at white space and
//! punctuation.
//!
//! The words are those of `BertNormalizer` and `BertPreTokenizer` of the `tokenizers` crate. Pieces
//! of ASCII, nearly all of an English text, are split here, some twenty times faster because no
//! offsets are kept; all others go through the crate. A test compares the two.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use crate::error::{Error, Result};

/// The normaliser, as it is also written to `tokenizer.json`.
pub(crate) fn normalizer(lowercase: bool) -> BertNormalizer {
    BertNormalizer::new(true, true, None, lowercase)
}

/// What takes the words of a text.
pub(crate) trait WordVisitor {
    fn word(&mut self, word: &str) -> Result<()>;

    /// A piece without white space that is not ASCII: to split it costs a hundred times as much as
    /// to look it up.
    fn piece(&mut self, piece: &str, lowercase: bool) -> Result<()> {
        of_piece(piece, lowercase, |word| self.word(word))
    }
}

impl<F: FnMut(&str) -> Result<()>> WordVisitor for F {
    fn word(&mut self, word: &str) -> Result<()> {
        self(word)
    }
}

/// Hands each word of `text` to `words`.
pub(crate) fn for_each(text: &str, lowercase: bool, mut words: impl WordVisitor) -> Result<()> {
    let mut buffer = String::new();
    for piece in text.split([' ', '\n', '\t', '\r']) {
        if piece.is_ascii() {
            ascii(piece, lowercase, &mut buffer, &mut words)?;
        } else {
            words.piece(piece, lowercase)?;
        }
    }
    Ok(())
}

fn ascii(
    piece: &str,
    lowercase: bool,
    buffer: &mut String,
    words: &mut impl WordVisitor,
) -> Result<()> {
    let stays = |byte: u8| byte.is_ascii_graphic() && !(lowercase && byte.is_ascii_uppercase());
    let mut rest = piece;
    while !rest.is_empty() {
        let len = rest.bytes().position(|byte| byte.is_ascii_punctuation()).unwrap_or(rest.len());
        // Punctuation is a word of its own.
        let (part, later) = rest.split_at(len.max(1));
        rest = later;
        if part.bytes().all(stays) {
            words.word(part)?;
            continue;
        }
        buffer.clear();
        let kept = part.chars().filter(|character| !character.is_ascii_control());
        buffer.extend(kept.map(|kept| if lowercase { kept.to_ascii_lowercase() } else { kept }));
        if !buffer.is_empty() {
            words.word(buffer)?;
        }
    }
    Ok(())
}

/// Calls `word` for each word of a piece.
pub(crate) fn of_piece(
    piece: &str,
    lowercase: bool,
    mut word: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut normalized = NormalizedString::from(piece);
    normalizer(lowercase).normalize(&mut normalized).map_err(tokenizer_error("normalise text"))?;
    let mut pieces = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut pieces).map_err(tokenizer_error("split text"))?;
    for (text, _, _) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
        if !text.is_empty() {
            word(text)?;
        }
    }
    Ok(())
}

/// Closure for `map_err`: an error of the tokenizers crate.
pub(crate) fn tokenizer_error(
    action: &'static str,
) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> Error {
    move |error| Error::Tokenizer { action, message: error.to_string() }
}

/// What the tokenizers crate gives; a panic of it, over a file that is cut off or contradicts
/// itself, is an error.
pub(crate) fn caught<T>(action: &'static str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    // What a panic leaves half done belongs to the tokenizers crate and is dropped; caches hold
    // whole words alone.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let message = format!("the tokenizer does not work: {}", text.unwrap_or("no reason given"));
        Err(Error::Tokenizer { action, message })
    })
}

/// Closure for `map_err`: says of an error of the tokenizers crate which file it is about.
pub(crate) fn about(path: &Path) -> impl Fn(Error) -> Error + '_ {
    move |error| match error {
        Error::Tokenizer { action, message } => {
            Error::Tokenizer { action, message: format!("{}: {message}", path.display()) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ours(text: &str, lowercase: bool) -> Vec<String> {
        let mut words = Vec::new();
        for_each(text, lowercase, |word: &str| {
            words.push(word.to_owned());
            Ok(())
        })
        .unwrap();
        words
    }

    fn theirs(text: &str, lowercase: bool) -> Vec<String> {
        let mut words = Vec::new();
        of_piece(text, lowercase, |word| {
            words.push(word.to_owned());
            Ok(())
        })
        .unwrap();
        words
    }

    #[test]
    fn words_are_clean_lower_case_and_split_at_punctuation() {
        let text = "Héllo, World!\r\n\u{feff}\"Don't\u{7}\" 中文 \u{0}x";
        let words = ["hello", ",", "world", "!", "\"", "don", "'", "t", "\"", "中", "文", "x"];
        assert_eq!(ours(text, true), words);
    }

    proptest! {
        #[test]
        fn any_text_splits_as_the_tokenizers_crate_does(
            text in "([ -~\\t\\n\\r\\x00-\\x7f]|\\PC|[äéßİΣς́ 　]){0,60}", lowercase in any::<bool>()
        ) {
            prop_assert_eq!(ours(&text, lowercase), theirs(&text, lowercase));
        }
    }
}
