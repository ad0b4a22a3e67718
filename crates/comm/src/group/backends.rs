//! Who moves a group's data: choosing a backend, connecting to it, and handing calls to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{CallArguments, Group};
use crate::backend::{self, Wanted};
use crate::call::{Call, CallMemory};
use crate::dtype::DType;
use crate::error::Result;
use crate::fingerprint::CallRecord;
use crate::gpu::cuda_error;
use crate::gpu::on_device::OnDevice;
use crate::gpu::Stream;
use crate::lane::{Check, Lane};

impl Group {
    /// Connects the ranks over the backend of the options. Collective.
    pub(super) fn open(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.options.connect_timeout;
        let core = self.core();
        let wanted = Wanted {
            backend: self.options.backend,
            gpu_memory: self.options.gpu_memory,
            gpu_trouble: self.options.gpu_trouble.take(),
        };
        let mut gather = |mine: &[u8]| self.all_gather_bytes(mine);
        let opened = backend::open(&core, wanted, &mut gather, deadline);
        let (became, transport, why) = opened.map_err(|error| core.peers.fail(error))?;
        (self.options.backend, self.transport) = (became, transport);
        self.choice = why;
        Ok(())
    }

    /// Why [`Backend::Auto`](crate::Backend::Auto) became what [`Group::backend`] says.
    #[must_use]
    pub fn backend_choice(&self) -> Option<&str> {
        self.choice.as_deref()
    }

    /// The number of this rank's GPU among those that the process sees, with NCCL, or MPI
    /// and [`GroupOptions::gpu_memory`](crate::GroupOptions::gpu_memory).
    #[must_use]
    pub fn device(&self) -> Option<usize> {
        self.transport.gpu().map(|gpu| gpu.device.ordinal)
    }

    /// The stream of the GPU on which the caller works: collectives on GPU memory come after what was
    /// asked of it before, and [`Work::wait`](crate::Work::wait) orders it after them. At first the default stream.
    pub fn set_stream(&mut self, stream: Stream) -> &mut Self {
        self.stream = stream;
        self
    }

    /// Who moves the data of a planned call, if not the host backend: what has no data is a matter of
    /// headers alone.
    pub(super) fn lane_for(&self, plan: &CallArguments, on_device: bool) -> Option<Arc<Lane>> {
        self.transport.lane(on_device).filter(|_| plan.segment > 0).map(Arc::clone)
    }

    /// Starts a call whose header goes over the control plane and whose data over `lane`.
    #[track_caller]
    pub(super) fn begin_on_lane(
        &mut self,
        lane: &Lane,
        plan: &CallArguments,
        record: CallRecord,
        timeout: Duration,
        memory: CallMemory,
    ) -> Result<Arc<Call>> {
        let dtype = plan.dtype.unwrap_or(DType::U8);
        let (reduction, header) = (plan.reduction, record.clone());
        let check = Call::new(header, dtype, reduction, 0, 1, true, timeout, CallMemory::Nothing);
        let (segment, segments) = (plan.segment, plan.segments);
        let mut call =
            Call::new(record, dtype, reduction, segment, segments, false, timeout, memory);
        call.entry = self.recorded(&call);
        let on_device = self.on_device(&call)?;
        let call = call.on_device(on_device);
        let check = self.core.start(check, None)?;
        self.started += 1;
        let call = Arc::new(call);
        if self.transport.is_in_stream_order() {
            self.on_gpu += 1;
        }
        lane.submit(Arc::clone(&call), Check::Collective(check));
        Ok(call)
    }

    /// The point of the caller's stream at which a call on GPU memory is made.
    pub(super) fn on_device(&self, call: &Call) -> Result<Option<OnDevice>> {
        match (self.transport.gpu(), &call.lock().memory) {
            (Some(gpu), CallMemory::Device { .. }) => OnDevice::after(&gpu.device, self.stream)
                .map(Some)
                .map_err(|error| cuda_error(self.rank(), error)),
            _ => Ok(None),
        }
    }
}
