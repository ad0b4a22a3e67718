//! Prepared text as samples for training on the next token.
//!
//! Sample i is tokens `i·L..(i + 1)·L` of the stream, and its labels are the tokens one further:
//! label j is what follows input j. Documents are packed: each is closed by its end token in the
//! stream, and a sample may hold several. With [`Documents::Apart`] batches say which is which.

use std::path::Path;
use std::sync::Arc;

use super::windows::TokenWindows;
use super::Samples;
use crate::batches::{Column, DType, Rows, Scratch, IGNORED};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::{TokenStream, Tokens};
use crate::source::Access;

/// No token: what is compared with it is never equal.
const NO_TOKEN: i64 = -1;

/// What a model is told of documents that share a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Documents {
    /// Nothing: columns `input_ids` and `labels`.
    #[default]
    Joined,
    /// Columns `position_ids`, which begin at 0 in each document, and `document_ids`, which count a
    /// sample's documents from 0: attention goes from a position to those before it of the same
    /// document. The label after a document's end is
    /// [`IGNORED`]: nobody can know what comes then.
    Apart,
}

/// Next-token samples of one length, cut out of prepared text.
#[derive(Clone, Debug)]
pub struct CausalText {
    windows: TokenWindows,
    sequence_len: usize,
    documents: Documents,
    /// The token that closes a document.
    end: i64,
    columns: Vec<Column>,
    fingerprint: Fingerprint,
}

impl CausalText {
    /// Opens a prepared folder (see [`prepare`](crate::convert::prepare)).
    ///
    /// # Errors
    /// As [`TokenStream::open`], and [`Error::InvalidOption`] for a sequence length of 0.
    pub fn open(
        folder: &Path,
        sequence_len: usize,
        documents: Documents,
        access: Access,
    ) -> Result<Self> {
        Self::new(Arc::new(TokenStream::open(folder, access)?), sequence_len, documents)
    }

    /// Samples of an open stream; several may share it.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a sequence length of 0, and for [`Documents::Apart`] where no
    /// token is known to close documents.
    pub fn new(stream: Arc<dyn Tokens>, sequence_len: usize, documents: Documents) -> Result<Self> {
        if sequence_len == 0 {
            return Err(Error::option("sequence_len", 0, "a sample has at least one token"));
        }
        let end = stream.special().document_end();
        if documents == Documents::Apart && end.is_none() {
            let reason = "it is not known which token closes documents: say so with MegatronTokens::with_special";
            return Err(Error::option("documents", "Apart", reason));
        }
        let end = end.map_or(NO_TOKEN, i64::from);
        let sum = Fingerprinter::new("causal-text 1").number(stream.fingerprint().0);
        let fingerprint = sum
            .number(to_u64(sequence_len))
            .number(u64::from(documents == Documents::Apart))
            .finish();
        let names: &[&'static str] = match documents {
            Documents::Joined => &["input_ids", "labels"],
            Documents::Apart => &["input_ids", "labels", "position_ids", "document_ids"],
        };
        let column = |&name: &&'static str| Column::new(name, DType::I64, [sequence_len]);
        let columns = names.iter().map(column).collect();
        // The last label of a sample is the first token of the next one.
        let windows = TokenWindows::new(stream, sequence_len, 1);
        Ok(CausalText { windows, sequence_len, documents, end, columns, fingerprint })
    }

    /// Tells the documents of one sample apart.
    fn tell_apart(&self, row: &mut Rows<'_>) -> Result<()> {
        let [input_ids, labels, positions, documents] = row.columns_mut::<i64, 4>([0, 1, 2, 3])?;
        let (mut position, mut document) = (0, 0);
        let inputs = input_ids.iter().zip(labels);
        for ((&id, label), (at, of)) in inputs.zip(positions.iter_mut().zip(documents)) {
            (*at, *of) = (position, document);
            position += 1;
            if id == self.end {
                *label = IGNORED;
                (position, document) = (0, document + 1);
            }
        }
        Ok(())
    }
}

impl Samples for CausalText {
    super::windows::of_windows!();

    fn fill(&self, _seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let len = self.sequence_len;
        let mut tokens = std::mem::take(&mut scratch.tokens);
        tokens.resize(len + 1, 0);
        for at in 0..rows.len() {
            let (sample, is_valid) = rows.sample(at);
            self.windows.expect_after(rows.samples(), at);
            self.windows.read(sample.id, 0, &mut tokens, scratch)?;
            let mut row = rows.part(at..at + 1);
            let [input_ids, labels] = row.columns_mut::<i64, 2>([0, 1])?;
            input_ids.copy_from_slice(&tokens[..len]);
            labels.copy_from_slice(&tokens[1..]);
            if self.documents == Documents::Apart {
                self.tell_apart(&mut row)?;
            }
            if !is_valid {
                row.column::<i64>(1)?.fill(IGNORED);
            }
        }
        scratch.tokens = tokens;
        Ok(())
    }
}
