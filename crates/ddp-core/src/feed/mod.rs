//! Batches as tensors, on the device, before they are asked for.
//!
//! On a GPU batches are built in page-locked memory and copied on a stream of their own while the GPU computes the
//! step before; the caller's stream waits for the copy, the caller does not.
//!
//! Columns of U16 and U32, which libtorch has no arithmetic for, become tensors of Int64.

mod ahead;
mod gpu;
mod tensors;

use std::sync::Arc;
use std::time::Duration;

use phalanx_comm::Group;
use phalanx_data::loader::Agreement;
use phalanx_data::order::{Position, Sample};
use phalanx_data::{Batch, Column, Loader, LoaderOptions, LoaderState, Samples};
use tch::{Device, Tensor};

use crate::error::Result;
use ahead::Ahead;
use gpu::Copies;

/// A micro-batch as tensors.
#[derive(Debug)]
pub struct TensorBatch {
    columns: Arc<[Column]>,
    tensors: Vec<Tensor>,
    samples: Vec<Sample>,
    valid: Vec<bool>,
    label_count: usize,
}

impl TensorBatch {
    /// The tensor of a column, `[rows, …]`.
    ///
    /// # Errors
    /// [`phalanx_data::Error::NoColumn`] if there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        let found = self.columns().find(|(own, _)| *own == name);
        found.map(|(_, tensor)| tensor).ok_or_else(|| {
            let present = self.columns().map(|(own, _)| own.to_owned()).collect();
            phalanx_data::Error::NoColumn { name: name.to_owned(), dtype: "any", present }.into()
        })
    }

    /// All columns with their names.
    pub fn columns(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.columns.iter().map(|column| &*column.name).zip(&self.tensors)
    }

    /// Which sample each row is.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Which rows count.
    pub fn valid(&self) -> &[bool] {
        &self.valid
    }

    /// How many positions of column `labels` count in the loss.
    pub fn label_count(&self) -> usize {
        self.label_count
    }

    /// All but the tensors.
    fn about(batch: &Batch) -> Self {
        TensorBatch {
            columns: batch.shared_columns(),
            tensors: Vec::new(),
            samples: batch.samples().to_vec(),
            valid: batch.valid().to_vec(),
            label_count: batch.label_count(),
        }
    }
}

/// This rank's part of a global batch, as tensors.
#[derive(Debug)]
#[non_exhaustive]
pub struct TensorStep {
    /// Where the global batch starts in the global order.
    pub start: Position,
    /// The micro-batches, in order. Never empty.
    pub micro_batches: Vec<TensorBatch>,
    /// How long the caller waited for data: building, not copying.
    pub data_wait: Duration,
    /// How many samples of all ranks were left out for damage. The same on every rank.
    pub left_out: usize,
    /// What this rank's mean loss is multiplied by: see [`phalanx_data::Step::weight`].
    pub weight: f64,
}

/// A [`Loader`] that delivers tensors on a device.
#[derive(Debug)]
pub struct Feed {
    loader: Loader,
    device: Device,
    /// The place after the last step that was delivered.
    state: LoaderState,
    /// Only for a GPU.
    copies: Option<Copies>,
    /// Steps on their way to the GPU, and the place after each.
    ahead: Ahead<(TensorStep, LoaderState, gpu::Arrival)>,
}

/// Steps that are copied before they are asked for.
const AHEAD: usize = 1;

impl Feed {
    /// From the beginning of the data.
    ///
    /// # Errors
    /// As [`Loader::new`]; [`crate::Error::Comm`] if the GPU cannot be used.
    pub fn new(samples: Arc<dyn Samples>, options: LoaderOptions, device: Device) -> Result<Self> {
        let (options, copies) = Self::prepare(options, device)?;
        Self::of(Loader::new(samples, options)?, device, copies)
    }

    /// From where `state` was taken.
    ///
    /// # Errors
    /// As [`Loader::resume`] and [`Feed::new`].
    pub fn resume(
        samples: Arc<dyn Samples>,
        options: LoaderOptions,
        state: &LoaderState,
        device: Device,
    ) -> Result<Self> {
        let (options, copies) = Self::prepare(options, device)?;
        Self::of(Loader::resume(samples, options, state)?, device, copies)
    }

