//! Small collectives: every rank has every rank's contribution, in the slots of its machine or in
//! the header frames of other machines, and computes its own result.

use std::sync::atomic::Ordering;

use super::compute::{compute, with_pointers};
use super::core::Core;
use crate::call::{Call, CallMemory};
use crate::error::Result;
use crate::memory::mapping::copy;

impl Core {
    /// Whether an inline call of one machine could be finished without waiting.
    pub(crate) fn inline_is_ready(&self, call: &Call) -> bool {
        let seq = call.seq();
        self.locals
            .iter()
            .all(|local| self.board(*local).published(seq).load(Ordering::Acquire) > seq)
    }

    /// Finishes an inline call of one machine: into `direct` (this rank's whole in-place form), or
    /// into the call's own memory. Does nothing when it is finished.
    pub(crate) fn finish_inline(&self, call: &Call, direct: Option<&mut [u8]>) -> Result<bool> {
        let mut state = call.lock();
        if let Some(result) = state.result.clone() {
            return result.map(|()| false);
        }
        let written = direct.is_some();
        if let Err(error) = self.meet_locals(call, None) {
            drop(state);
            let error = self.peers.fail(error);
            call.finish(Err(error.clone()));
            return Err(error);
        }
        let to = match direct {
            Some(direct) => direct.as_mut_ptr(),
            None => {
                if matches!(state.memory, CallMemory::Nothing) {
                    state.memory = CallMemory::Private(self.unchanged(call));
                }
                state.memory.base()
            }
        };
        with_pointers(
            self.locals.iter().map(|local| self.board(*local).payload(call.seq()).cast_const()),
            |inputs| compute(call, self.rank, inputs, to),
        );
        state.result = Some(Ok(()));
        drop(state);
        call.finish(Ok(()));
        self.completed();
        Ok(written)
    }

    /// This rank's in-place form before the call, as far as the slot has it.
    fn unchanged(&self, call: &Call) -> Vec<u8> {
        let mut bytes = vec![0; call.bytes_on(self.rank)];
        let (at, count) = call.contribution(self.rank);
        let from = self.board(self.rank).payload(call.seq());
        copy(from, bytes[at..at + count].as_mut_ptr(), count);
        bytes
    }
}
