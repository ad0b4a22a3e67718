//! Copies of batches to a GPU, ahead of the steps that use them.
#![expect(unsafe_code, reason = "gate: copies into tensors' memory on a GPU")]

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use phalanx_comm::{PinnedMemory, Upload, Uploader};
use phalanx_data::batches::{Allocator, ColumnBuffer, MicroBatches};
use phalanx_data::Step;
use tch::{Device, Tensor};

use super::{tensors, TensorBatch, TensorStep};
use crate::error::Result;
use crate::shim::current_stream;

/// A copy takes milliseconds; a GPU that needs longer has stopped.
const COPY_MAX: Duration = Duration::from_secs(60);

/// Page-locked memory for batches.
#[derive(Debug)]
struct Pinned(Arc<Uploader>);

#[derive(Debug)]
struct PinnedBlock(PinnedMemory);

impl ColumnBuffer for PinnedBlock {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl Allocator for Pinned {
    fn allocate(&self, bytes: usize) -> phalanx_data::Result<Box<dyn ColumnBuffer>> {
        let memory = self.0.pinned(bytes).map_err(|error| phalanx_data::Error::InvalidOption {
            option: "queue_bytes",
            value: format!("{bytes} bytes of page-locked memory"),
            reason: format!("{error}: take a shorter queue, or raise the limit of locked memory"),
        })?;
        Ok(Box::new(PinnedBlock(memory)))
    }
}

/// A step on its way.
#[derive(Debug)]
pub(super) struct Arrival {
    /// Kept until the copies are done: they read it.
    source: MicroBatches,
    /// Kept as well: the caller may drop its own before they are done.
    targets: Vec<Tensor>,
    upload: Upload,
}

/// The copies of one feed.
#[derive(Debug)]
pub(super) struct Copies {
    uploader: Arc<Uploader>,
    /// Delivered, but the GPU may still be copying.
    kept: Mutex<Vec<Arrival>>,
}

impl Copies {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let uploader = Arc::new(Uploader::open(ordinal)?);
        Ok(Copies { uploader, kept: Mutex::default() })
    }

    pub(super) fn memory(&self) -> Arc<dyn Allocator> {
        Arc::new(Pinned(Arc::clone(&self.uploader)))
    }

    /// Starts to copy a step.
    pub(super) fn start(&self, step: Step, device: Device) -> Result<(TensorStep, Arrival)> {
        let (start, weight, data_wait) = (step.start, step.weight(), step.data_wait);
        let left_out = step.left_out;
        let source = step.micro_batches;
        let mut micro_batches = Vec::with_capacity(source.len());
        let (mut targets, mut copies) = (Vec::new(), Vec::new());
        for batch in &source {
            let mut of_batch = Vec::with_capacity(batch.columns().len());
            for (at, column) in batch.columns().iter().enumerate() {
                let options = (tensors::kind(column)?, device);
                let tensor = Tensor::f_empty(batch.column_shape(at), options)?;
                let bytes = batch.column_bytes(at);
                debug_assert!(batch.block(at).is_none_or(is_pinned));
                copies.push((bytes, tensor.data_ptr() as u64));
                targets.push(tensor.shallow_clone());
                of_batch.push(tensor);
            }
            micro_batches.push(TensorBatch { tensors: of_batch, ..TensorBatch::about(batch) });
        }
        let stream = current_stream(device)?;
        // SAFETY: the batches and the tensors' memory, of exactly these sizes, are kept in the arrival until the upload is
        // done; the memory was allocated in the order of this stream.
        let upload = match unsafe { self.uploader.copy(&copies, stream) } {
            Ok(upload) => upload,
            Err(error) => {
                // Some of the copies may be under way, and nothing tells when they end.
                leave(source, targets);
                return Err(error.into());
            }
        };
        let arrival = Arrival { source, targets, upload };
        Ok((TensorStep { start, micro_batches, data_wait, left_out, weight }, arrival))
    }

    /// Lets the current stream wait for a step.
    pub(super) fn order(&self, arrival: &Arrival, device: Device) -> Result<()> {
        Ok(arrival.upload.order(current_stream(device)?)?)
    }

    /// Keeps what a copy needs until it is done, and lets go what is no longer needed.
    pub(super) fn keep(&self, arrival: Arrival) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|other| !matches!(other.upload.is_done(), Ok(true)));
        kept.push(arrival);
    }

    /// Waits for a copy that nobody will use.
    pub(super) fn finish(&self, arrival: Arrival) {
        if let Err(error) = arrival.upload.wait(COPY_MAX) {
            tracing::warn!(%error, "a copy to the GPU did not end; its memory is left as it is");
            leave(arrival.source, arrival.targets);
        }
    }
}

/// Leaves memory as it is for good: were it freed, the GPU might read and write what others have made of it.
fn leave(source: MicroBatches, targets: Vec<Tensor>) {
    Box::leak(Box::new((source, targets)));
}

fn is_pinned(block: &dyn ColumnBuffer) -> bool {
    (block as &dyn Any).is::<PinnedBlock>()
}

impl Drop for Copies {
    fn drop(&mut self) {
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        for arrival in kept {
            self.finish(arrival);
        }
    }
}
