//! A file system whose n-th operation fails.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use super::{Fs, Output, Source};

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The disk is full: this operation and all later writes fail.
    Full,
    /// An input/output error, once.
    Broken,
}

/// Another file system that fails at one operation; of a write that fails, half is written.
#[derive(Clone, Debug)]
pub struct Failing {
    inner: Arc<dyn Fs>,
    failure: Failure,
    left: Arc<AtomicUsize>,
}

impl Failing {
    /// Fails at operation `number`, counted from 0.
    pub fn new(inner: Arc<dyn Fs>, failure: Failure, number: usize) -> Self {
        Failing { inner, failure, left: Arc::new(AtomicUsize::new(number)) }
    }

    /// Whether the operation that fails was reached.
    pub fn has_failed(&self) -> bool {
        self.left.load(Ordering::SeqCst) == usize::MAX
    }

    fn step(&self, needs_space: bool) -> io::Result<()> {
        let before =
            self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| match left {
                usize::MAX => None,
                0 => Some(usize::MAX),
                more => Some(more - 1),
            });
        match (before, self.failure) {
            (Ok(0), Failure::Full) => Err(io::ErrorKind::StorageFull.into()),
            (Ok(0), Failure::Broken) => Err(io::Error::from_raw_os_error(5)),
            (Err(_), Failure::Full) if needs_space => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl Fs for Failing {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.step(true)?;
        self.inner.create_folder(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.step(true)?;
        Ok(Box::new(FailingFile { inner: self.inner.create(path)?, fs: self.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn Source>> {
        self.step(false)?;
        self.inner.open(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.step(false)?;
        self.inner.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(false)?;
        self.inner.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        self.inner.remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        self.inner.remove_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        self.inner.sync_folder(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.free_bytes(path)
    }
}

struct FailingFile {
    inner: Box<dyn Output>,
    fs: Failing,
}

impl Output for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.fs.step(true) {
            self.inner.write(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        self.inner.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.fs.step(false)?;
        self.inner.sync()
    }
}
