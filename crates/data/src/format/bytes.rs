//! Ranges of a source whose size was checked when it was opened.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::source::{open_file, Access, Source};

/// A source and its size.
#[derive(Clone, Debug)]
pub(crate) struct SizedSource {
    source: Arc<dyn Source>,
    len: u64,
}

impl SizedSource {
    /// Opens a file of this machine. If `expected_len` is given, any other size is an error.
    pub(crate) fn open(path: &Path, access: Access, expected_len: Option<u64>) -> Result<Self> {
        Self::of(open_file(path, access)?, expected_len)
    }

    /// A source that is open. If `expected_len` is given, any other size is an error.
    pub(crate) fn of(source: Arc<dyn Source>, expected_len: Option<u64>) -> Result<Self> {
        let len = source.size();
        if let Some(expected) = expected_len.filter(|&expected| expected != len) {
            let path = source.name().to_path_buf();
            return Err(Error::WrongSize { path, expected, actual: len });
        }
        Ok(SizedSource { source, len })
    }

    pub(crate) fn path(&self) -> &Path {
        self.source.name()
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes from `offset`; they may lie in `scratch`. When they were used,
    /// [`check`](Self::check) says whether they were the file's.
    pub(crate) fn read<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        if offset.checked_add(to_u64(len)).is_none_or(|end| end > self.len) {
            return Err(self.short(offset, len));
        }
        if let Some(all) = self.source.mapped() {
            let start = to_usize(offset);
            return all.get(start..start + len).ok_or_else(|| self.short(offset, len));
        }
        if scratch.len() < len {
            scratch.resize(len, 0);
        }
        self.source.read_at(offset, &mut scratch[..len])?;
        Ok(&scratch[..len])
    }

    /// All bytes.
    pub(crate) fn read_all(&self) -> Result<Vec<u8>> {
        let mut scratch = Vec::new();
        let bytes = self.read(0, to_usize(self.len), &mut scratch)?.to_vec();
        self.check(0..self.len)?;
        Ok(bytes)
    }

    /// To be called when bytes were used: a mapped file may have been cut off meanwhile.
    #[inline]
    pub(crate) fn check(&self, range: Range<u64>) -> Result<()> {
        self.source.check_mapped(range)
    }

    /// Has a range fetched that will be read soon.
    pub(crate) fn will_need(&self, range: Range<u64>) {
        let end = range.end.min(self.len);
        if range.start < end {
            self.source.will_need(range.start..end);
        }
    }

    /// Lets go of local copies. `true`: reading again may give other bytes.
    pub(crate) fn forget(&self, range: Range<u64>) -> bool {
        self.source.forget(range)
    }

    /// The bytes themselves where they are in memory and the range exists.
    #[inline]
    pub(crate) fn mapped(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = to_usize(offset);
        self.source.mapped()?.get(start..start.checked_add(len)?)
    }

    /// A small array from `offset`.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        if offset.checked_add(to_u64(N)).is_none_or(|end| end > self.len) {
            return Err(self.short(offset, N));
        }
        let mut array = [0; N];
        match self.mapped(offset, N) {
            Some(bytes) => {
                array.copy_from_slice(bytes);
                self.check(offset..offset + to_u64(N))?;
            }
            None => self.source.read_at(offset, &mut array)?,
        }
        Ok(array)
    }

    fn short(&self, offset: u64, len: usize) -> Error {
        let expected = offset.saturating_add(to_u64(len));
        Error::WrongSize { path: self.path().to_path_buf(), expected, actual: self.len }
    }
}
