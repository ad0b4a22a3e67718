//! Tables: a column of strings, each row a document. A place counts rows.

use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;

use super::block::{Block, Content, Place, Texts};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::table::{self, Table};

/// Rows of a block, unless their text is long.
const ROWS: usize = 256;

/// Text of a block.
const TEXT_BYTES: usize = 256 << 10;

/// The rows of one file, from a place on.
pub(super) struct Rows {
    table: Table,
    column: String,
    place: Place,
    current: Option<Batch>,
    ended: bool,
}

/// Rows in memory, of which those before `at` are done.
struct Batch {
    texts: ArrayRef,
    nulls: Option<NullBuffer>,
    at: usize,
}

impl Rows {
    pub(super) fn open(path: &Path, column: &str, place: Place) -> Result<Self> {
        let schema = table::schema(path)?;
        let kind = table::column_type(path, &schema, column)?;
        if !is_text(&kind) {
            let reason = format!(
                "its column `{column}` is of type {kind}, not strings; choose another with --field"
            );
            return Err(Error::BadTable { path: path.to_path_buf(), reason });
        }
        let table = Table::open(path, &schema, &[column.to_owned()], place.line)?;
        Ok(Rows { table, column: column.to_owned(), place, current: None, ended: false })
    }

    /// The next block, or `None` after the one that ends the file.
    pub(super) fn next(&mut self) -> Result<Option<Block>> {
        if self.ended {
            return Ok(None);
        }
        let (start, mut texts) = (self.place, Texts::default());
        while texts.rows() < ROWS && texts.bytes() < TEXT_BYTES {
            match &mut self.current {
                Some(batch) if batch.at < batch.texts.len() => {
                    texts.push(batch.text());
                    batch.at += 1;
                }
                _ => match self.table.next()? {
                    None => break,
                    Some(batch) => {
                        let found = table::column(&batch, &self.column);
                        self.current = found.map(Batch::new);
                    }
                },
            }
        }
        let (rows, bytes) = (texts.rows(), self.table.share(texts.rows(), texts.bytes()));
        self.place.offset += to_u64(rows);
        self.place.line += to_u64(rows);
        self.ended = rows == 0;
        let content = if self.ended { Content::End } else { Content::Rows(texts) };
        Ok(Some(Block { start, content, bytes, after_gap: false }))
    }
}

impl Batch {
    fn new((texts, nulls): (ArrayRef, Option<NullBuffer>)) -> Self {
        Batch { texts, nulls, at: 0 }
    }

    fn text(&self) -> std::result::Result<&str, &'static str> {
        let (texts, at) = (&*self.texts, self.at);
        if self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(at)) {
            return Err("it is null");
        }
        let bytes = match texts.data_type() {
            DataType::Utf8 => return Ok(texts.as_string::<i32>().value(at)),
            DataType::LargeUtf8 => return Ok(texts.as_string::<i64>().value(at)),
            DataType::Utf8View => return Ok(texts.as_string_view().value(at)),
            DataType::Binary => texts.as_binary::<i32>().value(at),
            DataType::LargeBinary => texts.as_binary::<i64>().value(at),
            DataType::BinaryView => texts.as_binary_view().value(at),
            _ => return Err("it is no string"),
        };
        std::str::from_utf8(bytes).ok().ok_or("it is not UTF-8")
    }
}

/// Strings, whatever way they are kept; bytes are read as UTF-8.
fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}