    fn prepare(
        mut options: LoaderOptions,
        device: Device,
    ) -> Result<(LoaderOptions, Option<Copies>)> {
        let Device::Cuda(ordinal) = device else { return Ok((options, None)) };
        let copies = Copies::open(ordinal)?;
        options.memory = copies.memory();
        Ok((options, Some(copies)))
    }

    fn of(loader: Loader, device: Device, copies: Option<Copies>) -> Result<Self> {
        tensors::check(loader.columns())?;
        let state = loader.state();
        Ok(Feed { loader, device, state, copies, ahead: Ahead::default() })
    }

    /// Compares what this rank is about to read with what all others are: data, seed, order, batches, damage and place. Collective; once,
    /// before the first step.
    ///
    /// # Errors
    /// [`phalanx_data::Error::RanksDisagree`], with the same words on every rank; [`crate::Error::Comm`] if the group fails.
    pub fn agree(&self, group: &mut Group) -> Result<()> {
        let mine = self.loader.agreement();
        let all = group.tagged("data").all_gather_bytes(&mine.to_bytes())?;
        let all: Vec<Agreement> = all.iter().map(|bytes| Agreement::from_bytes(bytes)).collect();
        Ok(Agreement::compare(&all)?)
    }

    /// The next step. Waits at most the loader's timeout for data; on a GPU its tensors are ready for what the current
    /// stream is asked from now on.
    ///
    /// # Errors
    /// As [`Loader::next_step`]; [`crate::Error::Tch`] or [`crate::Error::Comm`] if a tensor cannot be made or copied.
    pub fn next_step(&mut self) -> Result<TensorStep> {
        let Some(copies) = &self.copies else {
            let step = self.loader.next_step()?;
            let (start, data_wait, weight) = (step.start, step.data_wait, step.weight());
            let left_out = step.left_out;
            let of = |batch: Batch| {
                let about = TensorBatch::about(&batch);
                Ok(TensorBatch { tensors: tensors::on_cpu(batch)?, ..about })
            };
            let micro_batches = step.micro_batches.into_iter().map(of).collect::<Result<_>>()?;
            self.state = self.loader.state();
            return Ok(TensorStep { start, data_wait, left_out, weight, micro_batches });
        };
        let mut waited = Duration::ZERO;
        let (loader, device) = (&mut self.loader, self.device);
        let begun = self.ahead.next(AHEAD, |is_needed| {
            // A step that is there does not wait for one that is still being built.
            if loader.is_at_end() || !(is_needed || loader.is_next_ready()) {
                return None;
            }
            let step = loader.next_step().map_err(Into::into).and_then(|step| {
                waited += step.data_wait;
                copies.start(step, device)
            });
            Some(step.map(|(step, arrival)| (step, loader.state(), arrival)))
        });
        let (mut step, state, arrival) = match begun {
            Some(begun) => begun?,
            None => {
                let epochs = self.loader.state().epoch;
                return Err(phalanx_data::Error::EndOfData { epochs }.into());
            }
        };
        let ordered = copies.order(&arrival, self.device);
        // Kept in any case: the copy is under way.
        copies.keep(arrival);
        ordered?;
        for batch in &mut step.micro_batches {
            for (tensor, column) in batch.tensors.iter_mut().zip(batch.columns.iter()) {
                tensors::widen(tensor, column)?;
            }
        }
        step.data_wait = waited;
        self.state = state;
        Ok(step)
    }

    /// The place after the last step that was delivered. The same on every rank.
    pub fn state(&self) -> LoaderState {
        self.state.clone()
    }

    /// Whether all epochs that were asked for were delivered.
    pub fn is_at_end(&self) -> bool {
        self.loader.is_at_end() && self.ahead.is_empty()
    }

    /// How many steps an epoch has.
    pub fn steps_per_epoch(&self) -> u64 {
        self.loader.steps_per_epoch()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(copies) = &self.copies {
            // Before their tensors and their page-locked memory go.
            for (_, _, arrival) in self.ahead.drain() {
                copies.finish(arrival);
            }
        }
    }
}
