//! The thread that writes, so that training need not wait for a disk.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::folder::{tidy, Keep, Target};
use crate::manifest::Manifest;
use crate::{Error, Result};

/// The thread looks up so often when there is nothing to do; it has no other reason to wake.
const IDLE: Duration = Duration::from_secs(3600);

/// Something to do.
pub(super) enum Job {
    /// Write a shard.
    Write {
        target: Target,
        name: String,
        bytes: Buffer,
        needed: u64,
        is_cancelled: Arc<AtomicBool>,
    },
    /// Make a checkpoint of what was written, then remove what is not kept.
    Commit { target: Target, manifest: Box<Manifest>, keep: Keep },
    /// Remove what was written.
    Abandon { target: Target },
}

/// What came of it.
pub(super) enum Done {
    /// The checksums, and the buffer back.
    Written(Result<Vec<u32>>, Buffer),
    Committed(Result<()>),
    Abandoned,
}

/// The writing thread of one rank. It ends when this is dropped and its job is done.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

impl Worker {
    pub(super) fn start() -> Result<Self> {
        let ((jobs, incoming), (outgoing, done)) = (channel(), channel());
        std::thread::Builder::new()
            .name("phalanx-checkpoint".to_owned())
            .spawn(move || work(&incoming, &outgoing))
            .map_err(Error::io("start a thread for", std::path::Path::new("checkpoints")))?;
        Ok(Worker { jobs, done })
    }

    /// Hands a job over; whether there is somebody to take it.
    pub(super) fn send(&self, job: Job) -> bool {
        self.jobs.send(job).is_ok()
    }

    /// What came of the job, if it is done within so long.
    pub(super) fn wait(&self, limit: Duration) -> std::result::Result<Done, RecvTimeoutError> {
        self.done.recv_timeout(limit)
    }
}

fn work(jobs: &Receiver<Job>, done: &Sender<Done>) {
    loop {
        match jobs.recv_timeout(IDLE) {
            Ok(job) => {
                if done.send(job.run()).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Job {
    fn run(self) -> Done {
        match self {
            Job::Write { target, name, bytes, needed, is_cancelled } => {
                let written = target.write_shard(&name, &bytes, needed, &is_cancelled);
                Done::Written(written, bytes)
            }
            Job::Commit { target, manifest, keep } => {
                let committed = target.commit(&manifest);
                if committed.is_ok() {
                    for problem in tidy(&target, &keep) {
                        tracing::warn!("an old checkpoint stays: {problem}");
                    }
                }
                Done::Committed(committed.map(drop))
            }
            Job::Abandon { target } => {
                if let Err(problem) = target.abandon() {
                    tracing::warn!("left of a checkpoint that failed: {problem}");
                }
                Done::Abandoned
            }
        }
    }
}
