//! A group of ranks and what belongs to its life: making, dividing, ending.

mod backends;
mod collectives;
mod cores;
mod divide;
mod in_place;
mod messages;
mod on_device;
mod on_rank;
mod options;
mod place;
mod regions;

use std::panic::Location;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::backend::{self, Backend, Connected};
use crate::call::{Call, CallMemory};
use crate::control::liveness::Liveness;
use crate::control::peers::Identity;
use crate::deadline::LONGEST;
use crate::dtype::DType;
#[cfg(feature = "mpi")]
use crate::environment::StoreHost;
use crate::environment::World;
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op};
use crate::gpu::Stream;
use crate::memory::board;
use crate::memory::region::RegionMemory;
use crate::order::core::Core;
use crate::order::setup;
use crate::recorder::{self, FlightRecord, GroupPart, RecorderEntry};
use crate::reduce_op::Reduction;
use crate::rendezvous::{Meeting, Store};
use crate::work::Work;

pub use self::options::GroupOptions;

/// What the flight recorder calls this group and this rank.
#[derive(Debug, Clone, Copy)]
struct Track {
    group: u64,
    /// In the group of all ranks.
    rank: usize,
}

/// What applies to the next call only.
#[derive(Debug, Default)]
struct Next {
    tag: String,
    timeout: Option<Duration>,
}

/// This rank's membership in a group of ranks that run collectives together.
///
/// Every rank must start the same collectives in the same order; that is why they take `&mut self`.
/// After a collective has failed the group is dead: later calls return the first error.
///
/// # Determinism
///
/// Reductions of the host's memory, and over MPI, fold in rank order, `((g0 ∘ g1) ∘ g2) ∘ g3`, on every path: the result
/// has the same bits on every rank, every run and every placement of the ranks, and equals one process that
/// adds in that order. NCCL sums GPU memory in an order of its own: the same bits on every rank, but other ones with
/// another algorithm, protocol, number of channels or version.
///
/// # Example
///
/// ```
/// use phalanx_comm::{Group, GroupOptions, Sum};
///
/// let mut group = Group::single(GroupOptions::default())?;
/// let mut values = vec![1.0_f32, 2.0];
/// group.all_reduce(&mut values[..], Sum)?.wait()?;
/// assert_eq!(values, [1.0, 2.0]); // the sum over one rank
/// # Ok::<(), phalanx_comm::Error>(())
/// ```
#[derive(Debug)]
pub struct Group {
    core: Arc<Core>,
    world: World,
    options: GroupOptions,
    number: u64,
    regions: u64,
    /// Collectives started so far.
    started: u64,
    /// Of these, those on GPU memory over NCCL; and how many there were before calls that go together.
    on_gpu: u64,
    together: Option<u64>,
    /// Those on regions of the host that may not have ended, where the host backend moves them.
    on_regions: Vec<OnRegion>,
    next: Next,
    track: Track,
    /// The processes of the ranks of this machine, of the group of all ranks.
    neighbours: Arc<[u32]>,
    /// Kept: where this rank hosts the store, it goes on answering (and refusing) late comers.
    store: Option<Arc<dyn Store>>,
    /// Who moves the data.
    transport: Connected,
    /// The caller's stream.
    stream: Stream,
    /// Why [`Backend::Auto`] became what it is.
    choice: Option<String>,
}

impl Group {
    /// The group of all ranks that the launcher started (see [`World::from_env`]).
    ///
    /// # Errors
    ///
    /// The environment contradicts itself, or the ranks could not meet.
    pub fn from_environment(options: GroupOptions) -> Result<Self> {
        let options = options.bounded();
        let world = World::from_env()?;
        #[cfg(feature = "mpi")]
        if world.store_host == StoreHost::Mpi {
            return Self::from_mpi(options);
        }
        if world.world_size == 1 {
            return Self::root(world, options, &mut |_, _| Ok(Vec::new()));
        }
        let deadline = Instant::now() + options.connect_timeout;
        let store = crate::rendezvous::connect(&world, deadline)?;
        Self::new(world, store, options)
    }

    /// The group of all ranks of an MPI job, which meet over MPI: no address has to be known, and the
    /// job token is a fresh one. The backend is that of the options all the same.
    ///
    /// # Errors
    ///
    /// [`Error::NoBackend`] where no MPI launcher started this process; the ranks could not meet.
    #[cfg(feature = "mpi")]
    pub fn from_mpi(options: GroupOptions) -> Result<Self> {
        let options = options.bounded();
        let (world, store) = backend::meet_over_mpi(options.connect_timeout)?;
        Self::new(world, store, options)
    }

