//! Reading records, in any order, from many threads.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use super::field::{Field, FieldShape};
use super::index::{RecordIndex, RecordShard};
use crate::batches::{DType, Scratch};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::format::bytes::SizedSource;
use crate::format::checked::Checked;
use crate::format::header::SafetensorsHeader;
use crate::format::offsets::{bytes_of, elements_in, RowOffsets};
use crate::format::open_shards::{running_sums, shard_of, OpenShards};
use crate::source::{Access, Folder, LocalFolder};

/// The records of a folder.
#[derive(Debug)]
pub struct Records {
    index: RecordIndex,
    shards: OpenShards<OpenRecordShard>,
    /// Where each shard starts, and where the last one ends.
    starts: Vec<u64>,
}

#[derive(Debug)]
pub(crate) struct OpenRecordShard {
    checked: Checked,
    columns: Vec<ColumnLayout>,
}

/// Where a column lies in a shard, in bytes from the file's beginning.
#[derive(Debug)]
enum ColumnLayout {
    Fixed { start: u64, row_bytes: u64 },
    Variable { start: u64, offsets: RowOffsets, total: u64, longest: Option<u64> },
}

impl Records {
    /// Opens a folder: index, sizes and headers are checked; values are verified when they are
    /// first touched.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadIndex`], or what is wrong with a shard: its size, header, dtype
    /// or shape.
    pub fn open(folder: &Path, access: Access) -> Result<Self> {
        Self::open_from(&LocalFolder::new(folder, access))
    }

    /// Opens a folder, wherever it lies.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what the folder says.
    pub fn open_from(folder: &dyn Folder) -> Result<Self> {
        let index = RecordIndex::read_from(folder)?;
        let open = |entry: &_| OpenRecordShard::open(folder, entry, &index.fields);
        let shards = OpenShards::open(folder, index.fingerprint, &index.shards, open)?;
        let starts = running_sums(index.shards.iter().map(|shard| shard.record_count));
        Ok(Records { index, shards, starts })
    }

    /// What the folder says it holds.
    pub fn index(&self) -> &RecordIndex {
        &self.index
    }

    /// How many records there are.
    pub fn record_count(&self) -> u64 {
        self.index.record_count
    }

    /// The columns.
    pub fn fields(&self) -> &[Field] {
        &self.index.fields
    }

    /// Fingerprint of the content.
    pub fn fingerprint(&self) -> Fingerprint {
        self.index.fingerprint
    }

    /// How many elements a record has in field number `field`. Costs nothing unless the field is
    /// variable.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`], [`Error::NoColumn`], and as [`read`](Self::read) for variable
    /// fields.
    pub fn elements(&self, record: u64, field: usize, scratch: &mut Scratch) -> Result<usize> {
        let about = self.field(field)?;
        let (shard, row) = self.find(record)?;
        match about.elements() {
            Some(count) => Ok(count),
            None => {
                let range = shard.elements(field, row, record, scratch)?;
                Ok(to_usize(range.end - range.start))
            }
        }
    }

    /// Reads field number `field` of a record into `out`: little-endian values, as many bytes as
    /// its elements have.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`], [`Error::NoColumn`], [`Error::InvalidOption`] if `out` has another
    /// length, [`Error::Damaged`], [`Error::WrongSize`], [`Error::Io`], and [`Error::BadValue`] for
    /// bounds or truth values that cannot be.
    pub fn read(
        &self,
        record: u64,
        field: usize,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let about = self.field(field)?;
        let (shard, row) = self.find(record)?;
        let range = shard.bytes(field, row, record, about.dtype, scratch)?;
        let len = to_usize(range.end - range.start);
        if out.len() != len {
            let reason = format!("`{}` of record {record} has {len} bytes", about.name);
            return Err(Error::option("out.len()", out.len(), reason));
        }
        let reading = format_args!("record {record}");
        shard.copy(range, out, scratch, &reading)?;
        let bad = (about.dtype == DType::Bool).then(|| out.iter().position(|&byte| byte > 1));
        if let Some(position) = bad.flatten() {
            return Err(Error::BadValue {
                path: shard.checked.path().to_path_buf(),
                sample: record,
                position,
                value: i64::from(out[position]),
                reason: "a bool is 0 or 1; write the data again".to_owned(),
            });
        }
        Ok(())
    }

