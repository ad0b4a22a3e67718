//! Batches of named, typed columns, and the pool that their memory goes back to.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::masking::IGNORED;
use crate::memory::Block;
use crate::plan::LeftOut;
use crate::recycling::{Counted, Parts, Pool};
use crate::sampler::Sample;

/// One column of a batch: what every row holds under its name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Column {
    /// The name.
    pub name: Cow<'static, str>,
    /// What the elements are.
    pub dtype: DType,
    /// The shape of one row. Empty: one element.
    pub shape: Vec<usize>,
    /// The first size in `shape` is only the largest there can be: a batch is as long as its longest sample, if the column can be.
    pub padded: bool,
}

impl Column {
    /// A column whose rows all have this shape.
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Column { name: name.into(), dtype, shape: shape.into(), padded: false }
    }

    /// A column whose rows are padded to the longest sample of their batch; `shape[0]` is the longest there can be. Of several
    /// such columns each is as long as the longest sample, and no longer than its own `shape[0]`.
    pub fn padded(
        name: impl Into<Cow<'static, str>>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Column { padded: true, ..Column::new(name, dtype, shape) }
    }

    /// The shape of a row in a batch whose longest sample has `longest` elements, of which this column may hold fewer.
    fn row_shape(&self, longest: usize) -> impl Iterator<Item = usize> + '_ {
        let own = move |(at, &size): (usize, &usize)| match at {
            0 if self.padded => longest.min(size),
            _ => size,
        };
        self.shape.iter().enumerate().map(own)
    }

    /// Elements of such a row.
    pub(crate) fn row_elements(&self, longest: usize) -> usize {
        self.row_shape(longest).fold(1, usize::saturating_mul)
    }

    fn row_bytes(&self, longest: usize) -> usize {
        self.row_elements(longest).saturating_mul(self.dtype.bytes())
    }

    /// The longest a row can be; 0 for columns that are not padded.
    pub(crate) fn longest_max(&self) -> usize {
        if self.padded {
            self.shape.first().copied().unwrap_or(1)
        } else {
            0
        }
    }
}

/// Bytes of so many rows of all columns, at most.
pub(crate) fn bytes_max(columns: &[Column], rows: usize) -> usize {
    let of = |column: &Column| column.row_bytes(column.longest_max()).saturating_mul(rows);
    columns.iter().map(of).fold(0, usize::saturating_add)
}

/// What one rank computes at once: rows of named columns.
///
/// Dropping it gives its memory back to the loader.
#[derive(Debug)]
pub struct Batch {
    parts: Parts,
    longest: usize,
    /// Of the global batch whose first micro-batch this is.
    pub(crate) left_out: LeftOut,
    pool: Arc<Pool>,
}

impl Batch {
    /// A batch for `samples`, of which the last ones may not count. Its memory holds old values.
    pub(crate) fn take(pool: &Arc<Pool>, samples: impl Iterator<Item = (Sample, bool)>) -> Self {
        let mut parts = pool.take();
        parts.samples.clear();
        parts.valid.clear();
        parts.counted = Counted::default();
        for (sample, valid) in samples {
            parts.samples.push(sample);
            parts.valid.push(valid);
        }
        Batch { parts, longest: 0, left_out: LeftOut::default(), pool: Arc::clone(pool) }
    }

    /// Sets how long the rows of padded columns are, and gets memory where there is too little.
    pub(crate) fn shape_for(&mut self, longest: usize) -> Result<()> {
        let rows = self.rows();
        let columns = self.shared_columns();
        self.longest =
            columns.iter().map(Column::longest_max).max().map_or(0, |max| longest.min(max));
        self.parts.blocks.resize_with(columns.len(), || None);
        for (block, column) in self.parts.blocks.iter_mut().zip(columns.iter()) {
            let bytes = column.row_bytes(self.longest).saturating_mul(rows);
            let has = block.as_ref().map_or(0, |block| block.bytes().len());
            if has < bytes || block.is_none() {
                // Padded rows differ in length from batch to batch: some more than is needed now.
                let largest = column.row_bytes(column.longest_max()).saturating_mul(rows);
                let bytes = if column.padded { (bytes + bytes / 2).min(largest) } else { bytes };
                self.pool.replace(block, bytes)?;
            }
        }
        let needed = self.bytes();
        self.pool.use_bytes(&mut self.parts, needed);
        Ok(())
    }

    /// The columns there are.
    pub fn columns(&self) -> &[Column] {
        self.pool.columns()
    }

    /// The same, shared by all batches of a loader.
    pub fn shared_columns(&self) -> Arc<[Column]> {
        Arc::clone(self.pool.columns())
    }

    /// The elements of a column, row after row: `[rows, …shape of a row]`.
    ///
    /// # Errors
    /// [`Error::NoColumn`] if there is no column of that name and type.
    pub fn get<T: Element>(&self, name: &str) -> Result<&[T]> {
        let at = find::<T>(self.columns(), name)?;
        bytemuck::try_cast_slice(self.column_bytes(at)).map_err(|error| misaligned(name, error))
    }

