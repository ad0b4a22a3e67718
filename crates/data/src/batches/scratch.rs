//! What a thread that fills batches keeps from one to the next.

use crate::order::Sample;

/// Memory that a thread keeps from batch to batch, so that reading allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(crate) bytes: Vec<u8>,
    /// Tokens before they become rows.
    pub(crate) tokens: Vec<i64>,
    /// Samples of a mixture, numbered as in their part.
    pub(crate) renamed: Vec<Sample>,
}
