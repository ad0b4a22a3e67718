//! A file system in memory that remembers what of it would survive a crash, after each operation.
//!
//! A file has the bytes that were synced and those that are there now; a folder the names that were synced and the changes since.
//! After a crash any of those changes may have happened or not, and a file may hold any of what was written to it
//! (see `crash.rs`). Source: Pillai et al., "All File Systems Are Not Created Equal" (ALICE), OSDI 2014.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{CrashStates, Fs, Output, Source};

/// The number of the folder `/`.
pub(super) const ROOT: usize = 0;

/// A file system in memory, empty at first. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    state: Arc<Mutex<History>>,
}

#[derive(Debug, Default)]
struct History {
    disk: Disk,
    /// The disk after each operation that changed something, and what the operation was.
    history: Vec<(String, Disk)>,
    forgets: Forgets,
}

/// A sync that does nothing: a fault of a program that the enumeration has to find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Forgets {
    #[default]
    Nothing,
    Files,
    Folders,
}

/// Files and folders by number.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
pub(super) enum Node {
    File { synced: Arc<[u8]>, current: Arc<[u8]> },
    Folder { synced: BTreeMap<String, usize>, changes: Vec<Change> },
}

/// A change of the names in a folder.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Add(String, usize),
    Remove(String),
    Rename { from: String, to: String, node: usize },
}

impl Default for Disk {
    fn default() -> Self {
        let root = Node::Folder { synced: BTreeMap::new(), changes: Vec::new() };
        Disk { nodes: vec![root] }
    }
}

impl Change {
    pub(super) fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Change::Add(name, node) => {
                names.insert(name.clone(), *node);
            }
            Change::Remove(name) => {
                names.remove(name);
            }
            Change::Rename { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
        }
    }
}

impl Disk {
    fn names(&self, node: usize) -> io::Result<BTreeMap<String, usize>> {
        let Some(Node::Folder { synced, changes }) = self.nodes.get(node) else {
            return Err(ErrorKind::NotADirectory.into());
        };
        let mut names = synced.clone();
        changes.iter().for_each(|change| change.apply(&mut names));
        Ok(names)
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = ROOT;
        for part in path.components() {
            if let Component::Normal(name) = part {
                let names = self.names(at)?;
                let name = name.to_string_lossy();
                at = *names.get(&*name).ok_or(ErrorKind::NotFound)?;
            }
        }
        Ok(at)
    }

    /// The folder that a path lies in, and the path's last name.
    fn place(&self, path: &Path) -> io::Result<(usize, String)> {
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
        Ok((self.find(path.parent().unwrap_or(Path::new("/")))?, name))
    }

