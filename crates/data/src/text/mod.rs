//! From text files to a prepared folder: vocabulary, tokens, shards.

mod chunk;
mod encode;
mod lock;
mod prepare;
mod source;
mod vocabulary;
mod words;

pub use prepare::{prepare, PrepareOptions, Prepared};
