//! Data for data-parallel training: from text files to each rank's masked-LM batches.
//!
//! This crate does not talk to other ranks: rank and world size are numbers. All that ranks must agree on is a function of
//! data, seed and position.
//!
//! ```
//! use std::sync::Arc;
//! use phalanx_data::{progress, text, Access, Loader, LoaderOptions, MaskedText, Masking};
//!
//! # fn main() -> phalanx_data::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let data_dir = folder.path();
//! # std::fs::write(data_dir.join("a.txt"), "It was a dark and stormy night. ".repeat(200)).unwrap();
//! // Once: a vocabulary is trained and the text is tokenised. Later calls, and other processes, find it done.
//! let options = text::PrepareOptions { vocab_size: 1024, ..Default::default() };
//! let prepared = text::prepare(data_dir, &options, &progress::Terminal::stderr())?;
//!
//! let samples = MaskedText::open(&prepared.folder, 32, Masking::default(), Access::Auto)?;
//! let options = LoaderOptions { seed: 7, global_batch: 8, rank: 1, world_size: 4, ..Default::default() };
//! let mut loader = Loader::new(Arc::new(samples), options)?;
//! for _ in 0..3 {
//!     let step = loader.next_step()?;
//!     for batch in &step.micro_batches {
//!         assert_eq!(batch.shape(), [2, 32]); // two of the eight samples are this rank's
//!         assert_eq!(batch.input_ids().len(), batch.labels().len());
//!     }
//! }
//! assert_eq!(loader.state().next_global_sample, 24); // what a checkpoint keeps
//! # Ok(())
//! # }
//! ```

mod agreement;
mod ahead;
mod batch;
mod blocks;
mod bucketing;
mod cast;
mod causal_text;
pub mod convert;
mod damage;
mod dtype;
mod error;
mod fingerprint;
mod fixed;
mod format;
#[cfg(feature = "testing")]
pub mod fuzzing;
mod loader;
mod lock;
mod masked_text;
mod masking;
mod memory;
mod micro_batches;
mod mixing;
mod mixture;
mod order;
mod order_hash;
mod padded_text;
pub mod permutation;
mod plan;
mod pool;
mod prefetch;
mod prefetch_lines;
pub mod progress;
mod quality;
mod random;
mod raw_text;
pub mod records;
mod recycling;
mod sampler;
mod samples;
mod shares;
mod slice;
mod source;
mod state;
#[cfg(feature = "parquet")]
mod table;
pub mod text;
mod tokens;
mod verify;
mod wait_shares;
mod whole_words;

pub use agreement::Agreement;
pub use batch::{Batch, Column, Rows};
pub use causal_text::{CausalText, Documents};
pub use damage::{record_damage, DamagedBlock, OnDamage};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use fixed::FixedBatches;
pub use format::{
    Access, Index, MegatronTokens, ShardEntry, SpecialTokens, TokenDType, TokenStream, TokenWriter,
};
pub use loader::{Loader, LoaderOptions, Step};
pub use masked_text::MaskedText;
pub use masking::{Masker, Masking, IGNORED};
pub use memory::{Block, HostMemory, Memory};
pub use micro_batches::{IntoBatches, MicroBatches};
pub use mixture::Mixture;
pub use order::{Order, Tail};
pub use padded_text::{Objective, PaddedText};
pub use quality::Quality;
pub use raw_text::RawText;
pub use sampler::{BatchSize, Cursor, Position, Sample, Sampler};
pub use samples::{from_fn, map, FromFn, Map, Part, Samples, Scratch};
pub use slice::{part, MicroBatch, RankSlice};
pub use source::{CachedFolder, Folder, LocalFolder, Source};
#[cfg(feature = "http")]
pub use source::{HttpFolder, HttpOptions};
pub use state::{Buckets, LoaderState};
pub use tokens::Tokens;
pub use verify::{verify, verify_from, Verified};
pub use wait_shares::{SlowLoader, WaitShares};
pub use whole_words::Continuations;
