//! From files of text to a prepared folder: [`convert`], with any tokenizer, resumable.
//!
//! ```
//! use phalanx_data::convert::{convert, ConvertOptions, Vocabulary};
//! use phalanx_data::progress::Silent;
//!
//! # fn main() -> phalanx_data::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let (lines, target) = (folder.path().join("pages.jsonl"), folder.path().join("tokens"));
//! # std::fs::write(&lines, "{\"text\":\"It was a dark and stormy night.\"}\n".repeat(50)).unwrap();
//! // `lines` is a file with an object a line: {"text":"It was a dark …"}
//! let vocabulary = Vocabulary::Train { vocab_size: 100, min_frequency: 2, lowercase: true };
//! let options = ConvertOptions { vocabulary, ..Default::default() };
//! let made = convert(&[lines], &target, &options, &Silent)?;
//! assert_eq!(made.index.document_count, 50);
//! # Ok(())
//! # }
//! ```

mod block;
mod byte_level;
mod cut;
mod documents;
pub(crate) mod encoder;
pub(crate) mod input;
pub(crate) mod journal;
mod json_field;
mod options;
pub(crate) mod pipeline;
pub(crate) mod resume;
#[cfg(feature = "parquet")]
mod rows;
mod run;
pub(crate) mod sink;
mod special;
mod word_pieces;
mod words;

/// What tests feed with bytes. Each says whether anything was found.
#[cfg(feature = "testing")]
pub(crate) mod fuzzed {
    pub(crate) fn journal(text: &[u8]) -> bool {
        super::journal::parses(text)
    }

    pub(crate) fn tokenizer(json: &[u8]) -> bool {
        super::encoder::fuzzed(json)
    }

    #[cfg(feature = "parquet")]
    pub(crate) fn rows(path: &std::path::Path) -> bool {
        super::rows::fuzzed(path, "text").unwrap_or(false)
    }

    pub(crate) fn json_text(line: &str, field: &str) -> bool {
        super::json_field::json_text(line, field).is_ok()
    }
}

pub(crate) use block::Place;
pub(crate) use journal::Counts;
pub use options::{BadLines, ConvertOptions, Document, Format, Vocabulary};
pub use run::{convert, Converted};
pub(crate) use run::{count_words, encode_all};
