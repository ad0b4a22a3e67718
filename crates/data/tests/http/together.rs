//! Processes that share what is kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::format::TokenStream;
use phalanx_data::source::{CachedFolder, Folder, HttpFolder, HttpOptions};
use phalanx_data::Access;

use crate::kept::read_everything;
use crate::server::{Answer, Server};
use crate::{prepared, LONG};

/// What a test gives the processes that it starts: the server's address, and the folder beside which the data lie.
const PLACE: [&str; 2] = ["KEPT_TEST_ADDRESS", "KEPT_TEST_FOLDER"];

/// A process that ends with its test.
struct Reader(Child);

impl Drop for Reader {
    fn drop(&mut self) {
        drop((self.0.kill(), self.0.wait()));
    }
}

/// Starts the test `name` in a process of its own.
fn start(name: &str, server: &Server, kept: &Path) -> Reader {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(PLACE[0], server.address.to_string())
        .env(PLACE[1], kept)
        .stdout(Stdio::null())
        .spawn();
    Reader(child.unwrap())
}

/// Reads everything, if this is a process that a test has started.
fn is_reader() -> bool {
    let [Some(address), Some(kept)] = PLACE.map(std::env::var_os) else { return false };
    let (kept, address) = (PathBuf::from(kept), address.into_string().unwrap());
    let far = HttpFolder::new(&format!("http://{address}/data/"), HttpOptions::default()).unwrap();
    let folder = CachedFolder::new(far, &kept, 1 << 30).unwrap();
    let stream = TokenStream::open_from(&folder).unwrap();
    let near = TokenStream::open(&kept.with_file_name("tokens"), Access::Read).unwrap();
    assert!(read_everything(&stream) == read_everything(&near));
    true
}

/// Waits until something is the case.
#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < LONG, "{what}: not within {LONG:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The files of that kind in a folder.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == extension));
    files
}

#[test]
fn processes_that_start_at_once_fetch_each_block_once() {
    if is_reader() {
        return;
    }
    let (keep, target) = prepared();
    let kept = keep.path().join("kept");
    // Slow enough for all of them to need the same block at once.
    let server = Server::start(target.clone(), |_, _| {
        std::thread::park_timeout(Duration::from_millis(60));
        Answer::Good
    });
    let name = "together::processes_that_start_at_once_fetch_each_block_once";
    let mut readers: Vec<Reader> = (0..4).map(|_| start(name, &server, &kept)).collect();
    for reader in &mut readers {
        until("a reader ends", || reader.0.try_wait().unwrap().is_some());
        assert!(reader.0.wait().unwrap().success());
    }
    let near = TokenStream::open(&target, Access::Read).unwrap();
    let shards = &near.index().shards;
    let of_shards: u64 = shards.iter().map(|shard| shard.file_bytes.div_ceil(1 << 20)).sum();
    // The index has a block as well; each process asks what the files are, and for a list of damage and a tokenizer.
    let (blocks, opened) = (usize::try_from(of_shards).unwrap() + 1, shards.len() + 3);
    let requests = server.requests.load(Ordering::SeqCst);
    assert!(blocks >= 6, "{blocks} blocks");
    assert!(
        requests >= blocks && requests <= blocks + 1 + 4 * opened,
        "{requests} requests, {blocks} blocks, {opened} files"
    );
    assert_eq!(files(&kept, "new"), Vec::<PathBuf>::new());
}

#[test]
fn what_dead_processes_left_half_done_is_removed_and_nothing_else() {
    if is_reader() {
        return;
    }
    let (keep, target) = prepared();
    let kept = keep.path().join("kept");
    let [goes_on, is_asked] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (is_answered, asked) = (Arc::clone(&goes_on), Arc::clone(&is_asked));
    let opened = AtomicBool::new(false);
    // A shard's first request is for its size; its data do not come before the first process is dead.
    let server = Server::start(target.clone(), move |_, name| {
        if name == "tokens-00000.safetensors" && opened.swap(true, Ordering::SeqCst) {
            asked.store(true, Ordering::SeqCst);
            let started = Instant::now();
            while !is_answered.load(Ordering::SeqCst) && started.elapsed() < LONG {
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
        Answer::Good
    });
    let name = "together::what_dead_processes_left_half_done_is_removed_and_nothing_else";
    let dead = start(name, &server, &kept);
    until("a block is being fetched", || is_asked.load(Ordering::SeqCst));
    let left = files(&kept, "new");
    assert_eq!(left.len(), 1, "{left:?}");
    // Others leave alone what it holds as long as it lives.
    let open = || CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap();
    drop(open());
    assert_eq!(files(&kept, "new"), left);
    drop(dead);
    goes_on.store(true, Ordering::SeqCst);
    assert_eq!(files(&kept, "new"), left, "it had no time to remove them");

    let (unmade, foreign) = (kept.join("0123456789abcdef.17-3.new"), kept.join("of the user.new"));
    for path in [&unmade, &foreign] {
        fs::write(path, b"").unwrap();
    }
    let held = kept.join("0123456789abcdef.99-0.new");
    let holder = File::create(&held).unwrap();
    holder.lock_shared().unwrap();
    let folder = open();
    let mut rest = files(&kept, "new");
    rest.sort();
    assert_eq!(rest, [held, foreign]);
    let far = TokenStream::open_from(&folder).unwrap();
    let near = TokenStream::open(&target, Access::Read).unwrap();
    assert!(read_everything(&far) == read_everything(&near));
}

#[test]
fn who_waits_too_long_for_another_process_fetches_the_block_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    fs::create_dir(&data).unwrap();
    fs::write(data.join("f"), [5; 3000]).unwrap();
    let server = Server::start(data, |_, _| Answer::Good);
    let file = CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap().open("f").unwrap();
    let blocks = files(&kept, "blocks").pop().unwrap();
    let stuck = File::create(blocks.with_extension("0.new")).unwrap();
    stuck.lock().unwrap();
    let (started, mut out) = (Instant::now(), [0; 3000]);
    file.read_at(0, &mut out).unwrap();
    assert_eq!(out, [5; 3000]);
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(4), "{waited:?}");
    // It is kept all the same.
    let requests = server.requests.load(Ordering::SeqCst);
    file.read_at(0, &mut out).unwrap();
    assert_eq!(server.requests.load(Ordering::SeqCst), requests);
}

#[test]
fn what_is_no_file_is_left_alone_and_not_waited_for() {
    use rustix::fs::{mknodat, FileType, Mode, CWD};

    let folder = tempfile::tempdir().unwrap();
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    for path in [&data, &kept] {
        fs::create_dir(path).unwrap();
    }
    fs::write(data.join("f"), [5; 3000]).unwrap();
    // Who opens a pipe waits for a writer.
    let pipes = ["0123456789abcdef.blocks", "0123456789abcdef.0.new"].map(|name| kept.join(name));
    for pipe in &pipes {
        mknodat(CWD, pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    let server = Server::start(data, |_, _| Answer::Good);
    // There is no room: what nobody has open would be removed.
    let far = server.folder(LONG);
    let reading = std::thread::spawn(move || {
        let mut out = [0; 3000];
        let folder = CachedFolder::new(far, &kept, 0).unwrap();
        folder.open("f").unwrap().read_at(0, &mut out).unwrap();
        out
    });
    until("what is far is read", || reading.is_finished());
    assert_eq!(reading.join().unwrap(), [5; 3000]);
    assert!(pipes.iter().all(|pipe| pipe.exists()));
}
