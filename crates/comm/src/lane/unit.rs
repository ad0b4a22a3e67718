//! Calls that enter a lane, as they were made: one by one, or several that start together.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::call::Call;

/// A call, and how it is compared.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) call: Arc<Call>,
    pub(super) check: Check,
}

/// How ranks compare what they called.
#[derive(Debug)]
pub(crate) enum Check {
    /// The library's messages bring their headers themselves.
    None,
    /// Over the control plane: the header's call there.
    Collective(Arc<Call>),
    /// Both sides announce a message: its number between the two.
    Message(u64),
}

/// What starts together: one call, mostly.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) calls: SmallVec<[Submitted; 1]>,
    /// How many of them are known to be called by all ranks.
    pub(super) checked: usize,
}

impl Unit {
    /// A message that may overtake collectives.
    pub(super) fn is_free(&self) -> bool {
        matches!(&self.calls[..], [Submitted { check: Check::None, .. }])
    }
}

/// Calls that wait for others to start with.
#[derive(Debug, Default)]
pub(super) struct HeldCalls {
    pub(super) depth: usize,
    pub(super) calls: SmallVec<[Submitted; 1]>,
}
