//! Calls on their way into a lane, as they were made: one by one, or several that start together.

use std::sync::Arc;

use smallvec::SmallVec;

use super::host::call::Call;

/// A call and, for collectives, its header's way over the control plane.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) call: Arc<Call>,
    pub(super) check: Option<Arc<Call>>,
}

/// What starts together: one call, mostly.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) calls: SmallVec<[Submitted; 1]>,
    /// How many of them are known to be called by all ranks.
    pub(super) checked: usize,
}

impl Unit {
    pub(super) fn is_message(&self) -> bool {
        matches!(&self.calls[..], [Submitted { check: None, .. }])
    }
}

/// Calls that wait for others to start with.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) depth: usize,
    pub(super) calls: SmallVec<[Submitted; 1]>,
}
