//! What a loader reads from: anything that can fill the row of a sample.

use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::sampler::Sample;

/// One sample's part of a batch, to be filled completely: rows come from recycled buffers and hold old values.
#[derive(Debug)]
pub struct Row<'a> {
    /// Token ids.
    pub input_ids: &'a mut [i64],
    /// Labels; [`IGNORED`](crate::IGNORED) where the loss does not look.
    pub labels: &'a mut [i64],
    /// 1 for tokens, 0 for padding; absent if [`Samples::has_attention_mask`] says so.
    pub attention_mask: Option<&'a mut [i64]>,
}

/// Memory that a thread keeps from sample to sample, so that reading allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(crate) bytes: Vec<u8>,
}

/// Samples of one length that can be read in any order, from many threads at once.
///
/// Whatever is random about a sample must be a function of `seed` and `sample` alone: then batches do not depend on ranks,
/// threads or on where a run was resumed.
pub trait Samples: Send + Sync + 'static {
    /// How many samples there are.
    fn sample_count(&self) -> u64;

    /// How many tokens each sample has.
    fn sequence_len(&self) -> usize;

    /// Whether batches carry an attention mask. Without one every position is a token.
    fn has_attention_mask(&self) -> bool {
        false
    }

    /// Identifies the data and everything that decides about a sample but seed and epoch.
    fn fingerprint(&self) -> Fingerprint;

    /// Fills the row of `sample`.
    ///
    /// # Errors
    /// If the sample cannot be read, or is damaged.
    fn fill(&self, sample: Sample, seed: u64, row: Row<'_>, scratch: &mut Scratch) -> Result<()>;
}
