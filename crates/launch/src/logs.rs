//! Files that a run leaves. What is there already is another run's, which may have the same name: it stays as it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::error::LaunchError;
use crate::report::RankFailure;

/// Runs of one name whose files are told apart.
const NAMES_MAX: u32 = 10_000;

/// Makes `stem` + `suffix` in `folder` with `create`, or, where that is there, `stem-2` + `suffix` and so on.
pub(crate) fn create_beside<T>(
    folder: &Path,
    stem: &str,
    suffix: &str,
    create: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    let mut path = folder.join(format!("{stem}{suffix}"));
    for number in 2..=NAMES_MAX {
        match create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                path = folder.join(format!("{stem}-{number}{suffix}"));
            }
            made => return made.map(|made| (made, path)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The folder of this run, if one was asked for.
pub(crate) struct Logs {
    dir: Option<PathBuf>,
}

impl Logs {
    /// Makes a new folder for the run in `parent`.
    pub(crate) fn create(parent: Option<&Path>, run_id: &str) -> Result<Self, LaunchError> {
        let Some(parent) = parent else { return Ok(Self { dir: None }) };
        let path = parent.join(run_id);
        // The name may have folders in it.
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(log_failed(&path, io::ErrorKind::InvalidFilename.into()));
        };
        let create = |free: &Path| fs::create_dir(free);
        let made = fs::create_dir_all(folder)
            .and_then(|()| create_beside(folder, &name.to_string_lossy(), "", create));
        let ((), dir) = made.map_err(|source| log_failed(&path, source))?;
        Ok(Self { dir: Some(dir) })
    }

    /// Uses the folder that the launcher of node 0 has named; it is there already where the nodes share `parent`.
    pub(crate) fn join(parent: Option<&Path>, folder: &str) -> Result<Self, LaunchError> {
        let dir = parent.map(|parent| parent.join(folder));
        if let Some(dir) = &dir {
            fs::create_dir_all(dir).map_err(|source| log_failed(dir, source))?;
        }
        Ok(Self { dir })
    }

    /// The folder's path within `parent`.
    pub(crate) fn folder(&self, parent: Option<&Path>) -> Option<String> {
        let folder = self.dir.as_ref()?.strip_prefix(parent?).ok()?;
        Some(folder.to_string_lossy().into_owned())
    }

    /// The folder of an attempt: that of the run for the first one, a folder in it for each later one.
    pub(crate) fn of_attempt(&self, number: u32) -> Result<Self, LaunchError> {
        let Some(run) = &self.dir else { return Ok(Self { dir: None }) };
        let dir = if number == 0 { run.clone() } else { run.join(format!("attempt-{number}")) };
        // Nodes may share it.
        fs::create_dir_all(&dir).map_err(|source| log_failed(&dir, source))?;
        Ok(Self { dir: Some(dir) })
    }

    /// Where the ranks' operations are put side by side when the job fails.
    pub(crate) fn lineup(&self, run_id: &str, host: &str) -> PathBuf {
        match &self.dir {
            Some(dir) => dir.join(format!("flight-{host}.txt")),
            None => std::env::temp_dir().join(format!("phalanx-{run_id}-flight-{host}.txt")),
        }
    }

    /// A new file for what a rank says, and its path.
    pub(crate) fn of_rank(&self, rank: usize) -> Result<Option<(File, PathBuf)>, LaunchError> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let create = |free: &Path| OpenOptions::new().write(true).create_new(true).open(free);
        let made = create_beside(dir, &format!("rank{rank}"), ".log", create);
        made.map(Some).map_err(|source| log_failed(dir, source))
    }

    /// Appends the failure of an attempt, which had come to `step`, in one write, so that several launchers may share the
    /// file.
    pub(crate) fn record(&self, failure: &RankFailure, attempt: u32, step: Option<u64>) {
        let Some(dir) = &self.dir else { return };
        let path = dir.join("errors.jsonl");
        let mut record = failure.to_value();
        record["attempt"] = attempt.into();
        record["step"] = step.into();
        let line = format!("{record}\n");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            tracing::warn!(path = %path.display(), %error, "the failure could not be recorded");
        }
    }
}

fn log_failed(path: &Path, source: io::Error) -> LaunchError {
    LaunchError::Log { path: path.display().to_string(), source }
}
