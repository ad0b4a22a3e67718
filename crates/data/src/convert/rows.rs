//! Parquet: a column of strings, row after row.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::RowAccessor as _;
use parquet::schema::types::Type;

use super::block::{Block, Content, Place};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// Rows of a block, unless their text is long.
const ROWS: usize = 256;

/// Text of a block.
const TEXT_BYTES: usize = 256 << 10;

/// The rows of one file, from a place on.
pub(crate) struct Rows {
    path: PathBuf,
    rows: RowIter<'static>,
    place: Place,
    /// Bytes of the file for each row, in 2^-16 bytes: what progress counts.
    bytes_per_row: u64,
    ended: bool,
}

impl Rows {
    pub(crate) fn open(path: &Path, field: &str, start: Place) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let file_bytes = file.metadata().map_err(Error::io("open", path))?.len();
        let bad = |error: &dyn std::fmt::Display| bad_file(path, error);
        let reader = SerializedFileReader::new(file).map_err(|error| bad(&error))?;
        let metadata = reader.metadata().file_metadata();
        let row_count = u64::try_from(metadata.num_rows()).unwrap_or(0);
        let schema = metadata.schema();
        let column = schema.get_fields().iter().find(|column| column.name() == field);
        let Some(column) = column else {
            let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
            let names = names.join(", ");
            return Err(bad(&format!("it has no column `{field}`; it has: {names}")));
        };
        let projection = Type::group_type_builder(schema.name())
            .with_fields(vec![std::sync::Arc::clone(column)])
            .build()
            .map_err(|error| bad(&error))?;
        let rows = RowIter::from_file_into(Box::new(reader))
            .project(Some(projection))
            .map_err(|error| bad(&error))?;
        let bytes_per_row = (file_bytes << 16) / row_count.max(1);
        let (path, place) = (path.to_path_buf(), Place { offset: 0, line: 0, ..start });
        let mut rows = Rows { path, rows, place, bytes_per_row, ended: false };
        rows.skip(start.offset)?;
        Ok(rows)
    }

    fn skip(&mut self, count: u64) -> Result<()> {
        for _ in 0..count {
            if let Some(row) = self.rows.next() {
                row.map_err(|error| bad_file(&self.path, &error))?;
            }
            self.place.offset += 1;
            self.place.line += 1;
        }
        Ok(())
    }

    pub(crate) fn next(&mut self) -> Result<Option<Block>> {
        if self.ended {
            return Ok(None);
        }
        let start = self.place;
        let (mut texts, mut text_bytes) = (Vec::new(), 0);
        while texts.len() < ROWS && text_bytes < TEXT_BYTES {
            let Some(row) = self.rows.next() else { break };
            let row = row.map_err(|error| bad_file(&self.path, &error))?;
            let text = row.get_string(0).map_err(|error| {
                let (path, line) = (self.path.clone(), self.place.line + 1);
                Error::BadLine { path, line, reason: format!("it has no text: {error}") }
            })?;
            text_bytes += text.len();
            texts.push(text.clone());
            self.place.offset += 1;
            self.place.line += 1;
        }
        let count = to_u64(texts.len());
        let content = if texts.is_empty() { Content::End } else { Content::Rows(texts) };
        self.ended = count == 0;
        let bytes = to_u64(to_usize(self.bytes_per_row * count) >> 16);
        Ok(Some(Block { start, content, bytes, after_gap: false }))
    }
}

fn bad_file(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::BadHeader { path: path.to_path_buf(), reason: format!("as Parquet: {error}") }
}