    /// The bytes of column number `column`, row after row. Empty if there is no such column.
    pub fn column_bytes(&self, column: usize) -> &[u8] {
        let (Some(Some(block)), Some(about)) =
            (self.parts.blocks.get(column), self.pool.columns().get(column))
        else {
            return &[];
        };
        &block.bytes()[..about.row_bytes(self.longest) * self.rows()]
    }

    /// The bytes of column number `column`, to be changed. Empty if there is no such column.
    pub fn column_bytes_mut(&mut self, column: usize) -> &mut [u8] {
        let rows = self.rows();
        self.parts.counted = Counted::default();
        let (Some(Some(block)), Some(about)) =
            (self.parts.blocks.get_mut(column), self.pool.columns().get(column))
        else {
            return &mut [];
        };
        &mut block.bytes_mut()[..about.row_bytes(self.longest) * rows]
    }

    /// The block that column number `column` lies in, for who has made the [`Memory`](crate::Memory).
    pub fn block(&self, column: usize) -> Option<&dyn Block> {
        self.parts.blocks.get(column)?.as_deref()
    }

    /// The shape of column number `column` as libtorch counts: `[rows, …shape of a row]`. Empty if there is no such column.
    pub fn column_shape(&self, column: usize) -> Vec<i64> {
        let Some(about) = self.pool.columns().get(column) else { return Vec::new() };
        std::iter::once(self.rows()).chain(about.row_shape(self.longest)).map(size).collect()
    }

    /// Column `input_ids`, `[rows, sequence_len]`: token ids. Empty if there is none of I64.
    pub fn input_ids(&self) -> &[i64] {
        self.get("input_ids").unwrap_or_default()
    }

    /// Column `labels`, `[rows, sequence_len]`; [`IGNORED`] where the loss does not look. Empty if there is none of I64.
    pub fn labels(&self) -> &[i64] {
        self.get("labels").unwrap_or_default()
    }

    /// Column `attention_mask`, `[rows, sequence_len]`: 1 for tokens, 0 for padding. `None`: there is no padding.
    pub fn attention_mask(&self) -> Option<&[i64]> {
        self.get("attention_mask").ok()
    }

    /// Which sample each row is.
    pub fn samples(&self) -> &[Sample] {
        &self.parts.samples
    }

    /// Which rows count: rows that only fill up the last batch of an epoch do not.
    pub fn valid(&self) -> &[bool] {
        &self.parts.valid
    }

    /// How many rows count.
    pub fn valid_count(&self) -> usize {
        self.parts.valid.iter().filter(|&&valid| valid).count()
    }

    /// Bytes of all columns.
    pub(crate) fn bytes(&self) -> usize {
        let of = |column: &Column| column.row_bytes(self.longest).saturating_mul(self.rows());
        self.columns().iter().map(of).fold(0, usize::saturating_add)
    }

    /// How many samples.
    pub fn rows(&self) -> usize {
        self.parts.samples.len()
    }

    /// The first size of the first column's rows: how many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        let first = self.pool.columns().first();
        first.map_or(0, |column| column.row_shape(self.longest).next().unwrap_or(1))
    }

    /// `[rows, sequence_len]` as libtorch counts.
    pub fn shape(&self) -> [i64; 2] {
        [size(self.rows()), size(self.sequence_len())]
    }

    /// How many positions of `labels` count in the loss: the weight of this batch's mean loss.
    pub fn label_count(&self) -> usize {
        if self.parts.counted.rows == self.rows() {
            return self.parts.counted.labels;
        }
        self.labels().iter().filter(|&&label| label != IGNORED).count()
    }

    /// The rows, to be filled.
    pub(crate) fn rows_mut(&mut self) -> Rows<'_> {
        let Parts { blocks, samples, valid, counted, .. } = &mut self.parts;
        let (columns, longest) = (&self.pool.columns()[..], self.longest);
        Rows { columns, blocks, samples, valid, counted, start: 0, longest }
    }
}

/// What is in memory fits `i64`.
fn size(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.parts));
    }
}

fn find<T: Element>(columns: &[Column], name: &str) -> Result<usize> {
    let fits = |column: &Column| column.name == name && is::<T>(column.dtype);
    columns.iter().position(fits).ok_or_else(|| Error::NoColumn {
        name: name.to_owned(),
        dtype: T::DTYPE.name(),
        present: columns
            .iter()
            .map(|column| format!("{} ({})", column.name, column.dtype))
            .collect(),
    })
}

fn is<T: Element>(dtype: DType) -> bool {
    T::DTYPE == dtype || (T::DTYPE == DType::U8 && dtype == DType::Bool)
}

fn misaligned(name: &str, error: bytemuck::PodCastError) -> Error {
    Error::option("memory", name, format!("a block of this column cannot be used: {error}"))
}

