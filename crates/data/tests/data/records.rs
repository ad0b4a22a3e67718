//! Folders of records: what was pushed is read, by us and by any safetensors reader; damage is an error.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "made-up values"
)]

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::damage::verify;
use phalanx_data::progress::Silent;
use phalanx_data::records::{
    convert_safetensors, ColumnValue, Field, RecordIndex, RecordOptions, RecordSamples,
    RecordWriter, Records,
};
use phalanx_data::{Access, DType, Error, Loader, LoaderOptions};
use proptest::prelude::*;

const COUNT: u64 = 1000;

fn fields() -> Vec<Field> {
    vec![
        Field::fixed("image", DType::U8, [3, 4, 5]),
        Field::fixed("label", DType::I64, []),
        Field::variable("boxes", DType::F32),
        Field::fixed("good", DType::Bool, [1]),
    ]
}

fn image(record: u64) -> Vec<u8> {
    (0..60).map(|at| (record * 7 + at) as u8).collect()
}

fn boxes(record: u64) -> Vec<f32> {
    (0..record % 13).map(|at| (record + at) as f32 / 2.0).collect()
}

fn write(target: &Path, shard_bytes: u64) -> RecordIndex {
    let mut writer = RecordWriter::create(target, fields(), shard_bytes).expect("create");
    for record in 0..COUNT {
        let good = [u8::from(record.is_multiple_of(3))];
        writer
            .push(&[
                ColumnValue::of(&image(record)),
                ColumnValue::of(&[record.cast_signed() - 5]),
                ColumnValue::of(&boxes(record)),
                ColumnValue::from_bytes(DType::Bool, &good).expect("a whole number"),
            ])
            .expect("push");
    }
    writer.finish().expect("finish")
}

fn read(records: &Records, record: u64, field: usize, scratch: &mut Scratch) -> Vec<u8> {
    let count = records.elements(record, field, scratch).expect("elements");
    let mut out = vec![0xAA; count * records.fields()[field].dtype.bytes()];
    records.read(record, field, &mut out, scratch).expect("read");
    out
}

#[test]
fn what_was_pushed_is_read_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let index = write(&target, 20_000);
    assert!(index.shards.len() > 2, "several shards");
    for access in [Access::Read, Access::Map] {
        let records = Records::open(&target, access).unwrap();
        assert_eq!((records.record_count(), records.fields()), (COUNT, &fields()[..]));
        assert_eq!(records.fingerprint(), index.fingerprint);
        let mut scratch = Scratch::default();
        for step in 0..COUNT {
            let record = step * 377 % COUNT;
            assert_eq!(read(&records, record, 0, &mut scratch), image(record));
            let label = record.cast_signed() - 5;
            assert_eq!(read(&records, record, 1, &mut scratch), label.to_le_bytes());
            let values: Vec<u8> = boxes(record).iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(read(&records, record, 2, &mut scratch), values);
            assert_eq!(
                read(&records, record, 3, &mut scratch),
                [u8::from(record.is_multiple_of(3))]
            );
        }
        let mut four = [0; 4];
        let beyond = records.read(COUNT, 1, &mut four, &mut scratch).unwrap_err();
        assert!(matches!(beyond, Error::NoSuchSample { .. }), "{beyond}");
        let short = records.read(0, 1, &mut four, &mut scratch).unwrap_err();
        assert!(short.to_string().contains("`label` of record 0 has 8 bytes"), "{short}");
        assert!(records.elements(0, 4, &mut scratch).is_err());
    }
    assert!(verify(&target, None, &Silent).unwrap().damage.is_empty());
}

#[test]
fn any_safetensors_reader_reads_a_shard() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    write(&target, 1 << 30);
    let bytes = fs::read(target.join("records-00000.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let image_tensor = tensors.tensor("image").unwrap();
    assert_eq!(image_tensor.shape(), [1000, 3, 4, 5]);
    assert_eq!(image_tensor.data()[60..120], image(1));
    assert_eq!(tensors.tensor("label").unwrap().shape(), [1000]);
    let offsets = tensors.tensor("boxes.offsets").unwrap();
    assert_eq!((offsets.dtype(), offsets.shape()), (safetensors::Dtype::U64, &[1001][..]));
    for name in ["label", "boxes", "boxes.offsets"] {
        let data = tensors.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(data.is_multiple_of(4) && data >= 4096, "{name} starts at {data}");
    }
}

#[test]
fn damage_is_an_error_that_names_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    write(&target, 1 << 30);
    let path = target.join("records-00000.safetensors");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[50_000] ^= 4;
    fs::write(&path, &bad).unwrap();
    let records = Records::open(&target, Access::Read).unwrap();
    let mut out = [0; 60];
    let error = records.read(7, 0, &mut out, &mut Scratch::default()).unwrap_err();
    assert!(error.to_string().contains("while reading record 7"), "{error}");
    assert_eq!(verify(&target, None, &Silent).unwrap().damage.len(), 1);
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    assert!(matches!(Records::open(&target, Access::Map), Err(Error::WrongSize { .. })));
}

