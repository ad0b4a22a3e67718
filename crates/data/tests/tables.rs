//! Parquet and Arrow files: text to tokens as from JSON lines, columns to records.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_possible_wrap,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test; values are small; each case has its own names"
)]

#[path = "support/seen.rs"]
mod seen;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{FixedSizeListBuilder, Float32Builder, Int32Builder, ListBuilder};
use arrow_array::types::Int8Type;
use arrow_array::{
    ArrayRef, BooleanArray, DictionaryArray, Int64Array, LargeStringArray, RecordBatch,
    StringArray, StringViewArray, StructArray, UInt64Array, UInt8Array,
};
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_ipc::CompressionType;
use arrow_schema::{DataType, Field, Fields};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use phalanx_data::batches::Scratch;
use phalanx_data::convert::{convert, BadLines, ConvertOptions, Format, Vocabulary};
use phalanx_data::progress::{Event, Silent};
use phalanx_data::records::{convert_columns, FieldShape, RecordOptions, Records};
use phalanx_data::{Access, DType, Error};

use seen::Seen;

const ROWS: usize = 1000;

fn text(row: usize) -> String {
    let words = ["alpha", "beta", "gamma", "délta", "epsilon"];
    (0..row % 40).map(|at| words[(row * 7 + at * at) % 5]).collect::<Vec<_>>().join(" ")
}

/// Texts in all the ways that strings are kept.
fn texts(of: &str, rows: std::ops::Range<usize>) -> ArrayRef {
    let strings: Vec<String> = rows.map(text).collect();
    let all = strings.iter().map(String::as_str);
    match of {
        "large" => Arc::new(LargeStringArray::from_iter_values(all)),
        "view" => Arc::new(StringViewArray::from_iter_values(all)),
        "dictionary" => {
            let few: DictionaryArray<Int8Type> =
                strings.iter().map(|one| one.split(' ').next().unwrap()).collect();
            Arc::new(few)
        }
        _ => Arc::new(StringArray::from_iter_values(all)),
    }
}

fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter(columns).unwrap()
}

fn write_parquet(path: &Path, batch: &RecordBatch) {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(300))
        .set_data_page_row_count_limit(70)
        .set_write_batch_size(70)
        .build();
    let mut writer =
        ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties))
            .unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// In batches of 170 rows.
fn write_arrow(path: &Path, batch: &RecordBatch, is_stream: bool) {
    let parts = (0..batch.num_rows()).step_by(170);
    let parts = parts.map(|at| batch.slice(at, 170.min(batch.num_rows() - at)));
    let file = File::create(path).unwrap();
    if is_stream {
        let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
        parts.for_each(|part| writer.write(&part).unwrap());
        writer.finish().unwrap();
    } else {
        let mut writer = FileWriter::try_new(file, &batch.schema()).unwrap();
        parts.for_each(|part| writer.write(&part).unwrap());
        writer.finish().unwrap();
    }
}

fn options(field: &str) -> ConvertOptions {
    let vocabulary = Vocabulary::Train { vocab_size: 200, min_frequency: 1, lowercase: true };
    ConvertOptions { vocabulary, field: field.to_owned(), shard_bytes: 4000, ..Default::default() }
}

/// The shards of what a file is converted to.
fn shards(input: &Path, output: &Path, field: &str) -> Vec<Vec<u8>> {
    let made = convert(&[input.to_path_buf()], output, &options(field), &Silent).unwrap();
    assert!(made.index.shards.len() > 3);
    made.index.shards.iter().map(|shard| fs::read(output.join(&shard.file)).unwrap()).collect()
}

