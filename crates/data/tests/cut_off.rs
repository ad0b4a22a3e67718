//! A file that is cut off while it is mapped: an error for who reads it, and the process lives. Each test runs in a process of
//! its own, because it may die of a signal.
#![expect(unsafe_code, reason = "a SIGBUS that is not the library's is made with a map of our own")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use phalanx_data::{Access, Error, Scratch, SpecialTokens, TokenStream, TokenWriter};

const FOLDER: &str = "CUT_OFF_TEST_FOLDER";
const SIGBUS: i32 = 7;

/// The folder of a test that runs as a child; `None` in the parent.
fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// Runs the test `name` in a process of its own, for at most a minute.
fn in_child(name: &str) -> Output {
    let place = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(FOLDER, place.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if !ends_within(&mut child, Duration::from_secs(60)) {
        child.kill().unwrap();
    }
    child.wait_with_output().unwrap()
}

fn ends_within(child: &mut Child, limit: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < limit {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    false
}

#[track_caller]
fn passes_in_child(name: &str) {
    let output = in_child(name);
    assert!(output.status.success(), "{name}: {output:?}");
}

/// A prepared folder with a shard of 3 MiB, and its path.
fn prepared(folder: &Path) -> (PathBuf, PathBuf) {
    let target = folder.join("tokens");
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(&target, b"{}", 60_000, special, 1 << 30).unwrap();
    for document in 0..1000 {
        // No token is 0, so that zeros are not data.
        let tokens: Vec<u32> = (0..1500).map(|at| 257 + (document * 77 + at) % 50_000).collect();
        writer.tokens(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(0).unwrap();
    let shard = target.join("tokens-00000.safetensors");
    (target, shard)
}

fn cut(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// Whether an error says that a file was cut to so many bytes.
fn is_cut(error: &Error, len: u64) -> bool {
    matches!(error.root(), Error::WrongSize { actual, .. } if *actual == len)
}

#[test]
fn readers_of_a_file_that_is_cut_off_get_errors_and_the_process_lives() {
    let Some(folder) = folder() else {
        return passes_in_child(
            "readers_of_a_file_that_is_cut_off_get_errors_and_the_process_lives",
        );
    };
    let (target, shard) = prepared(&folder);
    let stream = TokenStream::open(&target, Access::Map).unwrap();
    stream.verify().unwrap();
    let (ready, is_ready) = channel();
    let stream = &stream;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4_u64)
            .map(|reader| {
                let ready = ready.clone();
                scope.spawn(move || {
                    let (mut out, mut scratch) = ([0; 512], Scratch::default());
                    let started = Instant::now();
                    let mut sample = reader * 131;
                    while started.elapsed() < Duration::from_secs(30) {
                        sample = (sample * 6_364_136 + 1_442_695) % 2900;
                        let read = stream.read(sample * 512, &mut out, &mut scratch, &"a sample");
                        if let Err(error) = read {
                            return Some(error);
                        }
                        assert!(out.iter().all(|&token| token >= 257), "zeros in {sample}");
                        ready.send(()).unwrap();
                    }
                    None
                })
            })
            .collect();
        for _ in 0..1000 {
            is_ready.recv_timeout(Duration::from_secs(30)).unwrap();
        }
        cut(&shard, 1_000_001);
        for reader in readers {
            let error = reader.join().unwrap().expect("an error within 30 s");
            let text = error.to_string();
            assert!(
                matches!(error, Error::Unreadable { .. })
                    && matches!(error.root(), Error::WrongSize { actual: 1_000_001, .. }),
                "{text}"
            );
            assert!(text.contains("cannot read a sample at offset"), "{text}");
        }
    });
    // Other data can still be read, and this one is still refused.
    fs::create_dir(folder.join("other")).unwrap();
    let (other, _) = prepared(&folder.join("other"));
    TokenStream::open(&other, Access::Map).unwrap().verify().unwrap();
    let again = stream.read(0, &mut [0; 8], &mut Scratch::default(), &"a sample");
    assert!(is_cut(&again.unwrap_err(), 1_000_001));
}

#[test]
fn no_place_of_the_cut_goes_unnoticed() {
    let Some(folder) = folder() else {
        return passes_in_child("no_place_of_the_cut_goes_unnoticed");
    };
    let (target, shard) = prepared(&folder);
    let whole = fs::read(&shard).unwrap();
    let len = whole.len() as u64;
    let (mut out, mut scratch) = ([0; 512], Scratch::default());
    let places = [0, 1, 4095, 4096, 4097, 1_000_000, 1_000_001, 2_999_808, 3_000_000, len - 9000];
    for place in places.into_iter().chain(len - 20..len) {
        fs::write(&shard, &whole).unwrap();
        let stream = TokenStream::open(&target, Access::Map).unwrap();
        stream.verify().unwrap();
        cut(&shard, place);
        // Token n lies at byte 4096 + 2 n; the samples before, around and behind the cut.
        let at = (place.saturating_sub(4096) / 2).min(1_500_000 - 512);
        for start in [0, at.saturating_sub(511), at, (at + 300).min(1_500_000 - 512)] {
            match stream.read(start, &mut out, &mut scratch, &"a sample") {
                Ok(()) => {
                    assert!(out.iter().all(|&token| token >= 257), "zeros, cut at {place}");
                    assert!(4096 + 2 * start + 1024 <= place, "read behind the cut at {place}");
                }
                Err(error) => assert!(is_cut(&error, place), "cut at {place}: {error}"),
            }
        }
    }
}

/// Faults in a map that the library knows nothing of.
fn fault(folder: &Path) {
    let path = folder.join("foreign");
    fs::write(&path, vec![1; 100_000]).unwrap();
    let file = File::open(&path).unwrap();
    // SAFETY: it is cut off on purpose; the process is meant to die.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    cut(&path, 0);
    std::hint::black_box(map[50_000]);
}

#[test]
fn a_bus_error_of_somebody_else_still_kills() {
    if let Some(folder) = folder() {
        let (target, _) = prepared(&folder);
        let stream = TokenStream::open(&target, Access::Map).unwrap();
        stream.verify().unwrap();
        fault(&folder);
        return;
    }
    let output = in_child("a_bus_error_of_somebody_else_still_kills");
    assert_eq!(output.status.signal(), Some(SIGBUS), "{output:?}");
}

#[test]
fn a_bus_error_of_somebody_else_after_one_of_ours_still_kills() {
    if let Some(folder) = folder() {
        let (target, shard) = prepared(&folder);
        let stream = TokenStream::open(&target, Access::Map).unwrap();
        cut(&shard, 4096);
        assert!(matches!(stream.verify(), Err(Error::WrongSize { actual: 4096, .. })));
        drop(stream);
        fault(&folder);
        return;
    }
    let output = in_child("a_bus_error_of_somebody_else_after_one_of_ours_still_kills");
    assert_eq!(output.status.signal(), Some(SIGBUS), "{output:?}");
}

#[test]
fn more_maps_than_the_first_slots_are_guarded() {
    let Some(folder) = folder() else {
        return passes_in_child("more_maps_than_the_first_slots_are_guarded");
    };
    let (target, shard) = prepared(&folder);
    let streams: Vec<_> =
        (0..200).map(|_| TokenStream::open(&target, Access::Map).unwrap()).collect();
    cut(&shard, 4096);
    for stream in &streams {
        assert!(matches!(stream.verify(), Err(Error::WrongSize { actual: 4096, .. })));
    }
}