    /// Records that lie in blocks that are known to be damaged (see
    /// [`record_damage`](crate::damage::record_damage)): ascending. Reads the bounds of variable
    /// fields in shards with such blocks.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn damaged(&self) -> Result<Vec<Range<u64>>> {
        self.shards.damaged(&self.starts, |at, shard, blocks| {
            shard.records_of(blocks, (&self.index.fields, self.index.shards[at].record_count))
        })
    }

    /// The most elements that a record has in variable field number `field`: as the index says.
    /// Where it does not, all bounds are read, but those that are known to be damaged.
    pub(crate) fn longest(&self, field: usize) -> Result<usize> {
        let mut longest = 0;
        for (at, shard, damaged) in self.shards.iter() {
            let ColumnLayout::Variable { offsets, total, longest: listed, .. } =
                shard.columns[field]
            else {
                continue;
            };
            if let Some(listed) = listed {
                longest = longest.max(to_usize(listed));
                continue;
            }
            let bad = bytes_of(&shard.checked, damaged);
            let reading = format_args!("the bounds of `{}`", self.index.fields[field].name);
            offsets.scan(&shard.checked, &bad, &reading, |row, bounds| {
                if let Some(bounds) = bounds {
                    shard.check_bounds(&bounds, total, (field, self.starts[at] + row))?;
                    longest = longest.max(to_usize(bounds.end - bounds.start));
                }
                Ok(())
            })?;
        }
        Ok(longest)
    }

    /// Has these records fetched from the disk, where that can be asked for. Reads the bounds of
    /// the first and the last one in variable fields, and waits for them.
    pub(crate) fn will_need(&self, records: Range<u64>, scratch: &mut Scratch) {
        self.shards.for_range(&self.starts, &records, |shard, rows, first| {
            shard.will_need(rows, (&self.index.fields, first), scratch);
        });
    }

    fn field(&self, field: usize) -> Result<&Field> {
        self.index.fields.get(field).ok_or_else(|| Error::NoColumn {
            name: format!("number {field}"),
            dtype: "any",
            present: self.index.fields.iter().map(|one| one.name.clone()).collect(),
        })
    }

    /// The shard of a record, and its row there.
    fn find(&self, record: u64) -> Result<(&OpenRecordShard, u64)> {
        if record >= self.record_count() {
            return Err(Error::NoSuchSample { sample: record, samples: self.record_count() });
        }
        let at = shard_of(&self.starts, record);
        let shard = self.shards.get(at, &format_args!("record {record}"))?;
        Ok((shard, record - self.starts[at]))
    }
}

