//! Tables of Parquet and Arrow files: columns by name, in batches of rows.
//!
//! A panic of the libraries over a malformed file becomes an error here. [`ipc`], [`footer`] and
//! [`pages`] see to it that no file makes the libraries ask for more memory than there is.

mod compact;
mod footer;
mod ipc;
mod pages;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::NullBuffer;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Fields, Schema, SchemaRef};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::ProjectionMask;
use parquet::schema::types::SchemaDescriptor;

use pages::Pages;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// Rows of a batch of Parquet. Those of Arrow are as large as they were written.
const BATCH_ROWS: usize = 128;

/// What is decoded at once of a row group.
const GROUP_BATCH_BYTES: u64 = 4 << 20;
const GROUP_BATCH_ROWS_MAX: u64 = 8192;

type Batches = Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>>>;

/// The rows of one file.
pub(crate) struct TableScan {
    path: PathBuf,
    batches: Batches,
    bytes: u64,
    progress: ReadProgress,
    /// Rows that are passed over.
    skip: u64,
}

/// What tells how far a file is read.
enum ReadProgress {
    /// How many rows it says it has: Parquet.
    Rows(u64),
    /// The reader's own place, which it shares with this handle: Arrow.
    Place(Option<File>),
}

/// How a file is laid out.
enum TableReader {
    Parquet(ParquetRecordBatchReaderBuilder<Pages>),
    File(FileReader<BufReader<File>>),
    Stream(StreamReader<BufReader<File>>),
}

impl TableReader {
    fn open(path: &Path, columns: Option<Vec<usize>>) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let mut magic = Vec::new();
        let read = (&mut file).take(6).read_to_end(&mut magic).and_then(|_| file.rewind());
        read.map_err(Error::io("read", path))?;
        caught(path, || {
            Ok(match &*magic {
                [b'P', b'A', b'R', b'1', ..] => {
                    let about = about(&file)?;
                    let pages = Pages::of(file, about.metadata().row_groups())?;
                    TableReader::Parquet(ParquetRecordBatchReaderBuilder::new_with_metadata(
                        pages, about,
                    ))
                }
                b"ARROW1" => {
                    ipc::check(&file, false)?;
                    let opened = FileReader::try_new(BufReader::new(file), columns);
                    TableReader::File(opened.map_err(|error| error.to_string())?)
                }
                [b'F', b'E', b'A', b'1', ..] => {
                    return Err("Feather of version 1 is not read: write version 2".to_owned());
                }
                _ => {
                    let unknown = |error: String| {
                        format!("it is neither Parquet nor an Arrow file or stream: {error}")
                    };
                    ipc::check(&file, true).map_err(unknown)?;
                    let opened = StreamReader::try_new(BufReader::new(file), columns);
                    TableReader::Stream(opened.map_err(|error| unknown(error.to_string()))?)
                }
            })
        })
    }

    fn schema(&self) -> SchemaRef {
        match self {
            TableReader::Parquet(reader) => Arc::clone(reader.schema()),
            TableReader::File(reader) => reader.schema(),
            TableReader::Stream(reader) => reader.schema(),
        }
    }
}

/// What the footer of a Parquet file says.
fn about(file: &File) -> std::result::Result<ArrowReaderMetadata, String> {
    footer::check(file)?;
    let loaded = ArrowReaderMetadata::load(file, ArrowReaderOptions::default());
    loaded.map_err(|error| error.to_string())
}

/// The columns of a file.
pub(crate) fn schema(path: &Path) -> Result<SchemaRef> {
    Ok(TableReader::open(path, None)?.schema())
}