#[test]
fn values_that_do_not_fit_are_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let mut writer = RecordWriter::create(&target, fields(), 1 << 20).unwrap();
    let (label, none) = ([1_i64], ColumnValue::of::<f32>(&[]));
    let flag = ColumnValue::from_bytes(DType::Bool, &[2]).unwrap();
    let image = image(0);
    let cases = [
        (vec![ColumnValue::of(&label)], "a record has 4 fields"),
        (vec![ColumnValue::of(&image[1..]), ColumnValue::of(&label), none, flag], "59 elements"),
        (vec![ColumnValue::of(&label), ColumnValue::of(&label), none, flag], "the field of U8"),
        (vec![ColumnValue::of(&image), ColumnValue::of(&label), none, flag], "a bool is 0 or 1"),
    ];
    for (values, part) in cases {
        let error = writer.push(&values).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(ColumnValue::from_bytes(DType::F32, &[0; 3]).is_err());
    drop(writer);
    let left = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), [".records.lock"]);
    fs::create_dir(&target).unwrap();
    fs::write(target.join("mine"), "x").unwrap();
    let refused = RecordWriter::create(&target, fields(), 1 << 20).unwrap_err();
    assert!(matches!(refused, Error::OutputExists { .. }), "{refused}");
}

#[test]
fn a_truth_value_that_is_none_is_named_in_the_file_it_is_in() {
    use safetensors::tensor::{serialize_to_file, Dtype, TensorView};

    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("a.safetensors"), folder.path().join("out"));
    let convert = |values: &[u8]| {
        let flags = TensorView::new(Dtype::BOOL, vec![3, 2], values).unwrap();
        serialize_to_file([("flags", flags)], None, &input).unwrap();
        let inputs = [input.clone()];
        convert_safetensors(&inputs, &output, &RecordOptions::default(), &Silent)
    };
    let error = convert(&[0, 1, 1, 0, 0, 7]).unwrap_err();
    let place = matches!(error, Error::BadValue { sample: 2, position: 1, value: 7, .. });
    assert!(place && error.to_string().contains("the BOOL tensor `flags` is 0 or 1"), "{error}");
    assert_eq!(convert(&[0, 1, 1, 0, 0, 1]).unwrap().index.record_count, 3);
}

#[test]
fn a_loader_delivers_records_and_pads_variable_ones() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    write(&target, 20_000);
    let samples = RecordSamples::new(Records::open(&target, Access::Map).unwrap()).unwrap();
    let options = LoaderOptions { global_batch: 8, ..LoaderOptions::default() };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    for _ in 0..20 {
        let step = loader.next_step().unwrap();
        let batch = &step.micro_batches[0];
        let longest = batch.column_shape(2)[1] as usize;
        let values = batch.get::<f32>("boxes").unwrap();
        for (row, sample) in batch.samples().iter().enumerate() {
            let images = &batch.get::<u8>("image").unwrap()[row * 60..][..60];
            assert_eq!(images, image(sample.id));
            assert_eq!(batch.get::<i64>("label").unwrap()[row], sample.id.cast_signed() - 5);
            let len = batch.get::<i64>("boxes_len").unwrap()[row] as usize;
            let padded = &values[row * longest..][..longest];
            assert_eq!(padded[..len], boxes(sample.id));
            assert!(padded[len..].iter().all(|&value| value == 0.0));
        }
    }
}

fn arrays(path: &Path, rows: usize, first: u8) -> PathBuf {
    let x: Vec<u8> = (0..rows * 6).map(|at| first.wrapping_add(at as u8)).collect();
    let y: Vec<u8> = (0..rows * 4).map(|at| at as u8).collect();
    let view =
        |dtype, shape, data| safetensors::tensor::TensorView::new(dtype, shape, data).unwrap();
    let tensors = [
        ("x", view(safetensors::Dtype::U8, vec![rows, 2, 3], &x)),
        ("y", view(safetensors::Dtype::F32, vec![rows], &y)),
    ];
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    path.to_path_buf()
}

