//! The collectives that only move data, on memory: out of the peers' regions where all have one,
//! else round by round through the staging areas; over sockets to other machines.
#![expect(unsafe_code, reason = "reads the peers' memory")]

use std::ops::Range;

use crate::algorithm::{movement, segment};
use crate::call::CallMemory;
use crate::error::Result;
use crate::fingerprint::Op;
use crate::memory::board::STAGING_BYTES;
use crate::memory::mapping::copy;
use crate::order::executor::CallRun;

/// What goes to other machines before something is taken in.
const WIRE_ROUND_BYTES: usize = 1 << 20;

pub(crate) fn run(run: &mut CallRun<'_>, memory: &mut CallMemory) -> Result<()> {
    let locals = run.core.locals.clone();
    let in_place = matches!(run.call.op(), Op::AllGather | Op::Broadcast);
    match (run.direct.clone(), &*memory) {
        (Some(offsets), CallMemory::Region { region, .. }) if in_place => {
            let part = |(rank, offset): &(usize, usize)| {
                let part = region.part(*rank).unwrap_or(std::ptr::null_mut());
                (*rank, part.wrapping_add(*offset))
            };
            let parts: Vec<(usize, *mut u8)> = offsets.iter().map(part).collect();
            let base = memory.base();
            pull(run, &parts, base);
            for round in segment::pieces(0..run.call.segment, WIRE_ROUND_BYTES) {
                wire(run, base, &round)?;
            }
            run.barrier(locals.into_iter())
        }
        _ => staged(run, memory.base()),
    }
}

/// Reads what this rank gets from the regions of its machine.
fn pull(run: &CallRun<'_>, parts: &[(usize, *mut u8)], base: *mut u8) {
    let call = run.call;
    let me = run.core.rank;
    for (peer, part) in parts {
        if *peer == me {
            continue;
        }
        if let Some(moved) = movement::between(call.op(), call.root, *peer, me) {
            let from = part.wrapping_add(moved.source * call.segment);
            copy(from, base.wrapping_add(moved.target * call.segment), call.segment);
        }
    }
}

fn staged(run: &mut CallRun<'_>, base: *mut u8) -> Result<()> {
    let (call, core, me) = (run.call, run.core, run.core.rank);
    let segments = movement::staged_segments(call.op(), core.world_size());
    let locals = core.locals.clone();
    let others = || locals.iter().copied().filter(|rank| *rank != me);
    for round in segment::pieces(0..call.segment, STAGING_BYTES / segments) {
        let bytes = round.len();
        let mut staged = vec![false; segments];
        for peer in others() {
            let Some(moved) = movement::between(call.op(), call.root, me, peer) else { continue };
            if !std::mem::replace(&mut staged[moved.staged], true) {
                let from = base.wrapping_add(moved.source * call.segment + round.start);
                copy(from, core.board(me).staging().wrapping_add(moved.staged * bytes), bytes);
            }
        }
        run.barrier(locals.iter().copied())?;
        // What goes to other machines leaves before anything of the buffer is overwritten.
        post(run, base, &round)?;
        for peer in others() {
            if let Some(moved) = movement::between(call.op(), call.root, peer, me) {
                let from = core.board(peer).staging().wrapping_add(moved.staged * bytes);
                copy(from, base.wrapping_add(moved.target * call.segment + round.start), bytes);
            }
        }
        take(run, base, &round)?;
        run.barrier(locals.iter().copied())?;
    }
    Ok(())
}

/// This round's part of what goes to and comes from other machines.
fn wire(run: &mut CallRun<'_>, base: *mut u8, round: &Range<usize>) -> Result<()> {
    post(run, base, round)?;
    take(run, base, round)
}

fn remote(run: &CallRun<'_>) -> Vec<usize> {
    let me = run.core.rank;
    let is_remote = |peer: &usize| !run.core.topology.shares_memory(me, *peer);
    (0..run.core.world_size()).filter(is_remote).collect()
}

fn post(run: &mut CallRun<'_>, base: *mut u8, round: &Range<usize>) -> Result<()> {
    let (call, me) = (run.call, run.core.rank);
    for peer in remote(run) {
        if let Some(moved) = movement::between(call.op(), call.root, me, peer) {
            let from = base.wrapping_add(moved.source * call.segment + round.start);
            // SAFETY: the in-place form of this rank covers the segment, and only this thread
            // touches it during the call.
            let bytes = unsafe { std::slice::from_raw_parts(from, round.len()) };
            run.post(peer, bytes)?;
        }
    }
    Ok(())
}

fn take(run: &mut CallRun<'_>, base: *mut u8, round: &Range<usize>) -> Result<()> {
    let (call, me) = (run.call, run.core.rank);
    for peer in remote(run) {
        if let Some(moved) = movement::between(call.op(), call.root, peer, me) {
            let to = base.wrapping_add(moved.target * call.segment + round.start);
            // SAFETY: as in `post`; peers read other segments of it only.
            let into = unsafe { std::slice::from_raw_parts_mut(to, round.len()) };
            run.receive(peer, into)?;
        }
    }
    Ok(())
}
