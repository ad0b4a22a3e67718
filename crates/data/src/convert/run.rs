//! [`convert`]: the whole of a conversion.

use std::path::{Path, PathBuf};

use super::block::InputPosition;
use super::journal::{self, ConversionJournal, ConvertCounts, JournalEntry};
use super::options::{BadLines, ConvertOptions, Document, Format, Vocabulary};
use super::pipeline::TextInput;
use super::sink::{self, TokenSink};
use super::{input, resume};
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::continuations::TOKENIZER_FILE;
use crate::format::folder::{partial_path, OnDrop};
use crate::format::{SpecialTokens, TokenIndex, TokenShard, TokenWriter};
use crate::progress::{Event, Progress, Stage};
use crate::random::mix;
use crate::text::cut::CutRule;
use crate::text::decode::read_bounded;
use crate::text::encoder::{self, Encoder};
use crate::text::split::about;
use crate::text::vocabulary::{self, TrainedVocabulary, WantedVocabulary, WordCounts, SPECIAL_IDS};
use crate::text::{special, words};
use crate::threads::in_pool;

/// Part of every key: raised when the same input and options give other files.
const KEY_VERSION: &str = "convert 6";

/// Text that a vocabulary is trained on; of more, so much in blocks that are spread over all of it.
const TRAINING_BYTES_MAX: u64 = 1 << 30;

/// A text file that is one document has one shard, and is worth a notice from so many bytes on.
const DOCUMENT_WORTH_A_NOTICE: u64 = 256 << 20;

/// One unknown token in so many is worth a notice.
pub(super) const UNKNOWN_WORTH_A_NOTICE: u64 = 50;

/// What [`convert`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Converted {
    /// What the folder holds.
    pub index: TokenIndex,
    /// Lines that were left out because they are bad.
    pub skipped_lines: u64,
    /// Shards that an interrupted run of the same conversion had finished.
    pub resumed_shards: u64,
    /// Whether all of it was there already.
    pub reused: bool,
}

