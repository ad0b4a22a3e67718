//! What of a conversion is done: a line for each finished shard, so that the same command goes on
//! after it.
//!
//! `conversion.jsonl` lies beside the shards. Its first line says what is converted and how (a
//! key); each further one names a shard that is whole and synced to disk, and the place of the
//! input after it. A last line that a crash cut off does not count. The file is the same whether a
//! conversion was interrupted or not, and stays in the finished folder.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::block::InputPosition;
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::format::index::{ShardEntry, ShardFile};
use crate::format::{json, TokenShard};

/// The name of the journal in a folder.
pub(crate) const JOURNAL_FILE: &str = "conversion.jsonl";

const FORMAT: &str = "phalanx-conversion";
const VERSION: u32 = 1;

/// A journal has some hundred bytes and four a GiB for each shard; more is not one.
const JOURNAL_BYTES_MAX: u64 = 256 << 20;

/// A line has no fewer bytes.
const LINE_BYTES_MIN: usize = 160;

/// Memory that a value of a journal takes, at most. A line has 28, with names and brackets.
const VALUE_BYTES: usize = 8;

#[derive(Debug, Serialize, Deserialize)]
struct JournalHead {
    format: String,
    version: u32,
    key: Fingerprint,
}

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalEntry<S = TokenShard> {
    pub(crate) shard: S,
    /// Where the input goes on.
    pub(crate) next: InputPosition,
    /// Of all shards up to this one.
    pub(crate) counts: ConvertCounts,
}

/// What was counted on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConvertCounts {
    /// Lines that were left out because they are bad.
    pub(crate) skipped_lines: u64,
    /// Tokens that stand for what the vocabulary lacks.
    pub(crate) unknown_tokens: u64,
}

/// The journal of a running conversion.
#[derive(Debug)]
pub(crate) struct ConversionJournal {
    path: PathBuf,
    file: File,
    /// Shards in it.
    noted: usize,
}

/// What lies in a folder.
#[derive(Debug)]
pub(crate) enum FoundJournal<S = TokenShard> {
    /// No journal.
    Nothing,
    /// The journal of another conversion, with at least one shard.
    Other,
    /// These shards are done.
    Shards(Vec<JournalEntry<S>>),
}

/// Reads the journal of a folder.
pub(crate) fn read<S: ShardEntry>(folder: &Path, key: Fingerprint) -> Result<FoundJournal<S>> {
    let path = folder.join(JOURNAL_FILE);
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            let mut bounded = file.take(JOURNAL_BYTES_MAX);
            bounded.read_to_end(&mut text).map_err(Error::io("read", &path))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(FoundJournal::Nothing)
        }
        Err(error) => return Err(Error::io("open", &path)(error)),
    }
    Ok(parse(&text, key, |&ShardFile { file, file_bytes, .. }| {
        let found = std::fs::metadata(folder.join(file));
        found.is_ok_and(|metadata| metadata.is_file() && metadata.len() == file_bytes)
    }))
}

/// The entries of a journal, up to the first that is cut off or whose shard is not `there`.
fn parse<S: ShardEntry>(
    text: &[u8],
    key: Fingerprint,
    there: impl Fn(&ShardFile<'_>) -> bool,
) -> FoundJournal<S> {
    let mut lines =
        text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let head: Option<JournalHead> = lines.next().and_then(|line| serde_json::from_slice(line).ok());
    match head {
        None => FoundJournal::Nothing,
        Some(head) if head.format != FORMAT || head.version != VERSION || head.key != key => {
            // It is of no use if not a single shard was finished.
            lines.next().map_or(FoundJournal::Nothing, |_| FoundJournal::Other)
        }
        // A text that no converter wrote is not parsed: it could take many times its size in
        // memory.
        Some(_) if json::check(text, VALUE_BYTES, text.len()).is_err() => {
            FoundJournal::Shards(Vec::new())
        }
        Some(_) => {
            let mut entries = Vec::with_capacity(text.len() / LINE_BYTES_MIN);
            entries.extend(
                lines
                    .map_while(|line| serde_json::from_slice::<JournalEntry<S>>(line).ok())
                    .take_while(|entry| {
                        is_plain(entry.shard.listed().file) && there(&entry.shard.listed())
                    }),
            );
            FoundJournal::Shards(entries)
        }
    }
}

/// Whether a text is a journal with at least one shard.
#[cfg(feature = "testing")]
pub(crate) fn parses(text: &[u8]) -> bool {
    let found = parse::<TokenShard>(text, Fingerprint(7), |_| true);
    matches!(found, FoundJournal::Shards(entries) if !entries.is_empty())
}

fn is_plain(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|plain| plain == name)
}

