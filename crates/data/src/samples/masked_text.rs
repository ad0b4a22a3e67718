//! Prepared text as samples for masked-LM training.
//!
//! Sample i is `[CLS]`, tokens `i·(L − 2)..(i + 1)·(L − 2)` of the stream, `[SEP]`. Documents are
//! packed: each is closed by `[SEP]` in the stream, so a sample may hold the end of one and the
//! beginning of the next, and ends in two `[SEP]` where a document ends with it. The tokens after
//! the last whole sample are left out. There is no padding.

use std::path::Path;
use std::sync::Arc;

use super::masking::{missing, Masker, Masking};
use super::windows::TokenWindows;
use super::Samples;
use crate::batches::{Column, DType, Rows, Scratch, IGNORED};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::{TokenStream, Tokens};
use crate::source::Access;

/// `[CLS]` before the tokens and `[SEP]` after them.
const FRAME: usize = 2;

/// Masked-LM samples of one length, cut out of prepared text.
#[derive(Clone, Debug)]
pub struct MaskedText {
    windows: TokenWindows,
    masker: Masker,
    sequence_len: usize,
    /// `[CLS]` and `[SEP]`.
    frame: [i64; 2],
    columns: [Column; 2],
    fingerprint: Fingerprint,
}

impl MaskedText {
    /// Opens a prepared folder (see [`prepare`](crate::convert::prepare)).
    ///
    /// # Errors
    /// As [`TokenStream::open`], and [`Error::InvalidOption`] for a sequence length below 3 a
    /// masking that cannot be, or a vocabulary without `[CLS]`, `[SEP]` or `[MASK]`.
    pub fn open(
        folder: &Path,
        sequence_len: usize,
        masking: Masking,
        access: Access,
    ) -> Result<Self> {
        Self::new(Arc::new(TokenStream::open(folder, access)?), sequence_len, masking)
    }

    /// Samples of an open stream; several may share it.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a sequence length below 3, a masking that cannot be, or a
    /// vocabulary without `[CLS]`, `[SEP]` or `[MASK]`.
    pub fn new(stream: Arc<dyn Tokens>, sequence_len: usize, masking: Masking) -> Result<Self> {
        if sequence_len <= FRAME {
            let reason = "[CLS] and [SEP] take two positions: it must be at least 3";
            return Err(Error::option("sequence_len", sequence_len, reason));
        }
        let special = stream.special();
        let token = |id: Option<u32>, name| id.map(i64::from).ok_or_else(|| missing(name));
        let frame = [token(special.cls, "[CLS]")?, token(special.sep, "[SEP]")?];
        let mut masker = Masker::new(masking, stream.vocab_size(), special)?;
        let mut sum = Fingerprinter::new("masked-text 1")
            .number(stream.fingerprint().0)
            .number(to_u64(sequence_len))
            .number(masking.probability.to_bits())
            .number(masking.mask_share.to_bits())
            .number(masking.random_share.to_bits());
        if masking.whole_words {
            let words = stream.continuations()?;
            sum = sum.bytes(b"whole words").number(words.fingerprint().0);
            masker = masker.with_words(words);
        }
        let fingerprint = sum.finish();
        let columns =
            ["input_ids", "labels"].map(|name| Column::new(name, DType::I64, [sequence_len]));
        let windows = TokenWindows::new(stream, sequence_len - FRAME, 0);
        Ok(MaskedText { windows, masker, sequence_len, frame, columns, fingerprint })
    }

    /// The stream of tokens behind the samples.
    pub fn stream(&self) -> &dyn Tokens {
        self.windows.stream()
    }

    /// Reads sample `id` without masks. `out` has the sequence length.
    ///
    /// # Errors
    /// As [`Tokens::read`], and [`Error::InvalidOption`] if `out` has another length.
    pub fn read_unmasked(&self, id: u64, out: &mut [i64], scratch: &mut Scratch) -> Result<()> {
        if out.len() != self.sequence_len {
            let reason = format!("a sample has {} tokens", self.sequence_len);
            return Err(Error::option("out.len()", out.len(), reason));
        }
        let window = self.sequence_len - FRAME;
        self.windows.read(id, 1, &mut out[1..=window], scratch)?;
        out[0] = self.frame[0];
        out[window + 1] = self.frame[1];
        Ok(())
    }
}

impl Samples for MaskedText {
    super::windows::of_windows!();

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let (samples, valid) = (rows.samples(), rows.valid());
        let [all_ids, all_labels] = rows.columns_mut::<i64, 2>([0, 1])?;
        let rows_of = |all| <[i64]>::chunks_exact_mut(all, self.sequence_len);
        let places = samples.iter().zip(valid);
        let mut label_count = 0;
        for (at, ((&sample, &is_valid), (input_ids, labels))) in
            places.zip(rows_of(all_ids).zip(rows_of(all_labels))).enumerate()
        {
            self.windows.expect_after(samples, at);
            self.read_unmasked(sample.id, input_ids, scratch)?;
            let count = self.masker.apply(seed, sample, input_ids, labels);
            if is_valid {
                label_count += count;
            } else {
                labels.fill(IGNORED);
            }
        }
        rows.set_label_count(label_count);
        Ok(())
    }
}
