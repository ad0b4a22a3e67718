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
    /// As the file system of each file asks for: [`Map`](Self::Map) on a disk of this machine, [`Read`](Self::Read) on a network's (NFS,
    /// Lustre, GPFS, Ceph, CIFS, FUSE and others). Which it was is logged once, for each kind of file system of a network.
    #[default]
    Auto,
    /// `pread` into memory of the reading thread. Right for network filesystems.
    Read,
    /// A memory map: no copy. The first map installs a handler for `SIGBUS`: a file that somebody cuts off while it is mapped is
    /// an error, not the end of the process. A handler that your program installs later must pass on to the one before it.
    /// Bytes that somebody writes over after they were verified are not noticed.
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

/// Opens a file. A large data set has more shards than a process may have open by default: the limit is raised when it is met.
fn open_one_more(path: &Path) -> std::io::Result<File> {
    let too_many = rustix::io::Errno::MFILE.raw_os_error();
    match File::open(path) {
        Err(error) if error.raw_os_error() == Some(too_many) => {
            let mut limit = rustix::process::getrlimit(Resource::Nofile);
            limit.current = limit.maximum;
            rustix::process::setrlimit(Resource::Nofile, limit)?;
            File::open(path)
        }
        result => result,
    }
}

/// Opens a regular file.
pub(crate) fn open_file(path: &Path, access: Access) -> Result<Arc<dyn Source>> {
    let file = open_one_more(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("read the size of", path))?;
    if !metadata.is_file() {
        let cause = std::io::Error::other("not a regular file");
        return Err(Error::Io { action: "open", path: path.to_path_buf(), cause });
    }
    let file = ReadFile { path: path.to_path_buf(), file, size: metadata.len() };
    let is_mapped = match access {
        Access::Read => false,
        Access::Map => true,
        Access::Auto => is_local(&file),
    };
    // An empty file cannot be mapped.
    if is_mapped && file.size > 0 {
        return Ok(Arc::new(MappedFile::new(file)?));
    }
    Ok(Arc::new(file))
}

/// Whether a file lies on a disk of this machine.
fn is_local(file: &ReadFile) -> bool {
    // What cannot be asked is no disk of ours.
    let Ok(about) = rustix::fs::fstatfs(&file.file) else { return false };
    // Numbers above 2^31 may have got a sign on their way.
    let Ok(magic) = u32::try_from(about.f_type & 0xFFFF_FFFF) else { return false };
    let Some(name) = network_name(magic) else { return true };
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(name) {
        let path = file.path.display();
        tracing::info!(%path, "files on {name} are read, not mapped; choose with Access::Map or Access::Read");
    }
    false
}
