//! The arithmetic and the copies of small collectives: this rank's result from all ranks' contributions.
#![expect(unsafe_code, reason = "reads the slots of the peers")]

use crate::call::Call;
use crate::fingerprint::Op;
use crate::kernel::{self, Factor, KernelOutput, KernelPass};
use crate::memory::mapping::copy;

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
    let output = KernelOutput::Final { targets: &[to], factor };
    with_pointers(inputs.iter().map(|input| input.wrapping_add(at)), |sources| {
        // SAFETY: every input holds the whole contribution, which covers `at + bytes`; all ranks have
        // published and none writes its slot again before all have consumed it; `to` has `bytes`
        // bytes of this rank's own memory, which no slot overlaps.
        unsafe {
            kernel::reduce(
                call.dtype,
                reduction.fold,
                &KernelPass { partial: None, sources, count, output },
            );
        }
    });
}

/// Collects pointers without allocating where they are few.
pub(crate) fn with_pointers(
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
