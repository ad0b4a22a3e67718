//! A group's calls over its own communicator.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use super::cut::{CutShape, ReductionCut, PIECES_MAX};
use super::exchange::{Context, ReductionExchange, Task};
use super::ffi::{Communicator, MpiAddress, MpiError, MpiRequest};
use super::fold::{copy_out, fold};
use super::library::Library;
use crate::call::{Call, CallMemory};
use crate::control::peers::Peers;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op, RECORD_BYTES};
use crate::lane::Mover;
use crate::order::core::Core;
use crate::reduce_op::Reduction;

/// The tag of messages between callers; the matching of a pair is in the order of the calls.
const MESSAGE_TAG: usize = 0;
/// Every library has tags up to this one.
const TAG_MAX: usize = 32_767;
/// Exchanges under way at a time. Their tags must not meet.
const EXCHANGES_MAX: usize = 4;
const _: () = assert!((EXCHANGES_MAX + 1) * 2 * PIECES_MAX < TAG_MAX);
/// Up to so many bytes from all ranks together, a buffer is gathered by everybody in one round.
const GATHERED_BYTES_MAX: usize = 64 << 10;
/// Up to so many bytes two ranks exchange whole buffers: one round, but twice the sums and the staging.
const ONE_ROUND_BYTES_MAX: usize = 64 << 10;
/// One message of a library collective.
const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;
/// What one broadcast moves at a time.
const BROADCAST_BYTES: usize = 1 << 30;
/// Operations looked at in one poll.
const TESTS_MAX: usize = 8;
/// A message that was buffered may need the library's attention after its send has ended.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// Moves a group's data with MPI.
#[derive(Debug)]
pub(super) struct MpiMover {
    library: &'static Library,
    peers: Arc<Peers>,
    context: Context,
    moving: Vec<Moving>,
    next_tag: usize,
    closed: bool,
}

/// A call under way.
#[derive(Debug)]
enum Moving {
    Done,
    ReductionExchange(ReductionExchange),
    /// A collective of the library, a long one in pieces; the memory is in use until it ends.
    Library {
        requests: Vec<MpiRequest>,
        keep: Vec<u8>,
        then: Option<Fold>,
    },
    /// Record and data.
    Send {
        requests: [MpiRequest; 2],
        _record: Box<[u8; RECORD_BYTES]>,
    },
    Receive {
        requests: [MpiRequest; 2],
        record: Box<[u8; RECORD_BYTES]>,
        ours: Box<CallRecord>,
    },
}

/// What is done with buffers that were gathered.
#[derive(Debug, Clone, Copy)]
struct Fold {
    reduction: (DType, Reduction),
    target: MpiAddress,
    bytes: usize,
}

impl MpiMover {
    pub(super) fn new(library: &'static Library, core: &Core, communicator: Communicator) -> Self {
        let (rank, ranks, peers) = (core.rank, core.world_size(), Arc::clone(&core.peers));
        let context = Context { communicator, rank, ranks, spare: Vec::new() };
        // A group of one has no communicator of its own.
        let closed = ranks == 1;
        Self { library, peers, context, moving: Vec::new(), next_tag: MESSAGE_TAG + 1, closed }
    }

    fn error(&self, error: MpiError) -> Error {
        let MpiError { call, code, what } = error;
        let what = format!("{what} (code {code})");
        Error::Backend { rank: self.context.rank, backend: "mpi", call: call.to_owned(), what }
    }

    /// Starts a call on memory of the host, in in-place form.
    pub(super) fn begin(&mut self, call: &Call, at: MpiAddress) -> Result<()> {
        let _open = self.library.enter(self.context.rank)?;
        let moving = self.launch(call, at).map_err(|error| self.error(error))?;
        self.moving.push(moving);
        Ok(())
    }

    /// Whether a CUDA-aware library can do a call where its data lies on the GPU: what only moves data, in the
    /// same way as [`MpiMover::begin`] of other ranks does it.
    pub(super) fn can_begin_in_place(&self, call: &Call) -> bool {
        let Context { rank, ranks, .. } = self.context;
        let only_moves = match call.op() {
            Op::AllGather => call.bytes_on(rank) > GATHERED_BYTES_MAX,
            // Not what is received: it is compared with what was expected first.
            Op::Broadcast | Op::Gather | Op::Scatter | Op::AllToAll | Op::Send => true,
            _ => false,
        };
        only_moves && ranks > 1
    }

