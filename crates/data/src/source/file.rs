//! A file read by `pread`.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::Advice;

use super::Source;
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct ReadFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) size: u64,
}

impl Source for ReadFile {
    fn name(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|cause| self.why(cause))
    }

    fn will_need(&self, range: Range<u64>) {
        let len = NonZeroU64::new(range.end - range.start);
        // Where the system cannot do that, nothing is lost.
        rustix::fs::fadvise(&self.file, range.start, len, Advice::WillNeed).ok();
    }
}

impl ReadFile {
    /// Why reading failed: cut off since it was opened, or what the system said.
    pub(super) fn why(&self, cause: std::io::Error) -> Error {
        let (path, expected) = (self.path.clone(), self.size);
        let actual = self.file.metadata().map_or(expected, |metadata| metadata.len());
        if actual < expected {
            return Error::WrongSize { path, expected, actual };
        }
        Error::Io { action: "read", path, cause }
    }
}
