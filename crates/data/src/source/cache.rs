//! Blocks of far files, kept in a folder of this machine.
//!
//! A file `<fingerprint>.blocks` for each version of a far file:
//!
//! ```text
//! one page     what it is of: name, size, version
//! table        u64 for each block: 0, or 2^32 + the CRC-32C of the block
//! blocks       each at its place; holes where none was fetched
//! ```
//!
//! A block is written before its entry, and compared with it when a process first uses it: what a
//! crash left unwritten is fetched again. Several processes share a folder: of those that need the
//! same block at once, one fetches it and the others wait for it, for a while
//! ([`crate::source::only`]); who has waited long enough fetches it as well, and writes the same
//! bytes. Files are removed whole, to make room, and not while a process has them open (`flock`).

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use rustix::fs::{flock, FlockOperation};

use super::only::{self, Only};
use super::{local, Folder, Source};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;

const MAGIC: &str = "phalanx-blocks 1";
const EXTENSION: &str = "blocks";
pub(crate) const PAGE: u64 = 4096;

/// What is fetched at once: what has a checksum of its own in prepared folders.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;

pub(crate) const ENTRY_BYTES: u64 = 8;
pub(crate) const PRESENT: u64 = 1 << 32;

/// Threads that fetch different blocks of a file at once.
const LOCKS: usize = 16;

/// Threads that fetch what will be needed: each waits for one answer.
const FETCHING_THREADS: usize = 4;

/// The size of the folder is counted again after so many bytes: other processes write to it as
/// well.
const COUNT_AGAIN: u64 = 64 * BLOCK_BYTES;

/// A folder whose files are kept on this machine, block by block, as they are read: each block of 1
/// MiB is fetched once, also for later runs and other processes. Who needs a block that another
/// process is fetching waits for it, for at most five seconds.
///
/// Files are known again by name, size and [`Source::version`]; those without a version are not
/// kept. If the folder is full (see [`new`](Self::new)) or the disk is, what is not kept is read
/// from afar.
#[derive(Debug)]
pub struct CachedFolder<F> {
    inner: F,
    cache: Arc<Cache>,
}

impl<F: Folder> CachedFolder<F> {
    /// Keeps what is read of `inner` in `folder`, about `max_bytes` of it: when that is full, files
    /// that no process has open are removed, those first that were opened longest ago. What dead
    /// processes have left half made there is removed at once.
    ///
    /// # Errors
    /// [`Error::CacheNotWritable`].
    pub fn new(inner: F, folder: &Path, max_bytes: u64) -> Result<Self> {
        let failed = |cause| Error::CacheNotWritable { path: folder.to_path_buf(), cause };
        fs::create_dir_all(folder).map_err(failed)?;
        let cache = Cache {
            folder: folder.to_path_buf(),
            max_bytes,
            used: AtomicU64::new(0),
            uncounted: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
            created: AtomicU64::new(0),
            ahead: Mutex::default(),
        };
        cache.count().map_err(failed)?;
        only::remove_left_over(folder);
        Ok(CachedFolder { inner, cache: Arc::new(cache) })
    }

    fn keep(&self, source: Arc<dyn Source>) -> Result<Arc<dyn Source>> {
        let Some(version) = source.version().filter(|_| source.size() > 0) else {
            return Ok(source);
        };
        let head = format!("{MAGIC}\n{}\n{}\n{version}\n", source.name().display(), source.size());
        if to_u64(head.len()) > PAGE {
            return Ok(source);
        }
        let cache = Arc::clone(&self.cache);
        let failed = |cause| Error::CacheNotWritable { path: cache.folder.clone(), cause };
        let blocks = source.size().div_ceil(BLOCK_BYTES);
        let data_at = (PAGE + blocks * ENTRY_BYTES).next_multiple_of(PAGE);
        let (path, file) = match cache.open(&head, data_at + source.size()) {
            Ok(opened) => opened,
            // What does not fit is read from afar.
            Err(error) if is_full(&error) => {
                tracing::warn!(%error, file = %source.name().display(), "the cache has no room for a file");
                return Ok(source);
            }
            Err(error) => return Err(failed(error)),
        };
        let words = blocks.div_ceil(u64::from(u64::BITS));
        Ok(Arc::new_cyclic(|me| CachedFile {
            me: Weak::clone(me),
            size: source.size(),
            inner: source,
            path,
            file,
            data_at,
            good: (0..words).map(|_| AtomicU64::new(0)).collect(),
            fetching: Default::default(),
            cache,
        }))
    }
}

