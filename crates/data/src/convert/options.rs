//! What is converted, and how.

use std::num::NonZeroUsize;
use std::path::PathBuf;

/// The kind of files that text is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// UTF-8 text: `.txt`.
    Text,
    /// A JSON object a line: `.jsonl`, `.ndjson`. Each is a document.
    JsonLines,
    /// A column of strings in Parquet files: `.parquet`. Each row is a document. Needs the feature
    /// `parquet`.
    Parquet,
    /// A column of strings in Arrow files or streams: `.arrow`, `.feather`. Each row is a document.
    /// Needs the feature `parquet`.
    Arrow,
}

impl Format {
    pub(crate) const ALL: [Format; 4] =
        [Format::Text, Format::JsonLines, Format::Parquet, Format::Arrow];

    pub(crate) fn extensions(self) -> &'static [&'static str] {
        match self {
            Format::Text => &["txt"],
            Format::JsonLines => &["jsonl", "ndjson"],
            Format::Parquet => &["parquet"],
            Format::Arrow => &["arrow", "feather"],
        }
    }

    /// Whether it has rows and columns.
    pub(crate) fn is_table(self) -> bool {
        matches!(self, Format::Parquet | Format::Arrow)
    }
}

/// What a document is in files of plain text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Document {
    /// Each file.
    #[default]
    File,
    /// Each line that holds more than white space.
    Line,
    /// Lines up to an empty one.
    BlankLine,
}

/// What happens to lines that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadLines {
    /// They end the conversion with an error that names file and line.
    #[default]
    Refuse,
    /// They are counted and left out.
    Skip,
}

/// Where the vocabulary comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vocabulary {
    /// A `tokenizer.json` of Hugging Face's `tokenizers`.
    File(PathBuf),
    /// A `WordPiece` vocabulary is trained on the text.
    Train {
        /// Entries, special tokens included. A small text yields fewer.
        vocab_size: u32,
        /// Pieces that occur less often do not enter the vocabulary.
        min_frequency: u64,
        /// Whether upper and lower case are the same, and accents dropped.
        lowercase: bool,
    },
}

/// How text is converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Where the vocabulary comes from.
    pub vocabulary: Vocabulary,
    /// The kind of the files; told from their names if not given.
    pub format: Option<Format>,
    /// Where an object or a row has its text: a field or column, or a path of them (`page.body`).
    pub field: String,
    /// What a document is in plain text.
    pub document: Document,
    /// The token that closes each document; found by name if not given: `[SEP]`, or the end of
    /// text.
    pub end_token: Option<String>,
    /// What happens to lines that are no JSON, not UTF-8, of more than 256 MiB or lack the field,
    /// and to rows without text.
    pub bad_lines: BadLines,
    /// A shard is closed at the first end of a document after so many bytes of tokens and of the
    /// places of documents (8 each).
    pub shard_bytes: u64,
    /// Threads; all processors if not given. The result does not depend on it.
    pub threads: Option<NonZeroUsize>,
    /// What an earlier conversion of other input or with other options left half done is dropped.
    pub restart: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        ConvertOptions {
            vocabulary: Vocabulary::Train { vocab_size: 8192, min_frequency: 2, lowercase: true },
            format: None,
            field: "text".to_owned(),
            document: Document::File,
            end_token: None,
            bad_lines: BadLines::Refuse,
            shard_bytes: 1 << 30,
            threads: None,
            restart: false,
        }
    }
}
