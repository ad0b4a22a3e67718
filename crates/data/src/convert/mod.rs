//! From files of text to a prepared folder: [`convert`], with any tokenizer, resumable, and
//! [`prepare`], which trains a vocabulary and finds what is prepared already.
//!
//! Here belongs what reads files of text and tables in blocks, all threads at once, and goes on
//! after an interruption. Tokens are made in `text`, written in [`crate::format`].
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

pub(crate) mod block;
mod documents;
pub(crate) mod input;
pub(crate) mod journal;
pub(crate) mod json_field;
mod options;
mod pipeline;
mod prepare;
pub(crate) mod resume;
#[cfg(feature = "parquet")]
pub(crate) mod rows;
mod run;
mod sink;

pub use options::{BadLines, ConvertOptions, Document, Format, Vocabulary};
pub use prepare::{prepare, PrepareOptions, Prepared};
pub use run::{convert, Converted};
