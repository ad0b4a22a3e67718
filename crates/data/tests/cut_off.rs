//! A file that is cut off while it is mapped: an error for who reads it, and the process lives. Each test runs in a process of
//! its own, because it may die of a signal.
#![expect(unsafe_code, reason = "a SIGBUS that is not the library's is made with a map of our own")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::batches::Scratch;
use phalanx_data::format::{MegatronTokens, SpecialTokens, TokenStream, TokenWriter, Tokens};
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::{Access, DType, Error, Loader, LoaderOptions};

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

/// Three thousand records with sounds of any length, in one shard of about 3 MiB; its path.
fn prepared_records(folder: &Path) -> (PathBuf, PathBuf) {
    let target = folder.join("records");
    let fields = vec![Field::fixed("label", DType::I64, []), Field::variable("sound", DType::I16)];
    let mut writer = RecordWriter::create(&target, fields, 1 << 30).unwrap();
    for record in 1..3001_i64 {
        let sound = vec![7_i16; usize::try_from(record % 997).unwrap()];
        writer.push(&[ColumnValue::of(&[record]), ColumnValue::of(&sound)]).unwrap();
    }
    writer.finish().unwrap();
    let shard = target.join("records-00000.safetensors");
    (target, shard)
}

#[test]
fn records_of_a_file_that_is_cut_off_are_errors() {
    let Some(folder) = folder() else {
        return passes_in_child("records_of_a_file_that_is_cut_off_are_errors");
    };
    let (target, shard) = prepared_records(&folder);
    let whole = fs::read(&shard).unwrap();
    let mut scratch = Scratch::default();
    for place in [0, 4096, 30_000, 1_000_001, whole.len() as u64 - 1] {
        // Once with blocks that were compared before, once without.
        for is_verified in [true, false] {
            fs::write(&shard, &whole).unwrap();
            let records = Records::open(&target, Access::Map).unwrap();
            let mut sounds = vec![Vec::new(); 3000];
            for (record, sound) in (0..3000_u64).zip(&mut sounds).filter(|_| is_verified) {
                let count = records.elements(record, 1, &mut scratch).unwrap();
                *sound = vec![0; 2 * count];
                records.read(record, 1, sound, &mut scratch).unwrap();
            }
            cut(&shard, place);
            let (mut good, mut bad) = (0, 0);
            for (record, sound) in (0..3000_u64).zip(&mut sounds) {
                let mut label = [0; 8];
                match records.read(record, 0, &mut label, &mut scratch) {
                    Ok(()) => assert_eq!(i64::from_le_bytes(label), record.cast_signed() + 1),
                    Err(error) => assert!(is_cut(&error, place), "cut at {place}: {error}"),
                }
                let read = records.elements(record, 1, &mut scratch).and_then(|count| {
                    sound.resize(2 * count, 0);
                    sound.fill(0);
                    records.read(record, 1, sound, &mut scratch)
                });
                match read {
                    Ok(()) => {
                        assert!(sound.as_chunks::<2>().0.iter().all(|value| *value == [7, 0]));
                        good += 1;
                    }
                    Err(error) => {
                        assert!(is_cut(&error, place), "cut at {place}: {error}");
                        bad += 1;
                    }
                }
            }
            assert!(bad > 0 || place > 1 << 20, "cut at {place}: {good} good, {bad} bad");
            // All of them through a loader.
            let samples = RecordSamples::new(records).unwrap();
            let options = LoaderOptions { epochs: Some(1), threads: 0, ..LoaderOptions::default() };
            let mut loader = Loader::new(Arc::new(samples), options).unwrap();
            let error = loop {
                match loader.next_step() {
                    Ok(_) if loader.is_at_end() => break None,
                    Ok(_) => {}
                    Err(error) => break Some(error),
                }
            };
            match error {
                Some(error) => assert!(is_cut(&error, place), "cut at {place}: {error}"),
                None => assert!(place > 1 << 20, "cut at {place}, and all were delivered"),
            }
        }
    }
}

#[test]
fn a_megatron_file_that_is_cut_off_is_an_error() {
    let Some(folder) = folder() else {
        return passes_in_child("a_megatron_file_that_is_cut_off_is_an_error");
    };
    // Sequences of ten tokens, none of which is 0.
    let count = 100_000_u64;
    let mut idx = b"MMIDIDX\0\0".to_vec();
    idx.extend(1_u64.to_le_bytes());
    idx.push(8);
    idx.extend([count, count + 1].iter().flat_map(|number| number.to_le_bytes()));
    idx.extend((0..count).flat_map(|_| 10_i32.to_le_bytes()));
    idx.extend((0..count).flat_map(|at| (20 * at).to_le_bytes()));
    idx.extend((0..=count).flat_map(u64::to_le_bytes));
    let bin = vec![1; usize::try_from(20 * count).unwrap()];
    let (idx_path, bin_path) = (folder.join("c.idx"), folder.join("c.bin"));
    let mut scratch = Scratch::default();
    for (path, place) in [
        (&bin_path, 0),
        (&bin_path, 1_000_001),
        (&bin_path, 20 * count - 1),
        (&idx_path, 0),
        (&idx_path, 500_000),
        (&idx_path, idx.len() as u64 - 1),
    ] {
        fs::write(&idx_path, &idx).unwrap();
        fs::write(&bin_path, &bin).unwrap();
        let tokens = MegatronTokens::open(&folder.join("c"), 777, Access::Map).unwrap();
        cut(path, place);
        let (mut out, mut bad) = ([0; 10], 0);
        for document in (0..count).step_by(1000).chain([count - 1]) {
            let read = tokens.document(document, &mut scratch).and_then(|range| {
                assert_eq!(range, 10 * document..10 * document + 10, "cut at {place}");
                tokens.read(range.start, &mut out, &mut scratch, &"a sample")
            });
            match read {
                Ok(()) => assert_eq!(out, [257; 10], "cut at {place}"),
                Err(error) => {
                    assert!(is_cut(&error, place), "cut at {place}: {error}");
                    bad += 1;
                }
            }
        }
        assert!(bad > 0, "{} cut at {place}", path.display());
    }
}
