//! A folder in memory, and one that is removed after use.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::source::{Folder, Source};

#[derive(Clone, Debug)]
pub(super) struct MemoryFolder(Vec<Arc<File>>);

#[derive(Debug)]
struct File {
    name: String,
    bytes: Vec<u8>,
    is_mapped: bool,
    reads: AtomicU64,
}

impl MemoryFolder {
    pub(super) fn new(files: &[(&str, &[u8])], is_mapped: bool) -> Self {
        let file = |&(name, bytes): &(&str, &[u8])| {
            Arc::new(File {
                name: name.to_owned(),
                bytes: bytes.to_vec(),
                is_mapped,
                reads: AtomicU64::new(0),
            })
        };
        MemoryFolder(files.iter().map(file).collect())
    }

    /// Of all files.
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|file| file.bytes.len()).sum()
    }

    /// Of one file.
    pub(super) fn size(&self, name: &str) -> u64 {
        self.find(name).map_or(0, |file| to_u64(file.bytes.len()))
    }

    /// How often a file was read.
    pub(super) fn reads(&self, name: &str) -> u64 {
        self.find(name).map_or(0, |file| file.reads.load(Ordering::Relaxed))
    }

    fn find(&self, name: &str) -> Option<&Arc<File>> {
        self.0.iter().find(|file| file.name == name)
    }
}

impl Folder for MemoryFolder {
    fn name(&self) -> &Path {
        Path::new("memory")
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        let missing = || Error::io("open", name.as_ref())(std::io::ErrorKind::NotFound.into());
        let file = self.find(name).ok_or_else(missing)?;
        Ok(Arc::<File>::clone(file))
    }
}

impl Source for File {
    fn name(&self) -> &Path {
        Path::new(&self.name)
    }

    fn size(&self) -> u64 {
        to_u64(self.bytes.len())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        // Who reads has compared the range with the size.
        out.copy_from_slice(&self.bytes[to_usize(offset)..][..out.len()]);
        Ok(())
    }

    fn version(&self) -> Option<String> {
        Some("1".to_owned())
    }

    fn mapped(&self) -> Option<&[u8]> {
        self.is_mapped.then_some(&self.bytes)
    }
}

/// A folder of this machine for one case.
pub(super) struct Temporary(PathBuf);

impl Temporary {
    /// `None`: there is no room, or no right, for temporary files.
    pub(super) fn new() -> Option<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("phalanx-fuzzing-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).ok()?;
        Some(Temporary(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
