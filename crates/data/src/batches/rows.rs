//! Rows of a batch while they are filled.

use std::ops::Range;

use super::column::Column;
use super::dtype::{DType, Element};
use super::memory::ColumnBuffer;
use super::recycling::Counted;
use crate::error::{Error, Result};
use crate::order::Sample;

/// Rows of a batch that are to be filled completely: they come from recycled memory and hold old
/// values.
#[derive(Debug)]
pub struct Rows<'a> {
    pub(super) columns: &'a [Column],
    pub(super) blocks: &'a mut [Option<Box<dyn ColumnBuffer>>],
    pub(super) samples: &'a [Sample],
    pub(super) valid: &'a [bool],
    pub(super) counted: &'a mut Counted,
    pub(super) start: usize,
    pub(super) longest: usize,
}

impl<'a> Rows<'a> {
    /// Which sample each row is to hold.
    pub fn samples(&self) -> &'a [Sample] {
        self.samples
    }

    /// Which rows count. The others are filled as well; their labels should be
    /// [`IGNORED`](super::IGNORED).
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

    /// How long rows of padded columns are: the length of their longest sample. Columns that cannot
    /// be as long are shorter.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Elements of one row of column number `column`.
    pub fn row_elements(&self, column: usize) -> usize {
        self.columns.get(column).map_or(0, |about| about.row_elements(self.longest))
    }

    /// Says that all of these rows are filled, and how many of their labels are not
    /// [`IGNORED`](super::IGNORED): whoever has just made them need not read them again. Where
    /// nobody says it, or a column is taken once more afterwards,
    /// [`Batch::label_count`](super::Batch::label_count) counts.
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

pub(super) fn find<T: Element>(columns: &[Column], name: &str) -> Result<usize> {
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

pub(super) fn misaligned(name: &str, error: bytemuck::PodCastError) -> Error {
    Error::option("memory", name, format!("a block of this column cannot be used: {error}"))
}
