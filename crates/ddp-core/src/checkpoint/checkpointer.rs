//! [`Checkpointer`]: when a training is saved, and how it comes back.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use phalanx_checkpoint::{
    Checkpoint, Folder, OnError, Progress, Saver, SaverOptions, Snapshot, Started,
};
use phalanx_comm::recorder::{self, Committing};
use phalanx_comm::slots::Slots;
use phalanx_comm::{Group, Max};
use serde::Serialize;
use serde_json::Value;
use signal_hook::consts::SIGTERM;

use super::content;
use super::keeper::{first_said, Keeper, NotKept};
use super::options::{CheckpointerOptions, Next, Origin, Resumed};
use super::ranks::OverGroup;
use super::signals::Signals;
use super::training::{gather, load, Beside, Share, Values};
use super::{kept, parts};
use crate::optim::ema::{self, Averages, Ema};
use crate::reduce::{self, Reducer, Shared};
use crate::{Ddp, Error, Optimizer, Result};

/// Makes a training resumable. One on each rank; all its calls are collective: over the `Ddp`'s group, or over the world where it has
/// [a part](Ddp::set_part) of a model, whose checkpoints every mesh reads.
///
/// Checkpoints are complete or absent: see the README of `phalanx-checkpoint`. A step that saves copies this rank's share to memory and
/// goes on; a thread writes it.
///
/// # Snapshots in memory
/// With [`memory_every_steps`](CheckpointerOptions::memory_every_steps) a step also copies each rank's share to memory of phalanx's launcher,
/// which outlives the rank, and sends it to a rank of the next node. When ranks are started again, [`resume`](Checkpointer::resume) goes on from the newest
/// of disk and memory, after the loss of ranks or of one node. It needs no folder: [`Checkpointer::in_memory`]. The memory goes with the
/// launcher. A machine's memory has twice the shares of its ranks and twice those of the ranks before them; while one is kept a copy more, and
/// while a training goes on from it, once, the shares that the machine has not.
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
/// let done = checkpointer.resume(Some(&mut optimizer))?.map_or(0, |resumed| resumed.step);
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
    folder: Option<PathBuf>,
    keeper: Option<Keeper>,
    /// Averages that are saved as well.
    averages: Option<Arc<Mutex<Averages>>>,
    /// After how many steps: to the folder, to memory.
    every_steps: (u64, u64),
    on_error: OnError,
    signals: Option<Signals>,
    /// The step that was saved last.
    saved: Option<u64>,
    /// Tells the launcher not to end this rank at once while one is being written.
    committing: Option<Committing>,
}

/// Where a step goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent of each other")]
struct Due {
    disk: bool,
    memory: bool,
}

impl Checkpointer {
    /// Saves into `folder`, which all ranks must see as one, and which is made where it does not exist. Collective.
    ///
    /// # Errors
    /// [`Error::System`]; [`Error::NoSnapshotMemory`] for snapshots in memory under another launcher than phalanx's; errors of the group.
    pub fn new(
        folder: impl Into<PathBuf>,
        ddp: &Ddp,
        options: CheckpointerOptions,
    ) -> Result<Self> {
        let slots = if options.memory_every_steps > 0 { slots_of_launcher() } else { None };
        Self::with_slots(Some(folder.into()), ddp, options, slots)
    }

    /// Keeps snapshots in the launcher's memory alone. Collective.
    ///
    /// # Errors
    /// As [`Checkpointer::new`].
    pub fn in_memory(ddp: &Ddp, options: CheckpointerOptions) -> Result<Self> {
        Self::with_slots(None, ddp, options, slots_of_launcher())
    }