#[test]
fn text_in_a_column_gives_the_tokens_of_the_same_lines() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let lines: String =
        (0..ROWS).map(|row| serde_json::json!({ "text": text(row) }).to_string() + "\n").collect();
    fs::write(at("a.jsonl"), lines).unwrap();
    let expected = shards(&at("a.jsonl"), &at("expected"), "text");
    for of in ["plain", "large", "view"] {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..ROWS as i64));
        let table = batch(vec![("id", numbers), ("text", texts(of, 0..ROWS))]);
        write_parquet(&at("a.parquet"), &table);
        write_arrow(&at("a.arrow"), &table, true);
        write_arrow(&at("a.feather"), &table, false);
        for name in ["a.parquet", "a.arrow", "a.feather"] {
            let output = at(&format!("{name}-{of}"));
            assert_eq!(shards(&at(name), &output, "text"), expected, "{name} {of}");
        }
    }
    // In a structure, and under a name with a dot.
    let inner = texts("plain", 0..ROWS);
    let fields = Fields::from(vec![Field::new("body", DataType::Utf8, true)]);
    let page: ArrayRef = Arc::new(StructArray::new(fields, vec![Arc::clone(&inner)], None));
    let table = batch(vec![("page", page), ("odd.name", inner)]);
    write_parquet(&at("b.parquet"), &table);
    write_arrow(&at("b.arrow"), &table, true);
    for name in ["b.parquet", "b.arrow"] {
        for field in ["page.body", "odd.name"] {
            let output = at(&format!("{name}-{field}"));
            assert_eq!(shards(&at(name), &output, field), expected, "{name} {field}");
        }
    }
}

#[test]
fn an_interrupted_conversion_of_rows_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, is_stream) in
        [("a.parquet", None), ("a.arrow", Some(true)), ("a.feather", Some(false))]
    {
        let table = batch(vec![("text", texts("plain", 0..ROWS))]);
        match is_stream {
            None => write_parquet(&at(name), &table),
            Some(is_stream) => write_arrow(&at(name), &table, is_stream),
        }
        let (whole, again) = (at(&format!("{name}-whole")), at(&format!("{name}-again")));
        let expected = shards(&at(name), &whole, "text");
        // What a run leaves that was killed after its second shard.
        let partial = at(&format!(".{name}-again.partial"));
        fs::create_dir(&partial).unwrap();
        let journal = fs::read_to_string(whole.join("conversion.jsonl")).unwrap();
        let three: String = journal.split_inclusive('\n').take(3).collect();
        fs::write(partial.join("conversion.jsonl"), three).unwrap();
        for file in ["tokenizer.json", "tokens-00000.safetensors", "tokens-00001.safetensors"] {
            fs::copy(whole.join(file), partial.join(file)).unwrap();
        }
        let seen = Seen::default();
        let note = |event: Event<'_>| seen.note(event);
        let made = convert(&[at(name)], &again, &options("text"), &note).unwrap();
        assert_eq!(made.resumed_shards, 2, "{name}");
        seen.is_all_of(&at(name));
        for (shard, bytes) in made.index.shards.iter().zip(&expected) {
            assert_eq!(&fs::read(again.join(&shard.file)).unwrap(), bytes, "{name}");
        }
        assert_eq!(fs::read_to_string(again.join("conversion.jsonl")).unwrap(), journal);
    }
}

#[test]
fn what_is_wrong_with_a_table_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let holes: ArrayRef = Arc::new(StringArray::from(vec![Some("one"), None, Some("three")]));
    let numbers: ArrayRef = Arc::new(UInt64Array::from(vec![1, 2, 3]));
    let table = batch(vec![("text", holes), ("id", numbers)]);
    write_parquet(&at("a.parquet"), &table);
    let inputs = [at("a.parquet")];
    let error = |options: &ConvertOptions| {
        convert(&inputs, &at("out"), options, &Silent).unwrap_err().to_string()
    };
    let told = error(&options("text"));
    assert!(told.contains("a.parquet, row 2, column `text`: it is null; correct it"), "{told}");
    assert!(told.contains("--skip-bad-lines"), "{told}");
    assert!(error(&options("body")).contains("no column `body`; it has: text, id"));
    assert!(error(&options("id")).contains("of type UInt64, not strings"));
    assert!(error(&options("text.inner")).contains("no column `text.inner`"));
    let skipping = ConvertOptions { bad_lines: BadLines::Skip, ..options("text") };
    let made = convert(&inputs, &at("skipped"), &skipping, &Silent).unwrap();
    assert_eq!((made.skipped_lines, made.index.document_count), (1, 2));

    let columns = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        convert_columns(&inputs, &at("records"), None, &names, &Default::default(), &Silent)
            .unwrap_err()
            .to_string()
    };
    let told = columns(&["text"]);
    assert!(told.contains("row 2, column `text`: it is null, and every row"), "{told}");
    assert!(told.ends_with("out of --columns") && !told.contains("--skip"), "{told}");
    assert!(columns(&["id"]).contains("of type UInt64, which no field has"));
    assert!(columns(&["none"]).contains("no column `none`"));

    // A null inside a list is named by its row; a format that is given need not be told from the name.
    let mut lists = ListBuilder::new(Int32Builder::new());
    for row in 0..5 {
        lists.values().append_value(row);
        lists.values().append_option((row != 3).then_some(row));
        lists.append(true);
    }
    write_arrow(&at("lists"), &batch(vec![("ids", Arc::new(lists.finish()) as ArrayRef)]), true);
    let lists = |format| {
        convert_columns(&[at("lists")], &at("records"), format, &[], &Default::default(), &Silent)
            .unwrap_err()
            .to_string()
    };
    let told = lists(Some(Format::Arrow));
    assert!(told.contains("row 4, column `ids`: its list holds a null"), "{told}");
    assert!(lists(None).contains("--format"));
    assert!(lists(Some(Format::Text)).contains("columns are those of Parquet and Arrow"));

    fs::write(at("b.parquet"), b"nothing of that kind").unwrap();
    let error = convert(&[at("b.parquet")], &at("out"), &options("text"), &Silent).unwrap_err();
    assert!(
        matches!(&error, Error::BadTable { reason, .. } if reason.contains("neither")),
        "{error}"
    );
}

