//! Tokenizers of GPT-2's, Llama 3's and Qwen's kind: pieces of text, each encoded for itself by its
//! bytes.
//!
//! What a piece's tokens are does not depend on what is around it, so pieces are remembered like
//! words; new ones go through the crate's model. A tokenizer is taken for such a one only if each
//! of its parts is known here; tests compare results with the crate's.

use std::borrow::Cow;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, SplitDelimiterBehavior, Tokenizer,
};

use super::pieces::{Pattern, Splitter};
use super::split::tokenizer_error;
use super::words::TokenCache;
use crate::error::Result;

/// A tokenizer of this kind.
pub(super) struct ByteLevel {
    splitter: Splitter,
    /// Text that does not begin with a space is given one.
    add_prefix_space: bool,
    normalizer: Option<NormalizerWrapper>,
    model: ModelWrapper,
    /// How the vocabulary writes each byte.
    letters: [char; 256],
}

/// How text is split before it is encoded by its bytes.
struct Splitting {
    patterns: Vec<Pattern>,
    add_prefix_space: bool,
}

impl ByteLevel {
    /// `None` if the tokenizer is of another kind, or encodes at random (the dropout of BPE).
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let splitting = match tokenizer.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(level)) if level.use_regex => Some(Splitting {
                patterns: vec![Pattern::Gpt2],
                add_prefix_space: level.add_prefix_space,
            }),
            Some(PreTokenizerWrapper::Sequence(parts)) => sequence(parts.as_ref()),
            _ => None,
        };
        let normalizer = match tokenizer.get_normalizer() {
            None => None,
            Some(nfc @ NormalizerWrapper::NFC(_)) => Some(nfc.clone()),
            Some(_) => return Ok(None),
        };
        let model = tokenizer.get_model();
        let is_random = match model {
            ModelWrapper::BPE(bpe) => bpe.dropout.is_some_and(|dropout| dropout > 0.0),
            _ => true,
        };
        let Some(Splitting { patterns, add_prefix_space }) = splitting.filter(|_| !is_random)
        else {
            return Ok(None);
        };
        let splitter = Splitter::new(patterns)?;
        let model = model.clone();
        Ok(Some(ByteLevel { splitter, add_prefix_space, normalizer, model, letters: letters() }))
    }

    /// Appends the tokens of a text, which may begin in the middle of what the tokenizer would be
    /// given whole.
    pub(super) fn encode(
        &self,
        text: &str,
        is_inside: bool,
        known: &mut TokenCache,
        tokens: &mut Vec<u32>,
    ) -> Result<()> {
        let mut whole = match &self.normalizer {
            Some(normalizer) if !text.is_ascii() => Cow::Owned(normalized(normalizer, text)?),
            _ => Cow::Borrowed(text),
        };
        if self.add_prefix_space && !is_inside && !whole.is_empty() && !whole.starts_with(' ') {
            whole = format!(" {whole}").into();
        }
        self.splitter
            .for_each(&whole, &mut |piece| known.push(piece, tokens, |new| self.encode_piece(new)))
    }

    fn encode_piece(&self, piece: &str) -> Result<Vec<u32>> {
        let written: String = piece.bytes().map(|byte| self.letters[usize::from(byte)]).collect();
        let found = self.model.tokenize(&written).map_err(tokenizer_error("tokenise text"))?;
        Ok(found.into_iter().map(|token| token.id).collect())
    }
}

/// Text in composed form. A line break composes with nothing, so each line is looked at for itself.
fn normalized(normalizer: &NormalizerWrapper, text: &str) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if line.is_ascii() {
            out.push_str(line);
            continue;
        }
        let mut changed = NormalizedString::from(line);
        normalizer.normalize(&mut changed).map_err(tokenizer_error("normalise text"))?;
        out.push_str(changed.get());
    }
    Ok(out)
}

/// Patterns, and then bytes.
fn sequence(parts: &[PreTokenizerWrapper]) -> Option<Splitting> {
    let (PreTokenizerWrapper::ByteLevel(level), splits) = parts.split_last()? else { return None };
    let mut patterns = splits.iter().map(pattern).collect::<Option<Vec<Pattern>>>()?;
    // A space in front of every piece, not of the text.
    if level.add_prefix_space {
        return None;
    }
    if level.use_regex {
        patterns.push(Pattern::Gpt2);
    }
    Some(Splitting { patterns, add_prefix_space: false })
}

fn pattern(part: &PreTokenizerWrapper) -> Option<Pattern> {
    match part {
        PreTokenizerWrapper::Split(
            split @ Split {
                pattern: SplitPattern::Regex(expression),
                behavior: SplitDelimiterBehavior::Isolated,
                ..
            },
        ) => Some(Pattern::of(split, expression)),
        _ => None,
    }
}

/// GPT-2's alphabet: bytes that are printed stand for themselves, the others for what follows
/// Latin-1.
fn letters() -> [char; 256] {
    let mut beyond = 256_u32;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(u8::try_from(byte).unwrap_or(0)),
        _ => {
            beyond += 1;
            char::from_u32(beyond - 1).unwrap_or('\0')
        }
    })
}
