//! Large collectives, and all collectives between machines: meet, compare, then run the algorithm.
//!
//! Between machines every rank sends its header (and its data, when small) to every rank of the
//! others at the beginning: one message time, and nothing of the caller's has changed when a
//! mismatch is found.

use std::sync::Arc;
use std::time::Instant;

use smallvec::{smallvec, SmallVec};

use super::compute::compute;
use super::core::Core;
use super::links::{Links, Wait};
use crate::call::{Call, CallMemory};
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, RECORD_BYTES};
use crate::memory::board::SlotHeader;
use crate::memory::mapping::copy;

/// fingerprint, payload bytes, region, offset, record.
const HEADER_FRAME_BYTES: usize = 32 + RECORD_BYTES;

/// Each local rank's offset in a region.
pub(crate) type Offsets = SmallVec<[(usize, usize); 8]>;

/// Moves the data of a large call, once the ranks have met.
pub(crate) type Carry = fn(&mut CallRun<'_>, &mut CallMemory) -> Result<()>;

/// What one thread at a time holds to work on the queue.
#[derive(Debug)]
pub(crate) struct Executor {
    links: Links,
    carry: Carry,
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct CallRun<'a> {
    pub(crate) core: &'a Core,
    pub(crate) call: &'a Call,
    pub(crate) links: &'a mut Links,
    pub(crate) deadline: Instant,
    /// Steps of this call that this rank has finished.
    step: u64,
    /// Each local rank's offset in the region that all have in common; `None` when some rank's
    /// buffer has to be staged.
    pub(crate) direct: Option<Offsets>,
}

impl Executor {
    pub(crate) fn new(links: Links, carry: Carry) -> Self {
        Self { links, carry }
    }

    pub(crate) fn run(&mut self, core: &Core, call: &Arc<Call>) -> Result<()> {
        if call.is_done() {
            return call.lock().result.clone().unwrap_or(Ok(()));
        }
        let deadline = Instant::now() + call.timeout;
        core.publish_late(call, deadline)?;
        if call.inline && core.topology.is_one_machine() {
            return core.finish_inline(call, None).map(|_| ());
        }
        let wait = Wait { call, deadline };
        let payloads = self.meet(core, call, wait)?;
        let mut state = call.lock();
        if call.inline {
            let inputs: Vec<*const u8> = payloads.inputs(core, call);
            if matches!(state.memory, CallMemory::Nothing) {
                return Ok(());
            }
            compute(call, core.rank, &inputs, state.memory.base());
        } else {
            let direct = payloads.common_region(core);
            let mut run = CallRun { core, call, links: &mut self.links, deadline, step: 0, direct };
            (self.carry)(&mut run, &mut state.memory)?;
        }
        drop(state);
        self.links.flush(wait)
    }

    /// Exchanges headers with everybody and compares them.
    fn meet(&mut self, core: &Core, call: &Call, wait: Wait<'_>) -> Result<Met> {
        let world_size = core.world_size();
        let board = core.board(core.rank);
        let mine = board.header(call.seq());
        let is_remote = |peer: &usize| !core.topology.shares_memory(core.rank, *peer);
        let remote: SmallVec<[usize; 8]> = (0..world_size).filter(is_remote).collect();
        if !remote.is_empty() {
            let mut frame = encode(&mine, call);
            self.links.seal(&mut frame, 0);
            let bytes = usize::try_from(mine.payload_bytes).unwrap_or(0);
            let at = frame.len();
            frame.resize(at + bytes, 0);
            copy(board.payload(call.seq()), frame[at..].as_mut_ptr(), bytes);
            self.links.seal(&mut frame, at);
            for peer in &remote {
                self.links.post_sealed(*peer, &frame, &[])?;
            }
        }
        core.meet_locals(call, Some(wait.deadline))?;
        let mut met = Met { headers: smallvec![mine; world_size], payloads: Vec::new() };
        if !remote.is_empty() {
            met.payloads.resize(world_size, Vec::new());
        }
        for local in &core.locals {
            met.headers[*local] = core.board(*local).header(call.seq());
        }
        for peer in remote {
            let mut frame = [0; HEADER_FRAME_BYTES];
            self.links.receive(peer, &mut frame, wait)?;
            let (header, record) = decode(&frame);
            let bytes = usize::try_from(header.payload_bytes).unwrap_or(usize::MAX);
            if header.fingerprint != call.fingerprint
                || bytes > crate::memory::board::INLINE_BYTES_MAX
            {
                return Err(core.out_of_step(call, peer, record));
            }
            met.payloads[peer].resize(bytes, 0);
            self.links.receive(peer, &mut met.payloads[peer], wait)?;
            met.headers[peer] = header;
        }
        Ok(met)
    }
}

fn encode(header: &SlotHeader, call: &Call) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_FRAME_BYTES);
    for word in [header.fingerprint, header.payload_bytes, header.region, header.offset] {
        frame.extend_from_slice(&word.to_le_bytes());
    }
    frame.extend_from_slice(&call.encoded);
    frame
}