    /// The group of all ranks of `world`, which meet in `store`.
    ///
    /// # Errors
    ///
    /// The ranks could not meet.
    pub fn new(world: World, store: Arc<dyn Store>, options: GroupOptions) -> Result<Self> {
        let (rank, world_size) = (world.rank, world.world_size);
        let attempt = world.restart_count;
        let mut group = Self::root(world, options, &mut |mine, deadline| {
            let (what, name) = ("the group of all ranks", format!("phalanx/{attempt}/group/card"));
            let meeting = Meeting { what, name: &name, rank, world_size };
            meeting.join(&*store, mine, deadline).map_err(Error::from)
        })?;
        group.store = Some(store);
        Ok(group)
    }

    /// A group of one rank: no environment, no sockets.
    ///
    /// # Errors
    ///
    /// The system has no memory or file descriptors left.
    pub fn single(options: GroupOptions) -> Result<Self> {
        Self::root(World::single(), options, &mut |_, _| Ok(Vec::new()))
    }

    /// A group that is no part of another: its ranks are those of the flight recorder.
    fn root(
        world: World,
        options: GroupOptions,
        exchange: &mut setup::Exchange<'_>,
    ) -> Result<Self> {
        recorder::begin(world.rank, world.world_size);
        let part = GroupPart::whole(world.world_size);
        let mut group = Self::over(world, options.bounded(), part, exchange)?;
        group.open()?;
        Ok(group)
    }

    /// The control plane: the ranks know each other, and the host backend moves their data.
    fn over(
        mut world: World,
        options: GroupOptions,
        part: GroupPart,
        exchange: &mut setup::Exchange<'_>,
    ) -> Result<Self> {
        let rank = part.ranks.get(world.rank).copied().unwrap_or(world.rank);
        let track = Track { group: part.group, rank };
        let link = options.host_link.unwrap_or(world.host_link);
        // Below a heartbeat nobody would live, and no heartbeat at all would be a busy thread.
        let heartbeat = options.heartbeat.max(Duration::from_millis(1));
        let dead_after = options.dead_after.max(heartbeat * 3);
        let remind_after = options.remind_after.max(Duration::from_millis(1));
        let liveness = Liveness { heartbeat, dead_after, remind_after };
        let timeout = options.connect_timeout;
        let terms = setup::Terms { link, timeout, liveness, carry: backend::HOST };
        let core = setup::connect(&mut world, terms, part, exchange)?;
        let number = setup::group_number();
        let identities = &core.peers.identities;
        let is_here = |other: &&Identity| other.host == identities[core.rank].host;
        let neighbours = identities.iter().filter(is_here).map(|one| one.pid).collect();
        Ok(Self {
            core,
            world,
            options,
            number,
            regions: 0,
            started: 0,
            on_gpu: 0,
            together: None,
            on_regions: Vec::new(),
            next: Next::default(),
            track,
            neighbours,
            store: None,
            transport: backend::host(),
            stream: Stream::default(),
            choice: None,
        })
    }

