//! What is kept on this machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenStream, Tokens};
use phalanx_data::source::{CachedFolder, Folder};
use phalanx_data::{Access, Error};

use crate::server::{Answer, Server};
use crate::{prepared, LONG};

/// Reads all of a stream in pieces, from several threads at once.
pub(crate) fn read_everything(stream: &TokenStream) -> Vec<i64> {
    let total = usize::try_from(stream.token_count()).unwrap();
    let mut all = vec![0; total];
    std::thread::scope(|scope| {
        for part in all.chunks_mut(total.div_ceil(4)).enumerate() {
            scope.spawn(move || {
                let (number, out) = part;
                let first = number * total.div_ceil(4);
                let mut scratch = Scratch::default();
                for (piece, tokens) in out.chunks_mut(997).enumerate() {
                    let start = u64::try_from(first + piece * 997).unwrap();
                    stream.read(start, tokens, &mut scratch, &"a piece").unwrap();
                }
            });
        }
    });
    all
}

/// What the files of a folder take on the disk.
fn disk_bytes(folder: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn what_is_kept_is_fetched_once() {
    let (keep, target) = prepared();
    let (server, kept) =
        (Server::start(target.clone(), |_, _| Answer::Good), keep.path().join("kept"));
    let near = read_everything(&TokenStream::open(&target, Access::Read).unwrap());
    let open = || {
        let folder = CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap();
        TokenStream::open_from(&folder).unwrap()
    };
    let asked = || server.requests.swap(0, Ordering::SeqCst);
    let bytes: u64 =
        open().index().shards.iter().map(|shard| shard.file_bytes.div_ceil(1 << 20)).sum();
    // The index, the tokenizer, and the question for a list of damage.
    let files = u64::try_from(open().index().shards.len()).unwrap() + 3;
    let blocks = usize::try_from(bytes + files).unwrap();
    std::fs::remove_dir_all(&kept).unwrap();
    asked();
    assert_eq!(read_everything(&open()), near);
    let first = asked();
    assert!(first <= blocks + usize::try_from(files).unwrap(), "{first} requests, {blocks} blocks");
    // Again, as another process would: only what the files are is asked for.
    assert_eq!(read_everything(&open()), near);
    assert_eq!(asked(), usize::try_from(files).unwrap());

    // A block that rots on this machine, and a file that was cut off, are fetched again.
    let largest = || {
        let entries = std::fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap());
        entries.max_by_key(|entry| entry.metadata().unwrap().len()).unwrap().path()
    };
    let mut content = std::fs::read(largest()).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(largest(), &content).unwrap();
    assert_eq!(read_everything(&open()), near);
    assert_eq!(asked(), usize::try_from(files).unwrap() + 1);
    content.truncate(middle);
    std::fs::write(largest(), &content).unwrap();
    assert_eq!(read_everything(&open()), near);
    // Rot behind a header that was read is found by the data's own checksum.
    let stream = open();
    let mut content = std::fs::read(largest()).unwrap();
    content[middle..middle + 2000].fill(7);
    std::fs::write(largest(), &content).unwrap();
    stream.verify().unwrap();
    assert_eq!(read_everything(&stream), near);
}

#[test]
fn a_kept_file_that_is_cut_off_while_it_is_read_is_read_from_afar() {
    let (keep, target) = prepared();
    let (server, kept) =
        (Server::start(target.clone(), |_, _| Answer::Good), keep.path().join("kept"));
    let near = read_everything(&TokenStream::open(&target, Access::Read).unwrap());
    let folder = CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap();
    let stream = TokenStream::open_from(&folder).unwrap();
    assert_eq!(read_everything(&stream), near);
    for entry in std::fs::read_dir(&kept).unwrap() {
        let path = entry.unwrap().path();
        let half = std::fs::metadata(&path).unwrap().len() / 2;
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
    }
    assert_eq!(read_everything(&stream), near);
}

