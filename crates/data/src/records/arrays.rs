//! Arrays in safetensors files, [N, …] each, as N records.

use std::path::{Path, PathBuf};

use super::convert::{
    convert, ConvertedRecords, InputPart, InputParts, RecordInput, RecordOptions,
};
use super::field::Field;
use super::packed::PackedColumn;
use crate::batches::DType;
use crate::cast::{to_u64, to_usize};
use crate::convert::input::{self, InputFile};
use crate::error::{Error, Result};
use crate::format::bytes::SizedSource;
use crate::format::header::{SafetensorsHeader, Span};
use crate::format::layout::CHECKSUMS;
use crate::progress::Progress;
use crate::source::Access;

/// What is read at once of a file, in bytes of all its tensors.
const PART_BYTES: usize = 4 << 20;

/// Converts safetensors files, or folders of them, to a folder of records at `output`. Every tensor
/// is a field and its first size counts records: all tensors of a file must agree in it, and all
/// files in names, types and the other sizes. Files follow each other as given, those of a folder
/// by name.
///
/// The folder appears when it is complete; after a crash or an error the same call goes on behind
/// the last finished shard, and the result has the bytes of a run without interruption.
///
/// # Determinism
/// The same input and options give the same bytes, whatever the number of threads.
///
/// # Errors
/// [`Error::NoInput`], [`Error::InvalidOption`] without files, [`Error::BadHeader`],
/// [`Error::WrongShape`] and [`Error::WrongDType`] for tensors that do not agree,
/// [`Error::BadValue`] for truth values other than 0 and 1, [`Error::TextChanged`],
/// [`Error::OutputExists`], [`Error::OtherConversion`], [`Error::LockTimeout`],
/// [`Error::CacheNotWritable`] and [`Error::Io`].
pub fn convert_safetensors(
    inputs: &[PathBuf],
    output: &Path,
    options: &RecordOptions,
    progress: &dyn Progress,
) -> Result<ConvertedRecords> {
    let files = input::list_named(inputs, &["safetensors"], progress)?;
    let open = |path| SizedSource::open(path, Access::Read, None);
    let arrays: Vec<Arrays> =
        files.iter().map(|file| Arrays::of(open(&file.path)?)).collect::<Result<_>>()?;
    for file in &arrays[1..] {
        file.agrees_with(&arrays[0])?;
    }
    convert(&AllArrays { files, arrays }, "safetensors", output, options, progress)
}

/// All files, of which there is at least one.
struct AllArrays {
    files: Vec<InputFile>,
    arrays: Vec<Arrays>,
}

impl RecordInput for AllArrays {
    type Content = ();

    fn files(&self) -> &[InputFile] {
        &self.files
    }

    fn fields(&self) -> &[Field] {
        &self.arrays[0].fields
    }

    fn parts(&self, file: usize) -> Result<InputParts<'_, ()>> {
        Ok(Box::new(self.arrays[file].parts().map(Ok)))
    }

    fn read(&self, file: usize, part: &InputPart<()>) -> Result<Vec<PackedColumn>> {
        self.arrays[file].read(part)
    }
}

/// One file.
struct Arrays {
    path: PathBuf,
    bytes: SizedSource,
    fields: Vec<Field>,
    /// Where each field's data start.
    starts: Vec<u64>,
    records: u64,
}

impl Arrays {
    fn of(bytes: SizedSource) -> Result<Self> {
        let path = bytes.path();
        let header = SafetensorsHeader::read(&bytes)?;
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

    fn parts(&self) -> impl Iterator<Item = InputPart<()>> + '_ {
        let row_bytes: usize = self.fields.iter().map(Field::row_bytes).sum();
        let step = (PART_BYTES / row_bytes.max(1)).max(1);
        (0..self.records).step_by(step).map(move |first| {
            let rows = (self.records - first).min(to_u64(step));
            let bytes = rows * to_u64(row_bytes);
            InputPart { first, rows, memory_bytes: bytes, file_bytes: bytes, content: () }
        })
    }

    fn read(&self, part: &InputPart<()>) -> Result<Vec<PackedColumn>> {
        let InputPart { first, rows, content: (), .. } = part;
        let rows = to_usize(*rows);
        let columns = self.fields.iter().zip(&self.starts).map(|(field, &start)| {
            let (row_bytes, mut bytes) = (field.row_bytes(), Vec::new());
            let at = start + first * to_u64(row_bytes);
            self.bytes.read(at, rows * row_bytes, &mut bytes)?;
            self.check_bools(field, *first, &bytes)?;
            Ok(PackedColumn::of_rows(bytes, row_bytes, rows))
        });
        columns.collect()
    }

    /// Whether all truth values are 0 or 1, in rows from `first` on.
    fn check_bools(&self, field: &Field, first: u64, bytes: &[u8]) -> Result<()> {
        if field.dtype != DType::Bool {
            return Ok(());
        }
        bytes.iter().position(|&byte| byte > 1).map_or(Ok(()), |at| {
            let (row, position) = (at / field.row_bytes(), at % field.row_bytes());
            let name = &field.name;
            Err(Error::BadValue {
                path: self.path.clone(),
                sample: first + to_u64(row),
                position,
                value: i64::from(bytes[at]),
                reason: format!(
                    "a value of the BOOL tensor `{name}` is 0 or 1; write the file again"
                ),
            })
        })
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
}

/// Reads all records of a file, as the converter does. Gives whether there are any.
#[cfg(feature = "testing")]
pub(crate) fn fuzzed(source: std::sync::Arc<dyn crate::source::Source>) -> bool {
    let read = || {
        let arrays = Arrays::of(SizedSource::of(source, None)?)?;
        arrays.agrees_with(&arrays)?;
        let mut records = 0;
        for part in arrays.parts() {
            let columns = arrays.read(&part)?;
            assert!(columns.iter().all(|column| to_u64(column.rows()) == part.rows));
            records += part.rows;
        }
        assert_eq!(records, arrays.records);
        Ok::<bool, Error>(records > 0)
    };
    read().unwrap_or(false)
}
