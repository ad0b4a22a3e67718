//! Records as samples of a loader: a column for each field.
//!
//! Variable fields become padded columns, filled up with zeros; the column `<name>_len` (I64) says
//! how many elements count. The index says how long the longest record of each is, so that a
//! batch's memory is bounded; of folders without that opening reads all bounds.

use std::ops::Range;

use super::field::{Field, FieldShape};
use super::reader::Records;
use crate::batches::{Column, DType, Rows, Scratch};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::samples::Samples;

/// Records that a [`Loader`](crate::Loader) delivers.
#[derive(Debug)]
pub struct RecordSamples {
    records: Records,
    columns: Vec<Column>,
}

impl RecordSamples {
    /// A column for each field. Reads the bounds of variable fields once if the folder was written
    /// before its index held their longest.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a field whose name another one's column of lengths has, and as
    /// [`Records::read`].
    pub fn new(records: Records) -> Result<Self> {
        let mut columns = Vec::new();
        let has = |name: &str| records.fields().iter().any(|field| field.name == name);
        for (number, Field { name, dtype, shape }) in records.fields().iter().enumerate() {
            match shape {
                FieldShape::Fixed(shape) => {
                    columns.push(Column::new(name.clone(), *dtype, shape.clone()));
                }
                FieldShape::Variable => {
                    let longest = records.longest(number)?;
                    let len_name = format!("{name}_len");
                    if has(&len_name) {
                        let reason = format!(
                            "the column of that name says how long the field `{name}` is: write the records with another name for one of the two"
                        );
                        return Err(Error::option("field", format!("`{len_name}`"), reason));
                    }
                    columns.push(Column::padded(name.clone(), *dtype, [longest]));
                    columns.push(Column::new(len_name, DType::I64, []));
                }
            }
        }
        Ok(RecordSamples { records, columns })
    }

    /// The records.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// One field of all rows; gives the columns that it filled.
    fn fill_field(
        &self,
        (field, column): (usize, usize),
        rows: &mut Rows<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize> {
        let about = &self.records.fields()[field];
        let row_bytes = rows.row_elements(column) * about.dtype.bytes();
        let samples = rows.samples();
        let is_variable = about.shape == FieldShape::Variable;
        for (at, sample) in samples.iter().enumerate() {
            let count = self.records.elements(sample.id, field, scratch)?;
            let len = count * about.dtype.bytes();
            let whole = rows.bytes(column)?;
            let row = &mut whole[at * row_bytes..(at + 1) * row_bytes];
            if len > row.len() {
                let reason = format!("record {} has {count} elements", sample.id);
                return Err(Error::option("longest", rows.longest(), reason));
            }
            let (values, rest) = row.split_at_mut(len);
            self.records.read(sample.id, field, values, scratch)?;
            rest.fill(0);
            if is_variable {
                let lens = rows.column::<i64>(column + 1)?;
                lens[at] = i64::try_from(count).unwrap_or(i64::MAX);
            }
        }
        Ok(if is_variable { 2 } else { 1 })
    }
}

impl Samples for RecordSamples {
    fn sample_count(&self) -> u64 {
        self.records.record_count()
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.records.fingerprint()
    }

    /// The longest of the record's variable fields.
    fn sample_len(&self, id: u64, scratch: &mut Scratch) -> Result<usize> {
        let mut longest = 0;
        for (number, field) in self.records.fields().iter().enumerate() {
            if field.shape == FieldShape::Variable {
                longest = longest.max(self.records.elements(id, number, scratch)?);
            }
        }
        Ok(longest)
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        self.records.damaged()
    }

    fn will_need(&self, samples: Range<u64>, scratch: &mut Scratch) {
        self.records.will_need(samples, scratch);
    }

    fn fill(&self, _seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let mut column = 0;
        for field in 0..self.records.fields().len() {
            column += self.fill_field((field, column), rows, scratch)?;
        }
        Ok(())
    }
}
