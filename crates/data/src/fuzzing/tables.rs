//! Tables of Parquet and Arrow: as text, and as records.

use std::fs;
use std::sync::Arc;

use arrow_array::builder::{FixedSizeListBuilder, Int32Builder, ListBuilder};
use arrow_array::types::Int8Type;
use arrow_array::{ArrayRef, BooleanArray, DictionaryArray, Int64Array, RecordBatch, StringArray};
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_ipc::CompressionType;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::folder::Temporary;
use super::{case, Case};
use crate::convert::rows;

/// 60 rows.
fn batch() -> Option<RecordBatch> {
    let texts: Vec<String> = (0..60).map(|row| "some words ".repeat(row % 7)).collect();
    let (mut lists, mut pairs) =
        (ListBuilder::new(Int32Builder::new()), FixedSizeListBuilder::new(Int32Builder::new(), 2));
    for row in 0..60 {
        lists.values().append_slice(&[row; 3][..usize::try_from(row % 4).unwrap_or(0)]);
        lists.append(true);
        pairs.values().append_slice(&[row, -row]);
        pairs.append(true);
    }
    let names: DictionaryArray<Int8Type> = (0..60).map(|row| ["a", "bc"][row % 2]).collect();
    let columns: [(&str, ArrayRef); 6] = [
        ("text", Arc::new(StringArray::from_iter_values(&texts))),
        ("id", Arc::new(Int64Array::from_iter_values(0..60))),
        ("ids", Arc::new(lists.finish())),
        ("pair", Arc::new(pairs.finish())),
        ("good", Arc::new(BooleanArray::from_iter((0..60).map(|row| Some(row % 3 == 0))))),
        ("name", Arc::new(names)),
    ];
    RecordBatch::try_from_iter(columns).ok()
}

fn parquet(batch: &RecordBatch, compression: Compression) -> Option<Vec<u8>> {
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_max_row_group_row_count(Some(25))
        .build();
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).ok()?;
    writer.write(batch).ok()?;
    writer.close().ok()?;
    Some(file)
}

fn arrow(
    batch: &RecordBatch,
    compression: Option<CompressionType>,
    is_stream: bool,
) -> Option<Vec<u8>> {
    let options = IpcWriteOptions::default().try_with_compression(compression).ok()?;
    let parts = [batch.slice(0, 25), batch.slice(25, 35)];
    let (mut file, schema) = (Vec::new(), batch.schema());
    if is_stream {
        let mut writer = StreamWriter::try_new_with_options(&mut file, &schema, options).ok()?;
        parts.iter().try_for_each(|part| writer.write(part)).ok()?;
        writer.finish().ok()?;
    } else {
        let mut writer = FileWriter::try_new_with_options(&mut file, &schema, options).ok()?;
        parts.iter().try_for_each(|part| writer.write(part)).ok()?;
        writer.finish().ok()?;
    }
    Some(file)
}

/// Each kind of file, as it is and compressed. None has strings as differences of each other, whose
/// number nothing bounds (`table/pages.rs`).
pub(super) fn right() -> Vec<Vec<u8>> {
    let Some(batch) = batch() else { return Vec::new() };
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let codecs = [Compression::UNCOMPRESSED, zstd, Compression::SNAPPY, Compression::LZ4_RAW];
    let mut files: Vec<Option<Vec<u8>>> = codecs.map(|codec| parquet(&batch, codec)).into();
    for compression in [None, Some(CompressionType::ZSTD), Some(CompressionType::LZ4_FRAME)] {
        files.extend([true, false].map(|is_stream| arrow(&batch, compression, is_stream)));
    }
    files.into_iter().flatten().collect()
}

pub(super) fn cases(bytes: &[u8]) -> Vec<Case> {
    let Some(place) = Temporary::new() else { return Vec::new() };
    let path = place.path().join("table");
    if fs::write(&path, bytes).is_err() {
        return Vec::new();
    }
    let place = Arc::new(place);
    let one = |read: fn(&std::path::Path) -> bool| {
        // As long as there is a case of it.
        let (place, path) = (Arc::clone(&place), path.clone());
        case(bytes.len(), move || place.path().is_dir() && read(&path))
    };
    let texts = |file: &std::path::Path| rows::fuzzed(file, "text").unwrap_or(false);
    vec![one(texts), one(crate::records::columns::fuzzed)]
}