fn decode(frame: &[u8; HEADER_FRAME_BYTES]) -> (SlotHeader, Option<CallRecord>) {
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&frame[at * 8..at * 8 + 8]);
        u64::from_le_bytes(word)
    };
    let header = SlotHeader {
        fingerprint: word(0),
        payload_bytes: word(1),
        region: word(2),
        offset: word(3),
    };
    (header, CallRecord::decode(&frame[32..]))
}

/// What everybody said.
struct Met {
    headers: SmallVec<[SlotHeader; 8]>,
    /// From ranks of other machines; empty when there are none.
    payloads: Vec<Vec<u8>>,
}

impl Met {
    fn inputs(&self, core: &Core, call: &Call) -> Vec<*const u8> {
        let input = |peer: usize| {
            if core.topology.shares_memory(core.rank, peer) {
                core.board(peer).payload(call.seq()).cast_const()
            } else {
                self.payloads[peer].as_ptr()
            }
        };
        (0..self.headers.len()).map(input).collect()
    }

    /// The local ranks' offsets, when the buffers of *all* ranks are in the same region: a decision
    /// that every rank takes alike.
    fn common_region(&self, core: &Core) -> Option<Offsets> {
        let first = self.headers[0].region;
        if first == 0 || self.headers.iter().any(|header| header.region != first) {
            return None;
        }
        let offset = |rank: &usize| {
            (*rank, usize::try_from(self.headers[*rank].offset).unwrap_or(usize::MAX))
        };
        Some(core.locals.iter().map(offset).collect())
    }
}

impl CallRun<'_> {
    /// Waits until `ranks` (of this machine) have come as far as this rank.
    pub(crate) fn barrier(&mut self, ranks: impl Iterator<Item = usize>) -> Result<()> {
        // A peer of another machine may wait for what is still kept here, and a rank of this one for
        // that peer: nothing may be kept while this rank waits.
        self.links.flush(Wait { call: self.call, deadline: self.deadline })?;
        self.step += 1;
        let phase = self.call.seq() << 24 | self.step;
        let mine = self.core.board(self.core.rank);
        mine.announce(mine.phase(), phase);
        for rank in ranks {
            let board = self.core.board(rank);
            self.core.wait_word(self.call, Some(self.deadline), rank, board.phase(), phase)?;
        }
        Ok(())
    }

    pub(crate) fn post(&mut self, peer: usize, bytes: &[u8]) -> Result<()> {
        self.links.post(peer, bytes)
    }

    pub(crate) fn receive(&mut self, peer: usize, into: &mut [u8]) -> Result<()> {
        let wait = Wait { call: self.call, deadline: self.deadline };
        self.links.receive(peer, into, wait)
    }
}

impl crate::algorithm::chain::Exchange for CallRun<'_> {
    type Error = Error;

    fn post(&mut self, peer: usize, bytes: &[u8]) -> Result<()> {
        CallRun::post(self, peer, bytes)
    }

    fn receive(&mut self, peer: usize, into: &mut [u8]) -> Result<()> {
        CallRun::receive(self, peer, into)
    }
}
