//! Where a run stands in its data: small enough for every checkpoint, enough to go on with any number of ranks.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::sampler::{Order, Position};

/// A loader's place: what [`Loader::resume`](crate::Loader::resume) needs.
///
/// It is the same on every rank, and knows nothing of ranks, threads or batch sizes: all of them may differ when a run is
/// resumed. At most 100 bytes as JSON for a billion samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The epoch, from 0.
    pub epoch: u64,
    /// How many samples of the epoch's order are done.
    #[serde(rename = "next_sample", alias = "next_global_sample")]
    pub next_global_sample: u64,
    /// The seed of order and masks.
    pub seed: u64,
    /// The order; [`Order::Shuffled`] is not written out.
    #[serde(default, skip_serializing_if = "is_shuffled")]
    pub order: Order,
    /// Batches of similar length: how many global batches of how many samples are sorted together (`8x256`). Absent: they
    /// are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buckets: Option<Buckets>,
    /// Version of the order ([`permutation::VERSION`](crate::permutation::VERSION)); 1 is not written out.
    #[serde(default = "first_version", skip_serializing_if = "is_first_version")]
    pub version: u32,
    /// What the data was.
    #[serde(rename = "data", alias = "fingerprint")]
    pub fingerprint: Fingerprint,
}

impl LoaderState {
    /// The place in the order.
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, next_global_sample: self.next_global_sample }
    }

    /// Checks that a state belongs to the same data and order as this run's beginning.
    pub(crate) fn check(&self, current: &LoaderState) -> Result<()> {
        let pairs = [
            ("data", self.fingerprint.to_string(), current.fingerprint.to_string()),
            ("seed", self.seed.to_string(), current.seed.to_string()),
            ("order", self.order.to_string(), current.order.to_string()),
            ("batches of similar length", shown(self.buckets), shown(current.buckets)),
            ("order's version", self.version.to_string(), current.version.to_string()),
        ];
        for (what, saved, now) in pairs {
            if saved != now {
                return Err(Error::StateMismatch { what, saved, current: now });
            }
        }
        Ok(())
    }
}

/// How samples of similar length come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Buckets {
    /// Global batches that are sorted together.
    pub batches: u64,
    /// Samples of a global batch.
    pub global_batch: u64,
}

impl fmt::Display for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.batches, self.global_batch)
    }
}

impl TryFrom<String> for Buckets {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let sizes = text.split_once('x').and_then(|(batches, global_batch)| {
            Some(Buckets {
                batches: batches.parse().ok()?,
                global_batch: global_batch.parse().ok()?,
            })
        });
        sizes.ok_or_else(|| {
            format!("`{text}` is not so many batches of so many samples, such as 8x256")
        })
    }
}

impl From<Buckets> for String {
    fn from(buckets: Buckets) -> String {
        buckets.to_string()
    }
}

fn shown(buckets: Option<Buckets>) -> String {
    buckets.map_or_else(|| "none".to_owned(), |buckets| buckets.to_string())
}

fn is_shuffled(order: &Order) -> bool {
    *order == Order::Shuffled
}

fn first_version() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_first_version(version: &u32) -> bool {
    *version == first_version()
}
