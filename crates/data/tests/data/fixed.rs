//! Fixed batches: what they deliver, and what is said about files that cannot be used.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use phalanx_data::samples::FixedBatches;
use phalanx_data::{Error, Loader, LoaderOptions, Order, Samples, IGNORED};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

type Column<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

fn bytes(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn column<'a>(name: &'a str, shape: [usize; 2], values: &[i64]) -> Column<'a> {
    (name, Dtype::I64, shape.to_vec(), bytes(values))
}

fn encode(columns: &[Column<'_>]) -> Vec<u8> {
    let views = columns.iter().map(|(name, dtype, shape, data)| {
        (*name, TensorView::new(*dtype, shape.clone(), data).expect("a valid tensor"))
    });
    safetensors::serialize(views, None).expect("a valid file")
}

fn write(folder: &Path, columns: &[Column<'_>]) -> PathBuf {
    let path = folder.join("batches.safetensors");
    fs::write(&path, encode(columns)).expect("write the file");
    path
}

/// Seven rows of three tokens: row i is 10·i, 10·i + 1, 10·i + 2.
fn rows() -> Vec<i64> {
    (0..7).flat_map(|row| (0..3).map(move |at| 10 * row + at)).collect()
}

fn labels() -> Vec<i64> {
    rows().iter().map(|&id| if id % 10 == 1 { id } else { IGNORED }).collect()
}

#[test]
fn rows_are_delivered_as_they_are_in_the_order_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let mask: Vec<i64> = rows().iter().map(|id| i64::from(id % 10 < 2)).collect();
    for masked in [false, true] {
        let mut columns =
            vec![column("input_ids", [7, 3], &rows()), column("labels", [7, 3], &labels())];
        if masked {
            columns.push(column("attention_mask", [7, 3], &mask));
        }
        let samples = Arc::new(FixedBatches::open(&write(folder.path(), &columns)).unwrap());
        assert_eq!((samples.sample_count(), samples.sequence_len(), samples.id_max()), (7, 3, 62));
        let mut slices = Vec::new();
        for rank in [0, 1] {
            let options = LoaderOptions {
                order: Order::Sequential,
                global_batch: 3,
                rank,
                world_size: 2,
                ..Default::default()
            };
            let mut loader =
                Loader::new(Arc::clone(&samples) as Arc<dyn Samples>, options).unwrap();
            let _first = loader.next_step().unwrap();
            let second = loader.next_step().unwrap();
            slices.extend(second.micro_batches.into_iter().take(1));
        }
        assert_eq!(slices[0].input_ids(), [30, 31, 32, 40, 41, 42]);
        assert_eq!(slices[0].labels(), [-100, 31, -100, -100, 41, -100]);
        assert_eq!(slices[0].attention_mask(), masked.then_some(&[1, 1, 0, 1, 1, 0][..]));
        assert_eq!(slices[1].input_ids(), [50, 51, 52]);
        assert_eq!(slices[1].label_count(), 1);
    }
}

#[test]
fn what_is_delivered_of_a_file_is_frozen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    // Byte by byte, so that the fingerprint does not depend on who writes such files.
    let tensor = |name: &str, start: usize| {
        let end = start + 7 * 3 * 8;
        format!(r#""{name}":{{"dtype":"I64","shape":[7,3],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{},{}}}", tensor("input_ids", 0), tensor("labels", 7 * 3 * 8));
    let mut file = with_header(&header, 0);
    file.extend(bytes(&rows()));
    file.extend(bytes(&labels()));
    fs::write(&path, file).unwrap();
    let samples = Arc::new(FixedBatches::open(&path).unwrap());
    assert_eq!(samples.fingerprint().to_string(), FROZEN, "saved states hold it");
    let options = LoaderOptions { global_batch: 4, seed: 42, ..Default::default() };
    let batch = &Loader::new(samples, options).unwrap().next_step().unwrap().micro_batches[0];
    let firsts: Vec<i64> = batch.input_ids().iter().step_by(3).copied().collect();
    assert_eq!(firsts, FROZEN_ROWS);
    let learnt: Vec<i64> = batch.labels().iter().skip(1).step_by(3).copied().collect();
    assert_eq!(learnt, FROZEN_ROWS.map(|first| first + 1));
}

const FROZEN: &str = "3aa62769c688f122";
const FROZEN_ROWS: [i64; 4] = [30, 0, 50, 60];

fn refused(columns: &[Column<'_>]) -> Error {
    let folder = tempfile::tempdir().unwrap();
    FixedBatches::open(&write(folder.path(), columns)).unwrap_err()
}

#[test]
fn missing_names_wrong_dtypes_and_shapes_are_told_apart() {
    let ids = || column("input_ids", [7, 3], &rows());
    match refused(&[ids(), column("targets", [7, 3], &labels())]) {
        Error::MissingTensor { name, mut present, .. } => {
            present.sort();
            assert_eq!(
                (name.as_str(), present),
                ("labels", vec!["input_ids".into(), "targets".into()])
            );
        }
        other => panic!("{other}"),
    }
    let narrow = vec![0; 7 * 3 * 4];
    match refused(&[ids(), ("labels", Dtype::I32, vec![7, 3], narrow)]) {
        Error::WrongDType { name, expected: "I64", actual, .. } => {
            assert_eq!((name.as_str(), actual.as_str()), ("labels", "I32"));
        }
        other => panic!("{other}"),
    }
    match refused(&[ids(), column("labels", [3, 7], &labels())]) {
        Error::WrongShape { name, expected, actual, .. } => {
            assert_eq!((name.as_str(), actual), ("labels", vec![3, 7]));
            assert_eq!(expected, "[7, 3], as `input_ids`");
        }
        other => panic!("{other}"),
    }
    match refused(&[("input_ids", Dtype::I64, vec![21], bytes(&rows()))]) {
        Error::WrongShape { expected, actual, .. } => {
            assert_eq!((expected.as_str(), actual), ("[samples, sequence_len]", vec![21]));
        }
        other => panic!("{other}"),
    }
    let none = refused(&[column("input_ids", [0, 3], &[]), column("labels", [0, 3], &[])]);
    assert!(none.to_string().contains("at least one row"), "{none}");
    let short =
        [ids(), column("labels", [7, 3], &labels()), column("attention_mask", [7, 1], &[1; 7])];
    assert!(matches!(refused(&short), Error::WrongShape { name, .. } if name == "attention_mask"));
}

#[test]
fn values_that_no_model_can_use_are_named_with_their_place() {
    let with = |change: fn(&mut Vec<i64>, &mut Vec<i64>, &mut Vec<i64>)| {
        let (mut ids, mut labels, mut mask) = (rows(), labels(), vec![1; 21]);
        change(&mut ids, &mut labels, &mut mask);
        let columns = [
            column("input_ids", [7, 3], &ids),
            column("labels", [7, 3], &labels),
            column("attention_mask", [7, 3], &mask),
        ];
        refused(&columns)
    };
    let place = |error| match error {
        Error::BadValue { sample, position, value, .. } => (sample, position, value),
        other => panic!("{other}"),
    };
    assert_eq!(place(with(|ids, _, _| ids[8] = -1)), (2, 2, -1));
    assert_eq!(place(with(|_, labels, _| labels[10] = -1)), (3, 1, -1));
    assert_eq!(place(with(|_, _, mask| mask[20] = 2)), (6, 2, 2));
}

#[test]
fn files_that_are_no_safetensors_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let open = |content: &[u8]| {
        let path = folder.path().join("file");
        fs::write(&path, content).unwrap();
        FixedBatches::open(&path).unwrap_err().to_string()
    };
    assert!(open(b"").contains("too few for a header"));
    assert!(open(b"hello").contains("too few for a header"));
    assert!(open(b"hello, this is text").contains("header claims"));
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    assert!(open(&huge).contains("header claims"));
    let missing = FixedBatches::open(&folder.path().join("none")).unwrap_err().to_string();
    assert!(missing.starts_with("cannot open"), "{missing}");
    let is_folder = FixedBatches::open(folder.path()).unwrap_err().to_string();
    assert!(is_folder.contains("not a regular file"), "{is_folder}");
    let whole =
        encode(&[column("input_ids", [7, 3], &rows()), column("labels", [7, 3], &labels())]);
    assert!(open(&whole[..whole.len() - 1]).contains("bytes of data"));
    assert!(open(&[&whole[..], b"x"].concat()).contains("bytes of data"));
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn headers_with_impossible_offsets_and_shapes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"input_ids":{{"dtype":"I64","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let headers = [
        tensor("[1,2]", "[0,8]"),
        tensor("[1,2]", "[16,0]"),
        tensor("[1,2]", "[8,24]"),
        tensor("[4294967296,4294967296]", "[0,16]"),
        tensor("[18446744073709551615,2]", "[0,16]"),
        tensor("[-1,2]", "[0,16]"),
        tensor("[1,2]", "[0,18446744073709551615]"),
        tensor("[1,2]", "[0]"),
        tensor("1", "[0,16]"),
        "[]".to_owned(),
        "null".to_owned(),
        "{".to_owned(),
        "[".repeat(10_000),
        r#"{"__metadata__":{"a":1}}"#.to_owned(),
    ];
    for header in headers {
        fs::write(&path, with_header(&header, 16)).unwrap();
        let error = FixedBatches::open(&path).unwrap_err();
        assert!(matches!(error, Error::BadHeader { .. }), "{header:.60}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Any bytes: an error or rows, but no panic.
    #[test]
    fn any_bytes_are_rows_or_an_error(
        content in proptest::collection::vec(any::<u8>(), 0..200)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, content).unwrap();
        prop_assert!(FixedBatches::open(&path).is_err());
    }

    /// A good file with some bytes changed: an error, or rows of the shape that the file says.
    #[test]
    fn a_changed_file_is_rows_or_an_error(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(), shorten in any::<bool>()
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut file = encode(&[column("input_ids", [7, 3], &rows()), column("labels", [7, 3], &labels())]);
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if shorten {
            file.truncate(cut.index(file.len()));
        }
        let path = folder.path().join("file");
        fs::write(&path, file).unwrap();
        if let Ok(samples) = FixedBatches::open(&path) {
            let size = samples.sample_count() * samples.sequence_len() as u64;
            prop_assert_eq!(size, 21);
            let global_batch = usize::try_from(samples.sample_count()).unwrap();
            let options = LoaderOptions { global_batch, threads: 0, ..Default::default() };
            prop_assert!(Loader::new(Arc::new(samples), options).unwrap().next_step().is_ok());
        }
    }
}
