//! What a batch is made of: columns by name, element type and shape.

use std::borrow::Cow;

use super::dtype::DType;

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
    /// The first size in `shape` is only the largest there can be: a batch is as long as its
    /// longest sample, if the column can be.
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

    /// A column whose rows are padded to the longest sample of their batch; `shape[0]` is the
    /// longest there can be. Of several such columns each is as long as the longest sample, and no
    /// longer than its own `shape[0]`.
    pub fn padded(
        name: impl Into<Cow<'static, str>>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Column { padded: true, ..Column::new(name, dtype, shape) }
    }

    /// The shape of a row in a batch whose longest sample has `longest` elements, of which this
    /// column may hold fewer.
    pub(super) fn row_shape(&self, longest: usize) -> impl Iterator<Item = usize> + '_ {
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

    pub(super) fn row_bytes(&self, longest: usize) -> usize {
        self.row_elements(longest).saturating_mul(self.dtype.bytes())
    }

    /// Bytes of the longest row that there can be.
    pub(super) fn row_bytes_max(&self) -> usize {
        self.row_bytes(self.longest_max())
    }

    /// The longest a row can be; 0 for columns that are not padded.
    fn longest_max(&self) -> usize {
        if self.padded {
            self.shape.first().copied().unwrap_or(1)
        } else {
            0
        }
    }
}

/// Bytes of so many rows of all columns, at most.
pub(crate) fn bytes_max(columns: &[Column], rows: usize) -> usize {
    let of = |column: &Column| column.row_bytes_max().saturating_mul(rows);
    columns.iter().map(of).fold(0, usize::saturating_add)
}

/// The longest that rows of padded columns can be; 0 if there are none.
pub(crate) fn longest_max(columns: &[Column]) -> usize {
    columns.iter().map(Column::longest_max).max().unwrap_or(0)
}