/// The type of the column at a path of names (`page.body`), or the names that there are.
pub(crate) fn column_type(path: &Path, schema: &Schema, column: &str) -> Result<DataType> {
    let missing = || {
        let names: Vec<&str> = schema.fields().iter().map(|field| &**field.name()).collect();
        let reason = format!("it has no column `{column}`; it has: {}", names.join(", "));
        Error::BadTable { path: path.to_path_buf(), reason }
    };
    if let Ok(field) = schema.field_with_name(column) {
        return Ok(field.data_type().clone());
    }
    let none = &Fields::empty();
    let mut fields = schema.fields();
    let mut found = None;
    for name in column.split('.') {
        let field = fields.iter().find(|field| field.name() == name).ok_or_else(missing)?;
        found = Some(field.data_type());
        if let DataType::Struct(inner) = field.data_type() {
            fields = inner;
        } else {
            fields = none;
        }
    }
    found.cloned().ok_or_else(missing)
}

impl TableScan {
    /// Opens a file of that schema at some row, for some of its columns, which exist.
    pub(crate) fn open(
        path: &Path,
        schema: &Schema,
        columns: &[String],
        first_row: u64,
    ) -> Result<Self> {
        let bytes = std::fs::metadata(path).map_err(Error::io("open", path))?.len();
        let root = |column: &String| {
            let first = column.split('.').next().unwrap_or(column);
            schema.index_of(column).or_else(|_| schema.index_of(first)).ok()
        };
        let mut roots: Vec<usize> = columns.iter().filter_map(root).collect();
        roots.sort_unstable();
        roots.dedup();
        let place =
            |reader: &BufReader<File>| ReadProgress::Place(reader.get_ref().try_clone().ok());
        let mut skip = first_row;
        let (progress, batches): (ReadProgress, Batches) =
            match TableReader::open(path, Some(roots))? {
                TableReader::File(reader) => (place(reader.get_ref()), Box::new(reader)),
                TableReader::Stream(reader) => (place(reader.get_ref()), Box::new(reader)),
                TableReader::Parquet(builder) => {
                    let rows = builder.metadata().file_metadata().num_rows();
                    let rows = ReadProgress::Rows(u64::try_from(rows).unwrap_or(0));
                    skip = 0;
                    let first = to_usize(first_row);
                    let reader = caught(path, || {
                        let mask = projection(builder.parquet_schema(), schema, columns);
                        let builder = builder.with_projection(mask).with_batch_size(BATCH_ROWS);
                        builder.with_offset(first).build().map_err(|error| error.to_string())
                    })?;
                    (rows, Box::new(reader))
                }
            };
        Ok(TableScan { path: path.to_path_buf(), batches, bytes, progress, skip })
    }

    /// The next rows.
    pub(crate) fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            let batches = &mut self.batches;
            let next = caught(&self.path, || {
                batches.next().transpose().map_err(|error| error.to_string())
            })?;
            let Some(batch) = next else { return Ok(None) };
            let rows = to_u64(batch.num_rows());
            if rows <= self.skip {
                self.skip -= rows;
                continue;
            }
            let first = to_usize(std::mem::take(&mut self.skip));
            return Ok(Some(batch.slice(first, batch.num_rows() - first)));
        }
    }

    /// Bytes of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the file up to its row number `rows`, about.
    pub(crate) fn bytes_until(&self, rows: u64) -> u64 {
        let done = match &self.progress {
            ReadProgress::Rows(count) => {
                let share = u128::from(self.bytes) * u128::from(rows) / u128::from((*count).max(1));
                u64::try_from(share).unwrap_or(self.bytes)
            }
            ReadProgress::Place(reader) => {
                reader.as_ref().and_then(|mut file| file.stream_position().ok()).unwrap_or(0)
            }
        };
        done.min(self.bytes)
    }
}

/// A part of a file that can be read for itself.
pub(crate) struct TablePart {
    /// Rows in it.
    pub(crate) rows: u64,
    /// What they take in memory, about.
    pub(crate) memory_bytes: u64,
    /// Bytes of the file that they stand for, about.
    pub(crate) file_bytes: u64,
    content: PartContent,
}

enum PartContent {
    /// A row group of a Parquet file, of which nothing is read yet.
    Group(ArrowReaderMetadata, usize),
    /// Rows of an Arrow file.
    Rows(RecordBatch),
}

