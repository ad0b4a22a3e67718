//! A mapped file that may be cut off: the reader gets an error, the process lives.
//!
//! A page behind the end of a file that became shorter faults; the handler of `sigbus.rs` puts
//! zeros there and marks the map. Who has read from the map asks afterwards whether what it saw was
//! real:
//!
//! 1. It touches the last byte. If the file was cut anywhere before the last page, that page is
//!    gone, and the touch faults. The kernel takes the pages away before it fills the rest of the
//!    new last page with zeros, so zeros that were read are always noticed.
//! 2. It looks at the map's mark.
//! 3. For bytes in the last page it asks the system for the file's size.
//!
//! Cost where nothing is wrong: two loads.
//! Source: Linux, `truncate_pagecache` in mm/truncate.c.
#![expect(unsafe_code, reason = "memory-mapping a file is unsafe: somebody else may change it")]

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{compiler_fence, fence, Ordering};

use memmap2::{Advice, Mmap};

use super::file::ReadFile;
use super::sigbus::{self, MapGuard};
use super::Source;
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct MappedFile {
    /// Dropped before the map: the handler must not touch memory that may be somebody else's by
    /// then.
    guard: MapGuard,
    map: Mmap,
    file: ReadFile,
    last_page: u64,
}

impl MappedFile {
    pub(super) fn new(file: ReadFile) -> Result<Self> {
        let mut options = memmap2::MmapOptions::new();
        options.len(to_usize(file.size));
        // SAFETY: the map is only read, as plain bytes. Prepared files are renamed into place and
        // never written again. If somebody cuts one off, `sigbus` keeps the process alive and
        // `check_mapped` says so.
        let map = unsafe { options.map(&file.file) }.map_err(Error::io("map", &file.path))?;
        let guard = sigbus::guard(&map).map_err(Error::io("guard the map of", &file.path))?;
        let page = to_u64(sigbus::page_bytes());
        let last_page = (file.size - 1) / page * page;
        Ok(MappedFile { guard, map, file, last_page })
    }

    fn cut_off(&self) -> Error {
        self.file.why(std::io::Error::other(
            "pages of its memory map were gone (SIGBUS): it was cut off, or its storage failed",
        ))
    }
}

impl Source for MappedFile {
    fn name(&self) -> &Path {
        &self.file.path
    }

    fn size(&self) -> u64 {
        self.file.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_at(offset, out)
    }

    fn will_need(&self, range: Range<u64>) {
        let (start, len) = (to_usize(range.start), to_usize(range.end - range.start));
        // Where the system cannot do that, nothing is lost.
        drop(self.map.advise_range(Advice::WillNeed, start, len));
    }

    #[inline]
    fn mapped(&self) -> Option<&[u8]> {
        Some(&self.map)
    }

    #[inline]
    fn check_mapped(&self, range: Range<u64>) -> Result<()> {
        // What was read before is read before what follows, by the compiler and by the processor.
        fence(Ordering::Acquire);
        if let Some(last) = self.map.last() {
            // SAFETY: `last` is a reference into the map, which lives as long as `self`.
            unsafe { std::ptr::read_volatile(last) };
        }
        compiler_fence(Ordering::SeqCst);
        if self.guard.is_cut_off() {
            return Err(self.cut_off());
        }
        if range.end > self.last_page {
            let (path, expected) = (&self.file.path, self.file.size);
            let metadata = self.file.file.metadata();
            // The path is copied only where something is wrong.
            let metadata = metadata.map_err(|cause| Error::io("read the size of", path)(cause))?;
            let actual = metadata.len();
            if actual < expected {
                return Err(Error::WrongSize { path: path.clone(), expected, actual });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::{Duration, Instant};

    use super::super::local::{open_file, Access};
    use super::*;

    /// How many pages of a part of a file lie in memory.
    fn resident(file: &File, range: Range<u64>) -> u64 {
        let mut options = memmap2::MmapOptions::new();
        options.offset(range.start).len(to_usize(range.end - range.start));
        // SAFETY: nobody writes to the file, and the map is not read.
        let map = unsafe { options.map(file) }.expect("a map");
        let mut pages = vec![0_u8; map.len().div_ceil(sigbus::page_bytes())];
        let (start, pages_start) = (map.as_ptr().cast_mut().cast(), pages.as_mut_ptr());
        // SAFETY: the map has so many bytes, and `pages` a byte for each of its pages.
        let result = unsafe { libc::mincore(start, map.len(), pages_start) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        pages.iter().map(|page| u64::from(page & 1)).sum()
    }

    #[test]
    fn what_will_be_needed_is_fetched_from_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 16 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let (part, rest) = (4 << 20..6 << 20, 12 << 20..16 << 20);
        let pages = (2 << 20) / to_u64(sigbus::page_bytes());
        for access in [Access::Map, Access::Read] {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            if resident(&file, rest.clone()) > 0 {
                println!("skipped: this file system keeps its files in memory");
                return;
            }
            let source = open_file(&path, access).unwrap();
            source.will_need(part.clone());
            let started = Instant::now();
            while resident(&file, part.clone()) < pages {
                let waited = started.elapsed();
                assert!(waited < Duration::from_secs(30), "{access:?}: not there after {waited:?}");
                std::thread::park_timeout(Duration::from_millis(1));
            }
            assert_eq!(resident(&file, rest.clone()), 0, "{access:?}: and not the rest");
        }
    }
}