    /// Starts a call on memory of the GPU: of two buffers, or in in-place form.
    pub(super) fn begin_in_place(
        &mut self,
        call: &Call,
        from: MpiAddress,
        to: MpiAddress,
    ) -> Result<()> {
        let _open = self.library.enter(self.context.rank)?;
        let (communicator, segment) = (self.context.communicator, call.segment);
        let moving = match call.op() {
            Op::Gather | Op::Scatter | Op::AllToAll if segment > MESSAGE_BYTES_MAX => {
                Err(too_long(call))
            }
            Op::Gather => communicator.gather_to(call.root, from, to, segment).map(lone),
            Op::Scatter => communicator.scatter_from(call.root, from, to, segment).map(lone),
            Op::AllToAll => communicator.all_to_all(from, to, segment).map(lone),
            _ => self.launch(call, to),
        };
        self.moving.push(moving.map_err(|error| self.error(error))?);
        Ok(())
    }

    fn exchange(&mut self, task: Task) -> Moving {
        let tags = ReductionExchange::tags(&task.cut);
        if self.next_tag + tags > TAG_MAX {
            self.next_tag = MESSAGE_TAG + 1;
        }
        let tag = self.next_tag;
        self.next_tag += tags;
        Moving::ReductionExchange(ReductionExchange::new(Task { tag, ..task }))
    }

    fn launch(&mut self, call: &Call, at: MpiAddress) -> Result<Moving, MpiError> {
        let Context { communicator, rank, ranks, .. } = self.context;
        let (segment, root) = (call.segment, call.root);
        if ranks == 1 {
            if let Some(reduction) = call.reduction {
                fold((call.dtype, reduction), &[at.0], at, call.bytes_on(rank));
            }
            return Ok(Moving::Done);
        }
        Ok(match call.op() {
            Op::AllReduce | Op::Reduce | Op::ReduceScatter => return self.reduce(call, at),
            Op::AllGather if call.bytes_on(rank) > GATHERED_BYTES_MAX => {
                let cut = ReductionCut::segments(call.bytes_on(rank), segment, ranks);
                self.exchange(Task { at, cut, reduction: None, shares: true, tag: 0 })
            }
            Op::AllGather => {
                let mut keep = copy_out(at.at(rank * segment), segment);
                let from = MpiAddress(keep.as_mut_ptr());
                library(communicator.all_gather(from, at, segment)?, keep)
            }
            Op::Broadcast => {
                let bytes = call.bytes_on(rank);
                // All at once: collectives of the library start in the same order everywhere.
                let pieces = (0..bytes).step_by(BROADCAST_BYTES).map(|from| {
                    let piece = BROADCAST_BYTES.min(bytes - from);
                    communicator.broadcast(at.at(from), piece, root)
                });
                let requests = pieces.collect::<Result<_, _>>()?;
                Moving::Library { requests, keep: Vec::new(), then: None }
            }
            Op::Gather | Op::Scatter | Op::AllToAll if segment > MESSAGE_BYTES_MAX => {
                return Err(too_long(call));
            }
            Op::Gather if rank != root => {
                library(communicator.gather_to(root, at, at, segment)?, Vec::new())
            }
            Op::Gather => {
                let mut keep = copy_out(at.at(rank * segment), segment);
                let from = MpiAddress(keep.as_mut_ptr());
                library(communicator.gather_to(root, from, at, segment)?, keep)
            }
            Op::Scatter if rank != root => {
                library(communicator.scatter_from(root, at, at, segment)?, Vec::new())
            }
            Op::Scatter => {
                let mut keep = vec![0; segment];
                let to = MpiAddress(keep.as_mut_ptr());
                library(communicator.scatter_from(root, at, to, segment)?, keep)
            }
            Op::AllToAll => {
                let mut keep = copy_out(at, call.bytes_on(rank));
                let from = MpiAddress(keep.as_mut_ptr());
                library(communicator.all_to_all(from, at, segment)?, keep)
            }
            Op::Send | Op::Receive => return self.message(call, at),
            Op::Barrier | Op::Allocate | Op::Split => Moving::Done,
        })
    }

