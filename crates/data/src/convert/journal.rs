//! What of a conversion is done: a line for each finished shard, so that the same command goes on after it.
//!
//! `conversion.jsonl` lies beside the shards. Its first line says what is converted and how (a key); each further one names a
//! shard that is whole and synced to disk, and the place of the input after it. A last line that a crash cut off does not count. The
//! file is the same whether a conversion was interrupted or not, and stays in the finished folder.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::block::Place;
use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::format::{json, ShardEntry};
use crate::records::RecordShard;

/// The name of the journal in a folder.
pub(crate) const JOURNAL_FILE: &str = "conversion.jsonl";

const FORMAT: &str = "phalanx-conversion";
const VERSION: u32 = 1;

/// A journal has some hundred bytes and four a GiB for each shard; more is not one.
const JOURNAL_BYTES_MAX: u64 = 256 << 20;

/// A line has no fewer bytes.
const LINE_BYTES_MIN: usize = 160;

/// A value of a journal takes no more memory; a line has 28, with names and brackets.
const VALUE_BYTES: usize = 8;

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    key: Fingerprint,
}

/// A shard as an index lists it.
pub(crate) trait Listed: Clone + Serialize + DeserializeOwned {
    /// Its name and its size in bytes.
    fn file(&self) -> (&str, u64);
}

impl Listed for ShardEntry {
    fn file(&self) -> (&str, u64) {
        (&self.file, self.file_bytes)
    }
}

impl Listed for RecordShard {
    fn file(&self) -> (&str, u64) {
        (&self.file, self.file_bytes)
    }
}

/// A finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry<S = ShardEntry> {
    pub(crate) shard: S,
    /// Where the input goes on.
    pub(crate) next: Place,
    /// Of all shards up to this one.
    pub(crate) counts: Counts,
}

/// What was counted on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Lines that were left out because they are bad.
    pub(crate) skipped_lines: u64,
    /// Tokens that stand for what the vocabulary lacks.
    pub(crate) unknown_tokens: u64,
}

/// The journal of a running conversion.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Shards in it.
    noted: usize,
}

/// What lies in a folder.
#[derive(Debug)]
pub(crate) enum Found<S = ShardEntry> {
    /// No journal.
    Nothing,
    /// The journal of another conversion, with at least one shard.
    Other,
    /// These shards are done.
    Shards(Vec<Entry<S>>),
}

/// Reads the journal of a folder.
pub(crate) fn read<S: Listed>(folder: &Path, key: Fingerprint) -> Result<Found<S>> {
    let path = folder.join(JOURNAL_FILE);
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            let mut bounded = file.take(JOURNAL_BYTES_MAX);
            bounded.read_to_end(&mut text).map_err(Error::io("read", &path))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(Error::io("open", &path)(error)),
    }
    Ok(parse(&text, key, |(file, bytes)| {
        let found = std::fs::metadata(folder.join(file));
        found.is_ok_and(|metadata| metadata.is_file() && metadata.len() == bytes)
    }))
}

/// The entries of a journal, up to the first that is cut off or whose shard is not `there`.
fn parse<S: Listed>(
    text: &[u8],
    key: Fingerprint,
    there: impl Fn((&str, u64)) -> bool,
) -> Found<S> {
    let mut lines =
        text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let head: Option<Head> = lines.next().and_then(|line| serde_json::from_slice(line).ok());
    match head {
        None => Found::Nothing,
        Some(head) if head.format != FORMAT || head.version != VERSION || head.key != key => {
            // Of no use to anybody if not a single shard was finished.
            lines.next().map_or(Found::Nothing, |_| Found::Other)
        }
        // What nobody has written is not parsed: it could take many times its size.
        Some(_) if json::check(text, VALUE_BYTES, text.len()).is_err() => Found::Shards(Vec::new()),
        Some(_) => {
            let mut entries = Vec::with_capacity(text.len() / LINE_BYTES_MIN);
            entries.extend(
                lines.map_while(|line| serde_json::from_slice::<Entry<S>>(line).ok()).take_while(
                    |entry| is_plain(entry.shard.file().0) && there(entry.shard.file()),
                ),
            );
            Found::Shards(entries)
        }
    }
}

/// Whether a text is a journal with at least one shard.
#[cfg(feature = "testing")]
pub(crate) fn parses(text: &[u8]) -> bool {
    let found = parse::<ShardEntry>(text, Fingerprint(7), |_| true);
    matches!(found, Found::Shards(entries) if !entries.is_empty())
}

fn is_plain(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|plain| plain == name)
}

impl Journal {
    /// Writes a journal with what is done so far.
    pub(crate) fn create<S: Listed>(
        folder: &Path,
        key: Fingerprint,
        done: &[Entry<S>],
    ) -> Result<Self> {
        let path = folder.join(JOURNAL_FILE);
        let head = Head { format: FORMAT.to_owned(), version: VERSION, key };
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
        Ok(Journal { path, file, noted: done.len() })
    }

    /// Adds a shard that lies on the disk.
    pub(crate) fn add<S: Listed>(&mut self, entry: &Entry<S>) -> Result<()> {
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
pub(crate) fn count<S>(entries: &[Entry<S>]) -> u64 {
    to_u64(entries.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Fingerprint = Fingerprint(7);

    fn entry(number: u64) -> Entry {
        let file = format!("tokens-{number:05}.safetensors");
        let shard = ShardEntry {
            file,
            file_bytes: 9,
            token_count: number,
            document_count: 1,
            crc32c: vec![1, 2],
        };
        let next = Place { file: 0, offset: 100 * number, line: number };
        Entry { shard, next, counts: Counts::default() }
    }

    fn shards(found: Found<ShardEntry>) -> Vec<Entry> {
        match found {
            Found::Shards(shards) => shards,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_added_is_read_whatever_cut_off_the_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read::<ShardEntry>(folder.path(), KEY).unwrap(), Found::Nothing));
        let mut journal = Journal::create(folder.path(), KEY, &[entry(0)]).unwrap();
        journal.add(&entry(1)).unwrap();
        let text = std::fs::read(folder.path().join(JOURNAL_FILE)).unwrap();
        for len in 0..=text.len() {
            let whole_lines = text[..len].iter().filter(|&&byte| byte == b'\n').count();
            match parse(&text[..len], KEY, |_| true) {
                Found::Nothing => assert_eq!(whole_lines, 0),
                Found::Shards(found) => {
                    assert_eq!(found, [entry(0), entry(1)][..whole_lines - 1]);
                }
                Found::Other => panic!("it is the same conversion"),
            }
        }
    }

    #[test]
    fn shards_that_are_not_there_are_not_done() {
        let folder = tempfile::tempdir().unwrap();
        drop(Journal::create(folder.path(), KEY, &[entry(0), entry(1), entry(2)]).unwrap());
        for number in [0, 2] {
            let name = entry(number).shard.file;
            std::fs::write(folder.path().join(name), [0; 9]).unwrap();
        }
        assert_eq!(shards(read(folder.path(), KEY).unwrap()), [entry(0)]);
        assert!(matches!(read::<ShardEntry>(folder.path(), Fingerprint(8)).unwrap(), Found::Other));
    }

    #[test]
    fn a_shard_outside_the_folder_is_not_believed() {
        let mut bad = entry(0);
        bad.shard.file = "../elsewhere".to_owned();
        let folder = tempfile::tempdir().unwrap();
        drop(Journal::create(folder.path(), KEY, &[bad]).unwrap());
        let text = std::fs::read(folder.path().join(JOURNAL_FILE)).unwrap();
        assert_eq!(shards(parse(&text, KEY, |_| true)), []);
    }
}