    /// As [`Checkpointer::new`] or, without a folder, [`Checkpointer::in_memory`], with memory that somebody else has made.
    ///
    /// # Errors
    /// As [`Checkpointer::new`].
    #[expect(clippy::needless_pass_by_value, reason = "as the other constructors take it")]
    pub fn with_slots(
        folder: Option<PathBuf>,
        ddp: &Ddp,
        options: CheckpointerOptions,
        slots: Option<Slots>,
    ) -> Result<Self> {
        let CheckpointerOptions {
            every_steps,
            memory_every_steps,
            keep,
            on_error,
            on_busy,
            finish_timeout,
            heed_signals,
        } = options;
        let saving = SaverOptions { keep, on_error, on_busy, finish_timeout };
        let shared = Shared::clone(ddp.shared());
        let mut group = {
            let mut reducer = reduce::lock(&shared)?;
            if reducer.store.part.is_some() {
                kept::warn_of_left_out(&reducer);
            }
            reducer.store.everyone().duplicate()?
        };
        let uses_memory = memory_every_steps > 0 || folder.is_none();
        Ok(Self {
            keeper: uses_memory.then(|| Keeper::new(&mut group, slots)).transpose()?,
            group,
            saver: Saver::new(folder.clone().unwrap_or_default(), saving)?,
            folder,
            averages: None,
            every_steps: (every_steps, memory_every_steps),
            on_error,
            signals: heed_signals.then(Signals::heed).transpose()?,
            saved: None,
            committing: None,
            shared,
        })
    }

    /// Saves and resumes averages of the weights as well. A checkpoint that has none lets them begin as its weights are.
    #[must_use]
    pub fn with_ema(self, ema: &Ema) -> Self {
        Self { averages: Some(ema.averages()), ..self }
    }

    /// Goes on from the newest complete checkpoint of the folder or snapshot in memory, if there is one: weights, buffers, the optimizer,
    /// the order of buckets and the ranks' random states. What is newer and incomplete or damaged is named in a warning and
    /// left alone. World size and ZeRO stage may differ from then; ranks that are new keep the random state that they have.
    ///
    /// With an optimizer of tch's, `None`: tch gives nobody its state, and it starts anew.
    ///
    /// # Errors
    /// [`Error::CheckpointMisfit`] with every tensor that differs; [`Error::Checkpoint`] when all there is in the folder is damaged; errors of the group.
    pub fn resume(&mut self, mut optimizer: Option<&mut Optimizer>) -> Result<Option<Resumed>> {
        let on_disk = self.newest_on_disk(None)?;
        let step_on_disk = on_disk.as_ref().map(Checkpoint::step);
        if let Some(snapshot) = self.newest_in_memory(step_on_disk)? {
            let resumed = self.resume_from(&snapshot, Origin::Memory, optimizer.as_deref_mut())?;
            drop(snapshot);
            self.keeper.iter().for_each(Keeper::let_go);
            match resumed {
                Ok(resumed) => return Ok(Some(resumed)),
                Err(error) => tracing::warn!("{error}; trying what is on disk"),
            }
        }
        self.resume_on_disk(on_disk, optimizer)
    }

    /// The step of the newest complete checkpoint in the folder, of those below `before`. Collective.
    ///
    /// # Errors
    /// As [`Checkpointer::resume`].
    pub fn newest_step(&mut self, before: Option<u64>) -> Result<Option<u64>> {
        Ok(self.newest_on_disk(before)?.as_ref().map(Checkpoint::step))
    }

    /// As [`Checkpointer::resume`], from the newest of the folder's that is below a step: where several checkpointers must go on from the same one.
    ///
    /// # Errors
    /// As [`Checkpointer::resume`].
    pub fn resume_before(
        &mut self,
        step: u64,
        optimizer: Option<&mut Optimizer>,
    ) -> Result<Option<Resumed>> {
        let on_disk = self.newest_on_disk(Some(step))?;
        self.resume_on_disk(on_disk, optimizer)
    }

    /// From this checkpoint, or one before it where that is damaged.
    fn resume_on_disk(
        &mut self,
        mut on_disk: Option<Checkpoint>,
        mut optimizer: Option<&mut Optimizer>,
    ) -> Result<Option<Resumed>> {
        let mut damage = None;
        loop {
            let Some(checkpoint) = on_disk else { return damage.map_or(Ok(None), Err) };
            match self.resume_from(&checkpoint, Origin::Disk, optimizer.as_deref_mut())? {
                Ok(resumed) => return Ok(Some(resumed)),
                Err(error) => {
                    tracing::warn!("{error}; trying the checkpoint before it");
                    damage = Some(error);
                    on_disk = self.newest_on_disk(Some(checkpoint.step()))?;
                }
            }
        }
    }

