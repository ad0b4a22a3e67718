//! Fixed batches from a safetensors file: samples that were made elsewhere, for parity and
//! evaluation.
//!
//! The file holds `input_ids` and `labels`, I64 [N, L], [`IGNORED`](crate::IGNORED) (−100) where
//! the loss does not look, and may hold `attention_mask`, I64 [N, L], 1 for tokens and 0 for
//! padding. Sample i is row i. Nothing is masked or changed.

use std::ops::Range;
use std::path::Path;

use super::Samples;
use crate::batches::{Column, DType, Rows, Scratch, IGNORED};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::bytes::SizedSource;
use crate::format::header::{SafetensorsHeader, Span};
use crate::source::{Access, Folder};

/// Read at once when the whole file is checked.
const READ_BYTES: usize = 1 << 20;
const READ_VALUES: usize = READ_BYTES / size_of::<i64>();

/// Rows of a safetensors file.
#[derive(Debug)]
pub struct FixedBatches {
    bytes: SizedSource,
    rows: usize,
    sequence_len: usize,
    input_ids: u64,
    labels: u64,
    attention_mask: Option<u64>,
    id_max: i64,
    columns: Vec<Column>,
    fingerprint: Fingerprint,
}

impl FixedBatches {
    /// Opens a file and reads it once: values are checked and a fingerprint is taken.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadHeader`], [`Error::MissingTensor`], [`Error::WrongDType`],
    /// [`Error::WrongShape`], and [`Error::BadValue`] for negative ids, for labels below 0 that are
    /// not −100, and for masks other than 0 and 1.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(SizedSource::open(path, Access::Read, None)?)
    }

    /// Opens the file `name` of a folder, wherever that lies.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what the folder says.
    pub fn open_from(folder: &dyn Folder, name: &str) -> Result<Self> {
        Self::of(SizedSource::of(folder.open(name)?, None)?)
    }

    fn of(bytes: SizedSource) -> Result<Self> {
        let owned = bytes.path().to_path_buf();
        let path = &owned;
        let header = SafetensorsHeader::read(&bytes)?;
        let input_ids = matrix(&header, "input_ids")?;
        let (rows, sequence_len) = (input_ids.shape[0], input_ids.shape[1]);
        if rows == 0 || sequence_len == 0 {
            let (path, name) = (path.to_path_buf(), "input_ids".to_owned());
            let expected = "at least one row of at least one token".to_owned();
            return Err(Error::WrongShape { path, name, expected, actual: input_ids.shape });
        }
        let alike = |name: &str| -> Result<u64> {
            let span = matrix(&header, name)?;
            if span.shape != input_ids.shape {
                let (path, name) = (path.to_path_buf(), name.to_owned());
                let expected = format!("{:?}, as `input_ids`", input_ids.shape);
                return Err(Error::WrongShape { path, name, expected, actual: span.shape });
            }
            Ok(span.start)
        };
        let labels = alike("labels")?;
        let mask = header.has("attention_mask").then(|| alike("attention_mask")).transpose()?;
        let names = ["input_ids", "labels"].into_iter().chain(mask.map(|_| "attention_mask"));
        let mut file = FixedBatches {
            bytes,
            rows,
            sequence_len,
            input_ids: input_ids.start,
            labels,
            attention_mask: mask,
            id_max: 0,
            columns: names
                .into_iter()
                .map(|name| Column::new(name, DType::I64, [sequence_len]))
                .collect(),
            fingerprint: Fingerprint(0),
        };
        file.check_values()?;
        file.fingerprint = file.content_fingerprint(&header)?;
        Ok(file)
    }

    /// How many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        self.sequence_len
    }

    /// The largest id among inputs and labels: a model's vocabulary must be larger.
    pub fn id_max(&self) -> i64 {
        self.id_max
    }

    fn check_values(&mut self) -> Result<()> {
        let columns = [
            (Some(self.input_ids), "input_ids are at least 0"),
            (Some(self.labels), "labels are at least 0, or -100 where the loss does not look"),
            (self.attention_mask, "attention_mask holds 0 and 1"),
        ];
        let mut scratch = Vec::new();
        let total = self.rows * self.sequence_len;
        for (column, (start, reason)) in columns.into_iter().enumerate() {
            let Some(start) = start else { continue };
            let good = |value: i64| match column {
                0 => value >= 0,
                1 => value >= 0 || value == IGNORED,
                _ => value == 0 || value == 1,
            };
            for first in (0..total).step_by(READ_VALUES) {
                let len = READ_VALUES.min(total - first) * size_of::<i64>();
                let at = start + to_u64(first * size_of::<i64>());
                let values = self.bytes.read(at, len, &mut scratch)?.as_chunks::<8>().0;
                let values = values.iter().map(|le| i64::from_le_bytes(*le));
                if let Some((number, value)) =
                    (first..).zip(values.clone()).find(|one| !good(one.1))
                {
                    return Err(Error::BadValue {
                        path: self.bytes.path().to_path_buf(),
                        sample: to_u64(number / self.sequence_len),
                        position: number % self.sequence_len,
                        value,
                        reason: reason.to_owned(),
                    });
                }
                self.id_max = self.id_max.max(values.max().unwrap_or(0));
                self.bytes.check(at..at + to_u64(len))?;
            }
        }
        Ok(())
    }

    fn content_fingerprint(&self, header: &SafetensorsHeader) -> Result<Fingerprint> {
        let mut scratch = Vec::new();
        let (mut crc, mut at) = (0, 0);
        while at < self.bytes.len() {
            let len = to_usize((self.bytes.len() - at).min(to_u64(READ_BYTES)));
            crc = crc32c::crc32c_append(crc, self.bytes.read(at, len, &mut scratch)?);
            self.bytes.check(at..at + to_u64(len))?;
            at += to_u64(len);
        }
        let sum = Fingerprinter::new("fixed-batches 1").bytes(header.bytes());
        Ok(sum.number(self.bytes.len()).number(u64::from(crc)).finish())
    }

    /// Where each column begins in the file, if there is one.
    fn starts(&self) -> [Option<u64>; 3] {
        [Some(self.input_ids), Some(self.labels), self.attention_mask]
    }

    fn read_row(&self, offset: u64, out: &mut [i64], scratch: &mut Scratch) -> Result<()> {
        let row_bytes = self.sequence_len * size_of::<i64>();
        let bytes = self.bytes.read(offset, row_bytes, &mut scratch.bytes)?;
        for (value, le) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *value = i64::from_le_bytes(*le);
        }
        self.bytes.check(offset..offset + to_u64(row_bytes))
    }
}

