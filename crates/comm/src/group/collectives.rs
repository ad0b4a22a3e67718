//! The collectives, typed: check the arguments, bring the buffers into the in-place form (`call.rs`
//! of the host backend), start.

use std::sync::Arc;

use super::{Group, Plan};
use crate::backend::host::call::{Call, Memory};
use crate::backend::host::point;
use crate::backend::lane::Check;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fingerprint::{CallRecord, Op};
use crate::reduce_op::{ReduceOp, Reduction};
use crate::region::{Buffer, Bytes};
use crate::work::{Arriving, Output, Work};

impl Group {
    /// Replaces every rank's buffer by the reduction of all.
    ///
    /// # Errors
    ///
    /// The group is dead, or the region belongs to another group.
    ///
    /// # Example
    ///
    /// ```
    /// # use phalanx_comm::{Avg, Group, GroupOptions};
    /// # let mut group = Group::single(GroupOptions::default())?;
    /// let gradients = group.allocate::<f32>(1000)?;
    /// let work = group.tagged("bucket 0").all_reduce(gradients.full(), Avg)?;
    /// // … other work …
    /// work.wait()?;
    /// # Ok::<(), phalanx_comm::Error>(())
    /// ```
    #[track_caller]
    pub fn all_reduce<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::AllReduce, &bytes, Some(op.reduction()), None);
        self.in_place(&plan, bytes)
    }

    /// Replaces the root's buffer by the reduction of all; the others' stay as they are.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; the root is no rank of the group.
    #[track_caller]
    pub fn reduce<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Reduce, root)?;
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::Reduce, &bytes, Some(op.reduction()), Some(root));
        self.in_place(&plan, bytes)
    }

    /// Replaces every rank's buffer by the root's.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce`].
    #[track_caller]
    pub fn broadcast<'b, T: Element>(
        &mut self,
        buffer: impl Buffer<'b, T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Broadcast, root)?;
        let bytes = buffer.into_bytes();
        let plan = plan::<T>(Op::Broadcast, &bytes, None, Some(root));
        self.in_place(&plan, bytes)
    }

    /// Reduces `input`, of `world_size` segments, and writes segment `rank` to `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; `input` is not `world_size` times as long as `output`.
    #[track_caller]
    pub fn reduce_scatter<'b, T: Element>(
        &mut self,
        input: &[T],
        output: impl Buffer<'b, T>,
        op: impl ReduceOp<T>,
    ) -> Result<Work<'b>> {
        let output = output.into_bytes();
        if output.is_on_device() {
            return Err(self.host_only(Op::ReduceScatter));
        }
        let input: &[u8] = bytemuck::cast_slice(input);
        let segment = output.len();
        self.check_segments::<T>(Op::ReduceScatter, "input", input.len(), segment)?;
        let plan = Plan {
            reduction: Some(op.reduction()),
            ..self.whole::<T>(Op::ReduceScatter, segment, None)
        };
        let skip = self.rank() * segment;
        let call = self.begin(&plan, Memory::Nothing, Some(input))?;
        Ok(self.work(&plan, call, Some(Output { bytes: output, skip })))
    }

    /// Writes every rank's `input`, in rank order, to every rank's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; `output` is not `world_size` times as long as `input`.
    #[track_caller]
    pub fn all_gather<'b, T: Element>(
        &mut self,
        input: &[T],
        output: impl Buffer<'b, T>,
    ) -> Result<Work<'b>> {
        let mut output = output.into_bytes();
        if output.is_on_device() {
            return Err(self.host_only(Op::AllGather));
        }
        let input: &[u8] = bytemuck::cast_slice(input);
        let segment = input.len();
        self.check_segments::<T>(Op::AllGather, "output", output.len(), segment)?;
        let plan = self.whole::<T>(Op::AllGather, segment, None);
        if let Bytes::Region { memory, offset, .. } = &output {
            self.check_region(Op::AllGather, memory)?;
            if let Some(error) = self.core.peers.failure() {
                return Err(error);
            }
            let memory = Memory::Region { region: Arc::clone(memory), offset: *offset };
            self.end_all_on(&memory, output.len())?;
            output.write(self.rank() * segment, input);
            return self.in_place(&plan, output);
        }
        self.placed(&plan, input, self.rank() * segment, Some((output, 0)))
    }

    /// Writes every rank's `input`, in rank order, to the root's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::reduce`]; `output` is not `Some` exactly on the root, or has not `world_size`
    /// times the length of `input`.
    #[track_caller]
    pub fn gather<'b, T: Element>(
        &mut self,
        input: &[T],
        output: Option<&'b mut [T]>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Gather, root)?;
        self.check_root_buffer(Op::Gather, root, output.is_some())?;
        let input: &[u8] = bytemuck::cast_slice(input);
        let segment = input.len();
        let plan = self.whole::<T>(Op::Gather, segment, Some(root));
        let Some(output) = output else {
            let call = self.begin(&plan, Memory::Nothing, Some(input))?;
            return Ok(self.work(&plan, call, None));
        };
        let output = Bytes::Slice(bytemuck::cast_slice_mut(output));
        self.check_segments::<T>(Op::Gather, "output", output.len(), segment)?;
        self.placed(&plan, input, self.rank() * segment, Some((output, 0)))
    }

    /// Writes segment r of the root's `input` to rank r's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::gather`], with `input` on the root.
    #[track_caller]
    pub fn scatter<'b, T: Element>(
        &mut self,
        input: Option<&[T]>,
        output: impl Buffer<'b, T>,
        root: usize,
    ) -> Result<Work<'b>> {
        self.check_rank(Op::Scatter, root)?;
        self.check_root_buffer(Op::Scatter, root, input.is_some())?;
        let output = output.into_bytes();
        if output.is_on_device() {
            return Err(self.host_only(Op::Scatter));
        }
        let segment = output.len();
        let plan = self.whole::<T>(Op::Scatter, segment, Some(root));
        let Some(input) = input else {
            return self.placed(&plan, &[], 0, Some((output, 0)));
        };
        let input: &[u8] = bytemuck::cast_slice(input);
        self.check_segments::<T>(Op::Scatter, "input", input.len(), segment)?;
        self.placed(&plan, input, 0, Some((output, root * segment)))
    }

    /// Writes segment r of this rank's `input` to segment `rank` of rank r's `output`.
    ///
    /// # Errors
    ///
    /// As [`Group::all_reduce`]; the lengths differ or are not a multiple of `world_size`.
    #[track_caller]
    pub fn all_to_all<'b, T: Element>(
        &mut self,
        input: &[T],
        output: &'b mut [T],
    ) -> Result<Work<'b>> {
        if input.len() != output.len() {
            let (expected, actual) = (input.len(), output.len());
            let op = Op::AllToAll.name();
            return Err(self.argument(Error::LengthMismatch {
                op,
                what: "output",
                expected,
                actual,
            }));
        }
        let output = Bytes::Slice(bytemuck::cast_slice_mut(output));
        let plan = self.segmented(plan::<T>(Op::AllToAll, &output, None, None))?;
        let call = self.begin(&plan, Memory::Nothing, Some(bytemuck::cast_slice(input)))?;
        Ok(self.work(&plan, call, Some(Output { bytes: output, skip: 0 })))
    }

    /// Waits, with [`Work::wait`], until every rank has come here.
    ///
    /// # Errors
    ///
    /// The group is dead.
    #[track_caller]
    pub fn barrier(&mut self) -> Result<Work<'static>> {
        let call = self.begin(&Plan::nothing(Op::Barrier), Memory::Nothing, None)?;
        Ok(Work::new(self.core(), call, None))
    }

    /// Sends a copy of `message` to `peer`, which receives it. Messages of a pair are matched in the
    /// order of the calls, independently of collectives.
    ///
    /// # Errors
    ///
    /// The group is dead, or `peer` is this rank or no rank.
    #[track_caller]
    pub fn send<T: Element>(&mut self, message: &[T], peer: usize) -> Result<Work<'static>> {
        let bytes: &[u8] = bytemuck::cast_slice(message);
        let call =
            self.message::<T>(Op::Send, peer, bytes.len(), Memory::Private(bytes.to_vec()))?;
        if let Some(lane) = self.lane.as_ref().filter(|_| !self.has_nccl()) {
            lane.submit(Arc::clone(&call), Check::None);
            return Ok(Work::new(self.core(), call, None).on(Some(lane)));
        }
        point::start_send(&self.core.peers, peer, Arc::clone(&call))?;
        Ok(Work::message(self.core(), call, None, peer))
    }

    /// Receives a message of exactly this length from `peer`.
    ///
    /// # Errors
    ///
    /// As [`Group::send`].
    #[track_caller]
    pub fn receive<'b, T: Element>(
        &mut self,
        message: impl Buffer<'b, T>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let bytes = message.into_bytes();
        if bytes.is_on_device() {
            return self.device_message::<T>(Op::Receive, bytes, peer);
        }
        self.receive_into::<T>(bytes.len(), Some(Output { bytes, skip: 0 }), peer)
    }

    /// Receives a message of exactly so many bytes from `peer` into memory of its own, which nothing needs to be kept borrowed for:
    /// the counterpart of a [`send`](Group::send) of bytes.
    ///
    /// # Errors
    ///
    /// As [`Group::send`].
    #[track_caller]
    pub fn receive_bytes(&mut self, len: usize, peer: usize) -> Result<Arriving> {
        Ok(Arriving { work: self.receive_into::<u8>(len, None, peer)? })
    }

    #[track_caller]
    fn receive_into<'b, T: Element>(
        &mut self,
        byte_len: usize,
        output: Option<Output<'b>>,
        peer: usize,
    ) -> Result<Work<'b>> {
        let memory = Memory::Private(vec![0; byte_len]);
        let call = self.message::<T>(Op::Receive, peer, byte_len, memory)?;
        if let Some(lane) = self.lane.as_ref().filter(|_| !self.has_nccl()) {
            lane.submit(Arc::clone(&call), Check::None);
            return Ok(Work::new(self.core(), call, output).on(Some(lane)));
        }
        point::start_receive(&self.core.peers, peer, Arc::clone(&call))?;
        Ok(Work::message(self.core(), call, output, peer))
    }

    /// Every rank's bytes, by rank; their lengths may differ. Waits.
    ///
    /// # Errors
    ///
    /// The group is dead or fails.
    #[track_caller]
    pub fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0_i64; self.world_size()];
        let length = i64::try_from(mine.len()).unwrap_or(i64::MAX);
        self.all_gather(&[length], &mut lengths[..])?.wait()?;
        let lengths: Vec<usize> =
            lengths.into_iter().map(|theirs| usize::try_from(theirs).unwrap_or(0)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let mut all = vec![0_u8; longest * self.world_size()];
        self.all_gather(&padded, &mut all[..])?.wait()?;
        let part = |(rank, bytes)| all[rank * longest..rank * longest + bytes].to_vec();
        Ok(lengths.into_iter().enumerate().map(part).collect())
    }

    /// Starts a call whose buffer is in in-place form.
    #[track_caller]
    pub(super) fn in_place<'b>(&mut self, plan: &Plan, bytes: Bytes<'b>) -> Result<Work<'b>> {
        if bytes.is_on_device() {
            let memory = self.device_memory(plan.op, bytes, None)?;
            return self.on_lane(plan, memory);
        }
        let (call, output) = match bytes {
            Bytes::Region { memory, offset, .. } => {
                self.check_region(plan.op, &memory)?;
                (self.begin(plan, Memory::Region { region: memory, offset }, None)?, None)
            }
            Bytes::Device { .. } => return Err(self.host_only(plan.op)),
            Bytes::Slice(slice) => {
                let call = self.begin(plan, Memory::Nothing, Some(slice))?;
                (call, Some(Output { bytes: Bytes::Slice(slice), skip: 0 }))
            }
        };
        Ok(self.work(plan, call, output))
    }

    fn work<'b>(&self, plan: &Plan, call: Arc<Call>, output: Option<Output<'b>>) -> Work<'b> {
        Work::new(self.core(), call, output).on(self.lane_for(plan, false).as_ref())
    }

    /// Starts a call whose in-place form is made here: `input` at byte `at` of it.
    #[track_caller]
    fn placed<'b>(
        &mut self,
        plan: &Plan,
        input: &[u8],
        at: usize,
        output: Option<(Bytes<'b>, usize)>,
    ) -> Result<Work<'b>> {
        let rooted = matches!(plan.op, Op::Gather | Op::Scatter);
        let segments = if rooted && plan.root != Some(self.rank()) { 1 } else { plan.segments };
        let mut form = vec![0; plan.segment * segments];
        form[at..at + input.len()].copy_from_slice(input);
        let call = self.begin(plan, Memory::Private(form), None)?;
        let output = output.map(|(bytes, skip)| Output { bytes, skip });
        Ok(self.work(plan, call, output))
    }

    #[track_caller]
    pub(super) fn message<T: Element>(
        &mut self,
        op: Op,
        peer: usize,
        bytes: usize,
        memory: Memory,
    ) -> Result<Arc<Call>> {
        self.check_rank(op, peer)?;
        let rank = self.rank();
        if peer == rank {
            return Err(self.argument(Error::SelfMessage { op: op.name(), rank }));
        }
        let next = std::mem::take(&mut self.next);
        if let Some(error) = self.core.peers.failure() {
            return Err(error);
        }
        let on_nccl = self.has_nccl() && matches!(memory, Memory::Device { .. });
        let record = CallRecord {
            op,
            // NCCL's messages are in order with its collectives: their place among them is compared.
            seq: if on_nccl {
                self.together.unwrap_or(self.on_gpu)
            } else {
                self.core.peers.points.next_index(peer, op == Op::Send)
            },
            dtype: Some(T::DTYPE),
            len: (bytes / T::DTYPE.size_bytes()) as u64,
            reduction: "",
            root: Some(peer),
            tag: next.tag,
        };
        let timeout = next.timeout.unwrap_or(self.options.timeout);
        let mut call = Call::new(record, T::DTYPE, None, bytes, 1, false, timeout, memory);
        call.entry = self.recorded(&call);
        let on_device = self.on_device(&call)?;
        Ok(Arc::new(call.on_device(on_device)))
    }

    /// A plan of `world_size` segments.
    pub(super) fn whole<T: Element>(&self, op: Op, segment: usize, root: Option<usize>) -> Plan {
        let segments = self.world_size();
        Plan {
            dtype: Some(T::DTYPE),
            len: segment * segments / T::DTYPE.size_bytes(),
            root,
            segment,
            segments,
            ..Plan::nothing(op)
        }
    }

    /// Cuts a plan's buffer into segments.
    pub(super) fn segmented(&mut self, plan: Plan) -> Result<Plan> {
        let world_size = self.world_size();
        if !plan.len.is_multiple_of(world_size) {
            let (op, actual) = (plan.op.name(), plan.len);
            return Err(self.argument(Error::NotDivisible { op, actual, world_size }));
        }
        Ok(Plan { segment: plan.segment / world_size, segments: world_size, ..plan })
    }

    /// An argument error: the options for the next call were for this one.
    pub(super) fn argument(&mut self, error: Error) -> Error {
        drop(std::mem::take(&mut self.next));
        error
    }

    pub(super) fn check_rank(&mut self, op: Op, rank: usize) -> Result<()> {
        let world_size = self.world_size();
        if rank < world_size {
            return Ok(());
        }
        Err(self.argument(Error::NoSuchRank { op: op.name(), rank, world_size }))
    }

    pub(super) fn check_root_buffer(&mut self, op: Op, root: usize, given: bool) -> Result<()> {
        let rank = self.rank();
        if given == (rank == root) {
            return Ok(());
        }
        Err(self.argument(Error::RootBuffer { op: op.name(), rank, root, given }))
    }

    pub(super) fn check_segments<T: Element>(
        &mut self,
        op: Op,
        what: &'static str,
        bytes: usize,
        segment: usize,
    ) -> Result<()> {
        let expected = segment * self.world_size();
        if bytes == expected {
            return Ok(());
        }
        let size = T::DTYPE.size_bytes();
        let (expected, actual) = (expected / size, bytes / size);
        Err(self.argument(Error::LengthMismatch { op: op.name(), what, expected, actual }))
    }
}

/// A plan of one segment.
pub(super) fn plan<T: Element>(
    op: Op,
    bytes: &Bytes<'_>,
    reduction: Option<Reduction>,
    root: Option<usize>,
) -> Plan {
    Plan {
        dtype: Some(T::DTYPE),
        len: bytes.len() / T::DTYPE.size_bytes(),
        reduction,
        root,
        segment: bytes.len(),
        ..Plan::nothing(op)
    }
}
