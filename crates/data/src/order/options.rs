//! How an epoch is ordered, and what becomes of its end.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// In which order an epoch visits the samples. As text: `shuffled`, `sequential`, `b65536x16`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Order {
    /// A [`Permutation`](crate::order::permutation::Permutation) chosen by seed and epoch.
    #[default]
    Shuffled,
    /// As they lie in the data, in every epoch.
    Sequential,
    /// For data that does not fit memory: blocks of neighbours are shuffled, and then the samples
    /// of `window` blocks in a row. Reading touches `window` blocks at a time. How close that comes
    /// to a full shuffle: [`Quality`](crate::order::Quality).
    Blocks {
        /// Samples of a block.
        block: u64,
        /// Blocks of a window: 10 or more.
        window: u64,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Shuffled => f.write_str("shuffled"),
            Order::Sequential => f.write_str("sequential"),
            Order::Blocks { block, window } => write!(f, "b{block}x{window}"),
        }
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let sizes = || {
            let (block, window) = text.strip_prefix('b')?.split_once('x')?;
            Some(Order::Blocks { block: block.parse().ok()?, window: window.parse().ok()? })
        };
        match text {
            "shuffled" => Ok(Order::Shuffled),
            "sequential" => Ok(Order::Sequential),
            _ => sizes().ok_or_else(|| {
                format!("`{text}` is no order: shuffled, sequential, or blocks such as b65536x16")
            }),
        }
    }
}

impl TryFrom<String> for Order {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Order> for String {
    fn from(order: Order) -> String {
        order.to_string()
    }
}

/// What happens to the samples at an epoch's end that do not fill a global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tail {
    /// They are left out of this epoch; shuffled, other ones are left out of the next.
    #[default]
    Drop,
    /// They share a global batch with the first samples of the next epoch: every sample is seen
    /// exactly once an epoch. After the last epoch that was asked for there is none: its last
    /// global batch is filled up as with `Pad`.
    Wrap,
    /// There may be none: an epoch that does not divide into global batches is an error that says
    /// the numbers.
    Refuse,
    /// The epoch's last global batch is filled up with samples that do not count: every rank has as
    /// many rows as ever, and [`Batch::valid`](crate::Batch::valid) says which count.
    Pad,
    /// The epoch's last global batch is smaller, and ranks weigh as much as they have samples
    /// ([`Step::weight`](crate::Step::weight)). A rank for which there is none gets one row that
    /// does not count.
    Exact,
}
