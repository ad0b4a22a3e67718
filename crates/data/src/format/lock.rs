//! One process prepares, the others wait.
//!
//! `flock` on a file beside the prepared folder: the system lets go of it when its holder dies,
//! however that happens.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// `flock` cannot wait with a deadline; asking so often costs nothing and delays nobody noticeably.
const POLL: Duration = Duration::from_millis(20);

/// The lock, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// The lock of those who write `output`: a hidden file beside it, which stays.
pub(crate) fn path_for(output: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(output.file_name().unwrap_or_default());
    name.push(".lock");
    output.with_file_name(name)
}

/// Takes the lock at `path`. Calls `waiting` once if somebody else holds it.
pub(crate) fn acquire(path: &Path, timeout: Duration, waiting: impl FnOnce()) -> Result<Lock> {
    let not_writable = |cause| Error::CacheNotWritable { path: path.to_path_buf(), cause };
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(not_writable)?;
    let started = Instant::now();
    let mut waiting = Some(waiting);
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(cause)) => return Err(not_writable(cause)),
            Err(TryLockError::WouldBlock) => {}
        }
        if let Some(tell) = waiting.take() {
            tell();
        }
        let waited = started.elapsed();
        if waited >= timeout {
            let (path, holder) = (path.to_path_buf(), holder(&mut file));
            return Err(Error::LockTimeout { path, holder, waited });
        }
        std::thread::park_timeout(POLL);
    }
    // Who holds it, for the message of those who wait in vain; the lock works without.
    if file.set_len(0).is_ok() {
        drop(write!(file, "{}", std::process::id()));
    }
    Ok(Lock { _file: file })
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match Read::by_ref(file).take(32).read_to_string(&mut text) {
        Ok(_) if !text.is_empty() => text,
        _ => "(unknown)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_too_long_learns_who_holds_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = acquire(&path, Duration::ZERO, || {}).unwrap();
        let mut told = false;
        let error = acquire(&path, Duration::from_millis(60), || told = true).unwrap_err();
        assert!(told);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(held);
        acquire(&path, Duration::ZERO, || panic!("nobody holds it")).unwrap();
    }
}