#[test]
fn arrays_become_records_and_must_agree() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let options = RecordOptions { shard_bytes: 50, ..Default::default() };
    let inputs = [arrays(&at("a.safetensors"), 5, 0), arrays(&at("b.safetensors"), 7, 100)];
    let index = convert_safetensors(&inputs, &at("out"), &options, &Silent).unwrap().index;
    assert_eq!(index.record_count, 12);
    let records = Records::open(&at("out"), Access::Read).unwrap();
    let mut out = [0; 6];
    records.read(6, 0, &mut out, &mut Scratch::default()).unwrap();
    assert_eq!(out, [106, 107, 108, 109, 110, 111]);

    let x = [0_u8; 8];
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![4, 2], &x).unwrap();
    fs::write(at("c.safetensors"), safetensors::serialize([("x", view)], None).unwrap()).unwrap();
    let inputs = [inputs[0].clone(), at("c.safetensors")];
    let error = convert_safetensors(&inputs, &at("other"), &options, &Silent).unwrap_err();
    assert!(error.to_string().contains("it holds x U8"), "{error}");
    assert!(!at("other").exists());
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
fn neither_threads_nor_interruptions_show_in_converted_arrays() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    // Several parts of 4 MiB, and shards that end in the middle of them.
    for (name, rows) in [("a.safetensors", 700_000), ("b.safetensors", 300_001)] {
        arrays(&at("in").join(name), rows, 3);
    }
    let inputs = [at("in")];
    let options = |threads| RecordOptions {
        shard_bytes: 1_000_003,
        threads: NonZeroUsize::new(threads),
        ..Default::default()
    };
    let made = convert_safetensors(&inputs, &at("one"), &options(1), &Silent).unwrap();
    assert_eq!((made.index.record_count, made.reused, made.resumed_shards), (1_000_001, false, 0));
    assert!(made.index.shards.len() > 9);
    let expected = content(&at("one"));
    convert_safetensors(&inputs, &at("three"), &options(3), &Silent).unwrap();
    assert!(content(&at("three")) == expected, "with three threads");
    let again = convert_safetensors(&inputs, &at("three"), &options(2), &Silent).unwrap();
    assert!(again.reused && again.index == made.index);

    // As a killed process leaves it: whole shards in the journal, a cut off line, and files that nobody names.
    let journal = String::from_utf8(expected["conversion.jsonl"].clone()).unwrap();
    let lines: Vec<&str> = journal.split_inclusive('\n').collect();
    for shards in [0, 1, 5, made.index.shards.len()] {
        let partial = at(".cut.partial");
        fs::create_dir(&partial).unwrap();
        let kept = lines[..=shards].concat()
            + &lines.get(shards + 1).unwrap_or(&"")[..10.min(lines.len() - shards - 1)];
        fs::write(partial.join("conversion.jsonl"), kept).unwrap();
        for shard in made.index.shards.iter().take(shards + 1) {
            fs::write(partial.join(&shard.file), &expected[&shard.file]).unwrap();
        }
        let resumed = convert_safetensors(&inputs, &at("cut"), &options(2), &Silent).unwrap();
        assert_eq!(resumed.resumed_shards, shards as u64);
        assert!(content(&at("cut")) == expected, "after {shards} shards");
        assert!(!partial.exists());
        fs::remove_dir_all(at("cut")).unwrap();
    }

    // Another conversion is not mixed with what this one left.
    fs::create_dir(at(".cut.partial")).unwrap();
    fs::write(at(".cut.partial/conversion.jsonl"), lines[..2].concat()).unwrap();
    let other = RecordOptions { shard_bytes: 2_000_000, ..options(1) };
    let error = convert_safetensors(&inputs, &at("cut"), &other, &Silent).unwrap_err();
    assert!(matches!(error, Error::OtherConversion { .. }), "{error}");
    let other = RecordOptions { restart: true, ..other };
    assert_eq!(
        convert_safetensors(&inputs, &at("cut"), &other, &Silent).unwrap().resumed_shards,
        0
    );
    let error = convert_safetensors(&inputs, &at("one"), &other, &Silent).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
}