    fn reduce(&mut self, call: &Call, at: MpiAddress) -> Result<Moving, MpiError> {
        let Context { communicator, rank, ranks, .. } = self.context;
        let bytes = call.bytes_on(rank);
        let Some(reduction) = call.reduction else { return Ok(Moving::Done) };
        let reduction = (call.dtype, reduction);
        let everyone = ranks == 2 && call.op() == Op::AllReduce && bytes <= ONE_ROUND_BYTES_MAX;
        if !everyone && bytes * ranks <= GATHERED_BYTES_MAX {
            let mut keep = vec![0; bytes * ranks];
            let request = communicator.all_gather(at, MpiAddress(keep.as_mut_ptr()), bytes)?;
            let own = match call.op() {
                Op::Reduce if rank != call.root => 0..0,
                Op::ReduceScatter => rank * call.segment..(rank + 1) * call.segment,
                _ => 0..bytes,
            };
            let fold = Fold { reduction, target: at.at(own.start), bytes: own.len() };
            let then = (!own.is_empty()).then_some(fold);
            return Ok(Moving::Library { requests: vec![request], keep, then });
        }
        let (cut, shares) = match call.op() {
            Op::Reduce => (ReductionCut::whole(CutShape::Root(call.root), bytes, ranks), false),
            Op::ReduceScatter => (ReductionCut::segments(bytes, call.segment, ranks), false),
            _ if everyone => (ReductionCut::whole(CutShape::Everyone, bytes, ranks), false),
            _ => (ReductionCut::even(bytes, ranks), true),
        };
        Ok(self.exchange(Task { at, cut, reduction: Some(reduction), shares, tag: 0 }))
    }

    /// The record goes first, so that a receiver that expects something else can say so.
    fn message(&self, call: &Call, at: MpiAddress) -> Result<Moving, MpiError> {
        let (bytes, peer, communicator) = (call.segment, call.root, self.context.communicator);
        if bytes > MESSAGE_BYTES_MAX {
            return Err(too_long(call));
        }
        // Should the second request fail, the first still uses it.
        let mut record = ManuallyDrop::new(Box::new(call.record.encode()));
        let head = MpiAddress(record.as_mut_ptr());
        Ok(if call.op() == Op::Send {
            let requests = [
                communicator.send(head, RECORD_BYTES, peer, MESSAGE_TAG)?,
                communicator.send(at, bytes, peer, MESSAGE_TAG)?,
            ];
            Moving::Send { requests, _record: ManuallyDrop::into_inner(record) }
        } else {
            let requests = [
                communicator.receive(head, RECORD_BYTES, peer, MESSAGE_TAG)?,
                communicator.receive(at, bytes, peer, MESSAGE_TAG)?,
            ];
            let record = ManuallyDrop::into_inner(record);
            Moving::Receive { requests, record, ours: Box::new(call.record.clone()) }
        })
    }

    fn poll_moving(&mut self, ended: &mut Vec<usize>) -> Result<bool> {
        let (mut exchanges, mut tests, mut moved) = (0, 0, false);
        let mut moving = std::mem::take(&mut self.moving);
        let result: Result<()> = moving.iter_mut().enumerate().try_for_each(|(place, one)| {
            let is_exchange = matches!(one, Moving::ReductionExchange(_));
            exchanges += usize::from(is_exchange);
            let is_message = matches!(one, Moving::Send { .. } | Moving::Receive { .. });
            // Later exchanges wait for their turn; messages are in no order with the rest.
            let waits = (is_exchange && exchanges > EXCHANGES_MAX) || tests >= TESTS_MAX;
            if waits && !is_message {
                return Ok(());
            }
            tests += usize::from(!is_message);
            let (done, did) = self.advance(one)?;
            moved |= did || done;
            if done {
                ended.push(place);
            }
            Ok(())
        });
        self.moving = moving;
        result?;
        for place in ended.iter().rev() {
            drop(self.moving.remove(*place));
        }
        Ok(moved)
    }