    /// Who moves the data.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.options.backend
    }

    /// Names the *next* collective; errors show the name, and ranks whose names differ are out of
    /// step.
    pub fn tagged(&mut self, tag: &str) -> &mut Self {
        tag.clone_into(&mut self.next.tag);
        self
    }

    /// Gives the *next* collective its own time limit.
    pub fn within(&mut self, timeout: Duration) -> &mut Self {
        self.next.timeout = Some(timeout.min(LONGEST));
        self
    }

    /// What the members of a part of this group call it, whatever other groups each has made.
    fn part_number(&self, color: Option<u32>) -> u64 {
        let color = u64::from(color.unwrap_or(0));
        let place = self.track.group.rotate_left(29) ^ self.started << 32 ^ color;
        // Odd, so that it is never that of all ranks.
        place.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    /// Kills the group on every rank: pending and later calls return [`Error::Aborted`] with this
    /// rank and reason.
    pub fn abort(&mut self, reason: &str) {
        let rank = self.rank();
        drop(self.core.peers.fail(Error::Aborted { rank, reason: reason.to_owned() }));
    }

    /// The error that ended the group, if one has: also one that a peer reported while this rank
    /// called nothing.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.core.peers.failure()
    }

    /// Waits until every rank has called with the same arguments.
    #[track_caller]
    fn agree(&mut self, op: Op, dtype: DType, len: usize) -> Result<()> {
        let plan = CallArguments { op, dtype: Some(dtype), len, ..CallArguments::nothing(op) };
        self.begin(&plan, CallMemory::Nothing, None)
            .map(|call| Work::new(self.core(), call, None))?
            .wait()
    }

    fn core(&self) -> Arc<Core> {
        Arc::clone(&self.core)
    }

    /// A line in the flight recorder for a call that starts.
    #[track_caller]
    fn recorded(&self, call: &Call) -> RecorderEntry {
        RecorderEntry::start(&call.encoded, self.track.group, self.track.rank, Location::caller())
    }

    /// The last operations of this process, whatever group they were of; see [`recorder`].
    #[must_use]
    pub fn flight_record(&self) -> Option<FlightRecord> {
        recorder::own()
    }

    /// Starts a planned call on memory of its own or on `input`.
    #[track_caller]
    fn begin(
        &mut self,
        plan: &CallArguments,
        memory: CallMemory,
        input: Option<&[u8]>,
    ) -> Result<Arc<Call>> {
        let next = std::mem::take(&mut self.next);
        if let Some(error) = self.core.peers.failure() {
            return Err(error);
        }
        let record = CallRecord {
            op: plan.op,
            seq: self.started,
            dtype: plan.dtype,
            len: plan.len as u64,
            reduction: plan.reduction.map_or("", Reduction::name),
            root: plan.root,
            tag: next.tag,
        };
        let timeout = next.timeout.unwrap_or(self.options.timeout);
        if let Some(lane) = self.lane_for(plan, matches!(memory, CallMemory::Device { .. })) {
            let memory = input.map_or(memory, |input| CallMemory::Private(input.to_vec()));
            return self.begin_on_lane(&lane, plan, record, timeout, memory);
        }
        let longest = Call::contribution_max(plan.op, plan.segment, plan.segments);
        let inline = longest <= board::INLINE_BYTES_MAX;
        let place = self.end_earlier(&memory, plan.segment * plan.segments, inline)?;
        let mut call = Call::new(
            record,
            plan.dtype.unwrap_or(DType::U8),
            plan.reduction,
            plan.segment,
            plan.segments,
            inline,
            timeout,
            memory,
        );
        call.entry = self.recorded(&call);
        let call = self.core.start(call, input)?;
        self.started += 1;
        if let Some(place) = place {
            self.on_regions.push(OnRegion { place, inline, call: Arc::downgrade(&call) });
        }
        Ok(call)
    }

    /// Waits for all calls on this memory that were made earlier: the caller's data is written there.
    fn end_all_on(&mut self, memory: &CallMemory, bytes: usize) -> Result<()> {
        self.end_earlier(memory, bytes, true)?;
        let deadline = Instant::now() + self.options.timeout;
        if self.transport.lane(false).is_none_or(|lane| lane.wait_idle(deadline)) {
            return Ok(());
        }
        let what = format!(
            "calls that were made before have not ended in {:?}: wait for them before their memory is used again",
            self.options.timeout
        );
        let rank = self.rank();
        Err(self.argument(Error::World { rank, what }))
    }

    /// Waits for calls on the same memory of a region that were made earlier, where the order matters: short ones
    /// take their input when they start, and bring their result when they are waited for. Long ones are in order by
    /// themselves. The place of `memory`, if it is a region's.
    fn end_earlier(
        &mut self,
        memory: &CallMemory,
        bytes: usize,
        now: bool,
    ) -> Result<Option<RegionPlace>> {
        let CallMemory::Region { region, offset } = memory else { return Ok(None) };
        let place = RegionPlace { region: Arc::downgrade(region), offset: *offset, bytes };
        self.on_regions
            .retain(|earlier| earlier.call.upgrade().is_some_and(|call| !call.is_done()));
        for earlier in &self.on_regions {
            let matters = (now || earlier.inline) && earlier.place.meets(&place);
            let Some(call) = earlier.call.upgrade().filter(|_| matters) else { continue };
            if self.core.finishes_in_place(&call) {
                self.core.finish_inline(&call, None)?;
            } else {
                self.core.drive(&call);
            }
        }
        Ok(Some(place))
    }
}

/// Part of a region.
#[derive(Debug)]
struct RegionPlace {
    region: Weak<RegionMemory>,
    offset: usize,
    bytes: usize,
}

impl RegionPlace {
    fn meets(&self, other: &Self) -> bool {
        let apart =
            self.offset + self.bytes <= other.offset || other.offset + other.bytes <= self.offset;
        self.region.ptr_eq(&other.region) && !apart
    }
}

/// A call on part of a region.
#[derive(Debug)]
struct OnRegion {
    place: RegionPlace,
    inline: bool,
    call: Weak<Call>,
}

impl Drop for Group {
    fn drop(&mut self) {
        if let (Some(store), Some(_)) = (&self.store, self.failure()) {
            // Where this rank hosts it: no waiting for ranks that may never come back.
            store.cancel();
        }
        self.core.peers.note_panic();
        self.transport.close(&self.core);
    }
}

/// The arguments of a collective, before it has a number.
#[derive(Debug, Clone, Copy)]
struct CallArguments {
    op: Op,
    dtype: Option<DType>,
    /// Elements, as the caller counts them.
    len: usize,
    reduction: Option<Reduction>,
    root: Option<usize>,
    /// Bytes of a segment, and how many there are (see `call/mod.rs`).
    segment: usize,
    segments: usize,
}

impl CallArguments {
    fn nothing(op: Op) -> Self {
        Self { op, dtype: None, len: 0, reduction: None, root: None, segment: 0, segments: 1 }
    }
}
