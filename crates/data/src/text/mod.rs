//! Text to tokens and back: vocabularies, words and pieces, encoders.
//!
//! Here belongs what knows language and tokenizers, and nothing of files of text
//! ([`crate::convert`]). Words and byte-level pieces are split here and remembered, because the
//! `tokenizers` crate keeps track of much that nobody asks for.

mod byte_level;
pub(crate) mod cut;
pub(crate) mod decode;
pub(crate) mod encoder;
mod pieces;
pub(crate) mod special;
pub(crate) mod split;
pub(crate) mod vocabulary;
mod word_pieces;
pub(crate) mod words;

pub use decode::Detokenizer;
