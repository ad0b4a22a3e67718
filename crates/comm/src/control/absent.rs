//! Which ranks a call still waits for, and the last call that each of them is known to have made.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::peers::{lock, Identity, Peers, NOBODY};
use crate::call::Call;
use crate::error::{Error, LastCall};
use crate::fingerprint::CallRecord;
use crate::memory::board::Board;

impl Peers {
    /// Says of which rank of another machine data is waited for; `None`: it has come.
    pub(crate) fn await_data(&self, peer: Option<usize>) {
        self.awaited.store(peer.unwrap_or(NOBODY), Ordering::Relaxed);
    }

    pub(crate) fn awaited(&self) -> Option<usize> {
        Some(self.awaited.load(Ordering::Relaxed)).filter(|peer| *peer != NOBODY)
    }

    /// The error for a call whose time is over, for which `peer` is waited.
    pub(crate) fn late_for(&self, call: &Call, peer: usize) -> Error {
        let last = lock(&self.heard).get(peer).cloned();
        self.late(call, &[(peer, last.unwrap_or(LastCall::Unknown))])
    }

    /// A peer says what it has started last.
    pub(crate) fn heard(&self, peer: usize, last: Option<CallRecord>) {
        if let Some(heard) = lock(&self.heard).get_mut(peer) {
            *heard = last.into();
        }
    }

    pub(crate) fn show_board(&self, board: &Arc<Board>) {
        // Set once, when the group is made.
        drop(self.own_board.set(Arc::clone(board)));
    }

    pub(crate) fn own_last(&self) -> Option<CallRecord> {
        self.own_board.get().and_then(|board| board.last_record())
    }

    /// The error for a call whose time is over; `absent` are the ranks that were waited for.
    pub(crate) fn late(&self, call: &Call, absent: &[(usize, LastCall)]) -> Error {
        let absent = absent
            .iter()
            .map(|(rank, last)| {
                let Identity { host, pid, .. } = self.identities[*rank].clone();
                crate::error::Absent { rank: *rank, host, pid, last: last.clone() }
            })
            .collect();
        Error::Timeout {
            rank: self.rank,
            call: Box::new(call.record.clone()),
            timeout: call.timeout,
            absent,
        }
    }
}
