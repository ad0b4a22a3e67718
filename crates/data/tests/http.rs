//! Data on a web server: a real one, of this test, on loopback.
#![expect(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test; a thread's handle has the name of what it is a handle of"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use phalanx_data::{
    Access, CachedFolder, Error, Folder, HttpFolder, HttpOptions, Scratch, SpecialTokens,
    TokenStream, TokenWriter,
};

/// What a server does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Good,
    Status(u16),
    /// Half of the body, then the connection is closed.
    Cut,
    /// The connection is closed at once.
    Close,
    /// Nothing, for a second.
    Silence,
    /// Another version.
    Etag(&'static str),
    Whole,
    /// Bytes that are no HTTP.
    Garbage,
    WrongRange,
}

type Script = dyn Fn(usize, &str) -> Answer + Send + Sync;

struct Server {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves the files of a folder; `script` is asked with the number of the request and the file's name.
    fn start(
        folder: PathBuf,
        script: impl Fn(usize, &str) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, connections) =
            (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let is_over = Arc::<AtomicBool>::default();
        let script: Arc<Script> = Arc::new(script);
        let (r, c, o) = (Arc::clone(&requests), Arc::clone(&connections), Arc::clone(&is_over));
        let accepting = std::thread::spawn(move || {
            let mut serving = Vec::new();
            for stream in listener.incoming() {
                if o.load(Ordering::SeqCst) {
                    break;
                }
                c.fetch_add(1, Ordering::SeqCst);
                let (folder, script) = (folder.clone(), Arc::clone(&script));
                let (requests, is_over) = (Arc::clone(&r), Arc::clone(&o));
                serving.push(std::thread::spawn(move || {
                    drop(serve(&stream.unwrap(), &folder, &*script, &requests, &is_over));
                }));
            }
            for thread in serving {
                thread.join().unwrap();
            }
        });
        Server { address, requests, connections, is_over, accepting: Some(accepting) }
    }

    fn folder(&self, timeout: Duration) -> HttpFolder {
        let attempt_timeout = Duration::from_millis(300);
        let options = HttpOptions { timeout, attempt_timeout, ..Default::default() };
        HttpFolder::new(&format!("http://{}/data/", self.address), options).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.accepting.take() {
            thread.join().unwrap();
        }
    }
}

/// Requests of one connection, until it is closed or the server ends.
fn serve(
    mut stream: &TcpStream,
    folder: &std::path::Path,
    script: &Script,
    requests: &AtomicUsize,
    is_over: &AtomicBool,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match lines.read_line(&mut head) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(_) if is_over.load(Ordering::SeqCst) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let number = requests.fetch_add(1, Ordering::SeqCst);
        let name = head.split(' ').nth(1).unwrap().strip_prefix("/data/").unwrap().to_owned();
        let answer = script(number, &name);
        let Ok(bytes) = std::fs::read(folder.join(&name)) else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let lower = head.to_ascii_lowercase();
        let range = lower.split("range: bytes=").nth(1).unwrap().split("\r\n").next().unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
        let last = last.min(bytes.len().saturating_sub(1));
        let etag = if let Answer::Etag(etag) = answer { etag } else { "\"1\"" };
        match answer {
            Answer::Status(status) => {
                write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")?;
            }
            Answer::Close => return Ok(()),
            Answer::Garbage => {
                stream.write_all(&[0x16, 0x03, b'\r', b'\n', b'\r', b'\n'])?;
                return Ok(());
            }
            Answer::Silence => std::thread::park_timeout(Duration::from_secs(1)),
            Answer::Whole => {
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len())?;
                stream.write_all(&bytes)?;
            }
            _ if bytes.is_empty() => {
                stream.write_all(b"HTTP/1.1 416 X\r\nContent-Range: bytes */0\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n")?;
            }
            Answer::Good | Answer::Cut | Answer::Etag(_) | Answer::WrongRange => {
                let body = &bytes[first..=last];
                let said = if answer == Answer::WrongRange { first + 1 } else { first };
                write!(
                    stream,
                    "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {said}-{last}/{}\r\nETag: {etag}\r\n\r\n",
                    body.len(),
                    bytes.len()
                )?;
                if answer == Answer::Cut {
                    stream.write_all(&body[..body.len() / 2])?;
                    return Ok(());
                }
                stream.write_all(body)?;
            }
        }
    }
}