    /// Whether a call has ended, and whether anything moved.
    fn advance(&mut self, moving: &mut Moving) -> Result<(bool, bool)> {
        let test = |request: &mut MpiRequest| request.test();
        Ok(match moving {
            Moving::Done => (true, true),
            Moving::ReductionExchange(exchange) => {
                let moved = exchange.advance(&mut self.context);
                let moved = moved.map_err(|error| self.error(error))?;
                (exchange.is_done(), moved)
            }
            Moving::Library { requests, keep, then } => {
                let mut done = true;
                for request in requests {
                    done = done && test(request).map_err(|error| self.error(error))?;
                }
                if let (true, Some(Fold { reduction, target, bytes })) = (done, *then) {
                    let whole = keep.len() / self.context.ranks;
                    // Where in each buffer this rank's part begins.
                    let skip = if bytes < whole { self.context.rank * bytes } else { 0 };
                    let sources: Vec<*const u8> =
                        keep.chunks_exact(whole).map(|buffer| buffer[skip..].as_ptr()).collect();
                    fold(reduction, &sources, target, bytes);
                }
                (done, done)
            }
            Moving::Send { requests: [head, data], .. } => {
                let head = test(head).map_err(|error| self.error(error))?;
                let data = test(data).map_err(|error| self.error(error))?;
                (head && data, head && data)
            }
            Moving::Receive { requests: [head, data], record, ours } => {
                if !test(head).map_err(|error| self.error(error))? {
                    return Ok((false, false));
                }
                self.compare(ours, &record[..])?;
                let done = test(data).map_err(|error| self.error(error))?;
                (done, done)
            }
        })
    }

    /// Whether the sender sends what is expected here.
    fn compare(&self, ours: &CallRecord, theirs: &[u8]) -> Result<()> {
        let theirs = CallRecord::decode(theirs);
        let ours = ours.travelled();
        let fits = |sent: &CallRecord| {
            (sent.dtype, sent.len, &sent.tag) == (ours.dtype, ours.len, &ours.tag)
        };
        match theirs {
            Some(sent) if fits(&sent) => Ok(()),
            theirs => Err(Error::OutOfStep {
                seq: ours.seq,
                rank: self.context.rank,
                ours: Box::new(ours.clone()),
                peer: ours.root.unwrap_or(0),
                theirs: Box::new(theirs.unwrap_or_else(|| ours.clone())),
            }),
        }
    }
}

fn lone(request: MpiRequest) -> Moving {
    library(request, Vec::new())
}

fn library(request: MpiRequest, keep: Vec<u8>) -> Moving {
    Moving::Library { requests: vec![request], keep, then: None }
}

fn too_long(call: &Call) -> MpiError {
    let what = format!(
        "{} has segments of {} bytes, and MPI counts to {MESSAGE_BYTES_MAX}: move the data in parts",
        call.record, call.segment
    );
    MpiError { call: call.op().name(), code: 0, what }
}

impl Mover for MpiMover {
    fn start(&mut self, call: &Arc<Call>, memory: &mut CallMemory) -> Result<()> {
        self.begin(call, MpiAddress(memory.base()))
    }

    fn poll(&mut self, ended: &mut Vec<usize>) -> Result<bool> {
        let _open = self.library.enter(self.context.rank)?;
        if self.moving.is_empty() {
            if !self.closed {
                let progress = self.context.communicator.progress();
                progress.map_err(|error| self.error(error))?;
            }
            return Ok(false);
        }
        self.poll_moving(ended)
    }

    fn abandon(&mut self, _cause: &Error) {
        // MPI may still read and write there, and a communicator in use cannot be freed.
        _ = ManuallyDrop::new(std::mem::take(&mut self.moving));
        self.closed = true;
        self.library.group_failed(self.peers.failure().as_ref());
    }

    fn close(&mut self) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let Ok(_open) = self.library.enter(self.context.rank) else { return };
        if let Err(error) = self.context.communicator.free() {
            tracing::debug!(%error, "a communicator could not be freed");
        }
    }

    fn lets_messages_overtake(&self) -> bool {
        true
    }

    fn wants_idle_poll(&self) -> Option<Duration> {
        Some(IDLE_POLL)
    }
}