impl OpenRecordShard {
    pub(crate) fn open(folder: &dyn Folder, entry: &RecordShard, fields: &[Field]) -> Result<Self> {
        let bytes = SizedSource::of(folder.open(&entry.file)?, Some(entry.file_bytes))?;
        let header = SafetensorsHeader::read(&bytes)?;
        // `[rows, rest…]`; any number of rows where none is given.
        let tensor = |name: &str, dtype: &'static str, rest: &[usize], rows: Option<u64>| {
            let fits = |shape: &[usize]| match shape.split_first() {
                Some((&first, tail)) => {
                    rows.is_none_or(|rows| to_u64(first) == rows) && tail == rest
                }
                None => false,
            };
            header.expect(name, dtype, fits, || {
                let rows = rows.map_or_else(|| "any".to_owned(), |rows| rows.to_string());
                format!("{rows} rows of {rest:?}")
            })
        };
        let columns = fields
            .iter()
            .enumerate()
            .map(|(number, field)| {
                let (name, dtype) = (&field.name, field.dtype.name());
                match &field.shape {
                    FieldShape::Fixed(shape) => {
                        let span = tensor(name, dtype, shape, Some(entry.record_count))?;
                        Ok(ColumnLayout::Fixed {
                            start: span.start,
                            row_bytes: to_u64(field.row_bytes()),
                        })
                    }
                    FieldShape::Variable => {
                        let values = tensor(name, dtype, &[], None)?;
                        let rows = entry.record_count.saturating_add(1);
                        let offsets = tensor(&field.offsets_name(), "U64", &[], Some(rows))?;
                        let total = to_u64(values.shape[0]);
                        let offsets = RowOffsets { start: offsets.start, rows: entry.record_count };
                        // A record cannot be longer than all of them together: memory is reserved
                        // by this.
                        let longest = entry.longest.get(number).map(|&longest| longest.min(total));
                        Ok(ColumnLayout::Variable { start: values.start, offsets, total, longest })
                    }
                }
            })
            .collect::<Result<_>>()?;
        let checked = Checked::new(bytes, &entry.crc32c);
        checked.check_header(&header)?;
        Ok(OpenRecordShard { checked, columns })
    }

    /// The elements of a record in a variable column, counted within the shard.
    fn elements(
        &self,
        field: usize,
        row: u64,
        record: u64,
        scratch: &mut Scratch,
    ) -> Result<Range<u64>> {
        let ColumnLayout::Variable { offsets, total, longest, .. } = &self.columns[field] else {
            return Ok(0..0);
        };
        let at = offsets.start + row * to_u64(size_of::<u64>());
        let mut ends = [0; 16];
        let reading = format_args!("the bounds of record {record}");
        self.copy(at..at + to_u64(ends.len()), &mut ends, scratch, &reading)?;
        let (pair, _) = ends.as_chunks::<8>();
        let (start, end) = (u64::from_le_bytes(pair[0]), u64::from_le_bytes(pair[1]));
        self.check_bounds(&(start..end), *total, (field, record))?;
        if let Some(longest) = longest.filter(|&longest| end - start > longest) {
            return Err(Error::BadValue {
                path: self.checked.path().to_path_buf(),
                sample: record,
                position: field,
                value: i64::try_from(end - start).unwrap_or(i64::MAX),
                reason: format!("the index says {longest} elements at most; write the data again"),
            });
        }
        Ok(start..end)
    }

    fn check_bounds(
        &self,
        &Range { start, end }: &Range<u64>,
        total: u64,
        (field, record): (usize, u64),
    ) -> Result<()> {
        if start <= end && end <= total {
            return Ok(());
        }
        Err(Error::BadValue {
            path: self.checked.path().to_path_buf(),
            sample: record,
            position: field,
            value: i64::try_from(end).unwrap_or(i64::MAX),
            reason: format!("elements {start} to {end} of {total}; write the data again"),
        })
    }

    /// The records that have values or bounds in these blocks, counted within the shard, in any
    /// order.
    fn records_of(
        &self,
        blocks: &[u64],
        (fields, count): (&[Field], u64),
    ) -> Result<Vec<Range<u64>>> {
        let bytes = bytes_of(&self.checked, blocks);
        let mut all = Vec::new();
        for (column, field) in self.columns.iter().zip(fields) {
            match *column {
                ColumnLayout::Fixed { start, row_bytes } => {
                    all.extend(elements_in(&bytes, (start, to_usize(row_bytes), count)));
                }
                ColumnLayout::Variable { start, offsets, total, .. } => {
                    let elements = elements_in(&bytes, (start, field.dtype.bytes(), total));
                    let reading = format_args!("the bounds of `{}`", field.name);
                    all.extend(offsets.damaged_rows(&self.checked, &bytes, &elements, &reading)?);
                }
            }
        }
        Ok(all)
    }

    /// Rows counted within the shard, whose first record is `first`.
    fn will_need(&self, rows: Range<u64>, (fields, first): (&[Field], u64), scratch: &mut Scratch) {
        for (number, field) in fields.iter().enumerate() {
            let mut place = |row| self.bytes(number, row, first + row, field.dtype, scratch);
            // Errors are left to whoever reads the records.
            if let (Ok(start), Ok(end)) = (place(rows.start), place(rows.end - 1)) {
                self.checked.bytes.will_need(start.start..end.end);
            }
        }
    }

    /// Where the bytes of a record lie.
    fn bytes(
        &self,
        field: usize,
        row: u64,
        record: u64,
        dtype: DType,
        scratch: &mut Scratch,
    ) -> Result<Range<u64>> {
        Ok(match &self.columns[field] {
            ColumnLayout::Fixed { start, row_bytes } => {
                let at = start + row * row_bytes;
                at..at + row_bytes
            }
            ColumnLayout::Variable { start, .. } => {
                let range = self.elements(field, row, record, scratch)?;
                let element = to_u64(dtype.bytes());
                start + range.start * element..start + range.end * element
            }
        })
    }

    fn copy(
        &self,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        let offset = range.start;
        self.copy_bare(range, out, scratch, reading)
            .map_err(|error| error.while_reading(reading, self.checked.path(), offset))
    }

    #[inline]
    fn copy_bare(
        &self,
        range: Range<u64>,
        out: &mut [u8],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()> {
        self.checked.verify(range.clone(), &mut scratch.bytes, reading)?;
        let bytes = self.checked.bytes.read(range.start, out.len(), &mut scratch.bytes)?;
        out.copy_from_slice(bytes);
        self.checked.bytes.check(range)
    }
}
