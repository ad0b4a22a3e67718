//! Text to tokens with any `tokenizer.json`.
//!
//! The `tokenizers` crate keeps track of where each token came from, which costs most of its time and which nobody asks for
//! here. Tokenizers of BERT's kind therefore split words on their own ([`crate::text::split`]) and ask the crate's model only
//! for words that are new; all others go through the crate. Tests compare the two.

use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{Model, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::block::{piece_len, Cut};
use super::options::Document;
use super::words::Memory;
use crate::error::{Error, Result};
use crate::text::split::{for_each, normalizer, tokenizer_error};

/// Turns text into tokens. Special tokens that stand in the text are text.
pub(crate) struct Encoder {
    way: Way,
    memory: Memory,
}

enum Way {
    /// BERT's words, then WordPiece.
    Words { model: WordPiece, lowercase: bool },
    /// Whatever the file says.
    Any(Box<Tokenizer>),
}

impl Encoder {
    /// WordPiece on BERT's words, for the rayon pool that this is called in.
    pub(crate) fn words(model: WordPiece, lowercase: bool) -> Self {
        Encoder { way: Way::Words { model, lowercase }, memory: Memory::new() }
    }

    /// The fastest way to do what a tokenizer does, for the rayon pool that this is called in.
    pub(crate) fn new(tokenizer: Tokenizer) -> Result<Self> {
        if let Some((model, lowercase)) = as_words(&tokenizer) {
            return Ok(Encoder::words(model, lowercase));
        }
        Ok(Encoder { way: Way::Any(Box::new(whole(tokenizer)?)), memory: Memory::new() })
    }

    /// Where the input may be cut so that tokens do not depend on it.
    pub(crate) fn cut(&self, unit: Document) -> Cut {
        match (unit, &self.way) {
            (Document::Line, _) => Cut::Line,
            (Document::BlankLine, _) => Cut::BlankLine,
            (Document::File, Way::Words { .. }) => Cut::Space,
            (Document::File, Way::Any(_)) => Cut::Piece,
        }
    }

    /// Appends the tokens of a text.
    pub(crate) fn encode(&self, text: &str, tokens: &mut Vec<u32>) -> Result<()> {
        match &self.way {
            Way::Words { model, lowercase } => {
                let mut known = self.memory.of_this_thread();
                for_each(text, *lowercase, |word| {
                    known.push(word, tokens, |word| {
                        let pieces =
                            model.tokenize(word).map_err(tokenizer_error("tokenise text"))?;
                        Ok(pieces.into_iter().map(|piece| piece.id).collect())
                    })
                })
            }
            Way::Any(tokenizer) => {
                let mut rest = text;
                while !rest.is_empty() {
                    // Always at a character: pieces end after ASCII white space, or where a character begins.
                    let len = piece_len(rest.as_bytes()).unwrap_or(rest.len());
                    let (piece, later) = rest.split_at(len);
                    let encoding = tokenizer
                        .encode_fast(piece, false)
                        .map_err(tokenizer_error("tokenise text"))?;
                    tokens.extend_from_slice(encoding.get_ids());
                    rest = later;
                }
                Ok(())
            }
        }
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = match &self.way {
            Way::Words { lowercase, .. } => format!("words, lowercase {lowercase}"),
            Way::Any(_) => "any".to_owned(),
        };
        f.debug_struct("Encoder").field("way", &way).finish_non_exhaustive()
    }
}

/// Reads a `tokenizer.json`.
pub(crate) fn read(json: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json).map_err(tokenizer_error("read the tokenizer"))
}

/// The smallest vocabulary size that holds every id.
pub(crate) fn vocab_size(tokenizer: &Tokenizer) -> Result<u32> {
    let largest = tokenizer.get_vocab(true).into_values().max();
    largest.and_then(|id| id.checked_add(1)).ok_or_else(|| Error::Tokenizer {
        action: "use the tokenizer",
        message: "it has no vocabulary".to_owned(),
    })
}

/// Without what belongs to batches and not to text: cut to a length, padding.
fn whole(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    tokenizer.with_truncation(None).map_err(tokenizer_error("use the tokenizer"))?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Whether a tokenizer is one of BERT's: all parts must be as [`crate::text::split`] has them.
fn as_words(tokenizer: &Tokenizer) -> Option<(WordPiece, bool)> {
    let Some(NormalizerWrapper::BertNormalizer(bert)) = tokenizer.get_normalizer() else {
        return None;
    };
    let ours = normalizer(bert.lowercase);
    // An explicit value that says what follows from `lowercase` anyway is the same.
    let strips = bert.strip_accents.unwrap_or(bert.lowercase) == bert.lowercase;
    let same = bert.clean_text == ours.clean_text
        && bert.handle_chinese_chars == ours.handle_chinese_chars
        && strips;
    let splits =
        matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)));
    match tokenizer.get_model() {
        ModelWrapper::WordPiece(model) if same && splits && only_special_added(tokenizer) => {
            Some((model.clone(), bert.lowercase))
        }
        _ => None,
    }
}

/// Whether no token was added that is to be found in text.
fn only_special_added(tokenizer: &Tokenizer) -> bool {
    tokenizer.get_added_tokens_decoder().values().all(|token| token.special)
}