/// The parts of a file of that schema, for some of its columns, which exist.
pub(crate) fn parts(
    path: &Path,
    schema: &Schema,
    columns: &[String],
) -> Result<Box<dyn Iterator<Item = Result<TablePart>>>> {
    if !matches!(TableReader::open(path, None)?, TableReader::Parquet(_)) {
        let mut table = TableScan::open(path, schema, columns, 0)?;
        let mut done = 0;
        return Ok(Box::new(std::iter::from_fn(move || {
            let batch = table.next().transpose()?;
            Some(batch.map(|batch| {
                let (before, rows) = (done, to_u64(batch.num_rows()));
                done = table.bytes_until(rows).max(before);
                let (memory_bytes, content) = (value_bytes(&batch), PartContent::Rows(batch));
                TablePart { rows, memory_bytes, file_bytes: done - before, content }
            }))
        })));
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let metadata = caught(path, || about(&file))?;
    let groups = metadata.metadata().num_row_groups();
    let mask = projection(metadata.parquet_schema(), schema, columns);
    Ok(Box::new((0..groups).map(move |number| {
        let group = metadata.metadata().row_group(number);
        let unsigned = |count: i64| u64::try_from(count).unwrap_or(0);
        let read = group.columns().iter().enumerate().filter(|(at, _)| mask.leaf_included(*at));
        let sizes = read.map(|(_, column)| unsigned(column.uncompressed_size()));
        Ok(TablePart {
            rows: unsigned(group.num_rows()),
            memory_bytes: sizes.fold(0, u64::saturating_add),
            file_bytes: unsigned(group.compressed_size()),
            content: PartContent::Group(metadata.clone(), number),
        })
    })))
}

impl TablePart {
    /// Calls `each` for the rows, batch by batch. `path`, `schema` and `columns` are those of
    /// [`parts`].
    pub(crate) fn read(
        &self,
        (path, schema, columns): (&Path, &Schema, &[String]),
        mut each: impl FnMut(&RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let (metadata, number) = match &self.content {
            PartContent::Rows(batch) => return each(batch),
            PartContent::Group(metadata, number) => (metadata.clone(), *number),
        };
        let file = File::open(path).map_err(Error::io("open", path))?;
        let row_bytes = self.memory_bytes / self.rows.max(1);
        let batch_rows = (GROUP_BATCH_BYTES / row_bytes.max(1)).clamp(1, GROUP_BATCH_ROWS_MAX);
        let mut batches = caught(path, || {
            let group = std::slice::from_ref(metadata.metadata().row_group(number));
            let pages = Pages::of(file, group)?;
            let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(pages, metadata);
            let mask = projection(builder.parquet_schema(), schema, columns);
            let builder = builder.with_projection(mask).with_row_groups(vec![number]);
            let reader = builder.with_batch_size(to_usize(batch_rows)).build();
            reader.map_err(|error| error.to_string())
        })?;
        while let Some(batch) =
            caught(path, || batches.next().transpose().map_err(|error| error.to_string()))?
        {
            each(&batch)?;
        }
        Ok(())
    }
}

/// What the values of some rows take, which may share memory with other rows and columns.
fn value_bytes(batch: &RecordBatch) -> u64 {
    let of = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(0);
    to_u64(batch.columns().iter().map(of).sum())
}

/// Of Parquet, inner columns are read alone.
fn projection(about: &SchemaDescriptor, schema: &Schema, columns: &[String]) -> ProjectionMask {
    let mut mask = ProjectionMask::none(about.num_columns());
    for column in columns {
        mask.union(&match schema.index_of(column) {
            Ok(root) => ProjectionMask::roots(about, [root]),
            Err(_) => ProjectionMask::columns(about, [&**column]),
        });
    }
    mask
}

/// A column of some rows, and which of them have no value.
type NullableArray = (ArrayRef, Option<NullBuffer>);

/// The column at a path of names, and which rows have no value: in it, or in what it lies in.
/// `path` is the file's.
pub(crate) fn column(
    path: &Path,
    batch: &RecordBatch,
    column: &str,
) -> Result<Option<NullableArray>> {
    caught(path, || {
        let Some((array, nulls)) = at_names(batch, column) else { return Ok(None) };
        let values = plain(&array).map_err(|error| {
            format!(
                "{} rows of column `{column}`, which has a dictionary, are too much at once: {error}; write it without one, or in smaller batches",
                array.len()
            )
        })?;
        Ok(Some((values, nulls)))
    })
}

fn at_names(batch: &RecordBatch, column: &str) -> Option<NullableArray> {
    if let Some(array) = batch.column_by_name(column) {
        return Some((Arc::clone(array), array.logical_nulls()));
    }
    let mut names = column.split('.');
    let mut array = Arc::clone(batch.column_by_name(names.next()?)?);
    let mut nulls = array.logical_nulls();
    for name in names {
        let inner = Arc::clone(array.as_struct_opt()?.column_by_name(name)?);
        nulls = NullBuffer::union(nulls.as_ref(), inner.logical_nulls().as_ref());
        array = inner;
    }
    Some((array, nulls))
}

/// A dictionary's values, row by row.
fn plain(array: &ArrayRef) -> std::result::Result<ArrayRef, ArrowError> {
    match array.as_any_dictionary_opt() {
        None => Ok(Arc::clone(array)),
        Some(dictionary) => arrow_select::take::take(dictionary.values(), dictionary.keys(), None),
    }
}

/// What the libraries give, their errors and their panics.
fn caught<T>(path: &Path, call: impl FnOnce() -> std::result::Result<T, String>) -> Result<T> {
    // What a panic leaves behind is dropped with the table.
    let done = catch_unwind(AssertUnwindSafe(call));
    let done = done.unwrap_or_else(|_| Err("its content contradicts itself".to_owned()));
    done.map_err(|reason| Error::BadTable { path: path.to_path_buf(), reason })
}

/// Whether each row of a column is a string or some bytes, in whatever way they are kept.
pub(crate) fn is_bytes(kind: &DataType) -> bool {
    matches!(
        kind,
        DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
            | DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
    )
}

/// The bytes of a row of a column of strings or bytes. `None`: it is of another type.
pub(crate) fn bytes_at(array: &dyn Array, row: usize) -> Option<&[u8]> {
    Some(match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).as_bytes(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).as_bytes(),
        DataType::Utf8View => array.as_string_view().value(row).as_bytes(),
        DataType::Binary => array.as_binary::<i32>().value(row),
        DataType::LargeBinary => array.as_binary::<i64>().value(row),
        DataType::BinaryView => array.as_binary_view().value(row),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use arrow_array::types::Int8Type;
    use arrow_array::{DictionaryArray, Int8Array, StringArray};

    use super::*;

    #[test]
    fn a_dictionary_of_more_than_its_type_can_hold_is_an_error_that_says_so() {
        let long = "x".repeat(64 << 20);
        let values: ArrayRef = Arc::new(StringArray::from_iter_values([&*long]));
        let rows = |count: usize| {
            let keys = Int8Array::from(vec![0; count]);
            let column = DictionaryArray::<Int8Type>::new(keys, Arc::clone(&values));
            RecordBatch::try_from_iter([("text", Arc::new(column) as ArrayRef)]).unwrap()
        };
        let file = Path::new("a.parquet");
        let (few, nulls) = column(file, &rows(2), "text").unwrap().unwrap();
        assert_eq!((few.as_string::<i32>().value(1), nulls), (&*long, None));
        let error = column(file, &rows(40), "text").unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::BadTable { .. }), "{text}");
        assert!(text.contains("a.parquet") && text.contains("40 rows of column `text`"), "{text}");
        assert!(column(file, &rows(2), "none").unwrap().is_none());
    }
}
