//! Calls on memory of a GPU beside calls on memory of the host.
//!
//! A call's data is copied to page-locked memory of the host when the caller's stream has come to the call,
//! MPI works on that, and the result is copied back; two streams of our own copy, so that one call leaves
//! the GPU while another returns. What only moves data needs no copies where the library is CUDA-aware:
//! it is given the GPU's addresses.
//!
//! MPI gets collectives in the order in which they were made, as on every rank, and the messages of a pair in
//! theirs. A call on memory that an earlier one writes, or that writes what an earlier one reads, leaves the GPU
//! after that one has returned.
#![expect(unsafe_code, reason = "gate: copies of the driver's")]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::ffi::MpiAddress;
use super::legs::{legs, CopySide, Leg};
use super::mover::MpiMover;
use crate::call::{Call, CallMemory};
use crate::error::{Error, Result};
use crate::fingerprint::Op;
use crate::gpu::cuda::{self, CudaError, Device, GpuEvent, OwnStream};
use crate::gpu::cuda_error;
use crate::gpu::memory::later;
use crate::lane::Mover;
use crate::upload::PinnedMemory;

/// Stagings that are kept for later calls.
const SPARE_MAX: usize = 32;
/// The shortest staging, so that short calls share it.
const STAGING_BYTES_MIN: usize = 64 << 10;

/// Moves a group's data with MPI, that of a GPU too.
#[derive(Debug)]
pub(super) struct Staged {
    mpi: MpiMover,
    rank: usize,
    device: Arc<Device>,
    /// For copies to the host, and back.
    leaving: OwnStream,
    returning: OwnStream,
    /// Whether MPI takes addresses of the GPU.
    cuda_aware: bool,
    /// In the order of the calls.
    moving: Vec<Moving>,
    /// The numbers of those that MPI has, in the order in which it got them.
    in_mpi: Vec<u64>,
    next: u64,
    /// Page-locked memory that is not in use.
    spare: Vec<PinnedMemory>,
    /// Of the calls that MPI has, the places of those that have ended.
    ended: Vec<usize>,
}

#[derive(Debug)]
struct Moving {
    number: u64,
    call: Arc<Call>,
    way: Way,
    stage: Stage,
    /// The GPU's bytes that it reads, and those that it writes.
    reads: Range<u64>,
    writes: Range<u64>,
}

impl Moving {
    /// Whether MPI must get this one before a later one.
    fn keeps(&self, later: &Self) -> bool {
        let of = |moving: &Self| match moving.call.op() {
            op @ (Op::Send | Op::Receive) => Some((op, moving.call.root)),
            _ => None,
        };
        of(self) == of(later)
    }

    fn is_before_mpi(&self) -> bool {
        matches!(self.stage, Stage::Behind | Stage::Before(_))
    }

    /// Whether one of the two must have ended before the other begins.
    fn conflicts(&self, other: &Self) -> bool {
        let meet = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        meet(&self.writes, &other.writes)
            || meet(&self.writes, &other.reads)
            || meet(&self.reads, &other.writes)
    }
}

#[derive(Debug)]
enum Way {
    /// Memory of the host.
    Host(MpiAddress),
    /// MPI takes the GPU's addresses.
    Direct { from: MpiAddress, to: MpiAddress },
    /// Over a copy on the host, to which `out` goes, and from which `back` comes.
    Copied { form: PinnedMemory, out: Option<Leg>, back: Option<Leg> },
}

#[derive(Debug)]
enum Stage {
    /// It waits for an earlier call on the same memory.
    Behind,
    /// MPI does not have it before this point of a stream.
    Before(Option<GpuEvent>),
    InMpi,
    /// It has ended at this point of a stream.
    After(Arc<GpuEvent>),
    Done,
}

impl Staged {
    pub(super) fn new(
        mpi: MpiMover,
        rank: usize,
        device: &Arc<Device>,
        cuda_aware: bool,
    ) -> Result<Self> {
        let stream = || OwnStream::new(device).map_err(|error| cuda_error(rank, error));
        let (leaving, returning, device) = (stream()?, stream()?, Arc::clone(device));
        Ok(Self {
            mpi,
            rank,
            device,
            leaving,
            returning,
            cuda_aware,
            moving: Vec::new(),
            in_mpi: Vec::new(),
            next: 0,
            spare: Vec::new(),
            ended: Vec::new(),
        })
    }

    fn failed(&self) -> impl Fn(CudaError) -> Error {
        let rank = self.rank;
        move |error| cuda_error(rank, error)
    }

