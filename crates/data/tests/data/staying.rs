//! What is said of the shards of a conversion that ended with an error.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use phalanx_data::convert::{convert, ConvertOptions, Document, Vocabulary};
use phalanx_data::progress::{Event, Stage};
use phalanx_data::records::{convert_safetensors, ColumnValue, Field, RecordOptions, RecordWriter};
use phalanx_data::{DType, Error};

use crate::support::write_text;

/// Runs with what is said; at the end of `stage` something is done.
fn notices<T>(
    stage: Stage,
    act: impl Fn() + Sync,
    run: impl FnOnce(&(dyn Fn(Event<'_>) + Sync)) -> T,
) -> (T, Vec<String>) {
    let said = Mutex::new(Vec::new());
    let note = |event: Event<'_>| match event {
        Event::Notice(text) => said.lock().unwrap().push(text.to_owned()),
        Event::End { stage: ended } if ended == stage => act(),
        _ => {}
    };
    let done = run(&note);
    (done, said.into_inner().unwrap())
}

fn options() -> ConvertOptions {
    ConvertOptions { document: Document::Line, shard_bytes: 2000, ..Default::default() }
}

#[test]
fn after_a_change_of_the_input_it_is_said_how_to_begin_again() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 500);
    let (input, output) = (folder.path().join("play-0.txt"), folder.path().join("out"));
    let run = |options: &ConvertOptions, act: &(dyn Fn() + Sync)| {
        notices(Stage::Encoding, act, |note| {
            convert(std::slice::from_ref(&input), &output, options, &note)
        })
    };
    let (error, said) = run(&options(), &|| fs::write(&input, "Something else.\n").unwrap());
    assert!(matches!(error, Err(Error::TextChanged { .. })), "{error:?}");
    let last = said.last().unwrap();
    assert!(
        last.contains("repeat the command with --restart") && !last.contains("stay"),
        "{said:?}"
    );
    // What it says is so.
    let (error, said) = run(&options(), &|| {});
    assert!(matches!(error, Err(Error::OtherConversion { .. })), "{error:?}");
    assert!(said.is_empty(), "nothing of this conversion is kept: {said:?}");
    let (made, _) = run(&ConvertOptions { restart: true, ..options() }, &|| {});
    made.unwrap();
}

#[test]
fn after_a_bad_line_it_is_said_that_a_corrected_input_begins_again() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("a.jsonl"), folder.path().join("out"));
    let line = |number: usize| format!("{{\"text\":\"scene {number} of the king and queen\"}}\n");
    let lines: String = (0..3000).map(line).collect();
    let run = |output: &Path, text: &str, options: &ConvertOptions| {
        fs::write(&input, text).unwrap();
        notices(
            Stage::Waiting,
            || {},
            |note| convert(std::slice::from_ref(&input), output, options, &note),
        )
    };
    let trained = folder.path().join("trained");
    run(&trained, &lines, &options()).0.unwrap();
    let vocabulary = Vocabulary::File(trained.join("tokenizer.json"));
    let options = ConvertOptions { vocabulary, ..options() };
    let (error, said) = run(&output, &format!("{lines}no\n"), &options);
    assert!(matches!(error, Err(Error::BadLine { line: 3001, .. })), "{error:?}");
    let stays = "the same command goes on there, and with --restart it begins again";
    assert!(said[0].contains("finished shards stay in") && said[0].contains(stays), "{said:?}");
    let (error, said) = run(&output, &lines, &options);
    assert!(matches!(error, Err(Error::OtherConversion { .. })) && said.is_empty(), "{said:?}");
    run(&output, &lines, &ConvertOptions { restart: true, ..options }).0.unwrap();
}

/// Writes an array of so many rows.
fn write_arrays(path: &Path, rows: u8) {
    let fields = vec![Field::fixed("x", DType::U8, [8])];
    let target = path.with_extension("folder");
    let mut writer = RecordWriter::create(&target, fields, 1 << 20).expect("create");
    for row in 0..rows {
        writer.push(&[ColumnValue::of(&[row; 8])]).expect("push");
    }
    writer.finish().expect("finish");
    fs::rename(target.join("records-00000.safetensors"), path).expect("move");
}

#[test]
fn so_it_is_with_records() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("a.safetensors"), folder.path().join("out"));
    write_arrays(&input, 200);
    let options = RecordOptions { shard_bytes: 400, ..Default::default() };
    let change = || {
        let file = fs::File::options().append(true).open(&input).unwrap();
        file.set_len(file.metadata().unwrap().len() + 1).unwrap();
    };
    let (error, said) = notices(Stage::Records, change, |note| {
        convert_safetensors(std::slice::from_ref(&input), &output, &options, &note)
    });
    assert!(matches!(error, Err(Error::TextChanged { .. })), "{error:?}");
    assert!(said[0].contains("repeat the command with --restart"), "{said:?}");
}

#[test]
fn of_a_file_that_is_one_large_document_it_is_said_how_to_cut_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    // With holes: it takes no room. Nothing is read of it either, for there is no tokenizer.
    let bytes = (256 << 20) + 1;
    for (name, bytes) in [("a.txt", 5), ("b.txt", bytes), ("c.txt", bytes)] {
        fs::File::create(at("in").join(name)).unwrap().set_len(bytes).unwrap();
    }
    fs::write(at("tokenizer.json"), "{}").unwrap();
    let run = |document| {
        let vocabulary = Vocabulary::File(at("tokenizer.json"));
        let options = ConvertOptions { vocabulary, document, ..Default::default() };
        let convert = |note: &(dyn Fn(Event<'_>) + Sync)| {
            convert(&[at("in")], &at("out"), &options, &note).map(drop)
        };
        notices(Stage::Waiting, || {}, convert)
    };
    let (error, said) = run(Document::File);
    assert!(matches!(error, Err(Error::Tokenizer { .. })), "{error:?}");
    let part = format!("b.txt (and 1 more) is one document of {bytes} bytes");
    assert!(said.len() == 1 && said[0].contains(&part), "{said:?}");
    assert!(said[0].ends_with("--document line or blank-line makes documents of its parts"));
    assert!(run(Document::Line).1.is_empty());
}
