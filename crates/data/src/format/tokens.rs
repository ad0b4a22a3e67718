//! What text samples are cut out of: a stream of tokens, whatever files it lies in.

use std::fmt::{Debug, Display};
use std::ops::Range;

use super::continuations::Continuations;
use super::special_tokens::SpecialTokens;
use crate::batches::Scratch;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

/// A stream of tokens that can be read at any place, from many threads.
pub trait Tokens: Debug + Send + Sync + 'static {
    /// How many tokens there are.
    fn token_count(&self) -> u64;

    /// Tokens are below this.
    fn vocab_size(&self) -> u32;

    /// The tokens that are no text.
    fn special(&self) -> SpecialTokens;

    /// Identifies the data.
    fn fingerprint(&self) -> Fingerprint;

    /// Reads tokens from `start` on, as many as `out` holds. `reading` names them in errors.
    ///
    /// # Errors
    /// If they do not exist, cannot be read, or are no tokens of the vocabulary.
    fn read(
        &self,
        start: u64,
        out: &mut [i64],
        scratch: &mut Scratch,
        reading: &dyn Display,
    ) -> Result<()>;

    /// How many documents there are; 0 where nothing is known of documents.
    fn document_count(&self) -> u64 {
        0
    }

    /// The tokens of a document.
    ///
    /// # Errors
    /// [`Error::NoSuchSample`] for a document that does not exist, or what kept its bounds from
    /// being read.
    fn document(&self, document: u64, _scratch: &mut Scratch) -> Result<Range<u64>> {
        Err(Error::NoSuchSample { sample: document, samples: self.document_count() })
    }

    /// Tokens that lie in blocks that are known to be damaged: ascending.
    fn damaged(&self) -> &[Range<u64>] {
        &[]
    }

    /// Documents that have tokens in such blocks: ascending.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if blocks are damaged and it is not known which documents lie in
    /// them.
    fn damaged_documents(&self) -> Result<Vec<Range<u64>>> {
        if self.damaged().is_empty() {
            return Ok(Vec::new());
        }
        let reason =
            "which documents lie in damaged blocks is not known: copy or prepare the data again";
        Err(Error::option("on_damage", "skip", reason))
    }

    /// `len` tokens from `start` on will be read at once: the processor can load them.
    fn expect(&self, _start: u64, _len: usize) {}

    /// These tokens will be read soon, in some order: they can be fetched from the disk.
    fn will_need(&self, _tokens: Range<u64>) {}

    /// Which tokens continue a word, for whole-word masks.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] where that is not known.
    fn continuations(&self) -> Result<Continuations> {
        let reason =
            "nothing is known of the words of this data: take data prepared with a tokenizer";
        Err(Error::option("masking.whole_words", true, reason))
    }
}