fn prepared() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(&target, b"{}", 60_000, special, 1 << 20).unwrap();
    for document in 0..1000 {
        let tokens: Vec<u32> = (0..1500).map(|at| 257 + (document * 77 + at) % 50_000).collect();
        writer.tokens(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(0).unwrap();
    (folder, target)
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn tokens_are_those_of_the_local_folder_over_one_connection() {
    let (_keep, target) = prepared();
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    let near = TokenStream::open(&target, Access::Read).unwrap();
    assert_eq!(far.index(), near.index());
    let (mut a, mut b, mut scratch) = ([0; 700], [0; 700], Scratch::default());
    for start in (0..far.token_count() - 700).step_by(9973) {
        far.read(start, &mut a, &mut scratch, &"a sample").unwrap();
        near.read(start, &mut b, &mut scratch, &"a sample").unwrap();
        assert_eq!(a, b);
    }
    far.verify().unwrap();
    assert!(server.requests.load(Ordering::SeqCst) > 100);
    assert_eq!(server.connections.load(Ordering::SeqCst), 1, "the connection is kept");
}

#[test]
fn what_fails_for_the_moment_is_asked_for_again() {
    let (_keep, target) = prepared();
    let bad = [Answer::Status(503), Answer::Cut, Answer::Close, Answer::Silence, Answer::Garbage];
    // Every second request of a file fails, in all ways in turn.
    let server = Server::start(target.clone(), move |number, _| {
        if number % 2 == 0 {
            bad[number / 2 % bad.len()]
        } else {
            Answer::Good
        }
    });
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    far.verify().unwrap();
    assert!(server.requests.load(Ordering::SeqCst) > 10);
}

#[test]
fn a_cut_answer_goes_on_from_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..100_000_u32).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    std::fs::write(folder.path().join("f"), &content).unwrap();
    let server = Server::start(folder.path().to_path_buf(), |number, _| {
        if (1..5).contains(&number) {
            Answer::Cut
        } else {
            Answer::Good
        }
    });
    let file = server.folder(LONG).open("f").unwrap();
    let mut out = vec![0; content.len()];
    file.read_at(0, &mut out).unwrap();
    assert_eq!(out, content);
    assert!(file.read_at(99_999, &mut [0; 2]).is_err(), "behind the end");
}

#[test]
fn a_server_that_stays_silent_is_an_error_at_the_deadline() {
    let (_keep, target) = prepared();
    let server =
        Server::start(target, |number, _| if number > 3 { Answer::Silence } else { Answer::Good });
    let started = Instant::now();
    let error = TokenStream::open_from(&server.folder(Duration::from_secs(2))).unwrap_err();
    assert!(matches!(&error, Error::Http { reason, .. } if reason.contains("attempts")), "{error}");
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[test]
fn a_file_that_changes_on_the_server_is_an_error() {
    let (_keep, target) = prepared();
    let is_new = Arc::new(Mutex::new(false));
    let changed = Arc::clone(&is_new);
    let server = Server::start(target, move |_, _| {
        if *changed.lock().unwrap() {
            Answer::Etag("\"2\"")
        } else {
            Answer::Good
        }
    });
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    *is_new.lock().unwrap() = true;
    let error = far.verify().unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
}

#[test]
fn what_will_not_get_better_is_an_error_at_once() {
    let (_keep, target) = prepared();
    let cases = [
        (Answer::Whole, "range requests"),
        (Answer::Status(403), "403"),
        (Answer::WrongRange, "it sent bytes"),
    ];
    for (answer, text) in cases {
        let server = Server::start(target.clone(), move |_, _| answer);
        let started = Instant::now();
        let error = TokenStream::open_from(&server.folder(LONG)).unwrap_err();
        assert!(matches!(error, Error::Http { .. }), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    let server = Server::start(target, |_, _| Answer::Good);
    let error = server.folder(LONG).open("absent file").unwrap_err();
    assert!(
        error.to_string().contains("absent%20file") && error.to_string().contains("404"),
        "{error}"
    );
    assert!(HttpFolder::new("ftp://a/b", HttpOptions::default()).is_err());
}

#[test]
fn an_empty_file_has_no_bytes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("f"), b"").unwrap();
    let server = Server::start(folder.path().to_path_buf(), |_, _| Answer::Good);
    let file = server.folder(LONG).open("f").unwrap();
    assert_eq!(file.size(), 0);
    file.read_at(0, &mut []).unwrap();
}

/// Reads all of a stream in pieces, from several threads at once.
fn read_everything(stream: &TokenStream) -> Vec<i64> {
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

#[test]
fn a_list_of_damage_is_found_on_a_server_and_its_absence_told_from_other_answers() {
    let (_keep, target) = prepared();
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    assert!(server.folder(LONG).find("damage.json").unwrap().is_none());
    assert!(TokenStream::open_from(&server.folder(LONG)).unwrap().damaged().is_empty());
    let fingerprint = phalanx_data::Index::read(&target).unwrap().fingerprint;
    let list = format!(
        r#"{{"format": "phalanx-damage", "version": 1, "fingerprint": "{fingerprint}",
            "blocks": [{{"file": "tokens-00000.safetensors", "block": 0}}]}}"#
    );
    std::fs::write(target.join("damage.json"), list).unwrap();
    assert_eq!(TokenStream::open_from(&server.folder(LONG)).unwrap().damaged().len(), 1);

    let server = Server::start(target.clone(), |_, name| {
        if name == "damage.json" {
            Answer::Status(403)
        } else {
            Answer::Good
        }
    });
    let error = TokenStream::open_from(&server.folder(LONG)).unwrap_err();
    assert!(matches!(error, Error::Http { .. }), "{error}");
    assert!(error.to_string().contains("list the folder"), "{error}");

    // A file that is taken away while it is read: not found, and named with what was read.
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    std::fs::remove_file(target.join("tokens-00000.safetensors")).unwrap();
    let error = far.read(9, &mut [0; 8], &mut Scratch::default(), &"sample 3").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("cannot read sample 3 at offset 4114 of "), "{text}");
    assert!(text.contains("404"), "{text}");
}
