//! What the footer of a Parquet file claims, and is not so.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test; seven bits fit a byte"
)]

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use phalanx_data::progress::Silent;
use phalanx_data::records::{convert_columns, RecordOptions};

/// 1000 rows of a column `text`, in groups of 300.
fn write(path: &Path) {
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(vec!["some words"; 1000]));
    let batch = RecordBatch::try_from_iter([("text", texts)]).unwrap();
    let groups = WriterProperties::builder().set_max_row_group_row_count(Some(300)).build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(groups)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// Puts `new` in the place of `old` wherever that is in the footer.
fn claim(path: &Path, old: &[u8], new: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let end = bytes.len() - 8;
    let footer_bytes = u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) as usize;
    let mut footer = bytes.split_off(end - footer_bytes);
    footer.truncate(footer_bytes);
    let (mut rest, mut changed) = (&footer[..], Vec::new());
    while let Some(at) = rest.windows(old.len()).position(|window| window == old) {
        changed.extend_from_slice(&rest[..at]);
        changed.extend_from_slice(new);
        rest = &rest[at + old.len()..];
    }
    assert!(!changed.is_empty(), "{old:?} is in the footer");
    changed.extend_from_slice(rest);
    bytes.extend_from_slice(&changed);
    bytes.extend_from_slice(&u32::try_from(changed.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(b"PAR1");
    fs::write(path, bytes).unwrap();
}

/// What is said of a file that was changed so.
fn told_of(old: &[u8], new: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (path, output) = (folder.path().join("a.parquet"), folder.path().join("records"));
    write(&path);
    claim(&path, old, new);
    let options = RecordOptions::default();
    convert_columns(&[path], &output, None, &[], &options, &Silent).unwrap_err().to_string()
}

/// Before a number stands that it is field 3 after field 2, of 64 bits: the rows of a group.
#[test]
fn rows_of_groups_that_have_no_sum_are_an_error() {
    let (rows, most) =
        ([0x16, 0xD8, 4], [0x16, 0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1]);
    let told = told_of(&rows, &most);
    assert!(told.contains("claim 18446744073709551614 rows, and then"), "{told}");
}

#[test]
fn children_that_a_schema_does_not_have_are_an_error() {
    // The last field of the root: one child.
    let name = b"\x0Carrow_schema\x15";
    let (one, most) =
        ([&name[..], &[2]].concat(), [&name[..], &[0xFE, 0xFF, 0xFF, 0xFF, 0x0F]].concat());
    let told = told_of(&one, &most);
    assert!(told.contains("element 0 of 2 in its schema claims 2147483647 children"), "{told}");
}

#[test]
fn structures_within_structures_have_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let (path, output) = (folder.path().join("a.parquet"), folder.path().join("records"));
    for (depth, expected) in [(40, "which no field has"), (200_000, "more than 64 structures")] {
        // A version; a list of structures: a root, groups of one child, and a column; no rows and no groups of them.
        let mut count = vec![];
        let mut rest: u32 = depth + 2;
        while rest >= 0x80 {
            count.push(0x80 | (rest & 0x7F) as u8);
            rest >>= 7;
        }
        count.push(rest as u8);
        let mut footer = [&[0x15, 4, 0x19, 0xFC], &count[..]].concat();
        footer.extend([0x48, 1, b'r', 0x15, 2, 0]);
        footer.extend([0x35, 2, 0x18, 1, b'g', 0x15, 2, 0].repeat(depth as usize));
        footer.extend([0x15, 2, 0x25, 0, 0x18, 1, b'x', 0, 0x16, 0, 0x19, 0x0C, 0]);
        let len = u32::try_from(footer.len()).unwrap().to_le_bytes();
        fs::write(&path, [b"PAR1", &*footer, &len, b"PAR1"].concat()).unwrap();
        let options = RecordOptions::default();
        let inputs = [path.clone()];
        let error = convert_columns(&inputs, &output, None, &[], &options, &Silent).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}
