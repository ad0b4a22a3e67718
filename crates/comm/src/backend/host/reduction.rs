//! `all_reduce`, `reduce` and `reduce_scatter` on memory: the chain over the mapped buffers of this
//! machine's ranks, in place when all ranks' buffers are in a region, else round by round through
//! the staging areas.
#![expect(unsafe_code, reason = "reads and writes the peers' memory")]

use std::ops::Range;

use smallvec::SmallVec;

use crate::algorithm::chain::{self, Arithmetic, ChainPiece, Delivery};
use crate::algorithm::segment;
use crate::call::{Call, CallMemory};
use crate::error::Result;
use crate::fingerprint::Op;
use crate::kernel::{self, Factor, KernelOutput, KernelPass};
use crate::memory::board::STAGING_BYTES;
use crate::memory::mapping::copy;
use crate::order::executor::CallRun;
use crate::reduce_op::{Finish, Fold, Reduction};

/// What travels between machines at a time: long enough that the system call does not count, short
/// enough that the stages overlap.
const WIRE_PIECE_BYTES: usize = 256 << 10;
/// Shares end at page boundaries, in bytes.
const SHARE_ALIGN_BYTES: usize = 4096;

/// Something for each rank of this machine, without allocating where they are few.
type Few<T> = SmallVec<[T; 8]>;

pub(crate) fn run(run: &mut CallRun<'_>, memory: &mut CallMemory) -> Result<()> {
    let scaled = |reduction: Reduction| matches!(reduction.finish, Finish::Scale(_));
    if run.core.world_size() == 1 && !run.call.reduction.is_some_and(scaled) {
        return Ok(()); // The reduction of one value is that value.
    }
    match run.direct.clone() {
        Some(offsets) => in_place(run, memory, &offsets),
        None => staged(run, memory),
    }
}

/// How many elements the buffer has, and how many of them belong to each rank where they differ.
fn lengths(call: &Call) -> (usize, usize) {
    let size = call.dtype.size_bytes();
    (call.segment * call.segments / size, call.segment / size)
}

fn in_place(
    run: &mut CallRun<'_>,
    memory: &mut CallMemory,
    offsets: &[(usize, usize)],
) -> Result<()> {
    let CallMemory::Region { region, .. } = memory else { return Ok(()) };
    let stage = stage(run);
    let base = |rank: &usize| {
        let offset = offsets.iter().find(|(of, _)| of == rank).map_or(0, |(_, offset)| *offset);
        region.part(*rank).map_or(std::ptr::null_mut(), |part| part.wrapping_add(offset))
    };
    let bases: Few<*mut u8> = stage.clone().map(|rank| base(&rank)).collect();
    let (count, segment) = lengths(run.call);
    sweep(run, bases, count, segment)?;
    run.barrier(stage)
}

/// Round by round through the two halves of the staging areas: while the peers reduce one half, the
/// next round's values are copied into the other, so a round costs one barrier.
fn staged(run: &mut CallRun<'_>, memory: &mut CallMemory) -> Result<()> {
    let stage = stage(run);
    let size = run.call.dtype.size_bytes();
    let (count, segment) = lengths(run.call);
    let segments = if run.call.op() == Op::ReduceScatter { run.core.world_size() } else { 1 };
    let own = memory.base();
    let half = |index: usize| index % 2 * (STAGING_BYTES / 2);
    let staging = run.core.board(run.core.rank).staging();
    let mine = |index: usize, round: &Range<usize>, segment_index: usize| {
        let staged = staging.wrapping_add(half(index) + segment_index * round.len() * size);
        (own.wrapping_add((segment_index * segment + round.start) * size), staged)
    };
    let copy_in = |index: usize, round: &Range<usize>| {
        for segment_index in 0..segments {
            let (values, staged) = mine(index, round, segment_index);
            copy(values, staged, round.len() * size);
        }
    };
    let rounds = segment::pieces(0..count / segments, STAGING_BYTES / 2 / segments / size);
    let mut rounds = rounds.enumerate().peekable();
    if let Some((index, round)) = rounds.peek() {
        copy_in(*index, round);
    }
    run.barrier(stage.clone())?;
    while let Some((index, round)) = rounds.next() {
        let base = |rank| run.core.board(rank).staging().wrapping_add(half(index));
        let bases: Few<*mut u8> = stage.clone().map(base).collect();
        sweep(run, bases, round.len() * segments, round.len())?;
        // The peers were done with that half before the last barrier.
        if let Some((next, following)) = rounds.peek() {
            copy_in(*next, following);
        }
        run.barrier(stage.clone())?;
        let segment_index = match run.call.op() {
            Op::Reduce if run.core.rank != run.call.root => continue,
            Op::ReduceScatter => run.core.rank,
            _ => 0,
        };
        let (values, staged) = mine(index, &round, segment_index);
        copy(staged, values, round.len() * size);
    }
    Ok(())
}

fn stage(run: &CallRun<'_>) -> Range<usize> {
    let topology = &run.core.topology;
    topology.stage(topology.stage_of(run.core.rank))
}

