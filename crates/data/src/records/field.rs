//! What a record is made of.

use serde::{Deserialize, Serialize};

use crate::batches::{DType, Element};
use crate::error::{Error, Result};
use crate::format::layout::CHECKSUMS;

#[cfg(not(target_endian = "little"))]
compile_error!("records are written as they lie in memory, and files are little-endian");

/// One column: what every record holds under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    /// The name; that of the tensor in the shards.
    pub name: String,
    /// What the elements are.
    pub dtype: DType,
    /// How many there are.
    pub shape: FieldShape,
}

/// How many elements a record has in a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FieldShape {
    /// As many as this shape says. Empty: one.
    Fixed(Vec<usize>),
    /// Each record its own number.
    Variable,
}

impl Field {
    /// A column whose records all have the same shape.
    pub fn fixed(name: &str, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Field { name: name.to_owned(), dtype, shape: FieldShape::Fixed(shape.into()) }
    }

    /// A column of which each record has its own number of elements.
    pub fn variable(name: &str, dtype: DType) -> Self {
        Field { name: name.to_owned(), dtype, shape: FieldShape::Variable }
    }

    /// Elements of each record, if they all have as many. `None` as well if the product overflows.
    pub(crate) fn elements(&self) -> Option<usize> {
        match &self.shape {
            FieldShape::Fixed(shape) => {
                shape.iter().try_fold(1, |product: usize, &size| product.checked_mul(size))
            }
            FieldShape::Variable => None,
        }
    }

    /// Bytes of each record, if they all have as many; else 0.
    pub(crate) fn row_bytes(&self) -> usize {
        self.elements().unwrap_or(0).saturating_mul(self.dtype.bytes())
    }

    /// The tensor that holds where each record of a variable column ends.
    pub(crate) fn offsets_name(&self) -> String {
        format!("{}.offsets", self.name)
    }
}

/// Fields that can be tensors of one file.
pub(crate) fn check(fields: &[Field]) -> std::result::Result<(), String> {
    if fields.is_empty() {
        return Err("a record needs at least one field".to_owned());
    }
    let mut names = Vec::new();
    for field in fields {
        if ["", "__metadata__", CHECKSUMS].contains(&&*field.name) {
            return Err(format!("`{}` cannot be the name of a field", field.name));
        }
        let bytes = field.elements().and_then(|count| count.checked_mul(field.dtype.bytes()));
        match field.shape {
            FieldShape::Fixed(_) if bytes.is_none_or(|bytes| bytes > 1 << 40) => {
                return Err(format!("field `{}` is too large", field.name));
            }
            FieldShape::Fixed(_) => {}
            FieldShape::Variable => names.push(field.offsets_name()),
        }
        names.push(field.name.clone());
    }
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two fields are called `{}`", pair[0])),
        None => Ok(()),
    }
}

/// What a record holds in one column: elements of a type, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnValue<'a> {
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a [u8],
}

impl<'a> ColumnValue<'a> {
    /// Elements of a Rust type.
    pub fn of<T: Element>(values: &'a [T]) -> Self {
        ColumnValue { dtype: T::DTYPE, bytes: bytemuck::cast_slice(values) }
    }

    /// Elements of any type as little-endian bytes; of `bool` each is 0 or 1.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if the bytes are no whole number of elements.
    pub fn from_bytes(dtype: DType, bytes: &'a [u8]) -> Result<Self> {
        if !bytes.len().is_multiple_of(dtype.bytes()) {
            let reason = format!("an element of {dtype} has {} bytes", dtype.bytes());
            return Err(Error::option("bytes.len()", bytes.len(), reason));
        }
        Ok(ColumnValue { dtype, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_cannot_share_a_file_are_refused() {
        let image = || Field::fixed("image", DType::U8, [3, 32, 32]);
        let refused = |fields: &[Field], part: &str| {
            let reason = check(fields).unwrap_err();
            assert!(reason.contains(part), "{reason}");
        };
        check(&[image(), Field::fixed("label", DType::I64, [])]).unwrap();
        refused(&[], "at least one");
        refused(&[image(), image()], "two fields are called `image`");
        let clash = [Field::variable("a", DType::U8), Field::fixed("a.offsets", DType::U8, [])];
        refused(&clash, "a.offsets");
        for name in ["", "block_crc32c"] {
            refused(&[Field::fixed(name, DType::U8, [])], "cannot be the name");
        }
        refused(&[Field::fixed("x", DType::U8, [usize::MAX, 2])], "too large");
        assert_eq!(Field::fixed("x", DType::U8, []).elements(), Some(1));
    }
}
