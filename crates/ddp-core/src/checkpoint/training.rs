//! A training as tensors and values: gathered for a snapshot, and brought back from a checkpoint.

use phalanx_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::held::{self, Held};
use super::kept::{self, AllNumbers};
use super::{content, parts, random};
use crate::optim::ema::{Averages, AveragesNumbers};
use crate::optim::saved::Numbers;
use crate::reduce::Reducer;
use crate::{Error, Optimizer, Result};

/// What stands in a checkpoint beside tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Values {
    /// In which gradients become ready, once that is known: where everything lies, and so in which order norms are summed.
    pub(super) ready_order: Option<Vec<String>>,
    pub(super) optimizer: Option<Numbers>,
    /// What hooks and local training keep beside tensors.
    #[serde(default)]
    pub(super) kept: AllNumbers,
    /// Of averages, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) averages: Option<AveragesNumbers>,
    pub(super) program: Value,
}

/// Which of the ranks' common tensors are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// Those that count: buffers may differ between steps, and rank 0's are everybody's.
    Saved,
    /// All that are to be filled.
    Filled,
}

/// What is trained beside the model.
#[derive(Debug, Default)]
pub(super) struct Beside<'a> {
    pub(super) optimizer: Option<&'a mut Optimizer>,
    pub(super) averages: Option<&'a mut Averages>,
}

/// Everything that this rank holds of the training.
pub(super) fn gather(
    reducer: &mut Reducer,
    beside: &mut Beside<'_>,
    share: Share,
) -> Result<Vec<Held>> {
    let buffers = reducer.options.buffers;
    let counts = share == Share::Filled || reducer.store.group.rank() == 0;
    reducer.store.meet()?;
    reducer.store.heed_written()?;
    let mut tensors = held::of_model(&reducer.store, (buffers, counts))?;
    if let Some(optimizer) = &mut beside.optimizer {
        tensors.extend(optimizer.held(&mut reducer.store)?);
    }
    if let Some(averages) = &mut beside.averages {
        tensors.extend(averages.held(&reducer.store)?);
    }
    held::place(&mut tensors, &reducer.store, share == Share::Filled);
    if share == Share::Saved {
        tensors.extend(random::held(&reducer.store)?);
    }
    Ok(tensors)
}

impl Beside<'_> {
    /// Their numbers.
    pub(super) fn numbers(&self, reducer: &Reducer) -> (Option<Numbers>, Option<AveragesNumbers>) {
        let optimizer = self.optimizer.as_ref();
        let averages = self.averages.as_ref().map(|averages| averages.numbers());
        (optimizer.map(|optimizer| optimizer.numbers(&reducer.store)), averages)
    }
}

/// Brings a checkpoint's training into this one; returns the program's values.
pub(super) fn load(
    checkpoint: &Checkpoint,
    reducer: &mut Reducer,
    mut beside: Beside<'_>,
) -> Result<Value> {
    let misfit =
        |report: String| Error::CheckpointMisfit { path: checkpoint.path().to_owned(), report };
    let values: Values = serde_json::from_value(checkpoint.values()?)
        .map_err(|error| misfit(format!("  values: {error}\n")))?;
    let unknown = beside.averages.take_if(|_| values.averages.is_none());
    let mut tensors = gather(reducer, &mut beside, Share::Filled)?;
    held::name_new_ranks(&mut tensors, checkpoint);
    let mut report = held::lacking(&tensors, &reducer.store, checkpoint);
    report.extend(content::misfits(&tensors, checkpoint));
    if let (Some(optimizer), Some(numbers)) = (&beside.optimizer, &values.optimizer) {
        report.extend(optimizer.misfit(numbers));
    }
    if !report.is_empty() {
        return Err(misfit(report.concat()));
    }
    if let Some(order) = &values.ready_order {
        let order = &parts::own_order(&reducer.store, order);
        // Everything may lie elsewhere then.
        drop(tensors);
        reducer.lay_in_order(order)?;
        beside.optimizer.iter_mut().for_each(|optimizer| optimizer.forget());
        beside.averages.iter_mut().for_each(|averages| averages.forget());
        tensors = gather(reducer, &mut beside, Share::Filled)?;
        held::name_new_ranks(&mut tensors, checkpoint);
    }
    content::fill(&mut tensors, checkpoint)?;
    reducer.store.forget_unrounded();
    reducer.store.forget_gathered()?;
    random::restore(&reducer.store, checkpoint)?;
    kept::load(checkpoint, reducer, &values.kept)?;
    if let (Some(optimizer), Some(numbers)) = (beside.optimizer, &values.optimizer) {
        optimizer.go_on(&mut reducer.store, numbers)?;
    }
    if let (Some(averages), Some(numbers)) = (beside.averages, values.averages) {
        averages.go_on(numbers);
    }
    if let Some(averages) = unknown {
        tracing::warn!("the checkpoint has no averages of weights: they begin as its weights are");
        averages.forget();
    }
    Ok(values.program)
}