/// One chain over `count` elements at `bases`, the memory of the ranks of this stage.
fn sweep(run: &mut CallRun<'_>, bases: Few<*mut u8>, count: usize, segment: usize) -> Result<()> {
    let core = run.core;
    let Some(reduction) = run.call.reduction else { return Ok(()) };
    let mut place = core.topology.place(core.rank);
    let pieces = pieces(run, count, segment);
    if place.lane.is_none() {
        place.stage_count = 0;
    }
    let stage = stage(run);
    let mut arithmetic =
        Mapped { call: run.call, reduction, bases, stage, world_size: core.world_size() };
    if place.lane.is_some() {
        chain::reduce(&place, &pieces, run, &mut arithmetic)?;
    }
    Ok(())
}

/// What this rank's lane works on, the same on every rank of the lane.
fn pieces(run: &CallRun<'_>, count: usize, segment: usize) -> Few<ChainPiece> {
    let core = run.core;
    let place = core.topology.place(core.rank);
    let Some(lane) = place.lane else { return Few::new() };
    let size = run.call.dtype.size_bytes();
    let align = SHARE_ALIGN_BYTES.min((count / place.lane_count * size).next_power_of_two() / 2);
    let align = align.max(64) / size;
    let one_stage = place.stage_count == 1;
    let longest = if one_stage { usize::MAX } else { WIRE_PIECE_BYTES / size };
    let mut all = Few::new();
    let mut add = |whole: Range<usize>, delivery, lowest_stage| {
        let ranges = segment::pieces(whole, longest);
        all.extend(ranges.map(|range| ChainPiece { range, delivery, lowest_stage }));
    };
    let share = |range: Range<usize>| {
        let share = segment::share(range.len(), place.lane_count, lane, align);
        range.start + share.start..range.start + share.end
    };
    match run.call.op() {
        Op::AllReduce => add(share(0..count), Delivery::All, 0),
        Op::Reduce => {
            let root = run.call.root;
            add(share(0..count), Delivery::Rank(root), core.topology.stage_of(root));
        }
        // On one machine every rank makes its own segment.
        _ if one_stage => {
            let rank = core.rank;
            add(rank * segment..(rank + 1) * segment, Delivery::Rank(rank), 0);
        }
        _ => {
            for rank in 0..core.world_size() {
                let range = share(rank * segment..(rank + 1) * segment);
                add(range, Delivery::Rank(rank), core.topology.stage_of(rank));
            }
        }
    }
    all
}

/// The buffers of this stage's ranks, mapped here.
struct Mapped<'a> {
    call: &'a Call,
    reduction: Reduction,
    bases: Few<*mut u8>,
    stage: Range<usize>,
    world_size: usize,
}

impl Mapped<'_> {
    fn at(&self, element: usize) -> Few<*mut u8> {
        let offset = element * self.call.dtype.size_bytes();
        self.bases.iter().map(|base| base.wrapping_add(offset)).collect()
    }

    fn targets(&self, element: usize, delivery: Delivery) -> Few<*mut u8> {
        let all = self.at(element);
        match delivery {
            Delivery::All => all,
            Delivery::Rank(rank) if self.stage.contains(&rank) => {
                Few::from_slice(&all[rank - self.stage.start..=rank - self.stage.start])
            }
            Delivery::Rank(_) => Few::new(),
        }
    }

    fn pass(&self, range: &Range<usize>, partial: Option<&[u8]>, output: KernelOutput<'_>) {
        let sources: Few<*const u8> =
            self.at(range.start).into_iter().map(<*mut u8>::cast_const).collect();
        let pass = KernelPass {
            partial: partial.map(<[u8]>::as_ptr),
            sources: &sources,
            count: range.len(),
            output,
        };
        let fold: Fold = self.reduction.fold;
        // SAFETY: the bases are mapped buffers (or staging areas) of every rank of the stage, whose
        // lengths the fingerprint has compared and whose ranks have met; no other rank works on
        // this range; partial sums have the length that `partial_bytes` says.
        unsafe { kernel::reduce(self.call.dtype, fold, &pass) };
    }
}

impl Arithmetic for Mapped<'_> {
    fn partial_bytes(&self, elements: usize) -> usize {
        elements * self.call.dtype.accumulator_bytes()
    }

    fn result_bytes(&self, elements: usize) -> usize {
        elements * self.call.dtype.size_bytes()
    }

    fn fold(&mut self, range: Range<usize>, partial: Option<&[u8]>, onward: &mut [u8]) {
        self.pass(&range, partial, KernelOutput::Partial(onward.as_mut_ptr()));
    }

    fn finish(
        &mut self,
        range: Range<usize>,
        partial: Option<&[u8]>,
        delivery: Delivery,
        back: Option<&mut [u8]>,
    ) {
        let mut targets = self.targets(range.start, delivery);
        targets.extend(back.map(<[u8]>::as_mut_ptr));
        let factor = Factor::new(self.reduction.finish, self.world_size);
        let output = KernelOutput::Final { targets: &targets, factor };
        self.pass(&range, partial, output);
    }

    fn write(&mut self, range: Range<usize>, result: &[u8], delivery: Delivery) {
        for target in self.targets(range.start, delivery) {
            copy(result.as_ptr(), target, result.len());
        }
    }
}
