//! [`Checkpointer`]: when a training is saved, and how it comes back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_checkpoint::{
    Checkpoint, Folder, Keep, OnBusy, OnError, Progress, Ranks, Saver, SaverOptions, Snapshot,
    Started,
};
use phalanx_comm::recorder::{self, Committing};
use phalanx_comm::{Group, Max};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use signal_hook::consts::SIGTERM;

use super::held::{self, Held};
use super::signals::Signals;
use super::{content, random};
use crate::optim::saved::Numbers;
use crate::reduce::{self, Reducer, Shared};
use crate::{Ddp, Error, Optimizer, Result};

/// When checkpoints are saved and which of them stay. [`Default`] saves only when a signal asks for it and at the end.
#[derive(Clone, Debug)]
pub struct CheckpointerOptions {
    /// Save after every so many steps; 0 for never.
    pub every_steps: u64,
    /// Which checkpoints stay in the folder.
    pub keep: Keep,
    /// What happens when one cannot be written: training goes on with a warning, or ends.
    pub on_error: OnError,
    /// What happens when one is due while another is still being written.
    pub on_busy: OnBusy,
    /// How long [`Checkpointer::finish`] waits for the disk.
    pub finish_timeout: Duration,
    /// Whether SIGTERM, SIGINT and SIGUSR1 save and end the training ([`Next::Stop`]). A second SIGINT ends the process at once.
    pub heed_signals: bool,
}

impl Default for CheckpointerOptions {
    fn default() -> Self {
        let SaverOptions { keep, on_error, on_busy, finish_timeout, .. } = SaverOptions::default();
        Self { every_steps: 0, keep, on_error, on_busy, finish_timeout, heed_signals: true }
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// With the next step.
    Continue,
    /// End: this signal came to some rank, and the step is saved.
    Stop {
        /// Its number.
        signal: i32,
    },
}

/// What a training went on from.
#[derive(Clone, Debug)]
pub struct Resumed {
    step: u64,
    world_size: usize,
    path: PathBuf,
    program: Value,
}

impl Resumed {
    /// Steps that were made.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// How many ranks had saved it.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The checkpoint's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The program's own values, as it had given them to [`Checkpointer::step`].
    ///
    /// # Errors
    /// [`Error::CheckpointMisfit`] where they are not a `T`.
    pub fn values<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.program.clone()).map_err(|error| Error::CheckpointMisfit {
            path: self.path.clone(),
            report: format!("  the program's values: {error}\n"),
        })
    }
}

/// What stands in a checkpoint beside tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Values {
    /// In which gradients become ready, once that is known: where everything lies, and so in which order norms are summed.
    ready_order: Option<Vec<String>>,
    optimizer: Option<Numbers>,
    program: Value,
}

/// Makes a training resumable. One on each rank; all its calls are collective.
///
/// Checkpoints are complete or absent: see the README of `phalanx-checkpoint`. A step that saves copies this rank's share to memory and
/// goes on; a thread writes it.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions, Next};
/// use phalanx_ddp_core::optim::{AdamW, Optimizer, ParameterGroups};
/// use phalanx_ddp_core::{Ddp, DdpOptions};
/// use tch::{nn, nn::Module, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// let mut group = Group::single(GroupOptions::default())?;
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
/// let mut optimizer = Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default())?;
///
/// let options = CheckpointerOptions { every_steps: 10, ..Default::default() };
/// let mut checkpointer = Checkpointer::new(folder, &ddp, options)?;
/// let done = checkpointer.resume(Some(&mut optimizer))?.map_or(0, |resumed| resumed.step());
/// for step in done + 1..=20 {
///     let loss = net.forward(&Tensor::ones([8, 4], (Kind::Float, Device::Cpu))).square().mean(Kind::Float);
///     loss.f_backward()?;
///     optimizer.step(None)?;
///     if checkpointer.step(step, Some(&mut optimizer), || ())? != Next::Continue {
///         break;
///     }
/// }
/// checkpointer.finish()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Checkpointer {
    shared: Shared,
    group: Group,
    saver: Saver,
    folder: PathBuf,
    every_steps: u64,
    signals: Option<Signals>,
    /// The step that was saved last.
    saved: Option<u64>,
    /// Tells the launcher not to end this rank at once while one is being written.
    committing: Option<Committing>,
}

