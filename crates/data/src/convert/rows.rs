//! Tables: a column of strings, each row a document. A place counts rows.

use std::path::{Path, PathBuf};

use arrow_array::{Array, ArrayRef};
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;

use super::block::{BlockContent, InputPosition, TextBlock, Texts};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::table::{self, TableScan};

/// Rows of a block, unless their text is long.
const ROWS: usize = 256;

/// Text of a block.
const TEXT_BYTES: usize = 256 << 10;

/// The rows of one file, from a place on.
pub(super) struct TableRows {
    path: PathBuf,
    table: TableScan,
    column: String,
    place: InputPosition,
    current: Option<TextBatch>,
    /// Bytes of the file that blocks stood for.
    done_bytes: u64,
    ended: bool,
}

/// Rows in memory, of which those before `at` are done.
struct TextBatch {
    texts: ArrayRef,
    nulls: Option<NullBuffer>,
    at: usize,
}

impl TableRows {
    pub(super) fn open(path: &Path, column: &str, place: InputPosition) -> Result<Self> {
        let schema = table::schema(path)?;
        let kind = table::column_type(path, &schema, column)?;
        if !is_text(&kind) {
            let reason = format!(
                "its column `{column}` is of type {kind}, not strings; choose another with --field"
            );
            return Err(Error::BadTable { path: path.to_path_buf(), reason });
        }
        let table = TableScan::open(path, &schema, &[column.to_owned()], place.line)?;
        let (path, column) = (path.to_path_buf(), column.to_owned());
        Ok(TableRows { path, table, column, place, current: None, done_bytes: 0, ended: false })
    }

    /// The next block, or `None` after the one that ends the file.
    pub(super) fn next(&mut self) -> Result<Option<TextBlock>> {
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
                        let found = table::column(&self.path, &batch, &self.column)?;
                        self.current = found.map(TextBatch::new);
                    }
                },
            }
        }
        let rows = to_u64(texts.rows());
        self.place.offset += rows;
        self.place.line += rows;
        self.ended = rows == 0;
        // The first block also counts for the rows before it, and the end for what follows the last
        // row.
        let rest = || self.table.bytes_until(self.place.line);
        let done_bytes = if self.ended { self.table.bytes() } else { rest() };
        let bytes = done_bytes.saturating_sub(self.done_bytes);
        self.done_bytes += bytes;
        let content = if self.ended { BlockContent::End } else { BlockContent::Rows(texts) };
        Ok(Some(TextBlock { start, content, bytes, is_inside: false }))
    }
}

impl TextBatch {
    fn new((texts, nulls): (ArrayRef, Option<NullBuffer>)) -> Self {
        TextBatch { texts, nulls, at: 0 }
    }

    fn text(&self) -> std::result::Result<&str, &'static str> {
        let (texts, at) = (&*self.texts, self.at);
        if self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(at)) {
            return Err("it is null");
        }
        let bytes = table::bytes_at(texts, at).ok_or("it is no string")?;
        std::str::from_utf8(bytes).ok().ok_or("it is not UTF-8")
    }
}

/// Strings, whatever way they are kept; bytes are read as UTF-8.
fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Dictionary(_, values) => is_text(values),
        _ => table::is_bytes(kind),
    }
}

/// Reads the texts of a file, as the converter does: some thousands. Gives whether there are any.
#[cfg(feature = "testing")]
pub(crate) fn fuzzed(path: &Path, column: &str) -> Result<bool> {
    let mut rows = TableRows::open(path, column, InputPosition::default())?;
    let mut is_read = false;
    for _ in 0..100 {
        match rows.next()? {
            Some(TextBlock { content: BlockContent::Rows(texts), .. }) => {
                is_read |= texts.rows() > 0;
            }
            _ => break,
        }
    }
    Ok(is_read)
}
