//! Arrays in safetensors files, [N, …] each, as N records.

use std::path::{Path, PathBuf};

use super::field::{ColumnValue, Field};
use super::index::RecordIndex;
use super::writer::RecordWriter;
use crate::cast::to_u64;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::bytes::{Access, Bytes};
use crate::format::checked::CHECKSUMS;
use crate::format::header::{Header, Span};
use crate::progress::{Event, Progress, Stage};

/// Converts safetensors files to a folder of records at `output`. Every tensor is a field and its first size counts records: all
/// tensors of a file must agree in it, and all files in names, types and the other sizes. Files follow each other as given.
///
/// # Errors
/// [`Error::InvalidOption`] without files, [`Error::BadHeader`], [`Error::WrongShape`] and [`Error::WrongDType`] for tensors
/// that do not agree, [`Error::OutputExists`], [`Error::CacheNotWritable`] and [`Error::Io`].
pub fn convert_safetensors(
    inputs: &[PathBuf],
    output: &Path,
    shard_bytes: u64,
    progress: &dyn Progress,
) -> Result<RecordIndex> {
    let files: Vec<Arrays> = inputs.iter().map(|path| Arrays::open(path)).collect::<Result<_>>()?;
    let Some(first) = files.first() else {
        return Err(Error::option("input", "empty", "give at least one file"));
    };
    for file in &files[1..] {
        file.agrees_with(first)?;
    }
    let total_bytes = files.iter().map(|file| file.bytes.len()).sum();
    progress.report(Event::Begin { stage: Stage::Encoding, total_bytes });
    let mut writer = RecordWriter::create(output, first.fields.clone(), shard_bytes)?;
    for file in &files {
        file.push_all(&mut writer, progress)?;
    }
    progress.report(Event::End { stage: Stage::Encoding });
    writer.finish()
}

/// One file.
struct Arrays {
    path: PathBuf,
    bytes: Bytes,
    fields: Vec<Field>,
    /// Where each field's data start.
    starts: Vec<u64>,
    records: u64,
}

impl Arrays {
    fn open(path: &Path) -> Result<Self> {
        let bytes = Bytes::open(path, Access::Read, None)?;
        let header = Header::read(&bytes)?;
        let mut names = header.names();
        names.sort_unstable();
        // A shard of records is such a file, but for the checksums at its end.
        names.retain(|name| name != CHECKSUMS);
        let bad = |reason: String| Error::BadHeader { path: path.to_path_buf(), reason };
        let (mut fields, mut starts, mut records) = (Vec::new(), Vec::new(), None);
        for name in names {
            let Span { dtype, shape, start } = header.tensor(&name)?;
            let dtype = serde_json::to_value(dtype).and_then(serde_json::from_value::<DType>);
            let dtype = dtype.map_err(|error| bad(format!("tensor `{name}`: {error}")))?;
            let Some((&rows, rest)) = shape.split_first() else {
                let expected = "[records, …]".to_owned();
                let path = path.to_path_buf();
                return Err(Error::WrongShape { path, name, expected, actual: shape });
            };
            // Such a tensor has no bytes, so nothing bounds how many records it claims.
            if rest.contains(&0) {
                let expected = "rows of at least one element".to_owned();
                let path = path.to_path_buf();
                return Err(Error::WrongShape { path, name, expected, actual: shape });
            }
            if *records.get_or_insert(rows) != rows {
                let expected = format!("{} rows, as the other tensors", records.unwrap_or(0));
                let path = path.to_path_buf();
                return Err(Error::WrongShape { path, name, expected, actual: shape });
            }
            fields.push(Field::fixed(&name, dtype, rest));
            starts.push(start);
        }
        let records = to_u64(records.ok_or_else(|| bad("it has no tensors".to_owned()))?);
        Ok(Arrays { path: path.to_path_buf(), bytes, fields, starts, records })
    }

    fn agrees_with(&self, first: &Arrays) -> Result<()> {
        if self.fields == first.fields {
            return Ok(());
        }
        let list = |fields: &[Field]| {
            let one = |field: &Field| format!("{} {} {:?}", field.name, field.dtype, field.shape);
            fields.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        let (ours, theirs) = (list(&self.fields), list(&first.fields));
        let reason = format!("it holds {ours}; {} holds {theirs}", first.path.display());
        Err(Error::BadHeader { path: self.path.clone(), reason })
    }

    fn push_all(&self, writer: &mut RecordWriter, progress: &dyn Progress) -> Result<()> {
        let mut scratch: Vec<Vec<u8>> = vec![Vec::new(); self.fields.len()];
        for record in 0..self.records {
            let mut values = Vec::with_capacity(self.fields.len());
            let mut bytes = 0;
            for ((field, &start), buffer) in self.fields.iter().zip(&self.starts).zip(&mut scratch)
            {
                let row = field.elements().unwrap_or(0) * field.dtype.bytes();
                let at = start + record * to_u64(row);
                let value = self.bytes.read(at, row, buffer)?;
                values.push(ColumnValue::from_bytes(field.dtype, value)?);
                bytes += to_u64(row);
            }
            writer.push(&values)?;
            progress.report(Event::Advance { stage: Stage::Encoding, bytes });
        }
        Ok(())
    }
}
