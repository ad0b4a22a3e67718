//! A folder of checkpoints: what is in it, and which is the newest.
//!
//! There is no file that names the latest one, which a crash could leave pointing at nothing: the newest is the one with the highest
//! step whose manifest is whole and whose files have their sizes.

mod commit;
mod keep;
mod names;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use commit::{ensure_folder, parent_of, tidy, Target};
pub use keep::Keep;
use names::Kind;

use crate::fs::{Fs, Real};
use crate::ranks::{all_gather, Ranks};
use crate::{Checkpoint, Error, Result};

/// A folder of checkpoints.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
    fs: Arc<dyn Fs>,
}

/// A checkpoint in a folder, or what is left of one.
#[derive(Debug)]
pub struct Listed {
    /// Its step.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// What can be done with it.
    pub state: State,
}

/// What can be done with something in a folder of checkpoints.
#[derive(Debug)]
#[non_exhaustive]
pub enum State {
    /// It can be read; its blocks are compared when they are.
    Complete(Box<Checkpoint>),
    /// Its manifest or a file is not what it should be.
    Damaged(Error),
    /// It was being written, or removed, when that ended. The next save that succeeds removes it.
    Incomplete,
}

impl Folder {
    /// The folder with this path. It need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self::with_fs(root, Arc::new(Real))
    }

    /// As [`Folder::new`], on another file system.
    pub fn with_fs(root: impl Into<PathBuf>, fs: Arc<dyn Fs>) -> Self {
        Folder { root: root.into(), fs }
    }

    /// Everything in it that is a checkpoint or was to be one, oldest first. Reads the manifests.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be listed. One that does not exist is empty.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let found = self.names()?.into_iter().map(|(step, kind, name)| {
            let path = self.root.join(name);
            let state = match kind {
                Kind::Partial => State::Incomplete,
                Kind::Replaced | Kind::Complete => match Checkpoint::open_with(&path, &*self.fs) {
                    Ok(checkpoint) => State::Complete(Box::new(checkpoint)),
                    Err(error) => State::Damaged(error),
                },
            };
            Listed { step, path, state }
        });
        Ok(found.collect())
    }

    /// The newest checkpoint that can be read, if there is one. What is newer and cannot be read is named in a warning.
    ///
    /// Its blocks are not compared: that happens when they are read. Should one be damaged, [`Folder::newest_before`] has the next.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be listed.
    pub fn newest(&self) -> Result<Option<Checkpoint>> {
        Ok(self.newest_up_to(u64::MAX)?.map(|(_, checkpoint)| checkpoint))
    }

    /// As [`Folder::newest`], of those with a smaller step.
    ///
    /// # Errors
    /// As [`Folder::newest`].
    pub fn newest_before(&self, step: u64) -> Result<Option<Checkpoint>> {
        let Some(last) = step.checked_sub(1) else { return Ok(None) };
        Ok(self.newest_up_to(last)?.map(|(_, checkpoint)| checkpoint))
    }

    /// As [`Folder::newest`], the same on all ranks: rank 0 looks, the others open what it found. With `before`, only
    /// smaller steps count.
    ///
    /// # Errors
    /// As [`Folder::newest`]; [`Error::Group`]; [`Error::OutOfStep`] on all ranks when one cannot open it.
    pub fn newest_on_all(
        &self,
        ranks: &mut dyn Ranks,
        before: Option<u64>,
    ) -> Result<Option<Checkpoint>> {
        let last = before.map_or(Some(u64::MAX), |step| step.checked_sub(1));
        let found = match last.filter(|_| ranks.rank() == 0) {
            Some(last) => self.newest_up_to(last),
            None => Ok(None),
        };
        let told = match &found {
            Ok(Some((name, _))) => format!("+{name}"),
            Ok(None) => String::new(),
            Err(error) => format!("-{error}"),
        };
        let told = all_gather(ranks, told.as_bytes())?.swap_remove(0);
        let told = String::from_utf8_lossy(&told).into_owned();
        let mine = match (found, told.strip_prefix('+')) {
            (Err(error), _) => return Err(error),
            (Ok(None), Some(name)) => {
                Checkpoint::open_with(&self.root.join(name), &*self.fs).map(Some)
            }
            (Ok(found), _) => Ok(found.map(|(_, checkpoint)| checkpoint)),
        };
        if let Some(reason) = told.strip_prefix('-') {
            return Err(Error::OutOfStep { reason: format!("rank 0: {reason}") });
        }
        if_all_can(ranks, mine)
    }

    /// The newest up to a step, and its name.
    fn newest_up_to(&self, last: u64) -> Result<Option<(String, Checkpoint)>> {
        for (step, kind, name) in self.names()?.into_iter().rev() {
            if step > last {
                continue;
            }
            let path = self.root.join(&name);
            if kind == Kind::Partial {
                tracing::warn!("ignored {}: it is not complete", path.display());
                continue;
            }
            match Checkpoint::open_with(&path, &*self.fs) {
                Ok(checkpoint) => return Ok(Some((name, checkpoint))),
                Err(error) => tracing::warn!("ignored {}: {error}", path.display()),
            }
        }
        Ok(None)
    }

    /// Sorted by step; of one step the complete one last.
    fn names(&self) -> Result<Vec<(u64, Kind, String)>> {
        let names = match self.fs.list(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            names => names.map_err(Error::io("list", &self.root))?,
        };
        let known = names
            .into_iter()
            .filter_map(|name| names::parse(&name).map(|(step, kind)| (step, kind, name)));
        let mut known: Vec<_> = known.collect();
        known.sort();
        Ok(known)
    }
}

/// What this rank has opened, if all could; else an error on all.
fn if_all_can(
    ranks: &mut dyn Ranks,
    mine: Result<Option<Checkpoint>>,
) -> Result<Option<Checkpoint>> {
    let trouble = mine.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let troubles = all_gather(ranks, trouble.as_bytes())?;
    match troubles.iter().position(|text| !text.is_empty()) {
        Some(rank) if mine.is_ok() => {
            let reason = format!("rank {rank}: {}", String::from_utf8_lossy(&troubles[rank]));
            Err(Error::OutOfStep { reason })
        }
        _ => mine,
    }
}

/// Whether a path is a folder with a manifest.
pub(crate) fn is_checkpoint(path: &Path) -> bool {
    path.join(crate::manifest::FILE).is_file()
}
