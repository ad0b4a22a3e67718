//! Preparing text: several processes at once, crashes, and bad input.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use phalanx_data::convert::{prepare, PrepareOptions};
use phalanx_data::format::TokenStream;
use phalanx_data::progress::{Event, Silent, Stage};
use phalanx_data::{Access, Error};

use crate::support::write_text;

const LONG: Duration = Duration::from_secs(60);

fn options() -> PrepareOptions {
    PrepareOptions { vocab_size: 512, ..Default::default() }
}

/// Where [`a_process_prepares_the_text_it_is_given`] looks, in its working folder, before it makes a text of its own.
const GIVEN: &str = "given-text";

/// A file beside the text: the process is to stop in the middle of its work.
const HOLD: &str = "hold";

/// Alone this prepares a text of its own; other tests start it as a process in a folder with `given-text`.
#[test]
fn a_process_prepares_the_text_it_is_given() {
    let own = tempfile::tempdir().unwrap();
    let mut folder = PathBuf::from(GIVEN);
    if !folder.exists() {
        write_text(own.path(), 1, 50);
        folder = own.path().to_path_buf();
    }
    let hold = folder.join(HOLD);
    let wait_to_be_killed = |event: Event<'_>| {
        if matches!(event, Event::Begin { stage: Stage::Encoding, .. }) && hold.exists() {
            std::thread::park_timeout(LONG);
        }
    };
    let prepared = prepare(&folder, &options(), &wait_to_be_killed).unwrap();
    TokenStream::open(&prepared.folder, Access::Read).unwrap().verify().unwrap();
    let result = format!("{} {}", prepared.reused, prepared.fingerprint);
    let place = folder.join(format!("result-{}", std::process::id()));
    fs::write(place, result).unwrap();
}

/// A child that is killed and waited for when the test lets go of it.
struct Process(Child);

impl Process {
    fn start(folder: &Path) -> Self {
        let program = std::env::current_exe().expect("the test's own path");
        let child = Command::new(program)
            .args(["--exact", "preparing::a_process_prepares_the_text_it_is_given"])
            .current_dir(folder)
            .stdout(Stdio::null())
            .spawn()
            .expect("start a process");
        Process(child)
    }

    fn finish(mut self) {
        let deadline = Instant::now() + LONG;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().expect("ask for the status") {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        panic!("a process did not finish within {LONG:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn results(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .expect("list the folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("result-")))
        .map(|path| fs::read_to_string(path).expect("read a result"))
        .collect()
}

#[test]
fn of_several_processes_one_prepares_and_the_others_read() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join(GIVEN);
    fs::create_dir(&text).unwrap();
    write_text(&text, 4, 4000);
    let processes: Vec<Process> = (0..3).map(|_| Process::start(folder.path())).collect();
    processes.into_iter().for_each(Process::finish);
    let results = results(&text);
    assert_eq!(results.len(), 3);
    assert_eq!(results.iter().filter(|result| result.starts_with("false")).count(), 1);
    let fingerprint = |result: &String| result.split(' ').nth(1).map(str::to_owned);
    assert!(results.iter().all(|result| fingerprint(result) == fingerprint(&results[0])));
}

#[test]
fn a_process_killed_while_preparing_leaves_nothing_that_is_taken_for_data() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join(GIVEN);
    fs::create_dir(&text).unwrap();
    write_text(&text, 4, 500);
    fs::write(text.join(HOLD), "").unwrap();
    let cache = text.join(".phalanx");
    let is_partial = || {
        fs::read_dir(&cache).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.path().extension().is_some_and(|e| e == "partial"))
        })
    };
    let process = Process::start(folder.path());
    let deadline = Instant::now() + LONG;
    while !is_partial() {
        assert!(Instant::now() < deadline, "the process never began to write");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    drop(process);
    assert!(is_partial() && results(&text).is_empty(), "killed in the middle of its work");
    fs::remove_file(text.join(HOLD)).unwrap();

    let prepared = prepare(&text, &options(), &Silent).unwrap();
    assert!(!prepared.reused);
    TokenStream::open(&prepared.folder, Access::Read).unwrap().verify().unwrap();
    assert!(!is_partial(), "what the dead process left is gone");
}

#[test]
fn who_waits_too_long_for_another_is_told() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 50);
    let prepared = prepare(folder.path(), &options(), &Silent).unwrap();
    let key = prepared.folder.file_name().unwrap().to_string_lossy().into_owned();
    fs::remove_dir_all(&prepared.folder).unwrap();
    let lock = folder.path().join(".phalanx").join(format!(".{key}.lock"));
    let held = fs::File::open(&lock).unwrap();
    held.try_lock().unwrap();
    let stages = Mutex::new(Vec::new());
    let note = |event: Event<'_>| {
        if let Event::Begin { stage, .. } = event {
            stages.lock().unwrap().push(stage);
        }
    };
    let options = PrepareOptions { lock_timeout: Duration::from_millis(80), ..options() };
    let error = prepare(folder.path(), &options, &note).unwrap_err();
    assert!(matches!(error, Error::LockTimeout { .. }), "{error}");
    assert_eq!(*stages.lock().unwrap(), [Stage::Waiting]);
    drop(held);
    assert!(!prepare(folder.path(), &options, &Silent).unwrap().reused);
}

