//! The file system as checkpoints need it: few operations, so that a test can record them, or let any of them fail.

#[cfg(feature = "testing")]
mod crash;
mod direct;
#[cfg(feature = "testing")]
mod failing;
mod real;
#[cfg(feature = "testing")]
mod recording;

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

#[cfg(feature = "testing")]
pub use crash::CrashStates;
#[cfg(feature = "testing")]
pub use failing::{Failing, Failure};
pub use real::Real;
#[cfg(feature = "testing")]
pub use recording::Recording;

/// A file system. Names in folders are durable when the folder was synced, a file's bytes when the file was.
pub trait Fs: Debug + Send + Sync {
    /// Creates a folder in one that exists.
    ///
    /// # Errors
    /// What the system says; `AlreadyExists` when something has this name.
    fn create_folder(&self, path: &Path) -> io::Result<()>;

    /// Creates a file that does not exist.
    ///
    /// # Errors
    /// What the system says; `AlreadyExists` when something has this name.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;

    /// Opens a file for reading.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn Source>>;

    /// The names in a folder, sorted.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Gives something another name in the same folder, in one step. What has that name is replaced if it is a file.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder that holds nothing.
    ///
    /// # Errors
    /// What the system says.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// Bytes that may still be written.
    ///
    /// # Errors
    /// What the system says.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// A file that is being written.
pub trait Output: Send {
    /// Appends bytes.
    ///
    /// # Errors
    /// What the system says; some of the bytes may have been written.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes all bytes durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> io::Result<()>;
}

/// Bytes that are read: a file, or memory.
pub trait Source: Debug + Send + Sync {
    /// How many there are.
    ///
    /// # Errors
    /// What the system says.
    fn bytes(&self) -> io::Result<u64>;

    /// Reads from an offset until `out` is full.
    ///
    /// # Errors
    /// What the system says; `UnexpectedEof` when there are fewer bytes.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

impl Source for Vec<u8> {
    fn bytes(&self) -> io::Result<u64> {
        Ok(crate::cast::to_u64(self.len()))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        read_slice(self, offset, out)
    }
}

/// Reads from memory as from a file.
pub(crate) fn read_slice(bytes: &[u8], offset: u64, out: &mut [u8]) -> io::Result<()> {
    let start = crate::cast::to_usize(offset);
    let end = start.checked_add(out.len());
    match end.and_then(|end| bytes.get(start..end)) {
        Some(bytes) => {
            out.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
