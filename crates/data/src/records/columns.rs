//! Columns of Parquet and Arrow files as the fields of records.

use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::{Array, OffsetSizeTrait, RecordBatch};
use arrow_buffer::NullBuffer;
use arrow_schema::{DataType, Schema, SchemaRef};

use super::convert::{
    convert, ConvertedRecords, InputPart, InputParts, RecordInput, RecordOptions,
};
use super::field::Field;
use super::packed::PackedColumn;
use crate::batches::DType;
use crate::cast::to_u64;
use crate::convert::input::{self, InputFile};
use crate::convert::Format;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::table;

/// Converts Parquet or Arrow files, or folders of them, to a folder of records at `output`;
/// `format` says which if their names do not. Each row is a record and each of `columns` (names, or
/// paths of them: `page.body`; all columns if empty) a field:
///
/// | column | field |
/// |---|---|
/// | numbers and truth values (no U64) | one element |
/// | lists of a fixed size, also of such lists; binary of a fixed size | as many elements, U8 of bytes |
/// | lists | elements, any number |
/// | strings, binary | U8, any number |
///
/// All files must agree in the columns' types, and every row must have a value in each. Files
/// follow each other by name.
///
/// The folder appears when it is complete; after a crash or an error the same call goes on behind
/// the last finished shard, and the result has the bytes of a run without interruption. Threads
/// share the row groups of Parquet files and the batches of Arrow files: up to 256 MiB of values
/// for each thread are in memory, or a single larger group or batch; of Arrow files also the batch
/// that comes next.
///
/// # Determinism
/// The same input and options give the same bytes, whatever the number of threads.
///
/// # Errors
/// [`Error::NoInput`], [`Error::BadTable`], [`Error::BadRow`], [`Error::InvalidOption`],
/// [`Error::TextChanged`], [`Error::OutputExists`], [`Error::OtherConversion`],
/// [`Error::LockTimeout`], [`Error::CacheNotWritable`] and [`Error::Io`].
pub fn convert_columns(
    inputs: &[PathBuf],
    output: &Path,
    format: Option<Format>,
    columns: &[String],
    options: &RecordOptions,
    progress: &dyn Progress,
) -> Result<ConvertedRecords> {
    let (files, format) = input::list(inputs, format, progress)?;
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
    convert(&Tables { files, schemas, names, fields }, "columns", output, options, progress)
}

/// All files, of which there is at least one.
struct Tables {
    files: Vec<InputFile>,
    schemas: Vec<SchemaRef>,
    names: Vec<String>,
    fields: Vec<Field>,
}

impl RecordInput for Tables {
    type Content = table::TablePart;

    fn files(&self) -> &[InputFile] {
        &self.files
    }

    fn fields(&self) -> &[Field] {
        &self.fields
    }

