//! Writing records: columns gather in memory, and become a shard when there are enough of them.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use super::field::{self, ColumnValue, Field, FieldShape};
use super::index::{RecordIndex, RecordShard};
use super::packed::PackedColumn;
use crate::batches::DType;
use crate::cast::{to_u64, to_usize};
use crate::convert::resume;
use crate::error::{Error, Result};
use crate::format::checked::seal;
use crate::format::folder::{is_free, OnDrop, PartialFolder, SHARD_EXTENSION};
use crate::format::header::{self, Tensor};
use crate::format::index::CREATOR;
use crate::format::lock::Lock;

/// Records without a byte fill no shard: it is closed after so many.
const SHARD_RECORDS_MAX: u64 = 1 << 24;

/// Writes a folder of records.
///
/// The folder appears under its name when [`finish`](Self::finish) succeeds, complete and synced to
/// disk; until then, and if the writer is dropped, nothing is there but the hidden file of the lock
/// that keeps other writers away. Memory: the bytes of one shard.
#[derive(Debug)]
pub struct RecordWriter {
    partial: PartialFolder,
    shard_bytes: u64,
    columns: Vec<ShardColumn>,
    records: u64,
    bytes: u64,
    done: Vec<RecordShard>,
    /// Held until the folder is in its place, or what was written is removed.
    _lock: Lock,
}

/// The records of the current shard.
#[derive(Debug)]
struct ShardColumn {
    field: Field,
    values: Vec<u8>,
    /// Of a variable column: where each record ends, in elements, after a 0.
    ends: Vec<u64>,
}

impl RecordWriter {
    /// A shard size that is read well and fits any memory.
    pub const SHARD_BYTES: u64 = 64 << 20;

    /// Starts a folder that will be renamed to `folder`. A shard is closed after so many bytes of
    /// values and of their offsets, or 2^24 records.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if something is there but an empty folder, [`Error::LockTimeout`] if
    /// somebody else writes it, [`Error::InvalidOption`] for fields that cannot be, and
    /// [`Error::CacheNotWritable`].
    pub fn create(folder: &Path, fields: Vec<Field>, shard_bytes: u64) -> Result<Self> {
        let lock = resume::lock(folder)?;
        if !is_free(folder)? {
            return Err(Error::OutputExists { path: folder.to_path_buf() });
        }
        Self::resume(folder, fields, shard_bytes, Vec::new(), (lock, OnDrop::Remove))
    }

    /// Goes on with what an earlier writer of the same folder left half done: these shards are
    /// whole, any others are removed. Without any it begins anew.
    pub(crate) fn resume(
        folder: &Path,
        fields: Vec<Field>,
        shard_bytes: u64,
        done: Vec<RecordShard>,
        (lock, on_drop): (Lock, OnDrop),
    ) -> Result<Self> {
        field::check(&fields).map_err(|reason| Error::option("fields", fields.len(), reason))?;
        let column = |field| ShardColumn { field, values: Vec::new(), ends: vec![0] };
        Ok(RecordWriter {
            partial: PartialFolder::open(folder, &done, on_drop)?,
            shard_bytes,
            columns: fields.into_iter().map(column).collect(),
            records: 0,
            bytes: 0,
            done,
            _lock: lock,
        })
    }

    /// Where shards gather until the folder is complete.
    pub(crate) fn folder(&self) -> &Path {
        self.partial.path()
    }

    /// The shards that are closed.
    pub(crate) fn shards(&self) -> &[RecordShard] {
        &self.done
    }

