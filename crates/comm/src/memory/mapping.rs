//! Memory that processes share without a name: a `memfd`, sealed against shrinking, mapped by each.
//!
//! The file descriptor travels over a socket; when the last process is gone, so is the memory,
//! whichever way the processes ended.
//!
//! Beside it private memory in huge pages, where nobody of this machine shares it: for what another library moves by messages (the
//! kernel copies between processes page by page, and pages of 2 MiB make that up to twice as fast), and for ranks that are alone.
#![expect(unsafe_code, reason = "mmap and the raw memory it gives")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{fcntl_add_seals, fstat, ftruncate, memfd_create, MemfdFlags, SealFlags};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

/// Page size of the smallest unit that is mapped. Larger pages divide evenly into regions anyway.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A huge page of x86-64 and, with pages of 4 KiB, of aarch64.
const HUGE_BYTES: usize = 2 << 20;
/// From here on a huge page is worth what it wastes: messages of 64 KiB gain by it, and there are few regions.
const HUGE_BYTES_MIN: usize = 32 << 10;

/// A writable mapping: of a whole memfd, shared, or of memory of this process alone.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a mapping is plain memory; whoever dereferences its pointer answers for the access.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; the struct itself is never mutated.
unsafe impl Sync for Mapping {}

/// Makes a memfd of `bytes` (rounded up to pages, at least one), all zero.
pub(crate) fn create(name: &str, bytes: usize) -> std::io::Result<(OwnedFd, Mapping)> {
    let bytes = bytes.max(1).next_multiple_of(PAGE_BYTES);
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes as u64)?;
    // A peer that shrank the file would make every other rank's access a SIGBUS.
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let mapping = map(fd.as_fd(), bytes)?;
    Ok((fd, mapping))
}

/// Maps a peer's memfd, after checking that it is as large as the peer said.
pub(crate) fn open(fd: BorrowedFd<'_>, bytes: usize) -> std::io::Result<Mapping> {
    let bytes = bytes.max(1).next_multiple_of(PAGE_BYTES);
    let actual = fstat(fd)?.st_size;
    if usize::try_from(actual).ok() != Some(bytes) {
        let what = format!("a peer's shared memory has {actual} bytes, expected {bytes}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what));
    }
    map(fd, bytes)
}

fn map(fd: BorrowedFd<'_>, bytes: usize) -> std::io::Result<Mapping> {
    // SAFETY: a null hint lets the kernel choose the place, so no mapping of ours is replaced.
    let base = unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            fd,
            0,
        )
    }?;
    Ok(Mapping { base: base.cast(), bytes })
}

/// Memory of this process alone, all zero, in huge pages where it is long and the system has them.
pub(crate) fn private(bytes: usize) -> std::io::Result<Mapping> {
    use rustix::mm::{madvise, mmap_anonymous, Advice};

    let huge = bytes >= HUGE_BYTES_MIN;
    let unit = if huge { HUGE_BYTES } else { PAGE_BYTES };
    let bytes = bytes.max(1).next_multiple_of(unit);
    // One unit more than needed: inside lies what starts on a whole one.
    let reserved = bytes + unit - PAGE_BYTES;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a null hint lets the kernel choose the place, so no mapping of ours is replaced.
    let start =
        unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, access, MapFlags::PRIVATE) }?;
    let start = start.cast::<u8>();
    let before = start.align_offset(unit);
    let base = start.wrapping_add(before);
    let after = reserved - before - bytes;
    for (from, length) in [(start, before), (base.wrapping_add(bytes), after)] {
        if length > 0 {
            // SAFETY: a part of the mapping just made, in whole pages, that nobody knows of.
            unsafe { munmap(from.cast(), length) }?;
        }
    }
    if huge {
        // SAFETY: advice that changes no content. Where it is refused, small pages do as well.
        unsafe { madvise(base.cast(), bytes, Advice::LinuxHugepage) }.ok();
    }
    Ok(Mapping { base, bytes })
}

impl Mapping {
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Its length, in whole pages.
    #[cfg(feature = "mpi")]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of our own mmap, and the last owner is going.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "munmap of a region failed");
        }
    }
}

/// Copies between memories that callers have checked.
pub(crate) fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: both come from buffers of at least `bytes` bytes in their callers, which do not
    // overlap: one side is always a slot, a staging area, or a private buffer.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "mpi")]
    #[test]
    fn private_memory_is_zero_and_starts_on_a_page_of_its_kind() {
        for (bytes, unit) in [(1, PAGE_BYTES), (5000, PAGE_BYTES), (3 << 20, HUGE_BYTES)] {
            let memory = private(bytes).unwrap();
            assert!((memory.base() as usize).is_multiple_of(unit), "{bytes}");
            let last = memory.base().wrapping_add(bytes - 1);
            // SAFETY: the last byte asked for lies inside.
            assert_eq!(unsafe { last.read_volatile() }, 0);
            // SAFETY: as above.
            unsafe { last.write_volatile(1) };
        }
    }

    #[test]
    fn two_mappings_of_one_memfd_are_the_same_memory() {
        let (fd, ours) = create("test", 5000).unwrap();
        let theirs = open(fd.as_fd(), 5000).unwrap();
        assert_eq!(ours.bytes, 8192);
        // SAFETY: byte 4999 lies inside the mapping.
        unsafe { ours.base().wrapping_add(4999).write_volatile(7) };
        // SAFETY: as above.
        assert_eq!(unsafe { theirs.base().wrapping_add(4999).read_volatile() }, 7);
        assert!(open(fd.as_fd(), 9000).is_err(), "a lie about the length is refused");
        assert!(ftruncate(&fd, 0).is_err(), "sealed against shrinking");
    }
}
