//! Text to words as BERT does it: clean, lower case, accents off, split at white space and punctuation.
//!
//! The words are those of `BertNormalizer` and `BertPreTokenizer` of the `tokenizers` crate. Pieces of ASCII, nearly all of an
//! English text, are split here, some twenty times faster because no offsets are kept; all others go through the crate.
//! A test compares the two.

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

/// Calls `word` for each word of `text`.
pub(crate) fn for_each(
    text: &str,
    lowercase: bool,
    mut word: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut buffer = String::new();
    for piece in text.split([' ', '\n', '\t', '\r']) {
        if piece.is_ascii() {
            ascii(piece, lowercase, &mut buffer, &mut word)?;
        } else {
            unicode(piece, lowercase, &mut word)?;
        }
    }
    Ok(())
}

fn ascii(
    piece: &str,
    lowercase: bool,
    buffer: &mut String,
    word: &mut impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let stays = |byte: u8| byte.is_ascii_graphic() && !(lowercase && byte.is_ascii_uppercase());
    let mut rest = piece;
    while !rest.is_empty() {
        let len = rest.bytes().position(|byte| byte.is_ascii_punctuation()).unwrap_or(rest.len());
        // Punctuation is a word of its own.
        let (part, later) = rest.split_at(len.max(1));
        rest = later;
        if part.bytes().all(stays) {
            word(part)?;
            continue;
        }
        buffer.clear();
        let kept = part.chars().filter(|character| !character.is_ascii_control());
        buffer.extend(kept.map(|kept| if lowercase { kept.to_ascii_lowercase() } else { kept }));
        if !buffer.is_empty() {
            word(buffer)?;
        }
    }
    Ok(())
}

fn unicode(piece: &str, lowercase: bool, word: &mut impl FnMut(&str) -> Result<()>) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ours(text: &str, lowercase: bool) -> Vec<String> {
        let mut words = Vec::new();
        for_each(text, lowercase, |word| {
            words.push(word.to_owned());
            Ok(())
        })
        .unwrap();
        words
    }

    fn theirs(text: &str, lowercase: bool) -> Vec<String> {
        let mut words = Vec::new();
        unicode(text, lowercase, &mut |word: &str| {
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