/// Converts text to a prepared folder at `output`: plain text, JSON lines, or a column of Parquet
/// or Arrow files, with any `tokenizer.json` or a vocabulary that is trained on the text.
///
/// The folder appears when it is complete. Until then shards gather in a hidden folder beside it;
/// after a crash or an error the same call goes on behind the last finished shard, and the result
/// has the bytes of a run without interruption. Of several processes with one output the first
/// converts and the others fail.
///
/// Text is encoded in pieces, cut so that tokenizers of BERT's, GPT-2's, Llama 3's and Qwen's kind
/// give the tokens of the whole; of others documents longer than 256 KiB are cut at spaces. A run
/// without white space is cut after 1 MiB. Special tokens that stand in the text are text.
///
/// A vocabulary is trained on all of the text up to 1 GiB, and on 1 GiB of more: blocks of it that
/// are spread evenly. Of its words the most frequent 65 536 count, or four times as many as the
/// vocabulary has entries.
///
/// Memory: some tens of MiB for each thread, 8 bytes for each document of a shard, and the words of
/// the text while a vocabulary is trained.
///
/// # Determinism
/// The same input and options give the same bytes, whatever the number of threads.
///
/// # Errors
/// [`Error::NoInput`], [`Error::InvalidUtf8`], [`Error::BadLine`], [`Error::BadRow`],
/// [`Error::BadTable`], [`Error::EmptyText`], [`Error::TextChanged`], [`Error::OutputExists`],
/// [`Error::OtherConversion`], [`Error::LockTimeout`] if another process converts to the same
/// output, [`Error::Tokenizer`], [`Error::InvalidOption`], [`Error::CacheNotWritable`] and
/// [`Error::Io`].
pub fn convert(
    inputs: &[PathBuf],
    output: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Converted> {
    check(options)?;
    let (files, format) = input::list(inputs, options.format, progress)?;
    let unit = match format {
        Format::Text => options.document,
        // Their rows are documents.
        _ => Document::Line,
    };
    if format.is_table() && !cfg!(feature = "parquet") {
        let reason = "this program was built without tables: build it with --features parquet";
        return Err(Error::option("format", format!("{format:?}").to_lowercase(), reason));
    }
    let (field, bad_lines) = (options.field.clone(), options.bad_lines);
    let input = TextInput { files, format, unit, field, bad_lines };
    let tokenizer = match &options.vocabulary {
        Vocabulary::File(path) => Some(read_bounded(path)?),
        Vocabulary::Train { .. } => None,
    };
    let key = key(&input, options, tokenizer.as_deref());
    let _lock = resume::lock(output)?;
    if let Some(done) = finished(output, key)? {
        return Ok(done);
    }
    let has_tokenizer = |partial: &Path| partial.join(TOKENIZER_FILE).is_file();
    let done = resume::half_done(output, key, options.restart, has_tokenizer, progress)?;
    if let Some(text) = large_document(&input) {
        progress.report(Event::Notice(&text));
    }
    let work = TextConversion { input: &input, output, options, key, progress };
    let made = in_pool(options.threads, || work.run(tokenizer, &done))?;
    made.inspect_err(|error| resume::tell_what_stays::<TokenShard>(output, key, error, progress))
}

fn check(options: &ConvertOptions) -> Result<()> {
    if let Vocabulary::Train { vocab_size, .. } = options.vocabulary {
        vocabulary::check_size(vocab_size)?;
        if let Some(name) = &options.end_token {
            let reason = "a vocabulary that is trained has [SEP]; this is for --tokenizer";
            return Err(Error::option("end_token", name, reason));
        }
    }
    if options.shard_bytes == 0 {
        return Err(Error::option("shard_bytes", 0, "a shard holds at least one byte"));
    }
    Ok(())
}

/// What is to be known of files that are one large document each.
fn large_document(input: &TextInput) -> Option<String> {
    let is_whole = input.format == Format::Text && input.unit == Document::File;
    let mut large = input.files.iter().filter(|file| file.bytes > DOCUMENT_WORTH_A_NOTICE);
    let first = large.next().filter(|_| is_whole)?;
    let others = match large.count() {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    let (path, bytes) = (first.path.display(), first.bytes);
    Some(format!(
        "{path}{others} is one document of {bytes} bytes: it lies in one shard, and after an interruption all of it begins again; \
         --document line or blank-line makes documents of its parts"
    ))
}

/// All that decides about the result.
fn key(input: &TextInput, options: &ConvertOptions, tokenizer: Option<&[u8]>) -> Fingerprint {
    let mut sum = Fingerprinter::new(KEY_VERSION)
        .bytes(format!("{:?} {:?}", input.format, input.unit).as_bytes())
        .bytes(options.field.as_bytes())
        .bytes(options.end_token.as_deref().unwrap_or_default().as_bytes())
        .number(u64::from(options.bad_lines == BadLines::Skip))
        .number(options.shard_bytes);
    sum = match (&options.vocabulary, tokenizer) {
        (Vocabulary::Train { vocab_size, min_frequency, lowercase }, _) => {
            sum.number(u64::from(*vocab_size)).number(*min_frequency).number(u64::from(*lowercase))
        }
        (Vocabulary::File(_), json) => sum.bytes(json.unwrap_or_default()),
    };
    input.files.iter().fold(sum, |sum, file| file.add_to(sum)).finish()
}

/// The output, if it is there and of the same conversion.
fn finished(output: &Path, key: Fingerprint) -> Result<Option<Converted>> {
    let Some(entries) = resume::finished::<TokenShard>(output, key, TokenIndex::is_in)? else {
        return Ok(None);
    };
    let index = TokenIndex::read(output)?;
    let skipped_lines = entries.last().map_or(0, |entry| entry.counts.skipped_lines);
    Ok(Some(Converted { index, skipped_lines, resumed_shards: 0, reused: true }))
}

/// A conversion under its lock.
struct TextConversion<'a> {
    input: &'a TextInput,
    output: &'a Path,
    options: &'a ConvertOptions,
    key: Fingerprint,
    progress: &'a dyn Progress,
}

/// What text is encoded with.
struct Language {
    /// Where it was read.
    path: PathBuf,
    json: Vec<u8>,
    encoder: Encoder,
    special: SpecialTokens,
    vocab_size: u32,
}

impl TextConversion<'_> {
    /// Must run in a rayon pool.
    fn run(&self, tokenizer: Option<Vec<u8>>, done: &[JournalEntry]) -> Result<Converted> {
        let language = self.language(tokenizer)?;
        let end_token = language.special.document_end().ok_or_else(|| {
            Error::option("end_token", "not given", "documents need a token that closes them")
        })?;
        let shards = done.iter().map(|entry| entry.shard.clone()).collect();
        let mut writer = TokenWriter::resume(
            self.output,
            &language.json,
            (language.vocab_size, language.special),
            self.options.shard_bytes,
            shards,
            OnDrop::Keep,
        )?;
        let mut journal = ConversionJournal::create(writer.folder(), self.key, done)?;
        let counts = self.encode(&language, &mut writer, &mut journal, (end_token, done));
        let counts = counts.map_err(about(&language.path))?;
        self.input.files.iter().try_for_each(input::InputFile::check_unchanged)?;
        if writer.shards().is_empty() {
            return Err(Error::EmptyText { path: self.input.files[0].path.clone() });
        }
        let index = writer.finish(self.input.bytes())?;
        self.tell(&index, counts, &language);
        let (skipped_lines, resumed_shards) = (counts.skipped_lines, journal::count(done));
        Ok(Converted { index, skipped_lines, resumed_shards, reused: false })
    }

    fn language(&self, given: Option<Vec<u8>>) -> Result<Language> {
        // An interrupted run may have trained it.
        let found = partial_path(self.output).join(TOKENIZER_FILE);
        let (path, json) = match (given, &self.options.vocabulary) {
            (Some(json), Vocabulary::File(path)) => (path.clone(), json),
            (_, Vocabulary::File(path)) => (path.clone(), read_bounded(path)?),
            (_, Vocabulary::Train { vocab_size, min_frequency, lowercase }) => {
                let json = if found.is_file() {
                    read_bounded(&found)?
                } else {
                    let wanted = WantedVocabulary {
                        vocab_size: *vocab_size,
                        min_frequency: *min_frequency,
                        lowercase: *lowercase,
                    };
                    let empty = &self.input.files[0].path;
                    train(self.input, wanted, empty, self.progress)?.json.into_bytes()
                };
                (found, json)
            }
        };
        let is_trained = matches!(self.options.vocabulary, Vocabulary::Train { .. });
        let tokenizer = encoder::read(&json).map_err(about(&path))?;
        let special = if is_trained {
            SPECIAL_IDS
        } else {
            special::find(self.options.end_token.as_deref(), |name| tokenizer.token_to_id(name))?
        };
        let vocab_size = encoder::vocab_size(&tokenizer).map_err(about(&path))?;
        let encoder = Encoder::new(tokenizer).map_err(about(&path))?;
        Ok(Language { path, json, encoder, special, vocab_size })
    }

    fn encode(
        &self,
        language: &Language,
        writer: &mut TokenWriter,
        journal: &mut ConversionJournal,
        (end_token, done): (u32, &[JournalEntry]),
    ) -> Result<ConvertCounts> {
        let (place, counts) =
            done.last().map_or_else(Default::default, |last| (last.next, last.counts));
        let sizes = self.input.files.iter().map(|file| file.bytes);
        let of_files: u64 = sizes.skip(place.file).sum();
        // Places in tables count rows: their file's first block stands for all that is done of it.
        let is_table = self.input.format.is_table();
        let total_bytes = of_files.saturating_sub(if is_table { 0 } else { place.offset });
        self.progress.report(Event::Begin { stage: Stage::Encoding, total_bytes });
        let unknown = language.special.unk;
        let journal = Some(journal);
        let mut sink = TokenSink { writer, journal, end_token, unknown, counts, is_open: false };
        encode_all(self.input, &language.encoder, place, &mut sink, self.progress)?;
        let end = InputPosition { file: self.input.files.len(), ..InputPosition::default() };
        let total = sink.finish(end)?;
        self.progress.report(Event::End { stage: Stage::Encoding });
        Ok(total)
    }

    fn tell(&self, index: &TokenIndex, counts: ConvertCounts, language: &Language) {
        let ConvertCounts { skipped_lines, unknown_tokens } = counts;
        if skipped_lines > 0 {
            let text = format!("{skipped_lines} bad lines were left out");
            self.progress.report(Event::Notice(&text));
        }
        if language.special.unk.is_some()
            && unknown_tokens.saturating_mul(UNKNOWN_WORTH_A_NOTICE) > index.token_count
        {
            self.progress.report(Event::Notice(&format!(
                "{unknown_tokens} of {} tokens stand for what the vocabulary lacks, which teaches nothing: \
                 take another one",
                index.token_count
            )));
        }
    }
}