    fn newest_on_disk(&mut self, before: Option<u64>) -> Result<Option<Checkpoint>> {
        let Some(folder) = &self.folder else { return Ok(None) };
        Ok(Folder::new(folder).newest_on_all(&mut OverGroup(&mut self.group), before)?)
    }

    fn newest_in_memory(&mut self, newer_than: Option<u64>) -> Result<Option<Checkpoint>> {
        match &mut self.keeper {
            Some(keeper) => keeper.find(&mut self.group, newer_than),
            None => Ok(None),
        }
    }

    /// Inside: damage to this checkpoint, the same on every rank. Outside: all else.
    fn resume_from(
        &mut self,
        checkpoint: &Checkpoint,
        origin: Origin,
        optimizer: Option<&mut Optimizer>,
    ) -> Result<Result<Resumed>> {
        let shared = Shared::clone(&self.shared);
        let mut reducer = reduce::lock(&shared)?;
        self.check_part(&mut reducer)?;
        let averages = self.averages.clone();
        let mut averages = averages.as_deref().map(ema::lock).transpose()?;
        let beside = Beside { optimizer, averages: averages.as_deref_mut() };
        let loaded = load(checkpoint, &mut reducer, beside);
        drop((reducer, averages));
        let damage = match &loaded {
            Err(Error::Checkpoint(error)) if error.is_damage() => error.to_string(),
            _ => String::new(),
        };
        let program = match loaded {
            Err(error) if damage.is_empty() => {
                self.group.abort(&error.to_string());
                return Err(error);
            }
            other => other.ok(),
        };
        // Some rank may have touched what no other did: the first one's words are everybody's.
        let found = first_said(&mut self.group, "damage to the checkpoint", &damage)?;
        if let Some(NotKept { rank, reason }) = found {
            return Ok(Err(Error::CheckpointDamaged { rank, reason }));
        }
        self.saved = (origin == Origin::Disk).then(|| checkpoint.step());
        Ok(Ok(Resumed {
            step: checkpoint.step(),
            world_size: checkpoint.world_size(),
            origin,
            path: checkpoint.path().to_owned(),
            program: program.unwrap_or_default(),
        }))
    }