impl Checkpointer {
    /// Saves into `folder`, which all ranks must see as one, and which is made where it does not exist. Collective.
    ///
    /// # Errors
    /// [`Error::System`]; errors of the group.
    #[expect(clippy::needless_pass_by_value, reason = "options are made on the spot")]
    pub fn new(
        folder: impl Into<PathBuf>,
        ddp: &Ddp,
        options: CheckpointerOptions,
    ) -> Result<Self> {
        let folder = folder.into();
        let CheckpointerOptions {
            every_steps,
            keep,
            on_error,
            on_busy,
            finish_timeout,
            heed_signals,
        } = options;
        let saving = SaverOptions { keep, on_error, on_busy, finish_timeout };
        let shared = Shared::clone(ddp.shared());
        let group = reduce::lock(&shared)?.store.group.duplicate()?;
        Ok(Self {
            group,
            saver: Saver::new(&folder, saving)?,
            folder,
            every_steps,
            signals: heed_signals.then(Signals::heed).transpose()?,
            saved: None,
            committing: None,
            shared,
        })
    }

    /// Goes on from the newest complete checkpoint of the folder, if there is one: weights, buffers, the optimizer, the order of
    /// buckets and the ranks' random states. What is newer and incomplete or damaged is named in a warning and
    /// left alone. World size and ZeRO stage may differ from then; ranks that are new keep the random state that they have.
    ///
    /// With an optimizer of tch's, `None`: tch gives nobody its state, and it starts anew.
    ///
    /// # Errors
    /// [`Error::CheckpointMisfit`] with every tensor that differs; [`Error::Checkpoint`] when all there is is damaged; errors of the group.
    pub fn resume(&mut self, mut optimizer: Option<&mut Optimizer>) -> Result<Option<Resumed>> {
        let folder = Folder::new(&self.folder);
        let mut before = None;
        let mut damage = None;
        loop {
            let found = folder.newest_on_all(&mut OverGroup(&mut self.group), before)?;
            let Some(checkpoint) = found else { return damage.map_or(Ok(None), Err) };
            match self.resume_from(&checkpoint, optimizer.as_deref_mut())? {
                Ok(resumed) => return Ok(Some(resumed)),
                Err(error) => {
                    tracing::warn!("{error}; trying the checkpoint before it");
                    before = Some(checkpoint.step());
                    damage = Some(error);
                }
            }
        }
    }

    /// Inside: damage to this checkpoint, the same on every rank. Outside: all else.
    fn resume_from(
        &mut self,
        checkpoint: &Checkpoint,
        optimizer: Option<&mut Optimizer>,
    ) -> Result<Result<Resumed>> {
        let shared = Shared::clone(&self.shared);
        let mut reducer = reduce::lock(&shared)?;
        let loaded = load(checkpoint, &mut reducer, optimizer);
        drop(reducer);
        let damage = match &loaded {
            Err(Error::Checkpoint(error)) if error.is_damage() => error.to_string(),
            _ => String::new(),
        };
        let program = match loaded {
            Err(error) if damage.is_empty() => {
                self.group.abort(&error.to_string());
                return Err(error);
            }
            other => other,
        };
        // Some rank may have touched what no other did.
        let told =
            self.group.tagged("damage to the checkpoint").all_gather_bytes(damage.as_bytes())?;
        let elsewhere = told.iter().position(|text| !text.is_empty());
        Ok(match (program, elsewhere) {
            (Err(error), _) => Err(error),
            (Ok(_), Some(rank)) => {
                let reason = String::from_utf8_lossy(&told[rank]).into_owned();
                Err(Error::Checkpoint(Box::new(phalanx_checkpoint::Error::OutOfStep { reason })))
            }
            (Ok(program), None) => {
                self.saved = Some(checkpoint.step());
                Ok(Resumed {
                    step: checkpoint.step(),
                    world_size: checkpoint.world_size(),
                    path: checkpoint.path().to_owned(),
                    program,
                })
            }
        })
    }

