//! A checkpoint on its way: what its ranks have agreed on, and how far this rank is.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::agree::{Status, Written};
use super::phase::Phase;
use super::worker::{Done, Job, Worker};
use super::Layouts;
use crate::buffer::Buffer;
use crate::folder::{Keep, Target};
use crate::manifest::{Manifest, Sums};
use crate::plan::Held;
use crate::snapshot::Snapshot;
use crate::Result;

/// What is said of a thread that has ended, which it does only by a panic.
const GONE: &str = "the thread that writes checkpoints has ended";

/// What ranks have agreed on before anything is copied.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) layouts: Arc<Layouts>,
    pub(super) nonce: u64,
    pub(super) values: Values,
}

/// The program's values as text.
#[derive(Clone, Debug)]
pub(super) struct Values {
    pub(super) all: Box<RawValue>,
    pub(super) rank: Box<RawValue>,
}

/// What a rank has to say of its snapshot: what it holds, and its values.
pub(super) fn prepare(snapshot: &Snapshot<'_>) -> Result<(Vec<Held>, Values)> {
    let (all, rank) = snapshot.both_values();
    let text = crate::manifest::values_text;
    let values = Values { all: text(all, "values")?, rank: text(rank, "values of this rank")? };
    Ok((snapshot.held()?, values))
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) target: Target,
    pub(super) phase: Phase,
    /// Of this rank in this phase.
    pub(super) status: Status,
    pub(super) is_cancelled: Arc<AtomicBool>,
    agreed: Agreed,
    sums: Vec<u32>,
}

impl Pending {
    pub(super) fn new(target: Target, agreed: Agreed) -> Self {
        let (phase, status) = (Phase::Writing, Status::Working);
        Pending { target, phase, status, is_cancelled: Arc::default(), agreed, sums: Vec::new() }
    }

    /// Copies this rank's share into a buffer and hands it to the thread.
    pub(super) fn begin(
        &mut self,
        worker: &Worker,
        rank: usize,
        snapshot: &Snapshot<'_>,
        buffer: &mut Buffer,
    ) {
        let layouts = &self.agreed.layouts;
        let filled = layouts.bytes_of(rank).and_then(|bytes| {
            buffer.resize(bytes);
            layouts.fill(rank, snapshot, buffer)
        });
        if let Err(error) = filled {
            // The others hear of it at the next poll.
            self.status = Status::Failed(error.to_string());
            return;
        }
        let job = Job::Write {
            target: self.target.clone(),
            name: layouts.file_name(rank),
            bytes: std::mem::take(buffer),
            needed: layouts.bytes(),
            is_cancelled: Arc::clone(&self.is_cancelled),
        };
        self.status = start(worker, job);
    }

    /// Takes what the thread has done; gives the buffer back if it is free.
    pub(super) fn take(
        &mut self,
        done: std::result::Result<Done, RecvTimeoutError>,
    ) -> Option<Buffer> {
        let (status, buffer) = match done {
            Ok(Done::Written(written, buffer)) => (self.written(written), Some(buffer)),
            Ok(Done::Committed(Err(error))) => (Status::Failed(error.to_string()), None),
            Ok(Done::Committed(Ok(())) | Done::Abandoned) => (Status::Done, None),
            Err(RecvTimeoutError::Timeout) => (Status::Working, None),
            Err(RecvTimeoutError::Disconnected) => (Status::Failed(GONE.to_owned()), None),
        };
        self.status = status;
        buffer
    }

    fn written(&mut self, written: Result<Vec<u32>>) -> Status {
        match written {
            Ok(sums) => {
                self.sums = sums;
                Status::Done
            }
            Err(error) => Status::Failed(error.to_string()),
        }
    }

    /// What this rank has written, for rank 0.
    pub(super) fn report(&mut self) -> Written {
        let crc32c = Sums(std::mem::take(&mut self.sums));
        Written { crc32c, rank_values: self.agreed.values.rank.clone() }
    }

    /// Rank 0 makes a checkpoint of what all have written; the others have nothing to do.
    pub(super) fn commit(&mut self, worker: &Worker, rank: usize, all: Vec<Written>, keep: Keep) {
        (self.phase, self.status) = (Phase::Committing, Status::Done);
        if rank == 0 {
            let (target, manifest) = (self.target.clone(), Box::new(self.manifest(all)));
            self.status = start(worker, Job::Commit { target, manifest, keep });
        }
    }

    fn manifest(&self, all: Vec<Written>) -> Manifest {
        let (sums, rank_values) = all.into_iter().map(|one| (one.crc32c, one.rank_values)).unzip();
        let Agreed { layouts, values, .. } = &self.agreed;
        let (files, tensors) = (layouts.file_entries(sums), layouts.tensor_entries(None));
        Manifest::new(self.target.step, files, tensors, values.all.clone(), rank_values)
    }

    /// Rank 0 removes what was written.
    pub(super) fn abandon(&mut self, worker: &Worker, rank: usize, phase: Phase) {
        (self.phase, self.status) = (phase, Status::Done);
        if rank == 0 {
            self.status = start(worker, Job::Abandon { target: self.target.clone() });
        }
    }

    /// Where it will be.
    pub(super) fn path(&self) -> PathBuf {
        self.target.complete()
    }
}

fn start(worker: &Worker, job: Job) -> Status {
    if worker.send(job) {
        Status::Working
    } else {
        Status::Failed(GONE.to_owned())
    }
}
