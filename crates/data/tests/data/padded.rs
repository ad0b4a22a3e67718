//! Documents as samples, padded to the longest of a batch.

use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenStream, Tokens};
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::samples::{Objective, PaddedText};
use phalanx_data::{from_fn, Access, Column, DType, Loader, LoaderOptions, Masking, Tail, IGNORED};

use crate::support::write_tokens;

const LEN_MAX: usize = 100;

/// Every row of an epoch: its document, its ids, labels and mask.
type Row = (u64, [Vec<i64>; 3]);

fn epoch(stream: &Arc<TokenStream>, objective: Objective, bucketing: u64) -> (Vec<Row>, usize) {
    let samples = PaddedText::new(Arc::<TokenStream>::clone(stream), LEN_MAX, objective).unwrap();
    let options = LoaderOptions {
        tail: Tail::Exact,
        epochs: Some(1),
        global_batch: 8,
        bucketing,
        ..Default::default()
    };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    let (mut rows, mut padded) = (Vec::new(), 0);
    for step in loader.steps() {
        for batch in &step.unwrap().micro_batches {
            let columns = ["input_ids", "labels", "attention_mask"];
            let columns = columns.map(|name| batch.get::<i64>(name).unwrap());
            let len = batch.sequence_len();
            assert_eq!(batch.column_shape(0), batch.shape());
            let of_row = |at: usize| columns.map(|all| all[at * len..(at + 1) * len].to_vec());
            let longest = columns[2].chunks(len).map(|mask| mask.iter().sum::<i64>()).max();
            assert_eq!(
                longest,
                Some(i64::try_from(len).unwrap()),
                "no longer than its longest row"
            );
            padded += columns[2].iter().filter(|&&token| token == 0).count();
            rows.extend((0..batch.rows()).map(|at| (batch.samples()[at].id, of_row(at))));
        }
    }
    (rows, padded)
}

fn stream() -> (tempfile::TempDir, Arc<TokenStream>) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 61, 500, 2000);
    let stream = Arc::new(TokenStream::open(&target, Access::Read).unwrap());
    (folder, stream)
}

#[test]
fn each_document_is_a_row() {
    let (_folder, stream) = stream();
    let (rows, _) = epoch(&stream, Objective::Causal, 0);
    let mut seen: Vec<u64> = rows.iter().map(|(document, _)| *document).collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..61), "every document once");
    let mut scratch = Scratch::default();
    let mut cut = 0;
    for (document, [ids, labels, mask]) in rows {
        let range = Tokens::document(&*stream, document, &mut scratch).unwrap();
        let mut expected = vec![0; usize::try_from(range.end - range.start).unwrap()];
        stream.read(range.start, &mut expected, &mut scratch, &"a document").unwrap();
        cut += usize::from(expected.len() > LEN_MAX);
        expected.truncate(LEN_MAX);
        let len = expected.len();
        assert_eq!(ids[..len], expected);
        assert!(ids[len..].iter().all(|&id| id == 0) && mask[len..].iter().all(|&bit| bit == 0));
        assert!(mask[..len].iter().all(|&bit| bit == 1));
        assert_eq!(labels[..len - 1], expected[1..]);
        assert!(labels[len - 1..].iter().all(|&label| label == IGNORED));
    }
    assert!(cut > 0 && cut < 61, "some are cut: {cut}");
}

#[test]
fn masks_are_the_same_however_batches_are_put_together() {
    let (_folder, stream) = stream();
    let objective = Objective::Masked(Masking::default());
    let by_document = |bucketing| {
        let (mut rows, padded) = epoch(&stream, objective, bucketing);
        rows.sort();
        let unpadded = |(document, columns): Row| {
            let len = usize::try_from(columns[2].iter().sum::<i64>()).unwrap();
            (document, columns.map(|column| column[..len].to_vec()))
        };
        (rows.into_iter().map(unpadded).collect::<Vec<Row>>(), padded)
    };
    let ((plain, much), (bucketed, little)) = (by_document(0), by_document(7));
    assert_eq!(plain, bucketed);
    assert!(little * 3 < much, "{little} and {much} positions are padding");
    assert!(plain.iter().all(|(_, [_, labels, _])| labels.iter().any(|&label| label != IGNORED)));
}