    /// Page-locked memory of at least `bytes`.
    fn staging(&mut self, bytes: usize) -> Result<PinnedMemory> {
        let granule = (bytes.next_power_of_two() / 8).max(STAGING_BYTES_MIN);
        let wanted = bytes.max(1).next_multiple_of(granule);
        let fits = |spare: &PinnedMemory| spare.bytes().len() == wanted;
        match self.spare.iter().position(fits) {
            Some(at) => Ok(self.spare.swap_remove(at)),
            None => PinnedMemory::new(&self.device, wanted).map_err(self.failed()),
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes a call on memory `to`, or from `from` to `to`; `is_kept`: of regions, which stay if the group fails.
    fn take(&mut self, call: &Arc<Call>, from: Option<u64>, to: u64, is_kept: bool) -> Result<()> {
        let (out, back) = legs(call, self.rank, from.is_some());
        let span = |leg: Option<Leg>| match leg {
            Some(Leg { side, at, bytes, .. }) => {
                let buffer = if side == CopySide::Input { from.unwrap_or(to) } else { to };
                buffer + at as u64..buffer + (at + bytes) as u64
            }
            None => 0..0,
        };
        // MPI may write long after a failure.
        let way = if self.cuda_aware && is_kept && self.mpi.can_begin_in_place(call) {
            Way::Direct { from: place(from.unwrap_or(to)), to: place(to) }
        } else {
            Way::Copied { form: self.staging(call.bytes_on(self.rank))?, out, back }
        };
        let (number, call, stage) = (self.number(), Arc::clone(call), Stage::Behind);
        self.moving.push(Moving { number, call, way, stage, reads: span(out), writes: span(back) });
        self.leave(self.moving.len() - 1)
    }

    /// Asks for the copies before a call, unless it has to wait for an earlier one.
    fn leave(&mut self, place: usize) -> Result<()> {
        let rank = self.rank;
        let failed = |error| cuda_error(rank, error);
        let stream = self.leaving.as_stream();
        let (earlier, rest) = self.moving.split_at_mut(place);
        let Some(moving) = rest.first_mut() else { return Ok(()) };
        for other in earlier.iter().filter(|other| other.conflicts(moving)) {
            match &other.stage {
                Stage::After(done) => done.order(stream).map_err(failed)?,
                Stage::Done => {}
                _ => return Ok(()),
            }
        }
        let Some(on_device) = &moving.call.on_device else {
            let (call, what) = (moving.call.op().name(), "the call has no place in a stream");
            let (call, what) = (call.to_owned(), what.to_owned());
            return Err(Error::Backend { rank, backend: "mpi", call, what });
        };
        on_device.ready.order(stream).map_err(failed)?;
        let from = moving.reads.start;
        match &mut moving.way {
            Way::Copied { form, out: Some(Leg { in_form, bytes, .. }), .. } => {
                let to = &mut form.bytes_mut()[*in_form..*in_form + *bytes];
                // SAFETY: the caller's buffer, which stays until the call has ended; the form is this
                // call's alone, and stays with it.
                unsafe { cuda::read_later(&self.device, from, to, stream) }.map_err(failed)?;
            }
            Way::Direct { from: input, to } if moving.call.op() == Op::AllGather && input != to => {
                // MPI has only the form that works in place.
                let bytes = moving.call.segment;
                let own = moving.writes.start + (rank * bytes) as u64;
                // SAFETY: as above.
                unsafe { cuda::copy_later(&self.device, from, own, bytes, stream) }
                    .map_err(failed)?;
            }
            _ => {}
        }
        let point = GpuEvent::record(&self.device, stream).map_err(failed)?;
        moving.stage = Stage::Before(Some(point));
        Ok(())
    }

    /// Gives MPI the calls that are ready, in order.
    fn give(&mut self) -> Result<bool> {
        let mut moved = false;
        let rank = self.rank;
        for place in 0..self.moving.len() {
            if matches!(self.moving[place].stage, Stage::Behind) {
                self.leave(place)?;
            }
        }
        for place in 0..self.moving.len() {
            let (earlier, rest) = self.moving.split_at_mut(place);
            let Some(moving) = rest.first_mut() else { break };
            let is_ready = match &moving.stage {
                Stage::Before(None) => true,
                Stage::Before(Some(ready)) => {
                    ready.is_passed().map_err(|error| cuda_error(rank, error))?
                }
                _ => false,
            };
            if !is_ready || earlier.iter().any(|one| one.is_before_mpi() && one.keeps(moving)) {
                continue;
            }
            let call = &moving.call;
            match &mut moving.way {
                Way::Host(at) => self.mpi.begin(call, *at)?,
                Way::Direct { from, to } => self.mpi.begin_in_place(call, *from, *to)?,
                Way::Copied { form, .. } => {
                    self.mpi.begin(call, MpiAddress(form.bytes_mut().as_mut_ptr()))?;
                }
            }
            moving.stage = Stage::InMpi;
            self.in_mpi.push(moving.number);
            moved = true;
        }
        Ok(moved)
    }

    /// Lets what MPI has done go back to the GPU.
    fn take_back(&mut self) -> Result<bool> {
        let mut ended = std::mem::take(&mut self.ended);
        ended.clear();
        let moved = self.mpi.poll(&mut ended)?;
        let stream = self.returning.as_stream();
        let rank = self.rank;
        let failed = |error| cuda_error(rank, error);
        let numbers: Vec<u64> =
            ended.iter().rev().map(|place| self.in_mpi.remove(*place)).collect();
        for number in numbers.into_iter().rev() {
            let found = self.moving.iter_mut().find(|moving| moving.number == number);
            let Some(Moving { call, way, stage, writes, .. }) = found else { break };
            *stage = Stage::Done;
            let Some(on_device) = &call.on_device else { continue };
            if let Way::Copied { form, back: Some(Leg { in_form, bytes, .. }), .. } = way {
                let from = &form.bytes()[*in_form..*in_form + *bytes];
                // SAFETY: the form stays as it is until the event below is passed; the caller's buffer
                // until then too.
                unsafe { cuda::write_later(&self.device, writes.start, from, stream) }
                    .map_err(failed)?;
            }
            let done = Arc::new(GpuEvent::record(&self.device, stream).map_err(failed)?);
            *stage = Stage::After(Arc::clone(&done));
            on_device.launch(done);
        }
        self.ended = ended;
        Ok(moved)
    }
}

impl Mover for Staged {
    fn start(&mut self, call: &Arc<Call>, memory: &mut CallMemory) -> Result<()> {
        if let CallMemory::Device { at, from, keep } = memory {
            let is_kept = keep.len() == 1 + usize::from(from.is_some());
            return self.take(call, *from, *at, is_kept);
        }
        let way = Way::Host(MpiAddress(memory.base()));
        let moving = Moving {
            number: self.number(),
            call: Arc::clone(call),
            way,
            stage: Stage::Before(None),
            reads: 0..0,
            writes: 0..0,
        };
        self.moving.push(moving);
        Ok(())
    }

    fn poll(&mut self, ended: &mut Vec<usize>) -> Result<bool> {
        // A CUDA-aware library works on the current device.
        let device = Arc::clone(&self.device);
        let current = (!self.moving.is_empty()).then(|| device.current()).transpose();
        let _current = current.map_err(self.failed())?;
        let given = self.give()?;
        let moved = self.take_back()?;
        let first = ended.len();
        for (place, Moving { stage, .. }) in self.moving.iter().enumerate() {
            let has_ended = match stage {
                Stage::Done => true,
                Stage::After(done) => done.is_passed().map_err(self.failed())?,
                Stage::Behind | Stage::Before(_) | Stage::InMpi => false,
            };
            if has_ended {
                ended.push(place);
            }
        }
        for place in ended[first..].iter().rev() {
            if let Way::Copied { form, .. } = self.moving.remove(*place).way {
                self.spare.push(form);
                if self.spare.len() > SPARE_MAX {
                    let longest_unused = self.spare.remove(0);
                    later(move || drop(longest_unused));
                }
            }
        }
        Ok(given || moved || ended.len() > first)
    }

    fn abandon(&mut self, cause: &Error) {
        // Copies and MPI may still work there.
        _ = ManuallyDrop::new(std::mem::take(&mut self.moving));
        self.mpi.abandon(cause);
    }

    fn close(&mut self) {
        self.mpi.close();
    }

    fn lets_messages_overtake(&self) -> bool {
        self.mpi.lets_messages_overtake()
    }

    fn wants_idle_poll(&self) -> Option<Duration> {
        self.mpi.wants_idle_poll()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // The driver may wait for the device before it takes page-locked memory back, and this is the thread
        // on which all groups' data moves.
        let spare = std::mem::take(&mut self.spare);
        later(move || drop(spare));
    }
}

/// An address of the GPU's, for MPI alone.
fn place(address: u64) -> MpiAddress {
    MpiAddress(std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0)))
}
