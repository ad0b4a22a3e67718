//! `phalanx data inspect` for folders of records.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use phalanx_data::batches::Scratch;
use phalanx_data::records::{Field, FieldShape, RecordIndex, Records};
use phalanx_data::Access;
use serde_json::json;

use crate::report::{self, bytes, count};

/// Bytes of a value that are shown.
const SHOWN: usize = 16;

pub(super) fn inspect(folder: &Path, as_json: bool, samples: u64) -> Result<()> {
    let records = Records::open(folder, Access::Read)?;
    let index = records.index();
    let total = index.shards.iter().map(|shard| shard.file_bytes).sum();
    if as_json {
        return report::print_json(&json!({
            "format": index.format, "version": index.version, "creator": index.creator,
            "records": index.record_count, "fields": index.fields, "bytes": total,
            "fingerprint": index.fingerprint,
            "shards": index.shards.iter().map(|shard| json!({
                "file": shard.file, "bytes": shard.file_bytes, "records": shard.record_count,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut out = String::new();
    writeln!(out, "folder       {}", folder.display())?;
    writeln!(out, "format       {} {}, by {}", index.format, index.version, index.creator)?;
    writeln!(out, "records      {}", count(index.record_count))?;
    for field in &index.fields {
        writeln!(out, "field        {}", about(field))?;
    }
    writeln!(out, "shards       {} with {}", index.shards.len(), bytes(total))?;
    writeln!(out, "fingerprint  {}", index.fingerprint)?;
    write_shards(&mut out, index)?;
    write_samples(&mut out, &records, samples)?;
    report::print(&out)
}

fn about(field: &Field) -> String {
    match &field.shape {
        FieldShape::Fixed(shape) => format!("{} {} {shape:?}", field.name, field.dtype),
        FieldShape::Variable => format!("{} {} of any length", field.name, field.dtype),
    }
}

fn write_shards(out: &mut String, index: &RecordIndex) -> Result<()> {
    for shard in &index.shards {
        let (size, records) = (bytes(shard.file_bytes), count(shard.record_count));
        writeln!(out, "  {}  {size}, {records} records", shard.file)?;
    }
    Ok(())
}

/// The first bytes of some records' values.
fn write_samples(out: &mut String, records: &Records, wanted: u64) -> Result<()> {
    let mut scratch = Scratch::default();
    for record in 0..wanted.min(records.record_count()) {
        for (number, field) in records.fields().iter().enumerate() {
            let elements = records.elements(record, number, &mut scratch)?;
            let mut value = vec![0; elements * field.dtype.bytes()];
            records.read(record, number, &mut value, &mut scratch)?;
            let hex: String = value.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
            let more = if value.len() > SHOWN { "…" } else { "" };
            writeln!(out, "record {record}: {} {elements} elements {hex}{more}", field.name)?;
        }
    }
    Ok(())
}
