//! Reading ranges of a file: by `pread`, or through a memory map.
#![expect(unsafe_code, reason = "memory-mapping a file is unsafe: somebody else may change it")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// How files are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// `pread` into memory of the reading thread. A file that is cut off while it is open gives an error. Right for network
    /// filesystems and for data that somebody may touch.
    #[default]
    Read,
    /// A memory map: no copy. If somebody cuts the file off while it is mapped, the system kills the process (`SIGBUS`):
    /// for local data that nobody writes to.
    Map,
}

/// A file whose size was checked when it was opened.
#[derive(Debug)]
pub(crate) struct Bytes {
    path: PathBuf,
    len: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    File(File),
    Map(Mmap),
}

impl Bytes {
    /// Opens a file. If `expected_len` is given, any other size is an error.
    pub(crate) fn open(path: &Path, access: Access, expected_len: Option<u64>) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read the size of", path))?;
        let len = metadata.len();
        if !metadata.is_file() {
            let cause = std::io::Error::other("not a regular file");
            return Err(Error::Io { action: "open", path: path.to_path_buf(), cause });
        }
        if let Some(expected) = expected_len.filter(|&expected| expected != len) {
            return Err(Error::WrongSize { path: path.to_path_buf(), expected, actual: len });
        }
        let source = match access {
            Access::Read => Source::File(file),
            // An empty file cannot be mapped.
            Access::Map if len == 0 => Source::File(file),
            Access::Map => {
                // SAFETY: the map is only read, as plain bytes. Prepared files are renamed into place and never written
                // again; the documentation of `Access::Map` names what happens if somebody does.
                let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
                Source::Map(map)
            }
        };
        Ok(Bytes { path: path.to_path_buf(), len, source })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes from `offset`; they may lie in `scratch`.
    pub(crate) fn read<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let end = offset.checked_add(to_u64(len)).filter(|&end| end <= self.len);
        let Some(end) = end else {
            let expected = offset.saturating_add(to_u64(len));
            return Err(Error::WrongSize { path: self.path.clone(), expected, actual: self.len });
        };
        match &self.source {
            Source::Map(map) => Ok(&map[to_usize(offset)..to_usize(end)]),
            Source::File(file) => {
                if scratch.len() < len {
                    scratch.resize(len, 0);
                }
                let bytes = &mut scratch[..len];
                file.read_exact_at(bytes, offset).map_err(|cause| self.short(cause, file))?;
                Ok(bytes)
            }
        }
    }

    /// The bytes themselves where they are in memory and the range exists.
    pub(crate) fn mapped(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let Source::Map(map) = &self.source else { return None };
        let start = to_usize(offset);
        map.get(start..start.checked_add(len)?)
    }

    /// Why a read failed: cut off since it was opened, or what the system said.
    fn short(&self, cause: std::io::Error, file: &File) -> Error {
        let path = self.path.clone();
        let actual = file.metadata().map_or(self.len, |metadata| metadata.len());
        if actual < self.len {
            return Error::WrongSize { path, expected: self.len, actual };
        }
        Error::Io { action: "read", path, cause }
    }
}