impl Samples for FixedBatches {
    fn sample_count(&self) -> u64 {
        to_u64(self.rows)
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn will_need(&self, samples: Range<u64>, _scratch: &mut Scratch) {
        let row_bytes = to_u64(self.sequence_len * size_of::<i64>());
        let end = samples.end.min(self.sample_count());
        let rows = samples.start.min(end) * row_bytes..end * row_bytes;
        for start in self.starts().into_iter().flatten() {
            self.bytes.will_need(start + rows.start..start + rows.end);
        }
    }

    fn fill(&self, _seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        for at in 0..rows.len() {
            let (sample, is_valid) = rows.sample(at);
            if sample.id >= self.sample_count() {
                let samples = self.sample_count();
                return Err(Error::NoSuchSample { sample: sample.id, samples });
            }
            for (column, start) in self.starts().into_iter().flatten().enumerate() {
                let mut row = rows.part(at..at + 1);
                let values = row.column::<i64>(column)?;
                let offset = start + sample.id * to_u64(self.sequence_len * size_of::<i64>());
                self.read_row(offset, values, scratch).map_err(|error| {
                    let reading = format_args!("sample {}", sample.id);
                    error.while_reading(&reading, self.bytes.path(), offset)
                })?;
                if column == 1 && !is_valid {
                    values.fill(IGNORED);
                }
            }
        }
        Ok(())
    }
}

/// The place of an I64 matrix.
fn matrix(header: &SafetensorsHeader, name: &str) -> Result<Span> {
    let expected = || "[samples, sequence_len]".to_owned();
    header.expect(name, "I64", |shape| shape.len() == 2, expected)
}
