//! Folders that are written: nothing that lies at their place is lost, and they are nobody's input.

use std::fs;
use std::sync::Mutex;

use phalanx_data::convert::{convert, prepare, ConvertOptions, PrepareOptions};
use phalanx_data::format::TokenWriter;
use phalanx_data::progress::{Event, Silent, Stage};
use phalanx_data::records::{Field, RecordWriter};
use phalanx_data::{DType, Error};

use crate::support::{write_text, SPECIAL};

fn writer(target: &std::path::Path) -> phalanx_data::Result<TokenWriter> {
    TokenWriter::create(target, b"{}", 500, SPECIAL, 1 << 20)
}

#[test]
fn what_lies_at_the_place_of_an_output_stays() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("mine");
    fs::create_dir(&target).unwrap();
    // An empty folder is in nobody's way.
    let mut early = writer(&target).unwrap();
    early.tokens(&[5, 6, 3]).unwrap();
    fs::write(target.join("thesis.txt"), "years of work").unwrap();
    let error = early.finish(0).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    assert!(folder.path().join(".mine.partial/index.json").exists(), "what was written is kept");
    let error = writer(&target).map(drop).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");

    let fields = vec![Field::fixed("x", DType::U8, [2])];
    let records = folder.path().join("records");
    let late = RecordWriter::create(&records, fields, 1 << 20).unwrap();
    fs::create_dir(&records).unwrap();
    fs::write(records.join("thesis.txt"), "more of it").unwrap();
    let error = late.finish().map(drop).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    assert_eq!(fs::read_to_string(target.join("thesis.txt")).unwrap(), "years of work");
    assert_eq!(fs::read_to_string(records.join("thesis.txt")).unwrap(), "more of it");
}

#[test]
fn an_output_inside_its_input_is_no_input() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus");
    fs::create_dir(&corpus).unwrap();
    write_text(&corpus, 2, 60);
    let inputs = [corpus.clone()];
    let inside = corpus.join("tokens");
    let made = convert(&inputs, &inside, &ConvertOptions::default(), &Silent).unwrap();
    assert!(!made.reused);
    let again = convert(&inputs, &inside, &ConvertOptions::default(), &Silent).unwrap();
    assert!(again.reused, "the same command does nothing");
    let elsewhere = folder.path().join("elsewhere");
    let notices = Mutex::new(Vec::new());
    let note = |event: Event<'_>| {
        if let Event::Notice(text) = event {
            notices.lock().unwrap().push(text.to_owned());
        }
    };
    let other = convert(&inputs, &elsewhere, &ConvertOptions::default(), &note).unwrap();
    assert_eq!(other.index.fingerprint, made.index.fingerprint);
    let passed_over = format!("{} is passed over: it holds tokens or records", inside.display());
    assert!(notices.lock().unwrap().contains(&passed_over), "{notices:?}");
    notices.lock().unwrap().clear();
    // So it is where text is prepared, by who prepares it.
    for expected in [true, false] {
        prepare(&corpus, &PrepareOptions::default(), &note).unwrap();
        assert_eq!(notices.lock().unwrap().contains(&passed_over), expected, "{notices:?}");
        notices.lock().unwrap().clear();
    }
}

#[test]
fn what_lies_in_the_place_of_prepared_text_is_found_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 60);
    let options = PrepareOptions::default();
    let prepared = prepare(folder.path(), &options, &Silent).unwrap().folder;
    fs::remove_file(prepared.join("index.json")).unwrap();
    let counting = |event: Event<'_>| {
        let is_work = matches!(event, Event::Begin { stage: Stage::Counting, .. });
        assert!(!is_work, "the text is not read");
    };
    let error = prepare(folder.path(), &options, &counting).unwrap_err();
    assert!(matches!(&error, Error::CacheOccupied { path } if *path == prepared), "{error}");
    let told = error.to_string();
    assert!(told.contains("remove it, or choose another cache_dir"), "{told}");
    fs::remove_dir_all(&prepared).unwrap();
    fs::create_dir(&prepared).unwrap();
    assert!(!prepare(folder.path(), &options, &Silent).unwrap().reused, "empty, it is free");
}
