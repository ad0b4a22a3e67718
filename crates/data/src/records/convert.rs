//! Files to records: parts of files are read by all threads and appended in order; after each shard
//! a journal says how far the input is done, so that the same call goes on there.

use std::num::NonZeroUsize;
use std::path::Path;

use rayon::prelude::*;

use super::field::Field;
use super::index::{RecordIndex, RecordShard};
use super::packed::PackedColumn;
use super::writer::RecordWriter;
use crate::cast::{to_u64, to_usize};
use crate::convert::block::InputPosition;
use crate::convert::input::InputFile;
use crate::convert::journal::{self, ConversionJournal, ConvertCounts, JournalEntry};
use crate::convert::resume;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::folder::OnDrop;
use crate::format::lock::Lock;
use crate::progress::{Event, Progress, Stage};
use crate::threads::in_pool;

/// Part of every key: raised when the same input and options give other files.
const KEY_VERSION: &str = "records 1";

/// Parts in flight for each thread, and their bytes, unless each thread has only one: enough that a
/// slow one does not make the others wait.
const PARTS_PER_THREAD: usize = 4;
const BYTES_PER_THREAD: u64 = 64 << 20;

/// Bytes of parts in flight for each thread, whatever their number; a single larger one is let
/// through. Row groups are written with some hundred MiB.
const BYTES_PER_THREAD_MAX: u64 = 256 << 20;

/// How files are converted to records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordOptions {
    /// A shard is closed after so many bytes of values and of their offsets.
    pub shard_bytes: u64,
    /// Threads; all processors if not given. The result does not depend on it.
    pub threads: Option<NonZeroUsize>,
    /// What an earlier conversion of other input or with other options left half done is dropped.
    pub restart: bool,
}

impl Default for RecordOptions {
    fn default() -> Self {
        RecordOptions { shard_bytes: RecordWriter::SHARD_BYTES, threads: None, restart: false }
    }
}

/// What a conversion to records made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvertedRecords {
    /// What the folder holds.
    pub index: RecordIndex,
    /// Bytes of the files that it was made of.
    pub source_bytes: u64,
    /// Shards that an interrupted run of the same conversion had finished.
    pub resumed_shards: u64,
    /// Whether all of it was there already.
    pub reused: bool,
}

/// Files that become records.
pub(super) trait RecordInput: Sync {
    /// What is to be read of a part.
    type Content: Send + Sync;

    fn files(&self) -> &[InputFile];

    fn fields(&self) -> &[Field];

    /// Finds the parts of a file, in order, without reading more than that takes.
    fn parts(&self, file: usize) -> Result<InputParts<'_, Self::Content>>;

    /// Reads a part: for each field as many rows as the part has.
    fn read(&self, file: usize, part: &InputPart<Self::Content>) -> Result<Vec<PackedColumn>>;
}

/// The parts of a file.
pub(super) type InputParts<'a, C> = Box<dyn Iterator<Item = Result<InputPart<C>>> + 'a>;

/// Rows of a file that are read at once.
pub(super) struct InputPart<C> {
    /// Rows of the file before it.
    pub(super) first: u64,
    pub(super) rows: u64,
    /// What they take in memory, about.
    pub(super) memory_bytes: u64,
    /// Bytes of the file that they stand for, about.
    pub(super) file_bytes: u64,
    pub(super) content: C,
}

/// Converts `input` to a folder at `output`. `kind` says how it is read.
pub(super) fn convert<I: RecordInput>(
    input: &I,
    kind: &str,
    output: &Path,
    options: &RecordOptions,
    progress: &dyn Progress,
) -> Result<ConvertedRecords> {
    if options.shard_bytes == 0 {
        return Err(Error::option("shard_bytes", 0, "a shard holds at least one byte"));
    }
    let key = key(input, kind, options);
    let source_bytes = input.files().iter().map(|file| file.bytes).sum();
    let lock = resume::lock(output)?;
    if resume::finished::<RecordShard>(output, key, RecordIndex::is_in)?.is_some() {
        let index = RecordIndex::read(output)?;
        return Ok(ConvertedRecords { index, source_bytes, resumed_shards: 0, reused: true });
    }
    let done = resume::half_done(output, key, options.restart, |_| true, progress)?;
    let resumed_shards = journal::count(&done);
    let work = RecordConversion { input, output, shard_bytes: options.shard_bytes, key, progress };
    let index = in_pool(options.threads, || work.run(&done, lock))?.inspect_err(|error| {
        resume::tell_what_stays::<RecordShard>(output, key, error, progress);
    })?;
    Ok(ConvertedRecords { index, source_bytes, resumed_shards, reused: false })
}

