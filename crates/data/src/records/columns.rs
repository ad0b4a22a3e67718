//! Columns of Parquet and Arrow files as the fields of records.

use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::{Array, OffsetSizeTrait, RecordBatch};
use arrow_buffer::NullBuffer;
use arrow_schema::{DataType, Schema, SchemaRef};

use super::field::{ColumnValue, Field};
use super::index::RecordIndex;
use super::writer::RecordWriter;
use crate::cast::to_u64;
use crate::convert::{input, Format};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::progress::{Event, Progress, Stage};
use crate::table::{self, Table};

/// Converts Parquet or Arrow files, or folders of them, to a folder of records at `output`; `format` says which if their names do
/// not. Each row is a record and each of
/// `columns` (names, or paths of them: `page.body`; all columns if empty) a field:
///
/// | column | field |
/// |---|---|
/// | numbers and truth values (no U64) | one element |
/// | lists of a fixed size, also of such lists; binary of a fixed size | as many elements, U8 of bytes |
/// | lists | elements, any number |
/// | strings, binary | U8, any number |
///
/// All files must agree in the columns' types, and every row must have a value in each. Files follow each other by name.
///
/// # Errors
/// [`Error::NoInput`], [`Error::BadTable`], [`Error::BadRow`], [`Error::InvalidOption`], [`Error::OutputExists`],
/// [`Error::CacheNotWritable`] and [`Error::Io`].
pub fn convert_columns(
    inputs: &[PathBuf],
    output: &Path,
    format: Option<Format>,
    columns: &[String],
    shard_bytes: u64,
    progress: &dyn Progress,
) -> Result<RecordIndex> {
    let (files, format) = input::list(inputs, format)?;
    if !format.is_table() {
        let reason = "columns are those of Parquet and Arrow files (.parquet, .arrow, .feather)";
        return Err(Error::option("columns", columns.join(","), reason));
    }
    let first = &files[0].path;
    let schemas: Vec<SchemaRef> =
        files.iter().map(|file| table::schema(&file.path)).collect::<Result<_>>()?;
    let names = names(&schemas[0], columns);
    let fields = fields(first, &schemas[0], &names)?;
    for (file, schema) in files.iter().zip(&schemas).skip(1) {
        let other = self::fields(&file.path, schema, &names)?;
        if let Some((ours, theirs)) = other.iter().zip(&fields).find(|(a, b)| a != b) {
            let reason = format!("its column is {ours:?}, that of {} {theirs:?}", first.display());
            return Err(Error::BadTable { path: file.path.clone(), reason });
        }
    }
    let total_bytes = files.iter().map(|file| file.bytes).sum();
    progress.report(Event::Begin { stage: Stage::Encoding, total_bytes });
    let mut writer = RecordWriter::create(output, fields.clone(), shard_bytes)?;
    for (file, schema) in files.iter().zip(&schemas) {
        let mut table = Table::open(&file.path, schema, &names, 0)?;
        let mut row = 0;
        while let Some(batch) = table.next()? {
            push(&batch, &fields, (&file.path, row), &mut writer)?;
            row += to_u64(batch.num_rows());
            let bytes = table.share(batch.num_rows(), batch.get_array_memory_size());
            progress.report(Event::Advance { stage: Stage::Encoding, bytes });
        }
        file.check_unchanged()?;
    }
    progress.report(Event::End { stage: Stage::Encoding });
    writer.finish()
}

fn names(schema: &Schema, columns: &[String]) -> Vec<String> {
    if columns.is_empty() {
        return schema.fields().iter().map(|field| field.name().clone()).collect();
    }
    columns.to_vec()
}

fn fields(path: &Path, schema: &Schema, names: &[String]) -> Result<Vec<Field>> {
    let one = |name: &String| {
        let kind = table::column_type(path, schema, name)?;
        field(name, &kind).ok_or_else(|| {
            let reason = format!(
                "its column `{name}` is of type {kind}, which no field has; leave it out, or write it as numbers of up to 64 bits (signed), lists of them, strings or bytes"
            );
            Error::BadTable { path: path.to_path_buf(), reason }
        })
    };
    names.iter().map(one).collect()
}

/// The field of a column's type.
fn field(name: &str, kind: &DataType) -> Option<Field> {
    match kind {
        DataType::List(inner) | DataType::LargeList(inner) => {
            Some(Field::variable(name, scalar(inner.data_type())?))
        }
        DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView => Some(Field::variable(name, DType::U8)),
        DataType::Dictionary(_, values) => field(name, values),
        _ => {
            let (mut kind, mut shape) = (kind, Vec::new());
            while let DataType::FixedSizeList(inner, count) = kind {
                shape.push(usize::try_from(*count).ok()?);
                kind = inner.data_type();
            }
            if let DataType::FixedSizeBinary(count) = kind {
                shape.push(usize::try_from(*count).ok()?);
                return Some(Field::fixed(name, DType::U8, shape));
            }
            Some(Field::fixed(name, scalar(kind)?, shape))
        }
    }
}

fn scalar(kind: &DataType) -> Option<DType> {
    Some(match kind {
        DataType::Boolean => DType::Bool,
        DataType::Int8 => DType::I8,
        DataType::Int16 => DType::I16,
        DataType::Int32 => DType::I32,
        DataType::Int64 => DType::I64,
        DataType::UInt8 => DType::U8,
        DataType::UInt16 => DType::U16,
        DataType::UInt32 => DType::U32,
        DataType::Float16 => DType::F16,
        DataType::Float32 => DType::F32,
        DataType::Float64 => DType::F64,
        _ => return None,
    })
}

