//! Saving in the background: a rank's share is copied, and training goes on while a thread writes it.
//!
//! What ranks tell each other is short and happens at calls that all make alike: one record each at a save (and the lists of tensors when
//! those have changed), one at each poll while a checkpoint is pending, nothing otherwise.

mod agree;
mod layouts;
mod options;
mod pending;
mod phase;
mod worker;

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::agree::{gather, Opening, Report, Status};
pub(crate) use self::layouts::Layouts;
pub use self::options::{OnBusy, OnError, Progress, SaverOptions, Started};
use self::pending::{prepare, Agreed, Pending};
use self::phase::{working, Failure, Next, Phase};
use self::worker::Worker;
use crate::buffer::Buffer;
use crate::folder::Target;
use crate::fs::{Fs, Real};
use crate::memory::{self, SnapshotShare};
use crate::plan::Held;
use crate::ranks::Ranks;
use crate::snapshot::Snapshot;
use crate::{Error, Result};

/// How long a rank waits for its own thread before it hears how the others are.
const ROUND: Duration = Duration::from_millis(500);

/// Saves the checkpoints of one rank of a training. All ranks have one, and make the same calls in the same order.
///
/// One training saves into a folder at a time. At most one checkpoint is being written; its memory, a copy of this rank's share, is kept for
/// the next. Dropped while one is pending, it is given up, and what was written of it is removed by the next save that succeeds.
#[derive(Debug)]
pub struct Saver {
    root: PathBuf,
    fs: Arc<dyn Fs>,
    options: SaverOptions,
    worker: Worker,
    /// What this rank held at its last save, and the plan that was made of it.
    layouts: Option<(Vec<Held>, Arc<Layouts>)>,
    /// The last file, kept so that its memory need not be touched anew.
    buffer: Buffer,
    pending: Option<Pending>,
    /// What polls that a save made have found.
    untold: VecDeque<Progress>,
    has_warned: bool,
}

impl Saver {
    /// Saves into a folder, which is made if it does not exist. Starts a thread.
    ///
    /// # Errors
    /// [`Error::Io`] when no thread can be started.
    pub fn new(folder: impl Into<PathBuf>, options: SaverOptions) -> Result<Self> {
        Self::with_fs(folder, options, Arc::new(Real))
    }

    /// As [`Saver::new`], on another file system.
    ///
    /// # Errors
    /// As [`Saver::new`].
    pub fn with_fs(
        folder: impl Into<PathBuf>,
        options: SaverOptions,
        fs: Arc<dyn Fs>,
    ) -> Result<Self> {
        Ok(Saver {
            root: folder.into(),
            fs,
            options,
            worker: Worker::start()?,
            layouts: None,
            buffer: Buffer::default(),
            pending: None,
            untold: VecDeque::new(),
            has_warned: false,
        })
    }

    /// Copies this rank's share of a snapshot and begins to write it. Collective.
    ///
    /// When it returns, the memory of the snapshot may change. The cost is the copy and one small collective; and waiting for a
    /// checkpoint that is not finished yet, unless [`OnBusy::Skip`] leaves this one out.
    ///
    /// # Errors
    /// Alike on all ranks: [`Error::OutOfStep`] for different steps; [`Error::Mismatch`], [`Error::Overlap`], [`Error::Hole`] for tensors that do
    /// not fit together; [`Error::SaveFailed`] for an earlier checkpoint ([`OnError::Fail`]), or when a rank's snapshot or values cannot be
    /// saved; [`Error::Late`]. And [`Error::Group`].
    pub fn save(
        &mut self,
        ranks: &mut dyn Ranks,
        step: u64,
        snapshot: &Snapshot<'_>,
    ) -> Result<Started> {
        if self.pending.is_some() && !self.make_room(ranks, step)? {
            return Ok(Started::Skipped);
        }
        let agreed = self.agree(ranks, step, snapshot)?;
        let (root, fs) = (self.root.clone(), Arc::clone(&self.fs));
        let target = Target { fs, root, step, nonce: agreed.nonce };
        let mut pending = Pending::new(target, agreed);
        pending.begin(&self.worker, ranks.rank(), snapshot, &mut self.buffer);
        self.pending = Some(pending);
        Ok(Started::Yes)
    }

    /// Hears how a pending checkpoint is; to be called by all ranks at every step. Collective only while one is pending, and then short.
    ///
    /// # Errors
    /// Alike on all ranks: [`Error::SaveFailed`] with [`OnError::Fail`]. And [`Error::Group`].
    pub fn poll(&mut self, ranks: &mut dyn Ranks) -> Result<Progress> {
        if let Some(progress) = self.untold.pop_front() {
            return Ok(progress);
        }
        self.collect(ranks.rank(), Duration::ZERO);
        self.round(ranks, false)
    }

    /// Waits until no checkpoint is pending: before a program ends. Collective.
    ///
    /// # Errors
    /// As [`Saver::poll`]; [`Error::Late`] on all ranks after [`SaverOptions::finish_timeout`], with the checkpoint still pending.
    pub fn finish(&mut self, ranks: &mut dyn Ranks) -> Result<Progress> {
        let started = Instant::now();
        loop {
            self.collect(ranks.rank(), ROUND.min(self.options.finish_timeout));
            let is_late = started.elapsed() >= self.options.finish_timeout;
            match self.round(ranks, is_late)? {
                Progress::Pending { .. } => {}
                Progress::Idle => return Ok(self.untold.pop_front().unwrap_or(Progress::Idle)),
                ended => return Ok(ended),
            }
        }
    }

