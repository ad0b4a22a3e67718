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
//! `tokens` is the text, document after document, each closed by `[SEP]` or what the vocabulary has
//! for it. `doc_offsets[i]..doc_offsets[i + 1]` is document i of the shard. Samples are cut out of
//! the stream when it is read, so one folder serves every sequence length.
//!
//! Here belongs how tokens lie in files (Megatron-LM's among them), and what folders of records
//! ([`crate::records`]) have in common with those of tokens: the index, shards with checksums, the
//! list of damage, and how a folder appears whole or not at all.

pub(crate) mod bytes;
pub(crate) mod checked;
pub(crate) mod continuations;
pub(crate) mod damage_list;
pub(crate) mod folder;
pub(crate) mod header;
pub(crate) mod index;
pub(crate) mod json;
pub(crate) mod layout;
pub(crate) mod lock;
mod megatron;
pub(crate) mod offsets;
pub(crate) mod open_shards;
mod prefetch_lines;
pub(crate) mod shard;
mod special_tokens;
mod stream;
mod token_index;
mod tokens;
mod widen;
mod writer;

pub use continuations::Continuations;
pub use megatron::MegatronTokens;
pub use special_tokens::SpecialTokens;
pub use stream::TokenStream;
pub use token_index::{TokenIndex, TokenShard};
pub use tokens::Tokens;
pub use writer::TokenWriter;