    fn parts(&self, file: usize) -> Result<InputParts<'_, table::TablePart>> {
        let parts = table::parts(&self.files[file].path, &self.schemas[file], &self.names)?;
        let row_bytes = self.fields.iter().map(Field::row_bytes).fold(0, usize::saturating_add);
        let mut first = 0_u64;
        Ok(Box::new(parts.map(move |part| {
            let content = part?;
            let table::TablePart { rows, file_bytes, .. } = content;
            // The size of a dictionary says little about that of the values it stands for.
            let memory_bytes = content.memory_bytes.max(rows.saturating_mul(to_u64(row_bytes)));
            let start = first;
            first = start.checked_add(rows).ok_or_else(|| Error::BadTable {
                path: self.files[file].path.clone(),
                reason: format!("its row groups claim {start} rows, and then {rows} more"),
            })?;
            Ok(InputPart { first: start, rows, memory_bytes, file_bytes, content })
        })))
    }

    fn read(&self, file: usize, part: &InputPart<table::TablePart>) -> Result<Vec<PackedColumn>> {
        let path = &*self.files[file].path;
        let mut columns: Vec<PackedColumn> =
            self.fields.iter().map(|_| PackedColumn::new()).collect();
        let mut row = part.first;
        part.content.read((path, &self.schemas[file], &self.names), |batch| {
            push(batch, &self.fields, (path, row), &mut columns)?;
            row += to_u64(batch.num_rows());
            Ok(())
        })?;
        Ok(columns)
    }
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
        _ if table::is_bytes(kind) => Some(Field::variable(name, DType::U8)),
        DataType::Dictionary(_, values) => field(name, values),
        _ => {
            let (mut kind, mut shape) = (kind, Vec::new());
            // Rows of no bytes: nothing would bound how many of them a file claims.
            let size = |count: i32| usize::try_from(count).ok().filter(|&size| size > 0);
            while let DataType::FixedSizeList(inner, count) = kind {
                shape.push(size(*count)?);
                kind = inner.data_type();
            }
            if let DataType::FixedSizeBinary(count) = kind {
                shape.push(size(*count)?);
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

/// Appends the rows of a batch, the first of which is row `first` of the file.
fn push(
    batch: &RecordBatch,
    fields: &[Field],
    (path, first): (&Path, u64),
    columns: &mut [PackedColumn],
) -> Result<()> {
    for (Field { name, dtype, .. }, column) in fields.iter().zip(columns) {
        let bad = |row: usize, reason: &str| {
            Error::BadRow {
            path: path.to_path_buf(),
            row: first + to_u64(row) + 1,
            column: name.clone(),
            reason: format!(
                "{reason}, and every row of a field needs a value; correct it, or leave the column out of --columns"
            ),
        }
        };
        let column_of = table::column(path, batch, name)?;
        let (array, nulls) = column_of.ok_or_else(|| bad(0, "it is not there"))?;
        if let Some(row) = first_null(nulls.as_ref()) {
            return Err(bad(row, "it is null"));
        }
        pack(&*array, *dtype, column).ok_or_else(|| {
            let has_null = |row: &usize| {
                pack(&*array.slice(*row, 1), *dtype, &mut PackedColumn::new()).is_none()
            };
            bad((0..array.len()).find(has_null).unwrap_or(0), "its list holds a null")
        })?;
    }
    Ok(())
}

fn first_null(nulls: Option<&NullBuffer>) -> Option<usize> {
    let nulls = nulls.filter(|nulls| nulls.null_count() > 0)?;
    (0..nulls.len()).find(|&row| nulls.is_null(row))
}

/// Appends a column's values. `None` if a list holds nulls.
fn pack(array: &dyn Array, dtype: DType, column: &mut PackedColumn) -> Option<()> {
    match array.data_type() {
        DataType::List(_) => list::<i32>(array, dtype, column),
        DataType::LargeList(_) => list::<i64>(array, dtype, column),
        kind => {
            if table::is_bytes(kind) {
                for row in 0..array.len() {
                    column.bytes_mut().extend_from_slice(table::bytes_at(array, row)?);
                    let end = column.bytes_mut().len();
                    column.end_row_at(end);
                }
                return Some(());
            }
            let start = column.bytes_mut().len();
            fixed(array, column.bytes_mut())?;
            let row = (column.bytes_mut().len() - start) / array.len().max(1);
            (1..=array.len()).for_each(|number| column.end_row_at(start + number * row));
            Some(())
        }
    }
}

fn list<O: OffsetSizeTrait>(
    array: &dyn Array,
    dtype: DType,
    column: &mut PackedColumn,
) -> Option<()> {
    let list = array.as_list::<O>();
    let offsets = list.value_offsets();
    let (first, last) = (offsets.first()?.as_usize(), offsets.last()?.as_usize());
    let start = column.bytes_mut().len();
    fixed(&*list.values().slice(first, last - first), column.bytes_mut())?;
    for offset in &offsets[1..] {
        column.end_row_at(start + (offset.as_usize() - first) * dtype.bytes());
    }
    Some(())
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

/// Reads all columns of a file, as the converter does. Gives whether there are rows.
#[cfg(feature = "testing")]
pub(crate) fn fuzzed(path: &Path) -> bool {
    use crate::progress::Silent;

    let read = || {
        let (files, _) = input::list(&[path.to_path_buf()], Some(Format::Parquet), &Silent)?;
        let schemas = vec![table::schema(path)?];
        let names = names(&schemas[0], &[]);
        let fields = fields(path, &schemas[0], &names)?;
        let tables = Tables { files, schemas, names, fields };
        let mut rows = 0;
        for part in tables.parts(0)?.take(100) {
            let columns = tables.read(0, &part?)?;
            rows += columns.first().map_or(0, PackedColumn::rows);
        }
        Ok::<bool, Error>(rows > 0)
    };
    read().unwrap_or(false)
}