    /// Appends a record: a value for each field, in the order of the fields.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if the values do not fit the fields (nothing was appended then),
    /// and [`Error::Io`].
    pub fn push(&mut self, values: &[ColumnValue<'_>]) -> Result<()> {
        if values.len() != self.columns.len() {
            let reason = format!("a record has {} fields", self.columns.len());
            return Err(Error::option("values.len()", values.len(), reason));
        }
        for (column, value) in self.columns.iter().zip(values) {
            column.check(value)?;
        }
        for (column, value) in self.columns.iter_mut().zip(values) {
            column.values.extend_from_slice(value.bytes);
            self.bytes += to_u64(value.bytes.len());
            if column.is_variable() {
                column.ends.push(to_u64(column.values.len() / column.field.dtype.bytes()));
                self.bytes += 8;
            }
        }
        self.records += 1;
        if self.is_full(self.bytes, self.records) {
            self.close_shard()?;
        }
        Ok(())
    }

    /// Appends rows from `at` on, up to the last or until the shard is closed. Gives how many.
    pub(super) fn append(&mut self, columns: &[PackedColumn], at: usize) -> Result<usize> {
        let rows = columns.iter().map(PackedColumn::rows).min().unwrap_or(0);
        let offsets = self.columns.iter().filter(|column| column.is_variable()).count();
        let (mut end, mut bytes) = (at, self.bytes);
        while end < rows && !self.is_full(bytes, self.records + to_u64(end - at)) {
            let values: usize = columns.iter().map(|column| column.row_bytes(end)).sum();
            bytes += to_u64(values + 8 * offsets);
            end += 1;
        }
        for (column, packed) in self.columns.iter_mut().zip(columns) {
            let (dtype, values) = (column.field.dtype, packed.of(at..end));
            column.check_values(values)?;
            if column.is_variable() {
                let mut place = column.values.len();
                column.ends.extend((at..end).map(|row| {
                    place += packed.row_bytes(row);
                    to_u64(place / dtype.bytes())
                }));
            }
            column.values.extend_from_slice(values);
        }
        (self.records, self.bytes) = (self.records + to_u64(end - at), bytes);
        if self.is_full(self.bytes, self.records) {
            self.close_shard()?;
        }
        Ok(end - at)
    }

    fn is_full(&self, bytes: u64, records: u64) -> bool {
        bytes >= self.shard_bytes || records >= SHARD_RECORDS_MAX
    }

    /// Closes the current shard, if it holds anything.
    pub(super) fn close(&mut self) -> Result<()> {
        if self.records > 0 {
            self.close_shard()?;
        }
        Ok(())
    }

    /// Writes the index and moves the folder to its place.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if something came to lie there meanwhile: it stays, and the complete
    /// folder is beside it as `.NAME.partial`. [`Error::Io`].
    pub fn finish(mut self) -> Result<RecordIndex> {
        self.close()?;
        let fields = self.columns.iter().map(|column| column.field.clone()).collect();
        let index = RecordIndex::new(fields, self.done);
        self.partial.finish(&index)?;
        Ok(index)
    }

    fn close_shard(&mut self) -> Result<()> {
        let file = format!("records-{:05}.{SHARD_EXTENSION}", self.done.len());
        let path = self.partial.path().join(&file);
        let failed = |cause| Error::Io { action: "write", path: path.clone(), cause };
        let mut tensors = Vec::new();
        for column in &self.columns {
            column.tensors(self.records, &mut tensors);
        }
        // Larger elements first: each tensor then starts at a multiple of its element's size.
        tensors.sort_by_key(|(tensor, _)| std::cmp::Reverse(tensor.element_bytes));
        let mut heads: Vec<Tensor> = tensors.iter().map(|(tensor, _)| tensor.clone()).collect();
        let creator = CREATOR.to_owned();
        let value_bytes: u64 = tensors.iter().map(|(_, bytes)| to_u64(bytes.len())).sum();
        let header = header::encode_sealed(&mut heads, &[("creator", creator)], value_bytes);
        let mut out = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        out.write_all(&header).map_err(failed)?;
        for (_, bytes) in &tensors {
            out.write_all(bytes).map_err(failed)?;
        }
        let (file_bytes, crc32c) = seal(&mut out, &path)?;
        let longest = self.columns.iter().map(ShardColumn::longest).collect();
        let record_count = self.records;
        self.done.push(RecordShard { file, file_bytes, record_count, crc32c, longest });
        for column in &mut self.columns {
            column.values.clear();
            column.ends.truncate(1);
        }
        (self.records, self.bytes) = (0, 0);
        Ok(())
    }
}

impl ShardColumn {
    fn check(&self, value: &ColumnValue<'_>) -> Result<()> {
        let Field { name, dtype, .. } = &self.field;
        let count = value.bytes.len() / dtype.bytes();
        let wrong = |reason: String| Err(Error::option("value", format!("for `{name}`"), reason));
        if value.dtype != *dtype {
            return wrong(format!("it is of {}, the field of {dtype}", value.dtype));
        }
        if let Some(expected) = self.field.elements().filter(|&expected| expected != count) {
            return wrong(format!("it has {count} elements, the field {expected}"));
        }
        self.check_values(value.bytes)
    }

