//! One of several processes does something, and the others wait for it, for a while.
//!
//! A file that its maker holds with `flock` while it works, and removes when it is done; the system
//! lets go of it when the maker dies. Who comes to hold a file that somebody else has removed
//! meanwhile may not be the only one: then the work is done twice, which costs time and nothing
//! else.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer than a block takes from any server that is worth waiting for: 1 MiB at 2 Mbit/s.
const WAIT: Duration = Duration::from_secs(5);

/// `flock` cannot wait with a deadline; to ask so often costs nothing, and a block takes as long
/// from the fastest server.
const POLL: Duration = Duration::from_millis(5);

const EXTENSION: &str = "new";

/// What a file of that kind is called behind the name of what is made.
pub(super) fn name(of: &str) -> String {
    format!("{of}.{EXTENSION}")
}

/// The right to do something alone, until it is dropped.
#[derive(Debug)]
pub(super) struct Only {
    path: PathBuf,
    _file: File,
}

impl Only {
    /// Waits until nobody else has the file at `path`. `None`: that took too long, or there can be
    /// no such file; then everybody does the work.
    pub(super) fn take(path: &Path) -> Option<Self> {
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).read(true).write(true).open(path).ok()?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Some(Only { path: path.to_path_buf(), _file: file }),
                Err(TryLockError::WouldBlock) if started.elapsed() < WAIT => {}
                Err(TryLockError::WouldBlock) => return None,
                Err(TryLockError::Error(_)) => {
                    drop(fs::remove_file(path));
                    return None;
                }
            }
            std::thread::park_timeout(POLL);
        }
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// Removes what dead processes have left of such files: those that nobody holds.
pub(super) fn remove_left_over(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !entry.file_name().to_str().is_some_and(is_ours) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() {
            drop(fs::remove_file(&path));
        }
    }
}

/// Whether a name is `<fingerprint>.<of>.new`.
fn is_ours(name: &str) -> bool {
    let Some((of, EXTENSION)) = name.rsplit_once('.') else { return false };
    let is_fingerprint =
        |text: &str| text.len() == 16 && text.bytes().all(|c| c.is_ascii_hexdigit());
    of.split_once('.').is_some_and(|(first, rest)| is_fingerprint(first) && !rest.contains('.'))
}