    /// Tells that `step` steps are made, to the launcher as well: saves if it is time to, or if a rank was asked to end. After the optimizer's step, on every
    /// rank. `values` gives what the program needs to go on, its place in the data, say; rank 0's are saved.
    ///
    /// Costs a small collective, and a copy of this rank's share where it saves.
    ///
    /// # Errors
    /// [`Error::MidStep`]; [`Error::Checkpoint`] where a checkpoint cannot be written, with [`OnError::Fail`]; errors of the group.
    pub fn step<T: Serialize>(
        &mut self,
        step: u64,
        optimizer: Option<&mut Optimizer>,
        values: impl FnOnce() -> T,
    ) -> Result<Next> {
        recorder::progress(step);
        let signal = self.agree_on_signal()?;
        let is_time = self.every_steps > 0 && step.is_multiple_of(self.every_steps);
        if signal != 0 {
            self.finish()?; // so that this one is not left out
        }
        if (is_time || signal != 0) && self.saved != Some(step) {
            self.save(step, optimizer, values)?;
        }
        self.poll()?;
        if signal == 0 {
            return Ok(Next::Continue);
        }
        self.finish()?;
        Ok(Next::Stop { signal })
    }

    /// Saves this step, due or not. Collective.
    ///
    /// # Errors
    /// As [`Checkpointer::step`].
    pub fn save<T: Serialize>(
        &mut self,
        step: u64,
        optimizer: Option<&mut Optimizer>,
        values: impl FnOnce() -> T,
    ) -> Result<()> {
        let program = serde_json::to_value(values()).map_err(|error| {
            let error = phalanx_checkpoint::Error::OutOfStep {
                reason: format!("the program's values: {error}"),
            };
            Error::Checkpoint(Box::new(error))
        })?;
        let shared = Shared::clone(&self.shared);
        let mut reducer = reduce::lock(&shared)?;
        if let Some(name) = reducer.pending() {
            return Err(Error::MidStep { name: name.to_owned() });
        }
        let (tensors, numbers) = gather(&mut reducer, optimizer, Share::Saved)?;
        let saved = Values { ready_order: reducer.settled_order(), optimizer: numbers, program };
        drop(reducer);
        let rooms = content::rooms(&tensors);
        let mut snapshot = Snapshot::new();
        content::offer(&mut snapshot, &tensors, &rooms)?;
        snapshot.values(serde_json::to_value(&saved).unwrap_or_default());
        let committing = recorder::committing();
        let started = self.saver.save(&mut OverGroup(&mut self.group), step, &snapshot)?;
        if started == Started::Yes {
            self.committing = Some(committing);
            self.saved = Some(step);
        }
        Ok(())
    }

    /// Waits until everything is written: before the program ends. Collective.
    ///
    /// # Errors
    /// As [`Checkpointer::step`]; and when the disk takes longer than
    /// [`finish_timeout`](CheckpointerOptions::finish_timeout).
    pub fn finish(&mut self) -> Result<()> {
        let progress = self.saver.finish(&mut OverGroup(&mut self.group))?;
        self.tell(&progress);
        Ok(())
    }

    /// The step that was saved last, or gone on from.
    #[must_use]
    pub fn saved_step(&self) -> Option<u64> {
        self.saved
    }

    fn poll(&mut self) -> Result<()> {
        let progress = self.saver.poll(&mut OverGroup(&mut self.group))?;
        self.tell(&progress);
        Ok(())
    }