#[test]
fn progress_adds_up_and_small_texts_are_mentioned() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 3, 3000);
    let bytes: u64 = (0..3)
        .map(|n| fs::metadata(folder.path().join(format!("play-{n}.txt"))).unwrap().len())
        .sum();
    let seen = Mutex::new((Vec::new(), 0, 0, Vec::new()));
    let note = |event: Event<'_>| {
        let mut seen = seen.lock().unwrap();
        match event {
            Event::Begin { stage, .. } => seen.0.push(stage),
            Event::Advance { stage: Stage::Counting, bytes } => seen.1 += bytes,
            Event::Advance { bytes, .. } => seen.2 += bytes,
            Event::Notice(text) => seen.3.push(text.to_owned()),
            _ => {}
        }
    };
    let options = PrepareOptions { vocab_size: 8192, ..options() };
    let prepared = prepare(folder.path(), &options, &note).unwrap();
    let (stages, counted, encoded, notices) = seen.into_inner().unwrap();
    assert_eq!(stages, [Stage::Counting, Stage::Training, Stage::Encoding]);
    assert_eq!((counted, encoded), (bytes, bytes));
    assert!(prepared.vocab_size < 8192);
    let expected = format!("vocabulary of {} entries, fewer than the 8192", prepared.vocab_size);
    assert!(notices[0].contains(&expected), "{notices:?}");
}

#[test]
fn a_vocabulary_too_small_for_the_text_is_mentioned() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 200);
    let notices = Mutex::new(Vec::new());
    let note = |event: Event<'_>| {
        if let Event::Notice(text) = event {
            notices.lock().unwrap().push(text.to_owned());
        }
    };
    let options = PrepareOptions { vocab_size: 64, ..options() };
    prepare(folder.path(), &options, &note).unwrap();
    let notices = notices.into_inner().unwrap();
    assert!(notices.iter().any(|text| text.contains("are [UNK]")), "{notices:?}");
}

#[test]
fn one_file_is_prepared_beside_itself_and_subfolders_belong_to_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 100);
    let file = folder.path().join("play-0.txt");
    let one = prepare(&file, &options(), &Silent).unwrap();
    assert_eq!(one.document_count, 1);
    assert!(one.folder.starts_with(folder.path().join(".phalanx")));

    fs::create_dir_all(folder.path().join("more/deep")).unwrap();
    write_text(&folder.path().join("more/deep"), 2, 100);
    fs::write(folder.path().join("notes.md"), "# not text").unwrap();
    fs::write(folder.path().join("empty.txt"), "").unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let cache_dir = Some(elsewhere.path().join("cache"));
    let all = prepare(folder.path(), &PrepareOptions { cache_dir, ..options() }, &Silent).unwrap();
    assert_eq!(all.document_count, 3, "empty files are no documents");
    assert!(all.folder.starts_with(elsewhere.path()));
}

#[test]
fn bad_input_is_answered_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let refused = |path: &Path| prepare(path, &options(), &Silent).unwrap_err();
    let error = refused(&at("none"));
    assert!(matches!(error, Error::DataMissing { .. }), "{error}");
    assert!(error.to_string().contains("does not exist: give a folder"), "{error}");

    fs::create_dir(at("no-text")).unwrap();
    fs::write(at("no-text").join("a.md"), "words").unwrap();
    let error = refused(&at("no-text"));
    assert!(error.to_string().contains("no .txt file under"), "{error}");

    fs::create_dir(at("blank")).unwrap();
    fs::write(at("blank").join("a.txt"), " \n\t \u{7}").unwrap();
    fs::write(at("blank").join("b.txt"), "").unwrap();
    let error = refused(&at("blank"));
    assert!(error.to_string().contains("has no words"), "{error}");

    fs::create_dir(at("latin1")).unwrap();
    fs::write(at("latin1").join("a.txt"), "good text\n").unwrap();
    fs::write(at("latin1").join("b.txt"), b"caf\xe9 au lait").unwrap();
    let error = refused(&at("latin1"));
    assert!(matches!(error, Error::InvalidUtf8 { offset: 3, .. }), "{error}");
    assert!(error.to_string().contains("b.txt is not UTF-8 at byte 3: convert it"), "{error}");
    let left: Vec<_> = fs::read_dir(at("latin1").join(".phalanx")).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| entry.path().extension().is_some_and(|e| e == "lock")));

    write_text(folder.path(), 1, 20);
    // A folder for prepared data that cannot be made, for root too: its parent is a file.
    let cache_dir = Some(at("play-0.txt").join("cache"));
    let error = prepare(&at("play-0.txt"), &PrepareOptions { cache_dir, ..options() }, &Silent);
    let error = error.unwrap_err();
    assert!(matches!(error, Error::CacheNotWritable { .. }), "{error}");
    assert!(error.to_string().contains("choose another folder"), "{error}");

    let small = PrepareOptions { vocab_size: 10, ..options() };
    let error = prepare(&at("play-0.txt"), &small, &Silent).unwrap_err();
    assert!(error.to_string().starts_with("vocab_size is 10: at least 64"), "{error}");

    fs::create_dir(at("half")).unwrap();
    fs::write(at("half").join("index.json"), "{").unwrap();
    let error = refused(&at("half"));
    assert!(matches!(error, Error::BadIndex { .. }), "{error}");
}

#[test]
fn text_that_changes_meanwhile_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 500);
    let file = folder.path().join("play-0.txt");
    let change = |event: Event<'_>| {
        if let Event::Begin { stage: Stage::Encoding, .. } = event {
            fs::write(&file, "Something else entirely.").unwrap();
        }
    };
    let options = PrepareOptions { threads: NonZeroUsize::new(1), ..options() };
    let error = prepare(folder.path(), &options, &change).unwrap_err();
    assert!(matches!(error, Error::TextChanged { .. }), "{error}");
    assert!(!prepare(folder.path(), &options, &Silent).unwrap().reused);
}
