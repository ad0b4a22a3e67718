//! Data on disk: safetensors shards of tokens, and the index that describes them.
//!
//! A prepared folder holds
//!
//! ```text
//! index.json                  what is here: counts, sizes, checksums, vocabulary, fingerprint
//! tokenizer.json              the tokenizer, as the `tokenizers` libraries read it
//! tokens-00000.safetensors    `tokens` U16 or U32 [n], `doc_offsets` U64 [documents + 1], `block_crc32c` U32 [blocks]; data start at 4096
//! tokens-00001.safetensors    …
//! ```
//!
//! `tokens` is the text, document after document, each closed by `[SEP]` or what the vocabulary has for it. `doc_offsets[i]..doc_offsets[i + 1]` is document i of
//! the shard. Samples are cut out of the stream when it is read, so one folder serves every sequence length.

pub(crate) mod bytes;
pub(crate) mod checked;
pub(crate) mod files;
pub(crate) mod header;
mod index;
pub(crate) mod json;
mod megatron;
pub(crate) mod offsets;
pub(crate) mod shard;
mod tokens;
mod widen;
mod writer;

pub use bytes::Access;
pub(crate) use files::partial_path;
pub(crate) use index::{
    is_output, read_json, BLOCK_BYTES, INDEX_BYTES_MAX, INDEX_FILE, RECORDS_FORMAT, TOKENIZER_FILE,
    VALUE_BYTES,
};
pub use index::{Index, ShardEntry, SpecialTokens, TokenDType};
pub use megatron::MegatronTokens;
pub use tokens::TokenStream;
pub use writer::TokenWriter;
