//! Files of this machine.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::Resource;
use serde::{Deserialize, Serialize};

use super::file::ReadFile;
use super::filesystem::network_name;
use super::map::MappedFile;
use super::{Folder, Source};
use crate::error::{Error, Result};

/// How files are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// As the file system of each file asks for: [`Map`](Self::Map) on a disk of this machine,
    /// [`Read`](Self::Read) on a network's (NFS, Lustre, GPFS, Ceph, CIFS, FUSE and others). Which
    /// it was is logged once, for each kind of file system of a network.
    #[default]
    Auto,
    /// `pread` into memory of the reading thread. Right for network filesystems.
    Read,
    /// A memory map: no copy. The first map installs a handler for `SIGBUS`: a file that somebody
    /// cuts off while it is mapped is an error, not the end of the process. A handler that your
    /// program installs later must pass on to the one before it. Bytes that somebody writes over
    /// after they were verified are not noticed.
    Map,
}

/// A folder of this machine.
#[derive(Clone, Debug)]
pub struct LocalFolder {
    path: PathBuf,
    access: Access,
}

impl LocalFolder {
    /// The folder `path`, whose files are read as `access` says.
    pub fn new(path: &Path, access: Access) -> Self {
        LocalFolder { path: path.to_path_buf(), access }
    }
}

impl Folder for LocalFolder {
    fn name(&self) -> &Path {
        &self.path
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        open_file(&self.path.join(name), self.access)
    }
}

/// Opens one file more. A large data set has more shards than a process may have open by default:
/// the limit is raised when it is met.
pub(super) fn one_more<T>(open: impl Fn() -> std::io::Result<T>) -> std::io::Result<T> {
    let too_many = rustix::io::Errno::MFILE.raw_os_error();
    match open() {
        Err(error) if error.raw_os_error() == Some(too_many) => {
            let mut limit = rustix::process::getrlimit(Resource::Nofile);
            limit.current = limit.maximum;
            rustix::process::setrlimit(Resource::Nofile, limit)?;
            open()
        }
        result => result,
    }
}

/// Opens a regular file.
pub(crate) fn open_file(path: &Path, access: Access) -> Result<Arc<dyn Source>> {
    let file = one_more(|| File::open(path)).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("read the size of", path))?;
    if !metadata.is_file() {
        let cause = std::io::Error::other("not a regular file");
        return Err(Error::Io { action: "open", path: path.to_path_buf(), cause });
    }
    let file = ReadFile { path: path.to_path_buf(), file, size: metadata.len() };
    let is_mapped = match access {
        Access::Read => false,
        Access::Map => true,
        Access::Auto => is_local(magic(&file.file), path),
    };
    // An empty file cannot be mapped.
    if is_mapped && file.size > 0 {
        return Ok(Arc::new(MappedFile::new(file)?));
    }
    Ok(Arc::new(file))
}

/// The number of a file's file system, if the system tells.
fn magic(file: &File) -> Option<u32> {
    let about = rustix::fs::fstatfs(file).ok()?;
    // Numbers above 2^31 may have got a sign on their way.
    u32::try_from(about.f_type & 0xFFFF_FFFF).ok()
}

/// Whether a file lies on a disk of this machine. Where the system does not say, the answer is no.
fn is_local(magic: Option<u32>, path: &Path) -> bool {
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let Some(magic) = magic else { return false };
    let Some(name) = network_name(magic) else { return true };
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(name) {
        let path = path.display();
        tracing::info!(%path, "files on {name} are read, not mapped; choose with Access::Map or Access::Read");
    }
    false
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tracing::{span, Event, Metadata, Subscriber};

    use super::*;

    /// Counts what is logged.
    struct Counting(Arc<AtomicUsize>);

    impl Subscriber for Counting {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }

        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

        fn event(&self, _: &Event<'_>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn enter(&self, _: &span::Id) {}

        fn exit(&self, _: &span::Id) {}
    }

    #[test]
    fn files_of_a_network_are_read_and_that_is_said_once_for_each_kind() {
        let said = Arc::<AtomicUsize>::default();
        tracing::subscriber::with_default(Counting(Arc::clone(&said)), || {
            let path = Path::new("f");
            for (magic, count) in [(0x7375_7245, 1), (0x7375_7245, 1), (0x564C, 2), (0x564C, 2)] {
                assert!(!is_local(Some(magic), path));
                assert_eq!(said.load(Ordering::SeqCst), count);
            }
            assert!(is_local(Some(0xEF53), path) && !is_local(None, path));
            assert_eq!(said.load(Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn a_file_is_mapped_where_its_file_system_is_local() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, [7; 100]).unwrap();
        let is_mapped = |access| open_file(&path, access).unwrap().mapped().is_some();
        let number = magic(&File::open(&path).unwrap()).expect("the system tells");
        assert_eq!(is_mapped(Access::default()), network_name(number).is_none());
        assert!(is_mapped(Access::Map) && !is_mapped(Access::Read));
        std::fs::write(&path, []).unwrap();
        assert_eq!(open_file(&path, Access::Auto).unwrap().size(), 0);
    }
}
