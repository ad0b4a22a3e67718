//! What a loader delivers, and how.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::Buckets;
use crate::batches::{Allocator, HostAllocator};
use crate::cast::to_u64;
use crate::order::{MicroBatch, Order, Tail};

/// What a [`Loader`](super::Loader) delivers, and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Seed of order and masks. The same on every rank.
    pub seed: u64,
    /// The order of an epoch. The same on every rank.
    pub order: Order,
    /// What happens at the end of an epoch. The same on every rank.
    pub tail: Tail,
    /// After how many epochs the data ends; `None`: epoch follows epoch. The same on every rank.
    pub epochs: Option<u64>,
    /// How many global batches are sorted by length together, so that samples of similar length
    /// share a batch. 0: none are. The same on every rank. Needs samples that know their length,
    /// and another tail than [`Tail::Wrap`].
    pub bucketing: u64,
    /// Samples that all ranks compute together in a step. The same on every rank.
    pub global_batch: usize,
    /// Whether [`Loader::resume`](super::Loader::resume) goes on from a state of other data: it
    /// keeps epoch and place, and does not know which samples were seen. Otherwise such a state is
    /// an error.
    pub allow_dataset_change: bool,
    /// What is done about data that is known to be damaged. The same on every rank.
    pub on_damage: OnDamage,
    /// How this rank's slice is cut.
    pub micro_batch: MicroBatch,
    /// This rank.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// Threads that build batches ahead. 0: they are built when they are asked for, by who asks. An
    /// order in blocks has one more, which asks for the next blocks from the disk.
    pub threads: usize,
    /// Micro-batches that wait in the queue, at most.
    pub queue_batches: usize,
    /// Bytes of micro-batches that wait in the queue, about; a single larger one is let through.
    /// Batches of padded rows differ in size: one that is being made counts as much as those before
    /// it had on average, so that each thread may exceed this by one batch. As much memory of
    /// padded rows is kept beside what is in use.
    pub queue_bytes: usize,
    /// Where the memory of batches comes from.
    pub memory: Arc<dyn Allocator>,
    /// How long to wait for the batches of a step before that is an error.
    pub timeout: Duration,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        LoaderOptions {
            seed: 0,
            order: Order::default(),
            tail: Tail::default(),
            epochs: None,
            bucketing: 0,
            global_batch: 32,
            allow_dataset_change: false,
            on_damage: OnDamage::default(),
            micro_batch: MicroBatch::default(),
            rank: 0,
            world_size: 1,
            threads: 1,
            queue_batches: 8,
            queue_bytes: 256 << 20,
            memory: Arc::new(HostAllocator),
            timeout: Duration::from_secs(60),
        }
    }
}

impl LoaderOptions {
    pub(super) fn buckets(&self) -> Option<Buckets> {
        let global_batch = to_u64(self.global_batch);
        (self.bucketing > 0).then_some(Buckets { batches: self.bucketing, global_batch })
    }

    /// Every sample exactly once over all ranks, in the data's order, and then the end
    /// ([`Error::EndOfData`](crate::Error::EndOfData)): for evaluation. All ranks have the same
    /// number of steps; ranks may differ by a sample in the last one, or have one that does not
    /// count.
    #[must_use]
    pub fn evaluation(global_batch: usize, rank: usize, world_size: usize) -> Self {
        LoaderOptions {
            order: Order::Sequential,
            tail: Tail::Exact,
            epochs: Some(1),
            global_batch,
            rank,
            world_size,
            ..Default::default()
        }
    }
}

/// What a loader does about blocks that are known to be damaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDamage {
    /// Whoever reads one gets [`Error::Damaged`](crate::Error::Damaged).
    #[default]
    #[serde(alias = "error")]
    Fail,
    /// Samples that lie in blocks that `damage.json` lists (see
    /// [`record_damage`](crate::damage::record_damage)) are left out: in their place comes a row
    /// that does not count ([`Batch::valid`](crate::Batch::valid)) and holds another sample. Order,
    /// saved states and batch sizes stay as they are, on every rank; only the weights of a step's
    /// ranks change. All machines need the same list. A damaged block that is not listed is an
    /// error as ever.
    Skip,
}
