//! From text files to a prepared folder: vocabulary, tokens, shards.

pub(crate) mod decode;
pub(crate) mod pieces;
mod prepare;
pub(crate) mod split;
pub(crate) mod vocabulary;

pub use decode::Detokenizer;
pub use prepare::{prepare, PrepareOptions, Prepared};