/// Writes the rows of a batch, the first of which is row `first` of the file.
fn push(
    batch: &RecordBatch,
    fields: &[Field],
    (path, first): (&Path, u64),
    writer: &mut RecordWriter,
) -> Result<()> {
    let mut packed = Vec::new();
    for Field { name, dtype, .. } in fields {
        let bad = |row: usize, reason: &str| Error::BadRow {
            path: path.to_path_buf(),
            row: first + to_u64(row) + 1,
            column: name.clone(),
            reason: reason.to_owned(),
        };
        let (array, nulls) = table::column(batch, name).ok_or_else(|| bad(0, "it is not there"))?;
        if let Some(row) = first_null(nulls.as_ref()) {
            return Err(bad(row, "it is null"));
        }
        let column = Packed::of(&*array, *dtype).ok_or_else(|| {
            let has_null = |row: &usize| Packed::of(&*array.slice(*row, 1), *dtype).is_none();
            bad((0..array.len()).find(has_null).unwrap_or(0), "its list holds a null")
        })?;
        packed.push((*dtype, column));
    }
    for row in 0..batch.num_rows() {
        let values = packed.iter().map(|(dtype, column)| {
            let bytes = column.row(row);
            ColumnValue::from_bytes(*dtype, bytes)
        });
        writer.push(&values.collect::<Result<Vec<_>>>()?)?;
    }
    Ok(())
}

fn first_null(nulls: Option<&NullBuffer>) -> Option<usize> {
    let nulls = nulls.filter(|nulls| nulls.null_count() > 0)?;
    (0..nulls.len()).find(|&row| nulls.is_null(row))
}

/// A column's values row by row.
struct Packed {
    bytes: Vec<u8>,
    /// Where each row begins, and where the last one ends.
    bounds: Vec<usize>,
}

impl Packed {
    /// `None` if a list holds nulls.
    fn of(array: &dyn Array, dtype: DType) -> Option<Self> {
        let mut bytes = Vec::new();
        let bounds = match array.data_type() {
            DataType::List(_) => list::<i32>(array, dtype, &mut bytes)?,
            DataType::LargeList(_) => list::<i64>(array, dtype, &mut bytes)?,
            _ => match rows(array) {
                Some(rows) => {
                    let mut bounds = vec![0];
                    for row in rows {
                        bytes.extend_from_slice(row);
                        bounds.push(bytes.len());
                    }
                    bounds
                }
                None => {
                    fixed(array, &mut bytes)?;
                    let row = bytes.len() / array.len().max(1);
                    (0..=array.len()).map(|number| number * row).collect()
                }
            },
        };
        Some(Packed { bytes, bounds })
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.bytes[self.bounds[row]..self.bounds[row + 1]]
    }
}

/// Strings and bytes.
fn rows(array: &dyn Array) -> Option<Vec<&[u8]>> {
    let all = 0..array.len();
    Some(match array.data_type() {
        DataType::Utf8 => {
            let strings = array.as_string::<i32>();
            all.map(|row| strings.value(row).as_bytes()).collect()
        }
        DataType::LargeUtf8 => {
            let strings = array.as_string::<i64>();
            all.map(|row| strings.value(row).as_bytes()).collect()
        }
        DataType::Utf8View => {
            let strings = array.as_string_view();
            all.map(|row| strings.value(row).as_bytes()).collect()
        }
        DataType::Binary => all.map(|row| array.as_binary::<i32>().value(row)).collect(),
        DataType::LargeBinary => all.map(|row| array.as_binary::<i64>().value(row)).collect(),
        DataType::BinaryView => all.map(|row| array.as_binary_view().value(row)).collect(),
        DataType::FixedSizeBinary(_) => {
            all.map(|row| array.as_fixed_size_binary().value(row)).collect()
        }
        _ => return None,
    })
}

fn list<O: OffsetSizeTrait>(
    array: &dyn Array,
    dtype: DType,
    bytes: &mut Vec<u8>,
) -> Option<Vec<usize>> {
    let list = array.as_list::<O>();
    let offsets = list.value_offsets();
    let (first, last) = (offsets.first()?.as_usize(), offsets.last()?.as_usize());
    fixed(&*list.values().slice(first, last - first), bytes)?;
    let place = |offset: &O| (offset.as_usize() - first) * dtype.bytes();
    Some(offsets.iter().map(place).collect())
}

/// Numbers, and lists of a fixed size. `None` if there are nulls.
fn fixed(array: &dyn Array, bytes: &mut Vec<u8>) -> Option<()> {
    if array.null_count() > 0 {
        return None;
    }
    match array.data_type() {
        DataType::Boolean => {
            let values = array.as_boolean();
            bytes.extend((0..values.len()).map(|row| u8::from(values.value(row))));
        }
        DataType::FixedSizeList(..) => {
            let list = array.as_fixed_size_list();
            let count = list.len() * usize::try_from(list.value_length()).ok()?;
            // The values of a slice are those of its rows.
            fixed(&*list.values().slice(0, count), bytes)?;
        }
        DataType::FixedSizeBinary(_) => {
            let values = array.as_fixed_size_binary();
            (0..values.len()).for_each(|row| bytes.extend_from_slice(values.value(row)));
        }
        kind => {
            let width = scalar(kind)?.bytes();
            let data = array.to_data();
            let values = data.buffers().first()?.as_slice();
            let start = data.offset() * width;
            bytes.extend_from_slice(values.get(start..start + array.len() * width)?);
        }
    }
    Some(())
}
