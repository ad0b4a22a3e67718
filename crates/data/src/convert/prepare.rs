//! [`prepare`]: text files in, prepared folder out, once.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::block::InputPosition;
use super::input::{self, InputFile};
use super::journal::ConvertCounts;
use super::options::{BadLines, Document, Format};
use super::pipeline::TextInput;
use super::run::{encode_all, train, UNKNOWN_WORTH_A_NOTICE};
use super::sink::TokenSink;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::folder::is_free;
use crate::format::{lock, SpecialTokens, TokenIndex, TokenWriter};
use crate::progress::{Event, Progress, Stage};
use crate::text::encoder::Encoder;
use crate::text::vocabulary::{self, WantedVocabulary, SEP, SPECIAL_IDS, UNK};
use crate::threads::in_pool;

/// Folder for prepared data inside the data folder.
const CACHE_FOLDER: &str = ".phalanx";

/// No processor is slower than this, by far.
const BYTES_A_SECOND_MIN: u64 = 1_000_000;

/// Part of every key: raised when the same text and options give other files.
const KEY_VERSION: &str = "prepare 5";

/// How text is prepared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrepareOptions {
    /// Entries of the vocabulary, special tokens included. A small text yields fewer.
    pub vocab_size: u32,
    /// Pieces that occur less often do not enter the vocabulary.
    pub min_frequency: u64,
    /// Whether upper and lower case are the same, and accents dropped.
    pub lowercase: bool,
    /// A shard is closed at the first end of a document after so many bytes of tokens and of the
    /// places of documents (8 each).
    pub shard_bytes: u64,
    /// Threads; all processors if not given. The result does not depend on it.
    pub threads: Option<NonZeroUsize>,
    /// Where prepared data is kept; `.phalanx` beside the text if not given.
    pub cache_dir: Option<PathBuf>,
    /// How long to wait for another process that prepares the same data, beside the time that it
    /// may take: a second for each megabyte of text.
    pub lock_timeout: Duration,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        PrepareOptions {
            vocab_size: 8192,
            min_frequency: 2,
            lowercase: true,
            shard_bytes: 256 << 20,
            threads: None,
            cache_dir: None,
            lock_timeout: Duration::from_secs(600),
        }
    }
}

/// A prepared folder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prepared {
    /// Where it is.
    pub folder: PathBuf,
    /// Entries of the vocabulary: a model needs at least so many embeddings. Text may yield fewer
    /// than were asked for; a folder that was prepared elsewhere has what it has.
    pub vocab_size: u32,
    /// Ids of the special tokens.
    pub special: SpecialTokens,
    /// Tokens in it.
    pub token_count: u64,
    /// Documents in it.
    pub document_count: u64,
    /// Fingerprint of the content: equal on machines that prepared the same text alike.
    pub fingerprint: Fingerprint,
    /// Whether it was there already.
    pub reused: bool,
}

impl Prepared {
    fn new(folder: &Path, index: &TokenIndex, reused: bool) -> Self {
        Prepared {
            folder: folder.to_path_buf(),
            vocab_size: index.vocab_size,
            special: index.special,
            token_count: index.token_count,
            document_count: index.document_count,
            fingerprint: index.fingerprint,
            reused,
        }
    }
}

