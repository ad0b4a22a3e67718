//! Prepared text as it is: column `input_ids` and nothing else, for models that make their own labels.
//!
//! Sample i is tokens `i·L..(i + 1)·L` of the stream. The tokens after the last whole sample are left out.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::batch::{Column, Rows};
use crate::cast::to_u64;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::{Access, TokenStream};
use crate::samples::{Samples, Scratch};
use crate::tokens::Tokens;

/// Rows that the processor is asked for before they are read.
const AHEAD: usize = 2;

/// Windows of one length over a stream of tokens.
#[derive(Clone, Debug)]
pub struct RawText {
    stream: Arc<dyn Tokens>,
    sequence_len: usize,
    columns: [Column; 1],
    fingerprint: Fingerprint,
}

impl RawText {
    /// Opens a prepared folder (see [`prepare`](crate::text::prepare)).
    ///
    /// # Errors
    /// As [`TokenStream::open`], and [`Error::InvalidOption`] for a sequence length of 0.
    pub fn open(folder: &Path, sequence_len: usize, access: Access) -> Result<Self> {
        Self::new(Arc::new(TokenStream::open(folder, access)?), sequence_len)
    }

    /// Samples of an open stream; several may share it.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a sequence length of 0.
    pub fn new(stream: Arc<dyn Tokens>, sequence_len: usize) -> Result<Self> {
        if sequence_len == 0 {
            return Err(Error::option("sequence_len", 0, "a sample has at least one token"));
        }
        let sum = Fingerprinter::new("raw-text 1").number(stream.fingerprint().0);
        let fingerprint = sum.number(to_u64(sequence_len)).finish();
        let columns = [Column::new("input_ids", DType::I64, [sequence_len])];
        Ok(RawText { stream, sequence_len, columns, fingerprint })
    }

    /// How many tokens a sample has.
    pub fn sequence_len(&self) -> usize {
        self.sequence_len
    }

    /// The stream of tokens behind the samples.
    pub fn stream(&self) -> &dyn Tokens {
        &*self.stream
    }
}

impl Samples for RawText {
    fn sample_count(&self) -> u64 {
        self.stream.token_count() / to_u64(self.sequence_len)
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        let len = to_u64(self.sequence_len);
        let of = |tokens: &Range<u64>| tokens.start / len..tokens.end.div_ceil(len);
        Ok(self.stream.damaged().iter().map(of).collect())
    }

    fn will_need(&self, samples: Range<u64>, _scratch: &mut Scratch) {
        let len = to_u64(self.sequence_len);
        self.stream.will_need(samples.start.saturating_mul(len)..samples.end.saturating_mul(len));
    }

    fn fill(&self, _seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let (len, count) = (self.sequence_len, self.sample_count());
        let samples = rows.samples();
        let all = rows.column::<i64>(0)?;
        for (at, (sample, row)) in samples.iter().zip(all.chunks_exact_mut(len)).enumerate() {
            if sample.id >= count {
                return Err(Error::NoSuchSample { sample: sample.id, samples: count });
            }
            if let Some(later) = samples.get(at + AHEAD) {
                self.stream.expect(later.id.saturating_mul(to_u64(len)), len);
            }
            let reading = format_args!("sample {}", sample.id);
            let start = sample.id * to_u64(len);
            self.stream.read(start, row, scratch, &reading).map_err(|error| match error {
                // The stream counts tokens; who reads the message counts samples.
                Error::BadValue { path, position, value, reason, .. } => {
                    Error::BadValue { path, sample: sample.id, position, value, reason }
                }
                other => other,
            })?;
        }
        Ok(())
    }
}
