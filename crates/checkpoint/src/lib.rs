//! Checkpoints of sharded tensors, written in the background and read by any number of ranks.
//!
//! This crate knows tensors by name, element type, shape and boxes alone: no framework, no process group, no device. A rank says what it
//! holds; the crate says who writes what, writes it into safetensors files, and makes a checkpoint of them by one rename, so that a
//! crash at any moment leaves whole checkpoints and nothing that looks like one. Every byte has a checksum that is compared before the byte is used.
//!
//! ```
//! use phalanx_checkpoint::{Alone, Dtype, Extent, Folder, Progress, Saver, SaverOptions, Snapshot, Tensors};
//!
//! # fn main() -> phalanx_checkpoint::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let folder = folder.path();
//! let mut weights = [1, 2, 3, 4, 5, 6];
//! let mut saver = Saver::new(folder, SaverOptions::default())?;
//! let mut ranks = Alone; // a trainer's process group, where there are more
//! for step in 1..=6 {
//!     weights[0] += 1;
//!     if step % 3 == 0 {
//!         let mut snapshot = Snapshot::new();
//!         snapshot.whole("model/w", Dtype::U8, &[2, 3], &weights);
//!         snapshot.values(serde_json::json!({ "epoch": 1 }));
//!         saver.save(&mut ranks, step, &snapshot)?; // copies, and writes while training goes on
//!     }
//!     saver.poll(&mut ranks)?;
//! }
//! assert!(matches!(saver.finish(&mut ranks)?, Progress::Saved { step: 6, .. }));
//!
//! let newest = Folder::new(folder).newest()?.unwrap();
//! let mut column = [0; 2];
//! newest.read("model/w", &Extent::new(&[0, 1], &[2, 1]), &mut column)?;
//! assert_eq!((newest.step(), column), (6, [2, 5]));
//! assert_eq!(newest.values()?["epoch"], 1);
//! # Ok(())
//! # }
//! ```
//!
//! The files, the order of writes and what they guarantee are described in the crate's README.

mod buffer;
mod cast;
mod content;
mod cover;
mod diff;
mod dtype;
mod error;
mod extent;
mod flat;
mod folder;
pub mod fs;
mod header;
mod manifest;
mod memory;
mod numbers;
mod opened;
mod plan;
mod ranks;
mod reading;
mod rewrite;
mod saver;
mod shard;
mod snapshot;
mod tensors;
mod weights;

pub use content::{scatter, Content, Plain, Strided};
pub use diff::{diff, diff_values, TensorDifference, What};
pub use dtype::Dtype;
pub use error::{Cause, Error, Result};
pub use extent::Extent;
pub use flat::flat_range;
pub use folder::{Folder, Keep, Listed, State};
pub use manifest::BLOCK_BYTES;
pub use memory::SnapshotShare;
pub use opened::{Opened, Selected};
pub use ranks::{Alone, Ranks};
pub use reading::{Checkpoint, Verified};
pub use saver::{OnBusy, OnError, Progress, Saver, SaverOptions, Started};
pub use snapshot::Snapshot;
pub use tensors::{Spec, Tensors};
pub use weights::{write_weights, write_weights_file, Weights, WeightsOptions};