/// Record n: n mod 5 boxes, a name of n mod 41 letters, and a note that nobody has.
fn write_records(target: &std::path::Path, records: u64) {
    let fields = ["boxes", "name", "note"].map(|name| Field::variable(name, DType::U8));
    let mut writer = RecordWriter::create(target, fields.into(), 1 << 20).expect("create");
    for record in 0..records {
        let letter = u8::try_from(record % 26).expect("a letter") + b'a';
        let letters = |count: u64| vec![letter; usize::try_from(record % count).expect("few")];
        let (boxes, name) = (letters(5), letters(41));
        let values = [&boxes[..], &name, &[]].map(ColumnValue::of);
        writer.push(&values).expect("push");
    }
    writer.finish().expect("finish");
}

#[test]
fn padded_columns_are_each_no_longer_than_they_can_be() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    write_records(&target, 200);
    for (bucketing, threads) in [(0, 0), (0, 2), (5, 2)] {
        let records = Records::open(&target, Access::Read).unwrap();
        let samples = RecordSamples::new(records).unwrap();
        let options = LoaderOptions {
            tail: Tail::Exact,
            epochs: Some(1),
            global_batch: 8,
            bucketing,
            threads,
            ..Default::default()
        };
        let mut loader = Loader::new(Arc::new(samples), options).unwrap();
        let (mut seen, mut shortest) = (0, i64::MAX);
        for step in loader.steps() {
            let step = step.unwrap();
            let batch = &step.micro_batches[0];
            let longest = batch.samples().iter().map(|sample| (sample.id % 41).max(sample.id % 5));
            let longest = i64::try_from(longest.max().unwrap()).unwrap();
            // Columns alternate with their lengths.
            let widths = [0, 2, 4].map(|column| batch.column_shape(column)[1]);
            assert_eq!(widths, [longest.min(4), longest, 0]);
            let (wide, lens) = (batch.get::<u8>("name").unwrap(), batch.get::<i64>("name_len"));
            let width = usize::try_from(longest).unwrap();
            for ((row, sample), &len) in wide.chunks(width).zip(batch.samples()).zip(lens.unwrap())
            {
                assert_eq!(u64::try_from(len).unwrap(), sample.id % 41);
                let letter = u8::try_from(sample.id % 26).unwrap() + b'a';
                let (own, rest) = row.split_at(usize::try_from(len).unwrap());
                assert!(own.iter().all(|&byte| byte == letter));
                assert!(rest.iter().all(|&byte| byte == 0));
            }
            assert_eq!(batch.get::<u8>("boxes").unwrap().len(), 8 * width.min(4));
            (seen, shortest) = (seen + batch.rows(), shortest.min(longest));
        }
        assert_eq!(seen, 200);
        assert!(bucketing == 0 || shortest < 10, "short names come together: {shortest}");
    }
}

#[test]
fn a_closure_fills_columns_of_different_lengths() {
    let columns = vec![
        Column::padded("encoder", DType::I64, [64]),
        Column::padded("decoder", DType::F32, [5, 2]),
    ];
    let samples = from_fn(96, columns, "v1", |sample, _, row| {
        row.column::<i64>(0)?.fill(sample.id.cast_signed());
        row.column::<f32>(1)?.fill(1.0);
        Ok(())
    })
    .with_len(|id| Ok(usize::try_from(id).unwrap_or(0)));
    let mut loader = Loader::new(Arc::new(samples), LoaderOptions::default()).unwrap();
    for _ in 0..3 {
        let step = loader.next_step().unwrap();
        let batch = &step.micro_batches[0];
        let longest = batch.samples().iter().map(|sample| sample.id).max().unwrap().min(64);
        let longest = longest.cast_signed();
        assert_eq!(batch.column_shape(0), [32, longest]);
        assert_eq!(batch.column_shape(1), [32, longest.min(5), 2]);
        assert_eq!(batch.get::<f32>("decoder").unwrap().len(), 320);
        assert_eq!(batch.sequence_len(), usize::try_from(longest).unwrap());
    }
}

#[test]
fn a_field_with_the_name_of_a_column_of_lengths_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fields = [Field::variable("boxes", DType::F32), Field::fixed("boxes_len", DType::I64, [])];
    for order in [[0, 1], [1, 0]] {
        let target = folder.path().join(format!("records-{}", order[0]));
        let mut writer = RecordWriter::create(
            &target,
            order.map(|at: usize| fields[at].clone()).into(),
            1 << 20,
        )
        .unwrap();
        let values = [ColumnValue::of(&[0.5_f32, 1.0]), ColumnValue::of(&[7_i64])];
        writer.push(&order.map(|at| values[at])).unwrap();
        writer.finish().unwrap();
        let records = Records::open(&target, Access::Read).unwrap();
        let error = RecordSamples::new(records).unwrap_err().to_string();
        assert!(error.contains("`boxes_len`") && error.contains("`boxes`"), "{error}");
    }
}