    /// Tells that `step` steps are made, to the launcher as well: saves if it is time to, or if a rank was asked to end. After the optimizer's step, on every
    /// rank. `values` gives what the program needs to go on, its place in the data, say; rank 0's are saved.
    ///
    /// Costs a small collective, and a copy of this rank's share where it saves; a snapshot in memory is also sent to another node.
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
        if signal != 0 {
            self.finish()?; // so that this one is not left out
        }
        self.put(self.due(step, signal != 0), step, optimizer, values)?;
        self.poll()?;
        if signal == 0 {
            return Ok(Next::Continue);
        }
        self.finish()?;
        Ok(Next::Stop { signal })
    }

    fn due(&self, step: u64, is_last: bool) -> Due {
        let is_time = |every: u64| every > 0 && step.is_multiple_of(every);
        let (to_disk, to_memory) = self.every_steps;
        let has_folder = self.folder.is_some();
        let disk = has_folder && self.saved != Some(step) && (is_last || is_time(to_disk));
        let is_wanted = is_time(to_memory) || (is_last && !has_folder);
        let is_kept = |keeper: &Keeper| keeper.step() == Some(step);
        let memory = is_wanted && self.keeper.as_ref().is_some_and(|keeper| !is_kept(keeper));
        Due { disk, memory }
    }

    /// Saves this step, due or not: to the folder or, without one, to memory. Collective.
    ///
    /// # Errors
    /// As [`Checkpointer::step`].
    pub fn save<T: Serialize>(
        &mut self,
        step: u64,
        optimizer: Option<&mut Optimizer>,
        values: impl FnOnce() -> T,
    ) -> Result<()> {
        let disk = self.folder.is_some();
        self.put(Due { disk, memory: !disk }, step, optimizer, values)
    }

    /// Takes a snapshot, and brings it where it is due.
    fn put<T: Serialize>(
        &mut self,
        due: Due,
        step: u64,
        optimizer: Option<&mut Optimizer>,
        values: impl FnOnce() -> T,
    ) -> Result<()> {
        if due == (Due { disk: false, memory: false }) {
            return Ok(());
        }
        let program = program_values(values())?;
        let shared = Shared::clone(&self.shared);
        let mut reducer = reduce::lock(&shared)?;
        self.check_part(&mut reducer)?;
        if let Some(name) = reducer.pending() {
            return Err(Error::MidStep { name: name.to_owned() });
        }
        // Between two averagings the ranks' models differ.
        reducer.average()?;
        let averages = self.averages.clone();
        let mut averages = averages.as_deref().map(ema::lock).transpose()?;
        let mut beside = Beside { optimizer, averages: averages.as_deref_mut() };
        let mut tensors = gather(&mut reducer, &mut beside, Share::Saved)?;
        let (held, kept) = kept::gather(&reducer)?;
        tensors.extend(held);
        let ready_order = reducer.settled_order();
        let (of_optimizer, of_averages) = beside.numbers(&reducer);
        let mut saved =
            Values { ready_order, optimizer: of_optimizer, averages: of_averages, kept, program };
        parts::merge(&mut reducer.store, &mut saved)?;
        drop((reducer, averages));
        let rooms = content::rooms(&tensors);
        let mut snapshot = Snapshot::new();
        content::offer(&mut snapshot, &tensors, &rooms)?;
        snapshot.values(serde_json::to_value(&saved).unwrap_or_default());
        if due.disk {
            self.write(step, &snapshot)?;
        }
        if due.memory {
            self.keep(step, &snapshot)?;
        }
        Ok(())
    }

    /// An error where the model has become a part of a larger one since.
    fn check_part(&self, reducer: &mut Reducer) -> Result<()> {
        if self.group.world_size() == reducer.store.everyone().world_size() {
            return Ok(());
        }
        let (setting, value) = ("Checkpointer", "made before Ddp::set_part".to_owned());
        Err(Error::BadSetting { setting, value, expected: "one that is made after it" })
    }

    fn write(&mut self, step: u64, snapshot: &Snapshot<'_>) -> Result<()> {
        let committing = recorder::committing();
        let started = self.saver.save(&mut OverGroup(&mut self.group), step, snapshot)?;
        if started == Started::Yes {
            self.committing = Some(committing);
            self.saved = Some(step);
        }
        Ok(())
    }

    fn keep(&mut self, step: u64, snapshot: &Snapshot<'_>) -> Result<()> {
        let Some(keeper) = &mut self.keeper else { return Ok(()) };
        match keeper.keep(&mut self.group, &mut self.saver, (step, snapshot))? {
            Ok(()) => {}
            Err(NotKept { rank, reason }) if self.on_error == OnError::Fail => {
                let error = phalanx_checkpoint::Error::SaveFailed { step, rank, reason };
                return Err(Error::Checkpoint(Box::new(error)));
            }
            Err(NotKept { rank, reason }) if self.group.rank() == 0 => {
                tracing::warn!(
                    "snapshot of step {step} in memory: {reason} (rank {rank}); training goes on"
                );
            }
            Err(_) => {}
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

    /// The step that was saved last to the folder, or gone on from there.
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

/// What the launcher has for this rank; what cannot be opened is as if there were none.
fn slots_of_launcher() -> Option<Slots> {
    Slots::from_environment().unwrap_or_else(|error| {
        tracing::warn!(%error, "the launcher's memory for snapshots cannot be opened");
        None
    })
}

/// The program's own values, as they are saved.
fn program_values<T: Serialize>(values: T) -> Result<Value> {
    serde_json::to_value(values).map_err(|error| {
        let (what, reason) = ("the program's values".to_owned(), error.to_string());
        phalanx_checkpoint::Error::BadValue { what, reason }.into()
    })
}