/// Columns of every kind.
fn all_kinds() -> RecordBatch {
    let mut pairs = FixedSizeListBuilder::new(Float32Builder::new(), 2);
    let mut lists = ListBuilder::new(Int32Builder::new());
    for row in 0..ROWS {
        pairs.values().append_slice(&[row as f32, -(row as f32)]);
        pairs.append(true);
        (0..row % 5).for_each(|at| lists.values().append_value((row * 10 + at) as i32));
        lists.append(true);
    }
    let bytes = (0..ROWS).map(|row| row as u8);
    let flags: Vec<bool> = (0..ROWS).map(|row| row % 3 == 0).collect();
    batch(vec![
        ("label", Arc::new(UInt8Array::from_iter_values(bytes))),
        ("flag", Arc::new(BooleanArray::from(flags))),
        ("pair", Arc::new(pairs.finish())),
        ("ids", Arc::new(lists.finish())),
        ("name", texts("dictionary", 0..ROWS)),
    ])
}

/// Small shards.
fn options_of(threads: Option<usize>) -> RecordOptions {
    let threads = threads.and_then(NonZeroUsize::new);
    RecordOptions { shard_bytes: 8000, threads, ..Default::default() }
}

/// All files of a folder.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn neither_threads_nor_interruptions_show_in_converted_columns() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Row groups of 150 rows, and batches in a file of Arrow.
    let table = all_kinds();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(150)).build();
    let file = File::create(at("a.parquet")).unwrap();
    let mut parquet = ArrowWriter::try_new(file, table.schema(), Some(properties)).unwrap();
    parquet.write(&table).unwrap();
    parquet.close().unwrap();
    let file = File::create(at("b.arrow")).unwrap();
    let mut arrow = FileWriter::try_new(file, &table.schema()).unwrap();
    (0..10).for_each(|part| arrow.write(&table.slice(part * 100, 100)).unwrap());
    arrow.finish().unwrap();
    for name in ["a.parquet", "b.arrow"] {
        let (inputs, one, cut) = ([at(name)], at(&format!("{name}-1")), at(&format!("{name}-cut")));
        let convert = |output: &Path, threads| {
            let seen = Seen::default();
            let note = |event: Event<'_>| seen.note(event);
            let options = options_of(Some(threads));
            let made = convert_columns(&inputs, output, None, &[], &options, &note).unwrap();
            seen.is_all_of(&inputs[0]);
            made
        };
        let made = convert(&one, 1);
        assert_eq!(made.index.record_count, ROWS as u64);
        let expected = content(&one);
        let three = at(&format!("{name}-3"));
        convert(&three, 3);
        assert!(content(&three) == expected, "{name} with three threads");

        let journal = String::from_utf8(expected["conversion.jsonl"].clone()).unwrap();
        let lines: Vec<&str> = journal.split_inclusive('\n').collect();
        for shards in 1..made.index.shards.len() {
            let partial = at(&format!(".{name}-cut.partial"));
            fs::create_dir(&partial).unwrap();
            fs::write(partial.join("conversion.jsonl"), lines[..=shards].concat()).unwrap();
            for shard in made.index.shards.iter().take(shards) {
                fs::write(partial.join(&shard.file), &expected[&shard.file]).unwrap();
            }
            assert_eq!(convert(&cut, 2).resumed_shards, shards as u64);
            assert!(content(&cut) == expected, "{name} after {shards} shards");
            fs::remove_dir_all(&cut).unwrap();
        }
    }
}

