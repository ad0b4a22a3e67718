//! Everything that can go wrong between a folder of text and a batch.
//!
//! Each variant says what is wrong and what to do about it; nothing here is logged or printed by
//! the crate itself.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fingerprint::Fingerprint;

/// `Result` of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, write, rename or sync a file.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said. It stands in the message, so it is not also the error's `source`.
        cause: io::Error,
    },
    /// The data path does not exist.
    #[error("{} does not exist: give a folder with .txt files, one text file, or a prepared folder", path.display())]
    DataMissing {
        /// The path that was given.
        path: PathBuf,
    },
    /// A path holds no prepared data.
    #[error("{} is not a prepared folder: it has no index.json; `phalanx data convert` makes one", path.display())]
    NotPrepared {
        /// The path that was given.
        path: PathBuf,
    },
    /// There is nothing to convert.
    #[error("there is nothing to convert at {}: give a file, or a folder with files that end in: {expected}", path.display())]
    NoInput {
        /// The path that was given.
        path: PathBuf,
        /// The extensions that are looked for.
        expected: String,
    },
    /// A line of input cannot be used.
    #[error("{}, line {line}: {reason}; correct the line, or leave such lines out with --skip-bad-lines", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A row of a table cannot be used.
    #[error("{}, row {row}, column `{column}`: {reason}", path.display())]
    BadRow {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: u64,
        /// The column.
        column: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Something lies where prepared text is to be kept.
    #[error("{} lies where prepared text is to be kept, and has no index.json: remove it, or choose another cache_dir", path.display())]
    CacheOccupied {
        /// What lies there.
        path: PathBuf,
    },
    /// A conversion would write over something.
    #[error("{} is there already and holds something else: choose another output, or remove it", path.display())]
    OutputExists {
        /// The output that was asked for.
        path: PathBuf,
    },
    /// A conversion with the same output, of other input or with other options, was left half done.
    #[error("{} holds a conversion of other input or with other options, half done: repeat that command to go on with it, or drop it with --restart", path.display())]
    OtherConversion {
        /// Where it lies.
        path: PathBuf,
    },
    /// The folder holds no text.
    #[error("no .txt file under {}: put UTF-8 text files there, or give the path of one text file", path.display())]
    NoText {
        /// The folder that was given.
        path: PathBuf,
    },
    /// The text is empty, or nothing but white space.
    #[error("the text under {} has no words: give files that hold some text", path.display())]
    EmptyText {
        /// The folder or file that was given.
        path: PathBuf,
    },
    /// A text file is not UTF-8.
    #[error("{} is not UTF-8 at byte {offset}: convert it (for example: iconv -f latin1 -t utf-8) or take it away", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that is not UTF-8.
        offset: u64,
    },
    /// A text file changed while it was being prepared.
    #[error("{} changed while it was being prepared: start again when nobody writes to it", path.display())]
    TextChanged {
        /// The file.
        path: PathBuf,
    },
    /// Prepared data cannot be written where it should lie.
    #[error("cannot write prepared data under {}: {cause}; make it writable or choose another folder for prepared data", path.display())]
    CacheNotWritable {
        /// The folder for prepared data.
        path: PathBuf,
        /// What the system said. It stands in the message, so it is not also the error's `source`.
        cause: io::Error,
    },
    /// Another process prepares the same data and did not finish in time.
    #[error("waited {waited:?} for {} which process {holder} holds while it prepares the same data: wait longer, or end that process", path.display())]
    LockTimeout {
        /// The lock file.
        path: PathBuf,
        /// The process that holds it, as it wrote itself into the file.
        holder: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The tokenizers library failed.
    #[error("cannot {action}: {message}")]
    Tokenizer {
        /// What was tried.
        action: &'static str,
        /// The library's own words, behind the file's path if it is about a file.
        message: String,
    },
    /// An option has a value that cannot work.
    #[error("{option} is {value}: {reason}")]
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// The value that was given.
        value: String,
        /// Why it cannot work, and what would.
        reason: String,
    },
    /// An `index.json` cannot be used.
    #[error("{}: {reason}; prepare the data again", path.display())]
    BadIndex {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A safetensors header cannot be used.
    #[error("{} is not a usable safetensors file: {reason}", path.display())]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A Parquet or Arrow file cannot be used.
    #[error("{} is not a usable table: {reason}", path.display())]
    BadTable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A safetensors file lacks a tensor.
    #[error("{} has no tensor `{name}`; it has: {}", path.display(), present.join(", "))]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor that is needed.
        name: String,
        /// The tensors that are there.
        present: Vec<String>,
    },
    /// A tensor has another element type than is needed.
    #[error("{}: `{name}` has dtype {actual}, expected {expected}", path.display())]
    WrongDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is needed.
        expected: &'static str,
        /// What is there.
        actual: String,
    },
    /// A tensor has another shape than is needed.
    #[error("{}: `{name}` has shape {actual:?}, expected {expected}", path.display())]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is needed, in words.
        expected: String,
        /// What is there.
        actual: Vec<usize>,
    },
    /// A file is shorter or longer than its index or header says.
    #[error("{} has {actual} bytes, expected {expected}: it was cut off or written to; prepare or copy it again", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// The size that was recorded.
        expected: u64,
        /// The size that was found.
        actual: u64,
    },
    /// `tokenizer.json` is not the one that the tokens beside it were made with.
    #[error("{} is not the tokenizer of the tokens beside it: its fingerprint is {actual}, index.json has {expected}; copy the one that they were made with, or take it away", path.display())]
    OtherTokenizer {
        /// The tokenizer.
        path: PathBuf,
        /// The fingerprint that the index has.
        expected: Fingerprint,
        /// The fingerprint of what is there.
        actual: Fingerprint,
    },
    /// `damage.json` does not fit its folder.
    #[error(
        "{}: {reason}; remove it, and run `phalanx data verify --record` where blocks are damaged",
        path.display()
    )]
    BadDamageList {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A block of a shard does not have the checksum that was recorded when it was written.
    #[error(
        "shard {} is damaged at offset {offset} (block {block}): checksum {actual:08x}, expected {expected:08x}; found while reading {reading}; prepare or copy it again, or list it with `phalanx data verify --record` and set on_damage to skip",
        path.display()
    )]
    Damaged {
        /// The shard.
        path: PathBuf,
        /// Number of the block.
        block: u64,
        /// Where the block starts in the file.
        offset: u64,
        /// The checksum that was recorded.
        expected: u32,
        /// The checksum of what was read.
        actual: u32,
        /// What was being read.
        reading: String,
    },
    /// A shard could not be read where a sample lies.
    #[error("cannot read {reading} at offset {offset} of {}: {cause}", path.display())]
    Unreadable {
        /// The shard.
        path: PathBuf,
        /// What was being read.
        reading: String,
        /// Where that begins in the file.
        offset: u64,
        /// Why not. It stands in the message, so it is not also the error's `source`; see
        /// [`Error::root`].
        cause: Box<Error>,
    },
    /// `damage.json` says that a shard is lost, and something in it was to be read.
    #[error("{reading} lies in shard {}, which damage.json lists as lost: copy or prepare the shard again and run `phalanx data verify --record`, or leave out what is damaged (OnDamage::Skip)", path.display())]
    Lost {
        /// The shard.
        path: PathBuf,
        /// What was being read.
        reading: String,
    },
    /// A web server does not give what is needed.
    #[error("cannot read {url}: {reason}")]
    Http {
        /// The file.
        url: String,
        /// What the server or the connection did, and what to do.
        reason: String,
    },
    /// A file on a web server is not the one that was opened.
    #[error("{url} changed since it was opened: {reason}; start again when nobody writes to it")]
    Changed {
        /// The file.
        url: String,
        /// What differs.
        reason: String,
    },
    /// A document's bounds cannot be.
    #[error("{}: document {document} is {reason}; prepare or copy the file again", path.display())]
    BadDocument {
        /// The file.
        path: PathBuf,
        /// The document, counted within the file.
        document: u64,
        /// Its bounds, and what they should lie in.
        reason: String,
    },
    /// A value in the data is not an entry of the vocabulary.
    #[error("{}: sample {sample} holds value {value} at position {position}: {reason}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The sample.
        sample: u64,
        /// Position in the sample.
        position: usize,
        /// The value.
        value: i64,
        /// Why it cannot be.
        reason: String,
    },
    /// The data has too few samples for even one global batch.
    #[error("the data has {samples} samples, fewer than the global batch of {global_batch}: take a smaller global batch, shorter sequences or more text")]
    TooFewSamples {
        /// How many samples there are.
        samples: u64,
        /// How many are needed.
        global_batch: u64,
    },
    /// A batch has no such column.
    #[error("there is no column `{name}` of type {dtype}; there are: {}", present.join(", "))]
    NoColumn {
        /// The column that was asked for.
        name: String,
        /// The type it was asked for as.
        dtype: &'static str,
        /// The columns there are.
        present: Vec<String>,
    },
    /// All epochs that were asked for are over.
    #[error("the data is over after {epochs} epochs: ask for more, or stop here")]
    EndOfData {
        /// How many epochs were asked for.
        epochs: u64,
    },
    /// A sample that does not exist was asked for.
    #[error("sample {sample} does not exist: the data has {samples}")]
    NoSuchSample {
        /// The sample that was asked for.
        sample: u64,
        /// How many there are.
        samples: u64,
    },
    /// A loader state belongs to other data or another order.
    #[error("the saved position does not fit: its {what} is {saved}, this run has {current}; resume with the same data and options, start without the saved position{}", if *what == "data" { ", or set allow_dataset_change to go on at the same place of other data" } else { "" })]
    StateMismatch {
        /// What differs.
        what: &'static str,
        /// The value in the state.
        saved: String,
        /// The value of this run.
        current: String,
    },
    /// The loaders of the ranks would not deliver parts of the same global batches. Every rank gets
    /// this same text.
    #[error("the ranks' loaders do not agree on {differences}; give every rank the same data and options")]
    RanksDisagree {
        /// What differs, and which ranks have what.
        differences: String,
    },
    /// A prefetch thread panicked.
    #[error("a loader thread panicked at epoch {epoch}, global sample {position}: {message}")]
    WorkerPanicked {
        /// The epoch of the batch it worked on.
        epoch: u64,
        /// Position of the batch in the epoch's order.
        position: u64,
        /// The panic's message.
        message: String,
    },
    /// No batch arrived in time.
    #[error("no batch within {timeout:?} (epoch {epoch}, global sample {position}): the storage is slow or gone; check it, or raise the loader's timeout")]
    Timeout {
        /// How long the consumer waited.
        timeout: Duration,
        /// The epoch of the batch.
        epoch: u64,
        /// Position of the batch in the epoch's order.
        position: u64,
    },
    /// The loader failed before; this is what it said then.
    #[error("the loader stopped after an error: {first}")]
    Stopped {
        /// The first error.
        first: String,
    },
}

impl Error {
    /// Closure for `map_err`: an I/O error with what was tried on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { action, path, cause }
    }

    /// The error behind [`Error::Unreadable`]; any other is its own.
    pub fn root(&self) -> &Error {
        match self {
            Error::Unreadable { cause, .. } => cause.root(),
            other => other,
        }
    }

    /// Adds what was being read and where to errors that know nothing of samples.
    #[cold]
    pub(crate) fn while_reading(self, reading: &dyn Display, path: &Path, offset: u64) -> Error {
        let is_bare = matches!(
            self,
            Error::Io { .. } | Error::WrongSize { .. } | Error::Http { .. } | Error::Changed { .. }
        );
        if !is_bare {
            return self;
        }
        let (path, reading) = (path.to_path_buf(), reading.to_string());
        Error::Unreadable { path, reading, offset, cause: Box::new(self) }
    }

    pub(crate) fn option(
        option: &'static str,
        value: impl Display,
        reason: impl Into<String>,
    ) -> Error {
        Error::InvalidOption { option, value: value.to_string(), reason: reason.into() }
    }
}
