//! Data for data-parallel training: from text files to each rank's masked-LM batches.
//!
//! This crate does not talk to other ranks: rank and world size are numbers. All that ranks must
//! agree on is a function of data, seed and position.
//!
//! A trainer needs the names here; the rest is in rooms: [`order`], [`batches`], [`samples`],
//! [`loader`] while training; [`convert`], [`records`], [`mod@format`], [`damage`] for the files;
//! [`source`] for where they lie.
//!
//! ```
//! use std::sync::Arc;
//! use phalanx_data::convert::{prepare, PrepareOptions};
//! use phalanx_data::{progress, Access, Loader, LoaderOptions, MaskedText, Masking};
//!
//! # fn main() -> phalanx_data::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let data_dir = folder.path();
//! # std::fs::write(data_dir.join("a.txt"), "It was a dark and stormy night. ".repeat(200)).unwrap();
//! // Once: a vocabulary is trained and the text is tokenised. Later calls, and other processes, find it done.
//! let options = PrepareOptions { vocab_size: 1024, ..Default::default() };
//! let prepared = prepare(data_dir, &options, &progress::Terminal::stderr())?;
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

pub mod batches;
mod cast;
pub mod convert;
pub mod damage;
mod error;
pub mod fingerprint;
pub mod format;
#[cfg(feature = "testing")]
pub mod fuzzing;
pub mod loader;
pub mod order;
pub mod progress;
mod random;
pub mod records;
pub mod samples;
pub mod source;
#[cfg(feature = "parquet")]
mod table;
pub mod text;
mod threads;

pub use batches::{Batch, Column, DType, IGNORED};
pub use error::{Error, Result};
pub use loader::{Loader, LoaderOptions, LoaderState, OnDamage, Step};
pub use order::{MicroBatch, Order, Tail};
pub use samples::{from_fn, CausalText, MaskedText, Masking, Samples};
pub use source::Access;