    fn check_values(&self, bytes: &[u8]) -> Result<()> {
        if self.field.dtype == DType::Bool && bytes.iter().any(|&byte| byte > 1) {
            let value = format!("for `{}`", self.field.name);
            return Err(Error::option("value", value, "a bool is 0 or 1"));
        }
        Ok(())
    }

    fn is_variable(&self) -> bool {
        self.field.shape == FieldShape::Variable
    }

    /// The most elements that a record of the shard has.
    fn longest(&self) -> u64 {
        let counts = self.ends.windows(2).map(|pair| pair[1] - pair[0]);
        self.field.elements().map_or_else(|| counts.max().unwrap_or(0), to_u64)
    }

    /// The tensors of a column and their bytes, where they lie.
    fn tensors<'a>(&'a self, records: u64, out: &mut Vec<(Tensor, &'a [u8])>) {
        let Field { name, dtype, shape } = &self.field;
        let count = to_usize(records);
        let rows = match shape {
            FieldShape::Fixed(row) => std::iter::once(count).chain(row.iter().copied()).collect(),
            FieldShape::Variable => {
                let offsets = Tensor {
                    name: self.field.offsets_name(),
                    dtype: "U64",
                    shape: vec![self.ends.len()],
                    element_bytes: 8,
                };
                out.push((offsets, bytemuck::cast_slice(&self.ends)));
                vec![self.values.len() / dtype.bytes()]
            }
        };
        let tensor = Tensor {
            name: name.clone(),
            dtype: dtype.name(),
            shape: rows,
            element_bytes: dtype.bytes(),
        };
        out.push((tensor, &self.values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batches::DType;

    #[test]
    fn a_shard_is_held_once_and_its_offsets_only_where_lengths_vary() {
        let folder = tempfile::tempdir().unwrap();
        let fields = vec![Field::fixed("a", DType::U8, [2]), Field::variable("b", DType::U8)];
        let mut writer = RecordWriter::create(&folder.path().join("out"), fields, 1 << 20).unwrap();
        for _ in 0..100 {
            writer.push(&[ColumnValue::of(&[1_u8, 2]), ColumnValue::of(&[3_u8])]).unwrap();
        }
        assert_eq!(writer.columns[0].ends.len(), 1, "a fixed column needs no offsets");
        assert_eq!(writer.columns[1].ends.len(), 101);
        let mut tensors = Vec::new();
        writer.columns[0].tensors(100, &mut tensors);
        assert_eq!(tensors[0].1.as_ptr(), writer.columns[0].values.as_ptr(), "no copy is made");
    }

    #[test]
    fn records_without_values_fill_shards_with_their_offsets() {
        let folder = tempfile::tempdir().unwrap();
        let fields = vec![Field::variable("b", DType::U8)];
        let mut writer = RecordWriter::create(&folder.path().join("out"), fields, 800).unwrap();
        for _ in 0..250 {
            writer.push(&[ColumnValue::of::<u8>(&[])]).unwrap();
        }
        let counts = writer.done.iter().map(|shard| shard.record_count);
        assert_eq!(counts.collect::<Vec<_>>(), [100, 100]);
    }
}
