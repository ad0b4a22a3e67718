//! Prepared text as it is: column `input_ids` and nothing else, for models that make their own
//! labels.
//!
//! Sample i is tokens `i·L..(i + 1)·L` of the stream. The tokens after the last whole sample are
//! left out.

use std::path::Path;
use std::sync::Arc;

use super::windows::TokenWindows;
use super::Samples;
use crate::batches::{Column, DType, Rows, Scratch};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::{TokenStream, Tokens};
use crate::source::Access;

/// Windows of one length over a stream of tokens.
#[derive(Clone, Debug)]
pub struct RawText {
    windows: TokenWindows,
    sequence_len: usize,
    columns: [Column; 1],
    fingerprint: Fingerprint,
}

impl RawText {
    /// Opens a prepared folder (see [`prepare`](crate::convert::prepare)).
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
        let windows = TokenWindows::new(stream, sequence_len, 0);
        Ok(RawText { windows, sequence_len, columns, fingerprint })
    }
}

impl Samples for RawText {
    super::windows::of_windows!();

    fn fill(&self, _seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let samples = rows.samples();
        let all = rows.column::<i64>(0)?.chunks_exact_mut(self.sequence_len);
        for (at, (sample, row)) in samples.iter().zip(all).enumerate() {
            self.windows.expect_after(samples, at);
            self.windows.read(sample.id, 0, row, scratch)?;
        }
        Ok(())
    }
}