    fn tell(&mut self, progress: &Progress) {
        if !self.saver.is_pending() {
            self.committing = None;
        }
        if let (Progress::Saved { step, path }, 0) = (progress, self.group.rank()) {
            tracing::info!(step, path = %path.display(), "checkpoint saved");
        }
    }

    /// A signal that came to any rank, or the launcher's wish, the same answer on every one; 0 for none.
    fn agree_on_signal(&mut self) -> Result<i32> {
        let Some(signals) = &self.signals else { return Ok(0) };
        let wish = if recorder::should_stop() { i64::from(SIGTERM) } else { 0 };
        let mut asked = [signals.asked().max(wish)];
        self.group.tagged("signals").all_reduce(&mut asked[..], Max)?.wait()?;
        Ok(i32::try_from(asked[0]).unwrap_or(0))
    }
}

/// Which of the ranks' common tensors are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Share {
    /// Those that count: buffers may differ between steps, and rank 0's are everybody's.
    Saved,
    /// All that are to be filled.
    Filled,
}

/// Everything that this rank holds of the training.
fn gather(
    reducer: &mut Reducer,
    optimizer: Option<&mut Optimizer>,
    share: Share,
) -> Result<(Vec<Held>, Option<Numbers>)> {
    let buffers = reducer.options.buffers;
    let counts = share == Share::Filled || reducer.store.group.rank() == 0;
    let mut tensors = held::of_model(&reducer.store, (buffers, counts))?;
    let mut numbers = None;
    if let Some(optimizer) = optimizer {
        tensors.extend(optimizer.held(&mut reducer.store)?);
        numbers = Some(optimizer.numbers(&reducer.store));
    }
    if share == Share::Saved {
        tensors.extend(random::held(&reducer.store)?);
    }
    Ok((tensors, numbers))
}

/// Brings a checkpoint's training into this one; returns the program's values.
fn load(
    checkpoint: &Checkpoint,
    reducer: &mut Reducer,
    mut optimizer: Option<&mut Optimizer>,
) -> Result<Value> {
    let misfit =
        |report: String| Error::CheckpointMisfit { path: checkpoint.path().to_owned(), report };
    let values: Values = serde_json::from_value(checkpoint.values()?)
        .map_err(|error| misfit(format!("  values: {error}\n")))?;
    let (mut tensors, _) = gather(reducer, optimizer.as_deref_mut(), Share::Filled)?;
    held::name_new_ranks(&mut tensors, checkpoint);
    let mut report = held::lacking(&tensors, checkpoint);
    report.extend(content::misfits(&tensors, checkpoint));
    if let (Some(optimizer), Some(numbers)) = (&optimizer, &values.optimizer) {
        report.extend(optimizer.misfit(numbers));
    }
    if !report.is_empty() {
        return Err(misfit(report.concat()));
    }
    if let Some(order) = &values.ready_order {
        // Everything may lie elsewhere then.
        drop(tensors);
        reducer.lay_in_order(order)?;
        optimizer.iter_mut().for_each(|optimizer| optimizer.forget());
        tensors = gather(reducer, optimizer.as_deref_mut(), Share::Filled)?.0;
        held::name_new_ranks(&mut tensors, checkpoint);
    }
    content::fill(&mut tensors, checkpoint)?;
    random::restore(&reducer.store, checkpoint)?;
    if let (Some(optimizer), Some(numbers)) = (optimizer, &values.optimizer) {
        optimizer.go_on(&mut reducer.store, numbers)?;
    }
    Ok(values.program)
}

/// A process group as the ranks that save together.
struct OverGroup<'a>(&'a mut Group);

impl Ranks for OverGroup<'_> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn all_gather(
        &mut self,
        bytes: &[u8],
    ) -> std::result::Result<Vec<Vec<u8>>, Box<dyn std::error::Error + Send + std::marker::Sync>>
    {
        Ok(self.0.tagged("checkpoint").all_gather_bytes(bytes)?)
    }
}