impl ConversionJournal {
    /// Writes a journal with what is done so far.
    pub(crate) fn create<S: ShardEntry>(
        folder: &Path,
        key: Fingerprint,
        done: &[JournalEntry<S>],
    ) -> Result<Self> {
        let path = folder.join(JOURNAL_FILE);
        let head = JournalHead { format: FORMAT.to_owned(), version: VERSION, key };
        let mut text = line(&head, &path)?;
        for entry in done {
            text.extend(line(entry, &path)?);
        }
        // Beside, then renamed: a crash leaves the old one or the new one.
        let beside = path.with_extension("new");
        std::fs::write(&beside, &text).map_err(Error::io("write", &beside))?;
        let mut file =
            OpenOptions::new().append(true).open(&beside).map_err(Error::io("open", &beside))?;
        file.sync_all().map_err(Error::io("sync", &beside))?;
        std::fs::rename(&beside, &path).map_err(Error::io("rename", &beside))?;
        file.flush().map_err(Error::io("write", &path))?;
        Ok(ConversionJournal { path, file, noted: done.len() })
    }

    /// Adds a shard that lies on the disk.
    pub(crate) fn add<S: ShardEntry>(&mut self, entry: &JournalEntry<S>) -> Result<()> {
        let text = line(entry, &self.path)?;
        self.file.write_all(&text).map_err(Error::io("write", &self.path))?;
        self.noted += 1;
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }

    /// How many shards it names.
    pub(crate) fn noted(&self) -> usize {
        self.noted
    }
}

fn line(value: &impl Serialize, path: &Path) -> Result<Vec<u8>> {
    let mut text =
        serde_json::to_vec(value).map_err(|error| Error::io("write", path)(error.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// How many shards, for messages.
pub(crate) fn count<S>(entries: &[JournalEntry<S>]) -> u64 {
    to_u64(entries.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Fingerprint = Fingerprint(7);

    fn entry(number: u64) -> JournalEntry {
        let file = format!("tokens-{number:05}.safetensors");
        let shard = TokenShard {
            file,
            file_bytes: 9,
            token_count: number,
            document_count: 1,
            crc32c: vec![1, 2],
        };
        let next = InputPosition { file: 0, offset: 100 * number, line: number };
        JournalEntry { shard, next, counts: ConvertCounts::default() }
    }

    fn shards(found: FoundJournal<TokenShard>) -> Vec<JournalEntry> {
        match found {
            FoundJournal::Shards(shards) => shards,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_added_is_read_whatever_cut_off_the_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read::<TokenShard>(folder.path(), KEY).unwrap(), FoundJournal::Nothing));
        let mut journal = ConversionJournal::create(folder.path(), KEY, &[entry(0)]).unwrap();
        journal.add(&entry(1)).unwrap();
        let text = std::fs::read(folder.path().join(JOURNAL_FILE)).unwrap();
        for len in 0..=text.len() {
            let whole_lines = text[..len].iter().filter(|&&byte| byte == b'\n').count();
            match parse(&text[..len], KEY, |_| true) {
                FoundJournal::Nothing => assert_eq!(whole_lines, 0),
                FoundJournal::Shards(found) => {
                    assert_eq!(found, [entry(0), entry(1)][..whole_lines - 1]);
                }
                FoundJournal::Other => panic!("it is the same conversion"),
            }
        }
    }

    #[test]
    fn shards_that_are_not_there_are_not_done() {
        let folder = tempfile::tempdir().unwrap();
        drop(
            ConversionJournal::create(folder.path(), KEY, &[entry(0), entry(1), entry(2)]).unwrap(),
        );
        for number in [0, 2] {
            let name = entry(number).shard.file;
            std::fs::write(folder.path().join(name), [0; 9]).unwrap();
        }
        assert_eq!(shards(read(folder.path(), KEY).unwrap()), [entry(0)]);
        assert!(matches!(
            read::<TokenShard>(folder.path(), Fingerprint(8)).unwrap(),
            FoundJournal::Other
        ));
    }

    #[test]
    fn a_shard_outside_the_folder_is_not_believed() {
        let mut bad = entry(0);
        bad.shard.file = "../elsewhere".to_owned();
        let folder = tempfile::tempdir().unwrap();
        drop(ConversionJournal::create(folder.path(), KEY, &[bad]).unwrap());
        let text = std::fs::read(folder.path().join(JOURNAL_FILE)).unwrap();
        assert_eq!(shards(parse(&text, KEY, |_| true)), []);
    }
}
