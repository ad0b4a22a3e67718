//! Memory that processes share without a name: a `memfd`, sealed against shrinking, mapped by each.
//!
//! The file descriptor travels over a socket; when the last process is gone, so is the memory,
//! whichever way the processes ended.
#![expect(unsafe_code, reason = "mmap and the raw memory it gives")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{fcntl_add_seals, fstat, ftruncate, memfd_create, MemfdFlags, SealFlags};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

/// Page size of the smallest unit that is mapped. Larger pages divide evenly into regions anyway.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A shared, writable mapping of a whole memfd.
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

impl Mapping {
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
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

#[cfg(test)]
mod tests {
    use super::*;

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