/// All that decides about the result.
fn key(input: &impl RecordInput, kind: &str, options: &RecordOptions) -> Fingerprint {
    let fields = format!("{:?}", input.fields());
    let sum = Fingerprinter::new(KEY_VERSION).bytes(kind.as_bytes()).bytes(fields.as_bytes());
    let sum = sum.number(options.shard_bytes);
    input.files().iter().fold(sum, |sum, file| file.add_to(sum)).finish()
}

/// A conversion under its lock.
struct RecordConversion<'a, I> {
    input: &'a I,
    output: &'a Path,
    shard_bytes: u64,
    key: Fingerprint,
    progress: &'a dyn Progress,
}

impl<I: RecordInput> RecordConversion<'_, I> {
    /// Must run in a rayon pool.
    fn run(&self, done: &[JournalEntry<RecordShard>], lock: Lock) -> Result<RecordIndex> {
        let shards = done.iter().map(|entry| entry.shard.clone()).collect();
        let fields = self.input.fields().to_vec();
        let writer = RecordWriter::resume(
            self.output,
            fields,
            self.shard_bytes,
            shards,
            (lock, OnDrop::Keep),
        )?;
        let journal = ConversionJournal::create(writer.folder(), self.key, done)?;
        let mut sink = RecordSink { writer, journal };
        let place = done.last().map_or_else(InputPosition::default, |last| last.next);
        let sizes: Vec<u64> = self.input.files().iter().map(|file| file.bytes).collect();
        // Places of records count rows: of the file in which they go on nothing is counted as done.
        let total_bytes = sizes.iter().skip(place.file).sum();
        self.progress.report(Event::Begin { stage: Stage::Records, total_bytes });
        self.read_all(place, &mut sink)?;
        self.progress.report(Event::End { stage: Stage::Records });
        self.input.files().iter().try_for_each(InputFile::check_unchanged)?;
        sink.writer.close()?;
        sink.note(InputPosition { file: sizes.len(), ..InputPosition::default() })?;
        sink.writer.finish()
    }

    fn read_all(&self, place: InputPosition, sink: &mut RecordSink) -> Result<()> {
        let threads = rayon::current_num_threads();
        let bytes_max = to_u64(threads) * BYTES_PER_THREAD_MAX;
        let (mut waiting, mut waiting_bytes) = (Vec::new(), 0_u64);
        for file in place.file..self.input.files().len() {
            // Parts say about how much of the file they stand for; all of them, and what lies
            // between them, are all of it.
            let mut rest_bytes = self.input.files()[file].bytes;
            for part in self.input.parts(file)? {
                let mut part = part?;
                part.file_bytes = part.file_bytes.min(rest_bytes);
                rest_bytes -= part.file_bytes;
                if file == place.file && part.first + part.rows <= place.line {
                    self.advance(part.file_bytes);
                    continue;
                }
                if waiting_bytes.saturating_add(part.memory_bytes) > bytes_max {
                    self.hand_on(&mut waiting, place, sink)?;
                    waiting_bytes = 0;
                }
                waiting_bytes = waiting_bytes.saturating_add(part.memory_bytes);
                waiting.push((file, part));
                let is_full = waiting_bytes >= to_u64(threads) * BYTES_PER_THREAD;
                if waiting.len() >= threads * if is_full { 1 } else { PARTS_PER_THREAD } {
                    self.hand_on(&mut waiting, place, sink)?;
                    waiting_bytes = 0;
                }
            }
            self.advance(rest_bytes);
        }
        self.hand_on(&mut waiting, place, sink)
    }

    /// Reads parts, each of a file, and appends their rows, but for those before `place`.
    fn hand_on(
        &self,
        parts: &mut Vec<(usize, InputPart<I::Content>)>,
        place: InputPosition,
        sink: &mut RecordSink,
    ) -> Result<()> {
        // What a part holds is let go of when it was read.
        let read = |(file, part): (usize, InputPart<I::Content>)| {
            let columns = self.input.read(file, &part);
            self.advance(part.file_bytes);
            (file, part.first, part.rows, columns)
        };
        // In order up to the first error, so that the same one is reported whatever the threads do.
        let all: Vec<_> = parts.par_drain(..).map(read).collect();
        all.into_iter().try_for_each(|(file, first, rows, columns)| {
            let done = if file == place.file { place.line } else { 0 };
            let already = to_usize(done.saturating_sub(first).min(rows));
            let columns = columns?;
            // Places in the journal count rows as the file's own directory does.
            if let Some(other) = columns.iter().find(|one| to_u64(one.rows()) != rows) {
                let path = self.input.files()[file].path.clone();
                let reason = format!(
                    "it says that {rows} rows begin at row {first}, and a column has {}",
                    other.rows()
                );
                return Err(Error::BadTable { path, reason });
            }
            sink.append(file, first, &columns, already)
        })
    }

    fn advance(&self, bytes: u64) {
        self.progress.report(Event::Advance { stage: Stage::Records, bytes });
    }
}