    fn change(&mut self, folder: usize, change: Change) {
        if let Some(Node::Folder { changes, .. }) = self.nodes.get_mut(folder) {
            changes.push(change);
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let (folder, name) = self.place(path)?;
        if self.names(folder)?.contains_key(&name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let number = self.nodes.len();
        self.nodes.push(node);
        self.change(folder, Change::Add(name, number));
        Ok(number)
    }

    fn content(&self, node: usize) -> io::Result<&Arc<[u8]>> {
        match self.nodes.get(node) {
            Some(Node::File { current, .. }) => Ok(current),
            _ => Err(ErrorKind::IsADirectory.into()),
        }
    }
}

impl Recording {
    /// Of a disk as a crash left it.
    pub(super) fn from_disk(disk: Disk) -> Self {
        let state = History { disk, ..History::default() };
        Recording { state: Arc::new(Mutex::new(state)) }
    }

    /// From here on syncing files does nothing: what a program without these calls would do.
    pub fn forget_file_syncs(&self) {
        self.lock().forgets = Forgets::Files;
    }

    /// From here on syncing folders does nothing.
    pub fn forget_folder_syncs(&self) {
        self.lock().forgets = Forgets::Folders;
    }

    /// The operations so far that changed something, in words. A crash may come after each of them.
    pub fn operations(&self) -> Vec<String> {
        self.lock().history.iter().map(|(what, _)| what.clone()).collect()
    }

    /// All that a crash right after the operation with this number may leave.
    pub fn crash_states(&self, operation: usize) -> CrashStates {
        let disk = self.lock().history.get(operation).map(|(_, disk)| disk.clone());
        CrashStates::of(disk.unwrap_or_default())
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the disk and remembers what came of it.
    fn record<T>(
        &self,
        what: String,
        act: impl FnOnce(&mut Disk) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.lock();
        let done = act(&mut state.disk)?;
        let disk = state.disk.clone();
        state.history.push((what, disk));
        Ok(done)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.record(format!("remove {}", path.display()), |disk| {
            let (folder, name) = disk.place(path)?;
            let node = disk.find(path)?;
            if disk.names(node).is_ok_and(|names| !names.is_empty()) {
                return Err(ErrorKind::DirectoryNotEmpty.into());
            }
            disk.change(folder, Change::Remove(name));
            Ok(())
        })
    }
}

impl Fs for Recording {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        let node = Node::Folder { synced: BTreeMap::new(), changes: Vec::new() };
        self.record(format!("create folder {}", path.display()), |disk| {
            disk.add(path, node).map(drop)
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let node = Node::File { synced: Arc::from([]), current: Arc::from([]) };
        let what = path.display().to_string();
        let node = self.record(format!("create {what}"), |disk| disk.add(path, node))?;
        Ok(Box::new(RecordedFile { fs: self.clone(), node, what }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn Source>> {
        let state = self.lock();
        let node = state.disk.find(path)?;
        let content = Arc::clone(state.disk.content(node)?);
        Ok(Arc::new(Content(content)))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        let node = state.disk.find(path)?;
        Ok(state.disk.names(node)?.into_keys().collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let what = format!("rename {} to {}", from.display(), to.display());
        self.record(what, |disk| {
            let (node, (folder, old), (other, new)) =
                (disk.find(from)?, disk.place(from)?, disk.place(to)?);
            if folder != other {
                return Err(ErrorKind::CrossesDevices.into());
            }
            if let Ok(target) = disk.find(to) {
                if disk.names(target).is_ok_and(|names| !names.is_empty()) {
                    return Err(ErrorKind::DirectoryNotEmpty.into());
                }
            }
            disk.change(folder, Change::Rename { from: old, to: new, node });
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.remove(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.remove(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let forgets = self.lock().forgets == Forgets::Folders;
        self.record(format!("sync folder {}", path.display()), |disk| {
            let node = disk.find(path)?;
            let names = disk.names(node)?;
            if !forgets {
                disk.nodes[node] = Node::Folder { synced: names, changes: Vec::new() };
            }
            Ok(())
        })
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(1 << 40)
    }
}

#[derive(Debug)]
struct Content(Arc<[u8]>);

impl Source for Content {
    fn bytes(&self) -> io::Result<u64> {
        Ok(crate::cast::to_u64(self.0.len()))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        super::read_slice(&self.0, offset, out)
    }
}

struct RecordedFile {
    fs: Recording,
    node: usize,
    what: String,
}

impl RecordedFile {
    fn change(
        &self,
        what: &str,
        act: impl FnOnce(&mut Arc<[u8]>, &mut Arc<[u8]>),
    ) -> io::Result<()> {
        self.fs.record(format!("{what} {}", self.what), |disk| {
            match disk.nodes.get_mut(self.node) {
                Some(Node::File { synced, current }) => act(synced, current),
                _ => return Err(ErrorKind::IsADirectory.into()),
            }
            Ok(())
        })
    }
}

impl Output for RecordedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.change("write", |_, current| *current = [current, bytes].concat().into())
    }

    fn sync(&mut self) -> io::Result<()> {
        let forgets = self.fs.lock().forgets == Forgets::Files;
        self.change("sync", |synced, current| {
            if !forgets {
                *synced = Arc::clone(current);
            }
        })
    }
}