#[test]
fn what_will_be_needed_is_fetched_before_it_is_read() {
    let (keep, target) = prepared();
    let (server, kept) =
        (Server::start(target.clone(), |_, _| Answer::Good), keep.path().join("kept"));
    let near = read_everything(&TokenStream::open(&target, Access::Read).unwrap());
    let folder = CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap();
    let stream = TokenStream::open_from(&folder).unwrap();
    server.requests.store(0, Ordering::SeqCst);
    let blocks: u64 =
        stream.index().shards.iter().map(|one| one.file_bytes.div_ceil(1 << 20)).sum();
    // The first block of each shard, with its header, is there.
    let missing = usize::try_from(blocks).unwrap() - stream.index().shards.len();
    assert!(missing >= 2, "{blocks} blocks");
    stream.will_need(0..stream.token_count());
    let started = Instant::now();
    while server.requests.load(Ordering::SeqCst) < missing {
        assert!(started.elapsed() < LONG, "{missing} blocks are missing");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    assert_eq!(read_everything(&stream), near);
    assert_eq!(server.requests.load(Ordering::SeqCst), missing, "each block once");
}

#[test]
fn many_may_open_the_same_new_file_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("f"), [5; 3000]).unwrap();
    let server = Server::start(data, |_, _| Answer::Good);
    for round in 0..20 {
        let kept = kept.join(round.to_string());
        // As ranks do: each a folder of its own, or threads that share one.
        let folders =
            [(); 2].map(|()| CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap());
        std::thread::scope(|scope| {
            for number in 0..8 {
                let folder = &folders[number % 2];
                scope.spawn(move || {
                    let mut out = [0; 3000];
                    folder.open("f").unwrap().read_at(0, &mut out).unwrap();
                    assert_eq!(out, [5; 3000]);
                });
            }
        });
        assert_eq!(std::fs::read_dir(&kept).unwrap().count(), 1, "nothing is left over");
    }
}

#[test]
fn another_version_is_fetched_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    std::fs::create_dir(&data).unwrap();
    let is_new = Arc::new(AtomicBool::new(false));
    let changed = Arc::clone(&is_new);
    let server = Server::start(data.clone(), move |_, _| {
        Answer::Etag(if changed.load(Ordering::SeqCst) { "\"2\"" } else { "\"1\"" })
    });
    let read = || {
        let cached = CachedFolder::new(server.folder(LONG), &kept, 1 << 30).unwrap();
        let (file, mut out) = (cached.open("f").unwrap(), vec![0; 3000]);
        file.read_at(0, &mut out).unwrap();
        out
    };
    std::fs::write(data.join("f"), [1; 3000]).unwrap();
    assert_eq!(read(), [1; 3000]);
    std::fs::write(data.join("f"), [2; 3000]).unwrap();
    assert_eq!(read(), [1; 3000], "the server calls it the same version");
    is_new.store(true, Ordering::SeqCst);
    assert_eq!(read(), [2; 3000]);
}

#[test]
fn what_is_kept_stays_within_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    std::fs::create_dir(&data).unwrap();
    let contents: Vec<Vec<u8>> = (0..4_u8).map(|name| vec![name; 3 << 20]).collect();
    for (name, content) in contents.iter().enumerate() {
        std::fs::write(data.join(name.to_string()), content).unwrap();
    }
    let server = Server::start(data, |_, _| Answer::Good);
    let read = |names: std::ops::Range<usize>, max_bytes: u64| {
        let cached = CachedFolder::new(server.folder(LONG), &kept, max_bytes).unwrap();
        for name in names {
            let (file, mut out) = (cached.open(&name.to_string()).unwrap(), vec![0; 3 << 20]);
            for round in 0..2 {
                file.read_at(0, &mut out).unwrap();
                assert!(out == contents[name], "file {name}, round {round}");
            }
        }
        let used = disk_bytes(&kept);
        assert!(used <= max_bytes + (64 << 10), "{used} of {max_bytes} bytes");
        used
    };
    // More than there is room for: what does not fit is read from afar.
    assert!(read(0..4, 7 << 20) >= 6 << 20);
    // Another run: files that nobody has open make room.
    server.requests.store(0, Ordering::SeqCst);
    assert!(read(3..4, 7 << 20) >= 3 << 20);
    read(3..4, 7 << 20);
    assert!(server.requests.load(Ordering::SeqCst) <= 5, "the last one is kept by now");
    assert_eq!(read(0..2, 0), disk_bytes(&kept), "nothing is kept without room");

    std::fs::write(folder.path().join("file"), b"").unwrap();
    let no_folder = CachedFolder::new(server.folder(LONG), &folder.path().join("file"), 1);
    assert!(matches!(no_folder, Err(Error::CacheNotWritable { .. })));
}