/// Shards, and the journal of them.
struct RecordSink {
    writer: RecordWriter,
    journal: ConversionJournal,
}

impl RecordSink {
    /// Appends rows of a file, the first of which is row `first`, from the one number `at` on.
    fn append(
        &mut self,
        file: usize,
        first: u64,
        columns: &[PackedColumn],
        at: usize,
    ) -> Result<()> {
        let rows = columns.first().map_or(0, PackedColumn::rows);
        let mut at = at;
        while at < rows {
            let shards = self.writer.shards().len();
            at += self.writer.append(columns, at)?;
            if self.writer.shards().len() > shards {
                let row = first + to_u64(at);
                self.note(InputPosition { file, offset: row, line: row })?;
            }
        }
        Ok(())
    }

    /// The last shard is whole if it is not noted yet, and holds the input up to `next`.
    fn note(&mut self, next: InputPosition) -> Result<()> {
        let shards = self.writer.shards();
        let Some(shard) = shards.last().filter(|_| self.journal.noted() < shards.len()) else {
            return Ok(());
        };
        let counts = ConvertCounts::default();
        self.journal.add(&JournalEntry { shard: shard.clone(), next, counts })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::Arc;

    use super::*;
    use crate::batches::DType;
    use crate::convert::input;
    use crate::progress::Silent;

    /// Parts that say how much memory they take, and take none.
    struct Sized {
        files: Vec<InputFile>,
        fields: [Field; 1],
        part_bytes: Vec<u64>,
        held: Arc<AtomicU64>,
        held_max: AtomicU64,
    }

    /// What is held of a part until it was read.
    struct Held(Arc<AtomicU64>, u64);

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.fetch_sub(self.1, Ordering::SeqCst);
        }
    }

    impl RecordInput for Sized {
        type Content = Held;

        fn files(&self) -> &[InputFile] {
            &self.files
        }

        fn fields(&self) -> &[Field] {
            &self.fields
        }

        fn parts(&self, _file: usize) -> Result<InputParts<'_, Held>> {
            Ok(Box::new((0..).zip(&self.part_bytes).map(|(first, &memory_bytes)| {
                let held = self.held.fetch_add(memory_bytes, Ordering::SeqCst) + memory_bytes;
                self.held_max.fetch_max(held, Ordering::SeqCst);
                let content = Held(Arc::clone(&self.held), memory_bytes);
                Ok(InputPart { first, rows: 1, memory_bytes, file_bytes: 0, content })
            })))
        }

        fn read(&self, _file: usize, part: &InputPart<Held>) -> Result<Vec<PackedColumn>> {
            Ok(vec![PackedColumn::of_rows(part.first.to_le_bytes().to_vec(), 8, 1)])
        }
    }

    #[test]
    fn parts_in_flight_are_bounded_in_bytes_whatever_the_threads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, "f").unwrap();
        let (files, _) = input::list(&[path], Some(crate::convert::Format::Text), &Silent).unwrap();
        let (small, half, huge) = (1_u64 << 10, 150_u64 << 20, 3_u64 << 30);
        // A part that is too large to come along has been found already.
        for (part_bytes, expected) in [
            (vec![small; 40], 16 * small),
            (vec![half; 12], 4 * half),
            (vec![huge; 6], 2 * huge),
            ([vec![small; 5], vec![huge; 2], vec![half; 3]].concat(), 2 * huge),
        ] {
            let sized = Sized {
                files: files.clone(),
                fields: [Field::fixed("number", DType::I64, [])],
                part_bytes,
                held: Arc::default(),
                held_max: AtomicU64::new(0),
            };
            let output = tempfile::tempdir().unwrap();
            let options =
                RecordOptions { threads: NonZeroUsize::new(4), ..RecordOptions::default() };
            let output = output.path().join("records");
            let made = convert(&sized, "sized", &output, &options, &Silent).unwrap();
            assert_eq!(made.index.record_count, to_u64(sized.part_bytes.len()));
            assert_eq!(sized.held.load(Ordering::SeqCst), 0);
            assert_eq!(sized.held_max.load(Ordering::SeqCst), expected);
        }
    }
}