impl<F: Folder> Folder for CachedFolder<F> {
    fn name(&self) -> &Path {
        self.inner.name()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        self.keep(self.inner.open(name)?)
    }

    fn find(&self, name: &str) -> Result<Option<Arc<dyn Source>>> {
        self.inner.find(name)?.map(|source| self.keep(source)).transpose()
    }
}

/// A folder of files of blocks.
#[derive(Debug)]
struct Cache {
    folder: PathBuf,
    max_bytes: u64,
    /// Bytes on the disk, as last counted, and what this process has added.
    used: AtomicU64,
    uncounted: AtomicU64,
    /// Whether room was looked for in vain.
    is_full: AtomicBool,
    /// Files made, for their names.
    created: AtomicU64,
    ahead: Mutex<FetchQueue>,
}

/// What is to be fetched before it is read.
#[derive(Debug, Default)]
struct FetchQueue {
    blocks: VecDeque<(Weak<CachedFile>, Range<u64>)>,
    threads: usize,
}

impl Cache {
    /// The files and what they take on the disk, those first that were opened longest ago.
    fn files(&self) -> io::Result<Vec<(SystemTime, PathBuf, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == EXTENSION) {
                // Another process may have removed it. Anything but a regular file is not ours, and
                // to open it could block for ever.
                if let Some(metadata) = fs::metadata(&path).ok().filter(fs::Metadata::is_file) {
                    files.push((metadata.modified()?, path, metadata.blocks() * 512));
                }
            }
        }
        files.sort();
        Ok(files)
    }

    /// Has blocks fetched by threads of their own, which end when there is nothing left to fetch.
    fn fetch(self: &Arc<Self>, file: Weak<CachedFile>, blocks: Range<u64>) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        ahead.blocks.push_back((file, blocks));
        if ahead.threads < FETCHING_THREADS {
            let cache = Arc::clone(self);
            let named = std::thread::Builder::new().name("data-fetch".to_owned());
            // Without a thread blocks are fetched when they are read.
            ahead.threads += usize::from(named.spawn(move || cache.fetch_all()).is_ok());
        }
    }

    fn fetch_all(&self) {
        while let Some((file, block)) = self.next_ahead() {
            // Whoever reads a file that is gone gets the error; nobody waits for a folder that was
            // dropped.
            let Some(file) = file.upgrade() else { continue };
            // A source that a program implements may panic: whoever reads it meets that again.
            let fetched = catch_unwind(AssertUnwindSafe(|| file.ensure(block)));
            if !matches!(fetched, Ok(Ok(_))) {
                self.ahead.lock().unwrap_or_else(PoisonError::into_inner).blocks.clear();
            }
        }
    }

    /// The block that is fetched next. `None`: the thread is not needed any more.
    fn next_ahead(&self) -> Option<(Weak<CachedFile>, u64)> {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((file, blocks)) = ahead.blocks.front_mut() {
            if let Some(block) = blocks.next().filter(|_| file.strong_count() > 0) {
                return Some((Weak::clone(file), block));
            }
            ahead.blocks.pop_front();
        }
        ahead.threads -= 1;
        None
    }

    fn count(&self) -> io::Result<()> {
        let used = self.files()?.iter().map(|(_, _, bytes)| bytes).sum();
        self.used.store(used, Ordering::Relaxed);
        self.uncounted.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Whether there is room for so many bytes; counts them if so.
    fn take(&self, bytes: u64) -> bool {
        let fits = || self.used.load(Ordering::Relaxed) + bytes <= self.max_bytes;
        let is_old = self.uncounted.load(Ordering::Relaxed) > COUNT_AGAIN;
        if (is_old && self.count().is_err()) || (!fits() && !self.make_room(bytes)) {
            return false;
        }
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.uncounted.fetch_add(bytes, Ordering::Relaxed);
        true
    }

    /// Opens the file for `head`, or makes it.
    fn open(&self, head: &str, size: u64) -> io::Result<(PathBuf, File)> {
        let name = Fingerprinter::new("blocks").bytes(head.as_bytes()).finish();
        let path = self.folder.join(format!("{name}.{EXTENSION}"));
        let mut page = vec![0; to_usize(PAGE)];
        page[..head.len()].copy_from_slice(head.as_bytes());
        self.is_full.store(false, Ordering::Relaxed);
        if let Some(file) = found(&path, &page, size)? {
            return Ok((path, file));
        }
        // Of several processes that do not find it one makes it.
        let _only = Only::take(&path.with_extension(only::name("file")));
        if let Some(file) = found(&path, &page, size)? {
            return Ok((path, file));
        }
        loop {
            // Complete before it has its name.
            let (new, file) = self.create_beside(&path)?;
            let written = file.write_all_at(&page, 0).and_then(|()| file.set_len(size));
            match written.and_then(|()| fs::rename(&new, &path)) {
                Ok(()) => return Ok((path, file)),
                // In the moment before it was locked it was taken for one that a dead process left,
                // and removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.folder.is_dir() => {}
                Err(error) => {
                    // Nobody else has its name.
                    drop(fs::remove_file(&new));
                    return Err(error);
                }
            }
        }
    }

    /// Makes a file beside `path` that nobody else makes: not another thread, nor another folder in
    /// this process. It is in use.
    fn create_beside(&self, path: &Path) -> io::Result<(PathBuf, File)> {
        loop {
            let number = self.created.fetch_add(1, Ordering::Relaxed);
            let new = path.with_extension(only::name(&format!("{}-{number}", std::process::id())));
            let create = || OpenOptions::new().read(true).write(true).create_new(true).open(&new);
            match local::one_more(create) {
                Ok(file) => {
                    use_it(&file);
                    return Ok((new, file));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes files that nobody has open, those first that were opened longest ago, until so many
    /// bytes fit. `false`: they do not.
    fn make_room(&self, bytes: u64) -> bool {
        if self.is_full.load(Ordering::Relaxed) || self.count().is_err() {
            return false;
        }
        let fits = || self.used.load(Ordering::Relaxed) + bytes <= self.max_bytes;
        for (_, path, freed) in self.files().unwrap_or_default() {
            if fits() {
                break;
            }
            let exclusive = FlockOperation::NonBlockingLockExclusive;
            let is_free = File::open(&path).is_ok_and(|file| flock(&file, exclusive).is_ok());
            if is_free && fs::remove_file(&path).is_ok() {
                self.used
                    .fetch_sub(freed.min(self.used.load(Ordering::Relaxed)), Ordering::Relaxed);
            }
        }
        // Until another file is opened nobody looks again.
        self.is_full.store(!fits(), Ordering::Relaxed);
        fits()
    }
}

/// Holds a file as long as it is open: nobody removes it meanwhile. File systems without locks do
/// without.
fn use_it(file: &File) {
    // Where the file system has no locks, only this protection is missing.
    let _is_held = flock(file, FlockOperation::NonBlockingLockShared);
}

/// The file at `path`, if it begins with that page and has that size.
fn found(path: &Path, page: &[u8], size: u64) -> io::Result<Option<File>> {
    let open = || OpenOptions::new().read(true).write(true).open(path);
    let Ok(file) = local::one_more(open) else { return Ok(None) };
    let mut begins = vec![0; page.len()];
    let is_same = file.read_exact_at(&mut begins, 0).is_ok() && begins == page;
    if !is_same || file.metadata()?.len() != size {
        return Ok(None);
    }
    use_it(&file);
    file.set_modified(SystemTime::now())?;
    Ok(Some(file))
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[derive(Debug)]
struct CachedFile {
    /// Itself, for the threads that fetch blocks of it.
    me: Weak<CachedFile>,
    inner: Arc<dyn Source>,
    size: u64,
    /// What it was called when it was opened, for the names of files beside it.
    path: PathBuf,
    file: File,
    /// Where the blocks begin.
    data_at: u64,
    /// A bit for each block that this process has fetched or compared.
    good: Box<[AtomicU64]>,
    fetching: [Mutex<()>; LOCKS],
    cache: Arc<Cache>,
}

impl CachedFile {
    fn bit(&self, block: u64) -> (&AtomicU64, u64) {
        let bits = u64::from(u64::BITS);
        (&self.good[to_usize(block / bits)], 1 << (block % bits))
    }

    fn is_good(&self, block: u64) -> bool {
        let (word, bit) = self.bit(block);
        word.load(Ordering::Acquire) & bit != 0
    }

    fn range(&self, block: u64) -> Range<u64> {
        let start = block * BLOCK_BYTES;
        start..(start + BLOCK_BYTES).min(self.size)
    }

    /// Sees to it that a block is there. `false`: it is not kept.
    fn ensure(&self, block: u64) -> Result<bool> {
        if self.is_good(block) {
            return Ok(true);
        }
        let lock = &self.fetching[to_usize(block) % LOCKS];
        let _of_this_process = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_good(block) {
            return Ok(true);
        }
        let range = self.range(block);
        let mut bytes = vec![0; to_usize(range.end - range.start)];
        if !self.is_there(block, &mut bytes) {
            if !self.cache.take(to_u64(bytes.len())) {
                return Ok(false);
            }
            let _only = Only::take(&self.path.with_extension(only::name(&block.to_string())));
            // Whoever had it before may have fetched the block.
            if !self.is_there(block, &mut bytes) {
                self.inner.read_at(range.start, &mut bytes)?;
                if self.write(block, &bytes).is_err() {
                    // The disk is full, or worse: the bytes are read from afar.
                    return Ok(false);
                }
            }
        }
        let (word, bit) = self.bit(block);
        word.fetch_or(bit, Ordering::Release);
        Ok(true)
    }

    /// Whether an earlier run has kept the block, unharmed.
    fn is_there(&self, block: u64, bytes: &mut [u8]) -> bool {
        let mut entry = [0; 8];
        let read = self.file.read_exact_at(&mut entry, PAGE + block * ENTRY_BYTES);
        let entry = u64::from_le_bytes(entry);
        read.is_ok()
            && entry & PRESENT != 0
            && self.file.read_exact_at(bytes, self.data_at + block * BLOCK_BYTES).is_ok()
            && entry == PRESENT + u64::from(crc32c::crc32c(bytes))
    }

    fn write(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        let entry = PRESENT + u64::from(crc32c::crc32c(bytes));
        self.file.write_all_at(bytes, self.data_at + block * BLOCK_BYTES)?;
        self.file.write_all_at(&entry.to_le_bytes(), PAGE + block * ENTRY_BYTES)
    }
}

impl Source for CachedFile {
    fn name(&self) -> &Path {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn version(&self) -> Option<String> {
        self.inner.version()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(to_u64(out.len()));
        if end > self.size {
            let path = self.name().to_path_buf();
            return Err(Error::WrongSize { path, expected: end, actual: self.size });
        }
        let (mut at, mut rest) = (offset, out);
        while !rest.is_empty() {
            let block = at / BLOCK_BYTES;
            let len = to_usize(self.range(block).end - at).min(rest.len());
            let (part, later) = rest.split_at_mut(len);
            let kept =
                self.ensure(block)? && self.file.read_exact_at(part, self.data_at + at).is_ok();
            if !kept {
                self.inner.read_at(at, part)?;
            }
            at += to_u64(len);
            rest = later;
        }
        Ok(())
    }

    fn will_need(&self, range: Range<u64>) {
        let blocks = range.start / BLOCK_BYTES..range.end.min(self.size).div_ceil(BLOCK_BYTES);
        self.cache.fetch(Weak::clone(&self.me), blocks);
    }

    fn forget(&self, range: Range<u64>) -> bool {
        for block in range.start / BLOCK_BYTES..range.end.min(self.size).div_ceil(BLOCK_BYTES) {
            let (word, bit) = self.bit(block);
            word.fetch_and(!bit, Ordering::AcqRel);
            // Where the entry cannot be cleared, its checksum still says that the block is what was
            // fetched.
            drop(self.file.write_all_at(&[0; 8], PAGE + block * ENTRY_BYTES));
        }
        self.inner.forget(range);
        true
    }
}