#[test]
fn arrays_of_nothing_are_refused_however_many_they_claim_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![1 << 60, 0], &[]);
    let tensors = [("x", view.unwrap())];
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let error =
        convert_safetensors(&[path], &folder.path().join("out"), &Default::default(), &Silent)
            .unwrap_err();
    assert!(error.to_string().contains("at least one element"), "{error}");
}

#[test]
fn one_output_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let field = || vec![Field::fixed("label", DType::I64, [])];
    let mut first = RecordWriter::create(&target, field(), 1).unwrap();
    first.push(&[ColumnValue::of(&[1_i64])]).unwrap();
    let second = RecordWriter::create(&target, field(), 1).unwrap_err();
    assert!(matches!(second, Error::LockTimeout { .. }), "{second}");
    assert_eq!(first.finish().unwrap().record_count, 1);
    assert_eq!(Records::open(&target, Access::Read).unwrap().record_count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever stands in an index or shard: an error or a value, never a panic.
    #[test]
    fn damaged_folders_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), index in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("records");
        let mut writer = RecordWriter::create(&target, fields(), 1 << 20).unwrap();
        for record in 0..20 {
            writer.push(&[
                ColumnValue::of(&image(record)),
                ColumnValue::of(&[1_i64]),
                ColumnValue::of(&boxes(record)),
                ColumnValue::from_bytes(DType::Bool, &[1]).unwrap(),
            ]).unwrap();
        }
        writer.finish().unwrap();
        let name = if index { "index.json" } else { "records-00000.safetensors" };
        let mut bytes = fs::read(target.join(name)).unwrap();
        let place = at.index(bytes.len());
        let is_same = bytes[place] == byte;
        bytes[place] = byte;
        fs::write(target.join(name), &bytes).unwrap();
        let mut scratch = Scratch::default();
        let mut out = [0; 60];
        let result = Records::open(&target, Access::Read)
            .and_then(|records| records.read(3, 0, &mut out, &mut scratch));
        prop_assert!(result.is_err() || index || is_same);
    }
}

/// The index without what earlier writers did not keep, or with something else there.
fn rewrite_index(folder: &Path, longest: Option<u64>) {
    let path = folder.join("index.json");
    let mut index: RecordIndex = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for shard in &mut index.shards {
        shard.longest = longest.map_or_else(Vec::new, |longest| vec![60, 1, longest, 1]);
    }
    let write = |index: &RecordIndex| fs::write(&path, serde_json::to_vec(index).unwrap()).unwrap();
    write(&index);
    let error = RecordIndex::read(folder).unwrap_err().to_string();
    let expected = error.split("expected ").nth(1).and_then(|rest| rest.get(..16)).unwrap();
    index.fingerprint = expected.parse().expect("the fingerprint that it should have");
    write(&index);
}

#[test]
fn the_longest_record_is_known_without_reading_all_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let index = write(&target, 20_000);
    assert!(index.shards.len() > 2);
    assert_eq!(index.shards[0].longest, [60, 1, 12, 1]);
    assert!(index.shards.iter().all(|shard| shard.longest[2] <= 12), "each shard has its own");
    let open = || RecordSamples::new(Records::open(&target, Access::Read).unwrap()).unwrap();
    let columns = open().records().fields().len();
    let shape = |samples: &RecordSamples| phalanx_data::Samples::columns(samples)[2].shape.clone();
    assert_eq!((columns, shape(&open())), (4, vec![12]));
    // Bounds that cannot be read are no trouble to who does not read them.
    let path = target.join("records-00000.safetensors");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let at = bad.len() / 2;
    bad[at..at + 8].fill(0xFF);
    fs::write(&path, &bad).unwrap();
    assert_eq!(shape(&open()), [12]);
    fs::write(&path, &good).unwrap();

    // As it was before: all bounds are read.
    rewrite_index(&target, None);
    assert!(!fs::read_to_string(target.join("index.json")).unwrap().contains("longest"));
    assert_eq!(shape(&open()), [12]);

    // A record that is longer than the index says is an error, not a row that is cut.
    rewrite_index(&target, Some(7));
    let samples = open();
    assert_eq!(shape(&samples), [7]);
    let mut loader = Loader::new(Arc::new(samples), LoaderOptions::default()).unwrap();
    let error = loader.steps().find_map(Result::err).expect("an error").to_string();
    assert!(error.contains("the index says 7 elements at most"), "{error}");
    // More than all of them together is no reason to take memory.
    rewrite_index(&target, Some(1 << 60));
    assert!(shape(&open())[0] < 10_000);
}