    /// Copies this rank's share of a snapshot to `buffer`, whose content is lost, for a neighbour to keep: see
    /// [`Checkpoint::from_snapshots`]. Collective.
    ///
    /// # Errors
    /// As [`Saver::save`]; [`Error::Content`] on a rank whose memory cannot be copied.
    ///
    /// [`Checkpoint::from_snapshots`]: crate::Checkpoint::from_snapshots
    pub fn capture(
        &mut self,
        ranks: &mut dyn Ranks,
        step: u64,
        snapshot: &Snapshot<'_>,
        buffer: &mut Vec<u8>,
    ) -> Result<SnapshotShare> {
        let Agreed { layouts, nonce, values } = self.agree(ranks, step, snapshot)?;
        let (rank, world_size) = (ranks.rank(), ranks.world_size());
        buffer.resize(layouts.bytes_of(rank)?, 0);
        layouts.fill(rank, snapshot, buffer)?;
        let about = memory::About { step, nonce, rank };
        memory::describe(&layouts, about, (values.all, values.rank), buffer)?;
        Ok(SnapshotShare { step, nonce, rank, world_size })
    }

    /// Whether a checkpoint is being written.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Waits for the pending checkpoint, or says that there is no room.
    fn make_room(&mut self, ranks: &mut dyn Ranks, step: u64) -> Result<bool> {
        self.collect(ranks.rank(), Duration::ZERO);
        let mut progress = self.round(ranks, false)?;
        if let Progress::Pending { step: before } = progress {
            if self.options.on_busy == OnBusy::Skip {
                return Ok(false);
            }
            if !self.has_warned && ranks.rank() == 0 {
                tracing::warn!(
                    "step {step} waits for the checkpoint of step {before}: writing one takes longer than the steps between two"
                );
            }
            self.has_warned = true;
            progress = self.finish(ranks)?;
        }
        self.untold.push_back(progress);
        Ok(true)
    }

    /// Compares steps and tensors with the other ranks.
    fn agree(
        &mut self,
        ranks: &mut dyn Ranks,
        step: u64,
        snapshot: &Snapshot<'_>,
    ) -> Result<Agreed> {
        let mine = prepare(snapshot);
        let is_known = |held: &Vec<Held>| {
            self.layouts.as_ref().is_some_and(|(before, layouts)| {
                before == held && layouts.files.len() == ranks.world_size()
            })
        };
        let opening = Opening {
            step,
            is_new: mine.as_ref().is_ok_and(|(held, _)| !is_known(held)),
            nonce: RandomState::new().hash_one(step),
            trouble: mine.as_ref().err().map(ToString::to_string),
        };
        let openings = gather(ranks, &opening)?;
        agree::check(&openings)?;
        let (held, values) = mine?;
        let nonce = openings.first().map_or(0, |first| first.nonce);
        if openings.iter().any(|one| one.is_new) {
            // Should this fail, it does on all ranks, and all begin anew.
            self.layouts = None;
            let layouts = Layouts::new(&gather(ranks, &held)?)?.for_rank(ranks.rank());
            self.layouts = Some((held, Arc::new(layouts)));
        }
        match &self.layouts {
            Some((_, layouts)) => Ok(Agreed { layouts: Arc::clone(layouts), nonce, values }),
            None => Err(Error::OutOfStep { reason: "there is no plan".to_owned() }),
        }
    }

    /// Takes what the thread has done, if it has by then.
    fn collect(&mut self, rank: usize, limit: Duration) {
        let Some(pending) = &mut self.pending else { return };
        if pending.status != Status::Working || !pending.phase.concerns(rank) {
            return;
        }
        if let Some(buffer) = pending.take(self.worker.wait(limit)) {
            self.buffer = buffer;
        }
    }

    /// Tells the others how far this rank is, and takes the step that all take.
    fn round(&mut self, ranks: &mut dyn Ranks, is_late: bool) -> Result<Progress> {
        let Some(pending) = &mut self.pending else { return Ok(Progress::Idle) };
        let step = pending.target.step;
        let reports = gather(ranks, &Report { status: pending.status.clone(), is_late })?;
        let (rank, keep) = (ranks.rank(), self.options.keep);
        match pending.phase.next(&reports) {
            Next::Wait(is_cancelled) => {
                pending.is_cancelled.store(is_cancelled, Ordering::Relaxed);
                if reports.iter().any(|report| report.is_late) {
                    let (waited, late) = (self.options.finish_timeout, working(&reports));
                    return Err(Error::Late { step, waited, late });
                }
            }
            Next::Commit => {
                let all = gather(ranks, &pending.report())?;
                pending.commit(&self.worker, rank, all, keep);
            }
            Next::Abandon(failure) => {
                pending.abandon(&self.worker, rank, Phase::Abandoning(failure));
            }
            Next::Saved => {
                let path = pending.path();
                self.pending = None;
                return Ok(Progress::Saved { step, path });
            }
            Next::Failed(failure) => {
                self.pending = None;
                return self.failed(rank, step, failure);
            }
        }
        Ok(Progress::Pending { step })
    }

    fn failed(&self, rank: usize, step: u64, failure: Failure) -> Result<Progress> {
        let Failure { rank: culprit, reason } = failure;
        if self.options.on_error == OnError::Fail {
            return Err(Error::SaveFailed { step, rank: culprit, reason });
        }
        if rank == 0 {
            tracing::warn!(
                "checkpoint of step {step}: {reason} (rank {culprit}); training goes on"
            );
        }
        Ok(Progress::Failed { step, rank: culprit, reason })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Some(pending) = &self.pending {
            pending.is_cancelled.store(true, Ordering::Relaxed);
        }
    }
}
