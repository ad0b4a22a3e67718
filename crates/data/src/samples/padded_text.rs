//! Documents as samples: each its own row, padded to the longest of its batch.
//!
//! Sample i is document i, cut to `len_max` tokens. Columns: `input_ids` (padded with the
//! vocabulary's padding token, else 0), `attention_mask` (1 for tokens, 0 for padding), `labels`.
//! Little is padded with [`LoaderOptions::bucketing`](crate::LoaderOptions::bucketing).

use std::ops::Range;
use std::sync::Arc;

use super::masking::{Masker, Masking};
use super::windows::of_sample;
use super::Samples;
use crate::batches::{Column, DType, Rows, Scratch, IGNORED};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::Tokens;

/// What a model learns from a document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Masked tokens; [`IGNORED`] elsewhere.
    Masked(Masking),
    /// The next token; [`IGNORED`] where there is none.
    Causal,
}

/// Samples that are whole documents.
#[derive(Clone, Debug)]
pub struct PaddedText {
    stream: Arc<dyn Tokens>,
    len_max: usize,
    masker: Option<Masker>,
    padding: i64,
    columns: [Column; 3],
    fingerprint: Fingerprint,
}

impl PaddedText {
    /// The documents of a stream; what is longer than `len_max` tokens is cut off.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a length of 0, a stream without documents, or a masking that
    /// cannot be.
    pub fn new(stream: Arc<dyn Tokens>, len_max: usize, objective: Objective) -> Result<Self> {
        if len_max == 0 {
            return Err(Error::option("len_max", 0, "a sample has at least one token"));
        }
        if stream.document_count() == 0 {
            let reason = "this data does not say where documents begin";
            return Err(Error::option("documents", 0, reason));
        }
        let special = stream.special();
        let mut sum = Fingerprinter::new("padded-text 1").number(stream.fingerprint().0);
        sum = sum.number(to_u64(len_max));
        let masker = match objective {
            Objective::Causal => None,
            Objective::Masked(masking) => {
                let Masking { probability, mask_share, random_share, whole_words } = masking;
                for number in [probability, mask_share, random_share] {
                    sum = sum.number(number.to_bits());
                }
                let mut masker = Masker::new(masking, stream.vocab_size(), special)?;
                if whole_words {
                    let words = stream.continuations()?;
                    sum = sum.number(words.fingerprint().0);
                    masker = masker.with_words(words);
                }
                Some(masker)
            }
        };
        let columns = ["input_ids", "labels", "attention_mask"]
            .map(|name| Column::padded(name, DType::I64, [len_max]));
        let padding = special.pad.map_or(0, i64::from);
        Ok(PaddedText { stream, len_max, masker, padding, columns, fingerprint: sum.finish() })
    }

    /// Where a sample begins, and how many tokens it has.
    fn place(&self, id: u64, scratch: &mut Scratch) -> Result<(u64, usize)> {
        let document = self.stream.document(id, scratch)?;
        let len = document.end.saturating_sub(document.start).min(to_u64(self.len_max));
        Ok((document.start, to_usize(len)))
    }
}

impl Samples for PaddedText {
    fn sample_count(&self) -> u64 {
        self.stream.document_count()
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn sample_len(&self, id: u64, scratch: &mut Scratch) -> Result<usize> {
        self.place(id, scratch).map(|(_, len)| len)
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        self.stream.damaged_documents()
    }

    fn will_need(&self, samples: Range<u64>, scratch: &mut Scratch) {
        if samples.is_empty() {
            return;
        }
        let mut bounds = |id| self.stream.document(id, scratch);
        // Errors are left to whoever reads the samples.
        if let (Ok(first), Ok(last)) = (bounds(samples.start), bounds(samples.end - 1)) {
            self.stream.will_need(first.start..last.end);
        }
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        for at in 0..rows.len() {
            let (sample, is_valid) = rows.sample(at);
            let (start, len) = self.place(sample.id, scratch)?;
            let mut row = rows.part(at..at + 1);
            let [input_ids, labels, attention_mask] = row.columns_mut::<i64, 3>([0, 1, 2])?;
            let len = len.min(input_ids.len());
            input_ids[len..].fill(self.padding);
            labels[len..].fill(IGNORED);
            attention_mask[..len].fill(1);
            attention_mask[len..].fill(0);
            let reading = format_args!("document {}", sample.id);
            let read = self.stream.read(start, &mut input_ids[..len], scratch, &reading);
            read.map_err(|error| of_sample(error, sample.id, 0))?;
            match &self.masker {
                Some(masker) => {
                    masker.apply(seed, sample, &mut input_ids[..len], &mut labels[..len]);
                }
                None if len > 0 => {
                    labels[..len - 1].copy_from_slice(&input_ids[1..len]);
                    labels[len - 1] = IGNORED;
                }
                None => {}
            }
            if !is_valid {
                labels.fill(IGNORED);
            }
        }
        Ok(())
    }
}