/// Rows of a batch that are to be filled completely: they come from recycled memory and hold old values.
#[derive(Debug)]
pub struct Rows<'a> {
    columns: &'a [Column],
    blocks: &'a mut [Option<Box<dyn Block>>],
    samples: &'a [Sample],
    valid: &'a [bool],
    counted: &'a mut Counted,
    start: usize,
    longest: usize,
}

impl<'a> Rows<'a> {
    /// Which sample each row is to hold.
    pub fn samples(&self) -> &'a [Sample] {
        self.samples
    }

    /// Which rows count. The others are filled as well; their labels should be [`IGNORED`].
    pub fn valid(&self) -> &'a [bool] {
        self.valid
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The columns.
    pub fn columns(&self) -> &'a [Column] {
        self.columns
    }

    /// How long rows of padded columns are, but for columns that cannot be as long: their longest sample's length.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Elements of one row of column number `column`.
    pub fn row_elements(&self, column: usize) -> usize {
        self.columns.get(column).map_or(0, |about| about.row_elements(self.longest))
    }

    /// All of these rows are filled, and so many of their labels are not [`IGNORED`]: who has just made them knows without
    /// reading them again. Where nobody says it, or a column is taken once more afterwards, [`Batch::label_count`] counts.
    pub fn set_label_count(&mut self, labels: usize) {
        self.counted.rows += self.len();
        self.counted.labels += labels;
    }

    /// The sample of row `at` and whether it counts.
    pub fn sample(&self, at: usize) -> (Sample, bool) {
        (self.samples[at], self.valid[at])
    }

    /// Column number `column`, row after row.
    ///
    /// # Errors
    /// [`Error::NoColumn`] if there is no such column of that type.
    pub fn column<T: Element>(&mut self, column: usize) -> Result<&mut [T]> {
        self.columns_mut([column]).map(|[one]| one)
    }

    /// Several columns of one type at once.
    ///
    /// # Errors
    /// [`Error::NoColumn`] if one of them is not there, is of another type, or is asked for twice.
    pub fn columns_mut<T: Element, const N: usize>(
        &mut self,
        columns: [usize; N],
    ) -> Result<[&mut [T]; N]> {
        let missing = |at: usize, all: &[Column]| {
            let name = all.get(at).map_or_else(|| format!("number {at}"), |c| c.name.to_string());
            find::<T>(all, &name).err().unwrap_or_else(|| {
                Error::option("column", name, "a column can be taken once at a time")
            })
        };
        *self.counted = Counted::default();
        let (start, rows, longest) = (self.start, self.samples.len(), self.longest);
        for at in columns {
            if !self.columns.get(at).is_some_and(|column| is::<T>(column.dtype)) {
                return Err(missing(at, self.columns));
            }
        }
        let Ok(blocks) = self.blocks.get_disjoint_mut(columns) else {
            return Err(missing(columns.first().copied().unwrap_or(0), self.columns));
        };
        let mut at = columns.iter();
        let mut failed = None;
        let slices = blocks.map(|block| -> &mut [T] {
            let Some((column, block)) =
                at.next().and_then(|&at| self.columns.get(at)).zip(block.as_mut())
            else {
                return &mut [];
            };
            let row = column.row_bytes(longest);
            let bytes = &mut block.bytes_mut()[start * row..(start + rows) * row];
            bytemuck::try_cast_slice_mut(bytes).unwrap_or_else(|error| {
                failed = Some(misaligned(&column.name, error));
                &mut []
            })
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(slices),
        }
    }

    /// The bytes of column number `column`, row after row, whatever its type is.
    ///
    /// # Errors
    /// [`Error::NoColumn`] if there is no such column.
    pub fn bytes(&mut self, column: usize) -> Result<&mut [u8]> {
        *self.counted = Counted::default();
        let (start, rows) = (self.start, self.samples.len());
        match (self.columns.get(column), self.blocks.get_mut(column)) {
            (Some(about), Some(Some(block))) => {
                let row = about.row_bytes(self.longest);
                Ok(&mut block.bytes_mut()[start * row..(start + rows) * row])
            }
            _ => Err(Error::NoColumn {
                name: format!("number {column}"),
                dtype: "any",
                present: self.columns.iter().map(|c| c.name.to_string()).collect(),
            }),
        }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If `range` exceeds the rows.
    pub fn part(&mut self, range: Range<usize>) -> Rows<'_> {
        Rows {
            columns: self.columns,
            samples: &self.samples[range.clone()],
            valid: &self.valid[range.clone()],
            start: self.start + range.start,
            longest: self.longest,
            blocks: self.blocks,
            counted: self.counted,
        }
    }

    /// The same rows, of which those of one part of a mixture are numbered as in their part.
    pub(crate) fn renamed<'b>(&'b mut self, samples: &'b [Sample]) -> Rows<'b> {
        debug_assert_eq!(samples.len(), self.samples.len());
        Rows {
            columns: self.columns,
            samples,
            valid: self.valid,
            start: self.start,
            longest: self.longest,
            blocks: self.blocks,
            counted: self.counted,
        }
    }
}
