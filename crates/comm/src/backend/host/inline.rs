//! Small collectives: every rank has every rank's contribution, in the slots of its machine or in
//! the header frames of other machines, and computes its own result.
#![expect(unsafe_code, reason = "reads the slots of the peers")]

use std::sync::atomic::Ordering;

use super::call::{Call, Memory};
use super::core::Core;
use crate::error::Result;
use crate::fingerprint::Op;
use crate::kernel::{self, Factor, Output, Pass};

/// Copies between memories that callers have checked.
pub(crate) fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: both come from buffers of at least `bytes` bytes in their callers, which do not
    // overlap: one side is always a slot, a staging area, or a private buffer.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

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
                if matches!(state.memory, Memory::Nothing) {
                    state.memory = Memory::Private(self.unchanged(call));
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

/// Computes this rank's result from all contributions (see [`Call::contribution`]).
pub(crate) fn compute(call: &Call, rank: usize, inputs: &[*const u8], to: *mut u8) {
    let segment = call.segment;
    match call.op() {
        Op::AllReduce => reduce(call, inputs, 0, call.segment * call.segments, to),
        Op::Reduce if rank == call.root => {
            reduce(call, inputs, 0, call.segment * call.segments, to);
        }
        Op::ReduceScatter => {
            let at = rank * segment;
            reduce(call, inputs, at, segment, to.wrapping_add(at));
        }
        Op::Broadcast if rank != call.root => {
            copy(inputs[call.root], to, call.bytes_on(rank));
        }
        Op::AllGather => {
            for (peer, input) in inputs.iter().enumerate() {
                copy(*input, to.wrapping_add(peer * segment), segment);
            }
        }
        Op::Gather if rank == call.root => {
            for (peer, input) in inputs.iter().enumerate() {
                copy(*input, to.wrapping_add(peer * segment), segment);
            }
        }
        Op::Scatter => {
            // The root's own segment too: its result may not be where its input was.
            let at = if rank == call.root { rank * segment } else { 0 };
            let from = inputs[call.root].wrapping_add(rank * segment);
            copy(from, to.wrapping_add(at), segment);
        }
        Op::AllToAll => {
            for (peer, input) in inputs.iter().enumerate() {
                let from = input.wrapping_add(rank * segment);
                copy(from, to.wrapping_add(peer * segment), segment);
            }
        }
        _ => {}
    }
}

fn reduce(call: &Call, inputs: &[*const u8], at: usize, bytes: usize, to: *mut u8) {
    let Some(reduction) = call.reduction else { return };
    let count = bytes / call.dtype.size_bytes();
    let factor = Factor::new(reduction.finish, inputs.len());
    let output = Output::Final { targets: &[to], factor };
    with_pointers(inputs.iter().map(|input| input.wrapping_add(at)), |sources| {
        // SAFETY: every input holds the whole contribution, which covers `at + bytes`; all ranks have
        // published and none writes its slot again before all have consumed it; `to` has `bytes`
        // bytes of this rank's own memory, which no slot overlaps.
        unsafe {
            kernel::reduce(
                call.dtype,
                reduction.fold,
                &Pass { partial: None, sources, count, output },
            );
        }
    });
}

/// Collects pointers without allocating where they are few.
fn with_pointers(
    pointers: impl ExactSizeIterator<Item = *const u8>,
    run: impl FnOnce(&[*const u8]),
) {
    let mut few = [std::ptr::null(); 16];
    let count = pointers.len();
    if count <= few.len() {
        for (place, pointer) in few.iter_mut().zip(pointers) {
            *place = pointer;
        }
        run(&few[..count]);
    } else {
        run(&pointers.collect::<Vec<_>>());
    }
}