/// Encodes the input from `place` on into shards. Must run in a rayon pool.
pub(crate) fn encode_all(
    input: &TextInput,
    encoder: &Encoder,
    place: InputPosition,
    sink: &mut TokenSink<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    let cut = match input.unit {
        Document::File => encoder.cut(),
        Document::Line => CutRule::Line,
        Document::BlankLine => CutRule::BlankLine,
    };
    input.for_each(
        place,
        cut,
        |block| {
            let encoded = sink::encode(input, encoder, block);
            progress.report(Event::Advance { stage: Stage::Encoding, bytes: block.bytes });
            encoded
        },
        |encoded| sink.take(&encoded),
    )
}

/// Trains a vocabulary on the input; `path` is what an error calls it. Must run in a rayon pool.
pub(crate) fn train(
    input: &TextInput,
    wanted: WantedVocabulary,
    path: &Path,
    progress: &dyn Progress,
) -> Result<TrainedVocabulary> {
    let counts = count_words(input, wanted.lowercase, progress)?;
    if counts.is_empty() {
        return Err(Error::EmptyText { path: path.to_path_buf() });
    }
    vocabulary::train_alone(&counts, wanted, progress)
}

/// Counts the words of the input, or of about [`TRAINING_BYTES_MAX`] of it. Must run in a rayon
/// pool.
fn count_words(input: &TextInput, lowercase: bool, progress: &dyn Progress) -> Result<WordCounts> {
    progress.report(Event::Begin { stage: Stage::Counting, total_bytes: input.bytes() });
    let (counter, bytes) = (words::Counter::new(), input.bytes());
    let cut = match input.unit {
        Document::File => CutRule::Space,
        Document::Line | Document::BlankLine => CutRule::Line,
    };
    input.for_each(
        InputPosition::default(),
        cut,
        |block| {
            if is_counted(block.start, bytes) {
                let mut counts = counter.of_this_thread();
                input.segments(block, |segment, _| counts.add(&segment.text, lowercase))?;
            }
            progress.report(Event::Advance { stage: Stage::Counting, bytes: block.bytes });
            Ok(())
        },
        Ok,
    )?;
    progress.report(Event::End { stage: Stage::Counting });
    counter.into_total(lowercase)
}

/// Whether the words of the block at `start` are counted, of so many bytes of input: as if drawn by
/// lot, the first always.
fn is_counted(start: InputPosition, bytes: u64) -> bool {
    let lot = mix(mix(to_u64(start.file)) ^ start.offset);
    let is_first = (start.file, start.offset) == (0, 0);
    bytes <= TRAINING_BYTES_MAX || is_first || lot % bytes < TRAINING_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_block_in_so_many_is_counted() {
        let is_share = |bytes| {
            let places = (0..10_000).map(|at| InputPosition {
                file: at % 3,
                offset: to_u64(at) << 16,
                line: 0,
            });
            places.filter(|&place| is_counted(place, bytes)).count()
        };
        let counted = |times: u64| is_share(times * TRAINING_BYTES_MAX);
        assert_eq!((counted(0), counted(1)), (10_000, 10_000));
        assert!((900..1100).contains(&counted(10)), "{}", counted(10));
        // As much as is promised, also of little more than that; and something of the first block.
        let most = is_share(TRAINING_BYTES_MAX / 10 * 11);
        assert!((8900..9300).contains(&most), "{most}");
        assert!(is_counted(InputPosition::default(), u64::MAX));
    }
}