/// Makes sure that the text at `path` is prepared, and says where.
///
/// `path` is a folder with `.txt` files (subfolders included), one text file, or a prepared folder,
/// which is used as it is. The first call trains a vocabulary, tokenises the text and writes shards
/// to `cache_dir/<key>`; later calls find them there. The key is made of the files' names, sizes
/// and times, and of the options: changed text gets another folder.
///
/// Any number of processes may call this at once: one does the work, the others wait for it and
/// then read. A crash leaves nothing that is later taken for prepared data.
///
/// The vocabulary is trained on all of the text up to 1 GiB, and on 1 GiB of more: blocks of it
/// that are spread evenly. Of its words the most frequent 65 536 count, or four times as many as
/// the vocabulary has entries.
///
/// Cost: some 12 MB of text a second and processor (words are counted, then encoded), and a second
/// for the vocabulary.
///
/// # Determinism
/// The same text and options give the same vocabulary, tokens and fingerprint, whatever the number
/// of threads.
///
/// # Errors
/// [`Error::DataMissing`], [`Error::NoText`], [`Error::EmptyText`], [`Error::InvalidUtf8`],
/// [`Error::TextChanged`], [`Error::CacheNotWritable`], [`Error::CacheOccupied`],
/// [`Error::LockTimeout`], [`Error::InvalidOption`], [`Error::Io`], [`Error::Tokenizer`], and
/// [`Error::BadIndex`] for a prepared folder that cannot be used.
pub fn prepare(path: &Path, options: &PrepareOptions, progress: &dyn Progress) -> Result<Prepared> {
    if !path.exists() {
        return Err(Error::DataMissing { path: path.to_path_buf() });
    }
    if TokenIndex::is_in(path) {
        return Ok(Prepared::new(path, &TokenIndex::read(path)?, true));
    }
    vocabulary::check_size(options.vocab_size)?;
    let found = input::list_text(path)?;
    let files = &found.files;
    let cache = match &options.cache_dir {
        Some(folder) => folder.clone(),
        None if path.is_dir() => path.join(CACHE_FOLDER),
        None => path.parent().unwrap_or(Path::new("")).join(CACHE_FOLDER),
    };
    let key = key(files, options);
    let target = cache.join(key.to_string());
    if TokenIndex::is_in(&target) {
        return Ok(Prepared::new(&target, &TokenIndex::read(&target)?, true));
    }
    let not_writable = |cause| Error::CacheNotWritable { path: cache.clone(), cause };
    fs::create_dir_all(&cache).map_err(not_writable)?;
    let mut waited = false;
    let waiting = || {
        waited = true;
        progress.report(Event::Begin { stage: Stage::Waiting, total_bytes: 0 });
    };
    let lock_file = cache.join(format!(".{key}.lock"));
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let work = Duration::from_secs(bytes / BYTES_A_SECOND_MIN);
    let _lock = lock::acquire(&lock_file, options.lock_timeout.saturating_add(work), waiting)?;
    if waited {
        progress.report(Event::End { stage: Stage::Waiting });
    }
    if TokenIndex::is_in(&target) {
        return Ok(Prepared::new(&target, &TokenIndex::read(&target)?, true));
    }
    // Before all text is read and a vocabulary trained for nothing.
    if !is_free(&target)? {
        return Err(Error::CacheOccupied { path: target });
    }
    found.tell(progress);
    let index = in_pool(options.threads, || write(path, &target, files, options, progress))??;
    Ok(Prepared::new(&target, &index, false))
}

fn key(files: &[InputFile], options: &PrepareOptions) -> Fingerprint {
    let sum = Fingerprinter::new(KEY_VERSION)
        .number(u64::from(options.vocab_size))
        .number(options.min_frequency)
        .number(u64::from(options.lowercase))
        .number(options.shard_bytes);
    files.iter().fold(sum, |sum, file| file.add_to(sum)).finish()
}

/// Does the work, under the lock.
fn write(
    path: &Path,
    target: &Path,
    files: &[InputFile],
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<TokenIndex> {
    let input = TextInput {
        files: files.to_vec(),
        format: Format::Text,
        unit: Document::File,
        field: String::new(),
        bad_lines: BadLines::Refuse,
    };
    let source_bytes = input.bytes();
    let PrepareOptions { vocab_size, min_frequency, lowercase, .. } = *options;
    let wanted = WantedVocabulary { vocab_size, min_frequency, lowercase };
    let vocabulary = train(&input, wanted, path, progress)?;
    let mut writer = TokenWriter::create(
        target,
        vocabulary.json.as_bytes(),
        vocabulary.size,
        SPECIAL_IDS,
        options.shard_bytes,
    )?;
    progress.report(Event::Begin { stage: Stage::Encoding, total_bytes: source_bytes });
    let encoder = Encoder::words(vocabulary.model, options.lowercase);
    let mut sink = TokenSink {
        writer: &mut writer,
        journal: None,
        end_token: SEP,
        unknown: Some(UNK),
        counts: ConvertCounts::default(),
        is_open: false,
    };
    encode_all(&input, &encoder, InputPosition::default(), &mut sink, progress)?;
    let unknown = sink.counts.unknown_tokens;
    progress.report(Event::End { stage: Stage::Encoding });
    files.iter().try_for_each(InputFile::check_unchanged)?;
    let index = writer.finish(source_bytes)?;
    let (tokens, documents, size) = (index.token_count, index.document_count, vocabulary.size);
    progress.report(Event::Notice(&format!(
        "{source_bytes} bytes of text in {documents} documents are {tokens} tokens of a vocabulary of {size} in {}",
        target.display()
    )));
    if unknown * UNKNOWN_WORTH_A_NOTICE > tokens {
        progress.report(Event::Notice(&format!(
            "{unknown} of these tokens are [UNK], which teaches nothing: a larger vocab_size leaves fewer"
        )));
    }
    Ok(index)
}