#[test]
fn columns_become_fields_of_records() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let table = all_kinds();
    write_parquet(&at("a.parquet"), &table.slice(0, 400));
    write_parquet(&at("b.parquet"), &table.slice(400, ROWS - 400));
    write_arrow(&at("a.arrow"), &table, true);
    let inputs: [Vec<PathBuf>; 2] = [vec![at("a.parquet"), at("b.parquet")], vec![at("a.arrow")]];
    for (number, inputs) in inputs.iter().enumerate() {
        let output = at(&format!("records-{number}"));
        let made = convert_columns(inputs, &output, None, &[], &options_of(None), &Silent).unwrap();
        let index = made.index;
        assert!(index.shards.len() > 2);
        let records = Records::open(&output, Access::Read).unwrap();
        assert_eq!(records.record_count(), ROWS as u64);
        let about: Vec<_> =
            records.fields().iter().map(|field| (&*field.name, field.dtype)).collect();
        let expected = [
            ("label", DType::U8),
            ("flag", DType::Bool),
            ("pair", DType::F32),
            ("ids", DType::I32),
            ("name", DType::U8),
        ];
        assert_eq!(about, expected);
        assert_eq!(records.fields()[2].shape, FieldShape::Fixed(vec![2]));
        let mut scratch = Scratch::default();
        for row in (0..ROWS).rev() {
            let mut value = |field: usize| {
                let count = records.elements(row as u64, field, &mut scratch).unwrap();
                let mut out = vec![0; count * records.fields()[field].dtype.bytes()];
                records.read(row as u64, field, &mut out, &mut scratch).unwrap();
                out
            };
            assert_eq!(value(0), [row as u8]);
            assert_eq!(value(1), [u8::from(row % 3 == 0)]);
            let pair = [row as f32, -(row as f32)].map(f32::to_le_bytes).concat();
            assert_eq!(value(2), pair);
            let ids: Vec<u8> =
                (0..row % 5).flat_map(|at| ((row * 10 + at) as i32).to_le_bytes()).collect();
            assert_eq!(value(3), ids, "row {row}");
            assert_eq!(value(4), text(row).split(' ').next().unwrap().as_bytes());
        }
    }
    let some = ["pair".to_owned(), "label".to_owned()];
    let options = options_of(None);
    let index =
        convert_columns(&inputs[0], &at("some"), None, &some, &options, &Silent).unwrap().index;
    let names: Vec<&str> = index.fields.iter().map(|field| &*field.name).collect();
    assert_eq!(names, ["pair", "label"]);
}

/// Puts other bytes in the place of `old`, which is there.
fn replaced(path: &Path, old: &[u8], new: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    bytes.splice(at..at + old.len(), new.iter().copied());
    fs::write(path, bytes).unwrap();
}

