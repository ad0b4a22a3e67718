//! What a loader reads from: anything that can fill the rows of a batch.
//!
//! Here belong the trait [`Samples`] and what implements it: text that is masked or not, fixed
//! batches, mixtures, closures. Where the bytes come from, and how they lie in files, is elsewhere
//! ([`crate::format`], [`crate::records`]).

mod causal_text;
mod closures;
mod fixed;
mod masked_text;
mod masking;
mod mixture;
mod padded_text;
mod raw_text;
mod windows;

use std::ops::Range;

pub use causal_text::{CausalText, Documents};
pub use closures::{from_fn, map, FromFn, Map};
pub use fixed::FixedBatches;
pub use masked_text::MaskedText;
pub use masking::{Masker, Masking};
pub use mixture::Mixture;
pub use padded_text::{Objective, PaddedText};
pub use raw_text::RawText;

use crate::batches::column::longest_max;
use crate::batches::{Column, Rows, Scratch};
use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::order::MixtureComponent;

/// Samples that can be read in any order, from many threads at once.
///
/// Whatever is random about a sample must be a function of `seed` and `sample` alone: then batches
/// do not depend on ranks, threads or on where a run was resumed.
pub trait Samples: Send + Sync + 'static {
    /// How many samples there are.
    fn sample_count(&self) -> u64;

    /// What a batch holds.
    fn columns(&self) -> &[Column];

    /// Identifies the data and everything that decides about a sample but seed and epoch.
    fn fingerprint(&self) -> Fingerprint;

    /// How long sample `id` is in padded columns; needed only if there are such columns, or for
    /// batches of samples of similar length.
    ///
    /// # Errors
    /// If it cannot be read.
    fn sample_len(&self, _id: u64, _scratch: &mut Scratch) -> Result<usize> {
        Ok(longest_max(self.columns()))
    }

    /// The parts that samples are drawn from by weight. One part: they are drawn as the order says.
    fn parts(&self) -> Vec<MixtureComponent> {
        vec![MixtureComponent { samples: self.sample_count(), weight: 1.0 }]
    }

    /// Samples that lie in blocks that are known to be damaged, as ranges in any order: a loader
    /// with [`OnDamage::Skip`](crate::OnDamage::Skip) leaves them out.
    ///
    /// # Errors
    /// If blocks are damaged and it cannot be said which samples lie in them.
    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    /// These samples, which lie one behind the other, will be read soon, in some order: whoever
    /// reads them from a disk can have them fetched. Reports no error: whoever reads the samples
    /// gets it. A loader calls this for orders in blocks ([`Order::Blocks`](crate::Order::Blocks)),
    /// a window ahead, on a thread that no batch waits for: bounds may be read here.
    fn will_need(&self, _samples: Range<u64>, _scratch: &mut Scratch) {}

    /// Fills the rows.
    ///
    /// # Errors
    /// If a sample cannot be read, or is damaged.
    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()>;
}
