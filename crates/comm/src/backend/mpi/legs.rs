//! Calls on GPU memory over MPI: which bytes are copied to the host before the call (see [`Call`]
//! for the layout there), and which are copied back after it. Pure.

use crate::call::Call;
use crate::fingerprint::Op;

/// Which buffer of the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopySide {
    Input,
    Output,
}

/// A copy between a buffer of the GPU and the form on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leg {
    pub(super) side: CopySide,
    /// The byte at which it begins in the buffer.
    pub(super) at: usize,
    /// The byte at which it begins in the form.
    pub(super) in_form: usize,
    pub(super) bytes: usize,
}

/// What `rank` copies before and after the call; `two` where it has an input beside its output.
pub(super) fn legs(call: &Call, rank: usize, two: bool) -> (Option<Leg>, Option<Leg>) {
    let (segment, whole) = (call.segment, call.bytes_on(rank));
    let is_root = rank == call.root;
    let all = Leg { side: CopySide::Output, at: 0, in_form: 0, bytes: whole };
    let own = Leg { at: rank * segment, in_form: rank * segment, bytes: segment, ..all };
    let input = |leg: Leg| if two { Leg { side: CopySide::Input, ..leg } } else { leg };
    // A buffer of one segment has it at its beginning.
    let short = Leg { at: 0, ..own };
    match call.op() {
        Op::AllReduce => (Some(all), Some(all)),
        Op::Reduce => (Some(all), is_root.then_some(all)),
        Op::Broadcast => (is_root.then_some(all), (!is_root).then_some(all)),
        Op::ReduceScatter => (Some(input(all)), Some(if two { short } else { own })),
        Op::AllGather => (Some(if two { input(short) } else { own }), Some(all)),
        Op::AllToAll => (Some(input(all)), Some(all)),
        Op::Gather if is_root => (Some(if two { input(short) } else { own }), Some(all)),
        Op::Gather | Op::Send => (Some(all), None),
        Op::Scatter if is_root => (Some(input(all)), Some(short)),
        Op::Scatter | Op::Receive => (None, Some(all)),
        Op::Barrier | Op::Allocate | Op::Split => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::call::CallMemory;
    use crate::dtype::DType;
    use crate::fingerprint::CallRecord;

    const SEGMENT: usize = 12;

    fn call(op: Op, segments: usize, root: Option<usize>) -> Call {
        let record = CallRecord {
            op,
            seq: 0,
            dtype: Some(DType::F32),
            len: (SEGMENT * segments / 4) as u64,
            reduction: "",
            root,
            tag: String::new(),
        };
        let limit = Duration::from_secs(1);
        Call::new(record, DType::F32, None, SEGMENT, segments, false, limit, CallMemory::Nothing)
    }

    /// Buffer, place in it, place in the form, length.
    fn numbers(leg: Option<Leg>) -> Option<(bool, usize, usize, usize)> {
        leg.map(|leg| (leg.side == CopySide::Input, leg.at, leg.in_form, leg.bytes))
    }

    #[track_caller]
    fn expect(
        call: &Call,
        rank: usize,
        two: bool,
        before: Option<(bool, usize, usize, usize)>,
        after: Option<(bool, usize, usize, usize)>,
    ) {
        let (out, back) = legs(call, rank, two);
        assert_eq!((numbers(out), numbers(back)), (before, after), "{:?} rank {rank}", call.op());
    }

    #[test]
    fn each_operation_copies_what_it_needs() {
        let all = Some((false, 0, 0, 3 * SEGMENT));
        let all_input = Some((true, 0, 0, 3 * SEGMENT));
        let one = Some((false, 0, 0, SEGMENT));
        expect(&call(Op::AllReduce, 1, None), 1, false, one, one);
        let reduce = call(Op::Reduce, 1, Some(2));
        expect(&reduce, 2, false, one, one);
        expect(&reduce, 0, false, one, None);
        let broadcast = call(Op::Broadcast, 1, Some(2));
        expect(&broadcast, 2, false, one, None);
        expect(&broadcast, 0, false, None, one);
        let sums = call(Op::ReduceScatter, 3, None);
        expect(&sums, 1, false, all, Some((false, SEGMENT, SEGMENT, SEGMENT)));
        expect(&sums, 1, true, all_input, Some((false, 0, SEGMENT, SEGMENT)));
        let everywhere = call(Op::AllGather, 3, None);
        expect(&everywhere, 2, false, Some((false, 2 * SEGMENT, 2 * SEGMENT, SEGMENT)), all);
        expect(&everywhere, 2, true, Some((true, 0, 2 * SEGMENT, SEGMENT)), all);
        expect(&call(Op::AllToAll, 3, None), 0, true, all_input, all);
        let gather = call(Op::Gather, 3, Some(1));
        expect(&gather, 1, true, Some((true, 0, SEGMENT, SEGMENT)), all);
        expect(&gather, 2, false, one, None);
        let scatter = call(Op::Scatter, 3, Some(1));
        expect(&scatter, 1, true, all_input, Some((false, 0, SEGMENT, SEGMENT)));
        expect(&scatter, 2, false, None, one);
        expect(&call(Op::Send, 1, Some(1)), 0, false, one, None);
        expect(&call(Op::Receive, 1, Some(1)), 0, false, None, one);
    }
}