#[test]
fn sizes_that_a_table_cannot_have_are_errors_before_memory_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let error = |name: &str| {
        let error = convert(&[at(name)], &at("out"), &options("text"), &Silent).unwrap_err();
        drop(fs::remove_dir_all(at(".out.partial")));
        error.to_string()
    };
    // Buffers that claim to unpack to a petabyte: no memory satisfies that, and it would not be a panic.
    let strings: Vec<String> = (0..300).map(text).collect();
    let table = batch(vec![("text", texts("plain", 0..300))]);
    let bytes = strings.iter().map(String::len).sum::<usize>() as i64;
    let compressed = IpcWriteOptions::default();
    let compressed = compressed.try_with_compression(Some(CompressionType::ZSTD)).unwrap();
    for (name, is_stream) in [("a.arrow", true), ("a.feather", false)] {
        let file = File::create(at(name)).unwrap();
        let options = compressed.clone();
        if is_stream {
            let mut writer =
                StreamWriter::try_new_with_options(file, &table.schema(), options).unwrap();
            writer.write(&table).unwrap();
            writer.finish().unwrap();
        } else {
            let mut writer =
                FileWriter::try_new_with_options(file, &table.schema(), options).unwrap();
            writer.write(&table).unwrap();
            writer.finish().unwrap();
        }
        replaced(&at(name), &bytes.to_le_bytes(), &(1_i64 << 50).to_le_bytes());
        assert!(error(name).contains("claims to hold 1125899906842624"), "{}", error(name));
    }
    // A footer of more than the file.
    let mut bytes = fs::read(at("a.feather")).unwrap();
    let end = bytes.len() - 10;
    bytes[end..end + 4].copy_from_slice(&i32::MAX.to_le_bytes());
    fs::write(at("a.feather"), bytes).unwrap();
    assert!(
        error("a.feather").contains("its footer claims 2147483647 of"),
        "{}",
        error("a.feather")
    );

    // A dictionary of 2^31 - 1 entries, and one that claims to unpack to as many bytes. The first page of the file is that of the
    // only column.
    let entries = strings.iter().collect::<std::collections::BTreeSet<_>>().len();
    let of_entries = [0x4C, 0x15, u8::try_from(2 * entries).unwrap()];
    let most = [0xFE, 0xFF, 0xFF, 0xFF, 0x0F];
    write_parquet(&at("a.parquet"), &table);
    replaced(&at("a.parquet"), &of_entries, &[&of_entries[..2], &most].concat());
    let told = error("a.parquet");
    assert!(told.contains("claims 2147483647 entries"), "{told}");
    write_parquet(&at("a.parquet"), &table);
    let mut bytes = fs::read(at("a.parquet")).unwrap();
    assert_eq!(bytes[4..7], [0x15, 4, 0x15], "the header of a dictionary");
    let len = bytes[7..].iter().take_while(|&&byte| byte >= 0x80).count() + 1;
    bytes.splice(7..7 + len, most);
    fs::write(at("a.parquet"), bytes).unwrap();
    let told = error("a.parquet");
    assert!(told.contains("unpack to 2147483647"), "{told}");

    // Rows of nothing: a file could claim any number of them.
    let mut nothing = FixedSizeListBuilder::new(Float32Builder::new(), 0);
    (0..5).for_each(|_| nothing.append(true));
    write_arrow(
        &at("b.arrow"),
        &batch(vec![("none", Arc::new(nothing.finish()) as ArrayRef)]),
        true,
    );
    let options = RecordOptions::default();
    let refused = convert_columns(&[at("b.arrow")], &at("records"), None, &[], &options, &Silent);
    assert!(refused.unwrap_err().to_string().contains("which no field has"));
}

#[test]
fn any_change_of_a_table_is_rows_or_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let table = batch(vec![("text", texts("plain", 0..200)), ("large", texts("large", 0..200))]);
    write_parquet(&at("a.parquet"), &table);
    write_arrow(&at("a.arrow"), &table, true);
    write_arrow(&at("a.feather"), &table, false);
    std::panic::set_hook(Box::new(|_| {})); // of the libraries, which are caught
    let mut errors = 0;
    for name in ["a.parquet", "a.arrow", "a.feather"] {
        let original = fs::read(at(name)).unwrap();
        for round in 0..100 {
            let mut bytes = original.clone();
            let place = (round * 7919 + round * round * 31) % bytes.len();
            match round % 3 {
                0 => bytes[place] ^= 1 << (round % 8),
                1 => bytes.truncate(place),
                _ => {
                    let end = (place + 8).min(bytes.len());
                    bytes[place..end].fill(0xFF);
                }
            }
            let (changed, output) = (at(&format!("changed-{name}")), at("out"));
            fs::write(&changed, &bytes).unwrap();
            errors += usize::from(
                convert(std::slice::from_ref(&changed), &output, &options("text"), &Silent)
                    .is_err(),
            );
            drop(fs::remove_dir_all(&output));
            drop(fs::remove_dir_all(at(".out.partial")));
            let columns =
                convert_columns(&[changed], &output, None, &[], &Default::default(), &Silent);
            errors += usize::from(columns.is_err());
            drop(fs::remove_dir_all(&output));
        }
    }
    drop(std::panic::take_hook());
    assert!(errors > 170, "{errors} errors");
}
