//! What is known to be damaged in a folder: `damage.json`, written by [`record_damage`], read by a loader that leaves it out.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cast::to_usize;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::format::bytes::Bytes;
use crate::format::files::{partial_path, write_synced, Layout, Listed};
use crate::format::{json, Index, INDEX_BYTES_MAX, VALUE_BYTES};
use crate::records::RecordIndex;
use crate::source::Folder;
use crate::verify::Verified;

/// The list of a folder.
pub(crate) const DAMAGE_FILE: &str = "damage.json";

const FORMAT: &str = "phalanx-damage";
const VERSION: u32 = 1;

/// What a loader does about blocks that are known to be damaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDamage {
    /// Whoever reads one gets [`Error::Damaged`].
    #[default]
    #[serde(alias = "error")]
    Fail,
    /// Samples that lie in blocks that `damage.json` lists (see [`record_damage`]) are left out: in their place comes a row
    /// that does not count ([`Batch::valid`](crate::Batch::valid)) and holds another sample. Order, saved states and
    /// batch sizes stay as they are, on every rank; only the weights of a step's ranks change. All machines need the
    /// same list. A damaged block that is not listed is an error as ever.
    Skip,
}

/// A damaged block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DamagedBlock {
    /// The shard, by its name in the folder.
    pub file: String,
    /// The block's number.
    pub block: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct DamageList {
    format: String,
    version: u32,
    /// Of the folder that it belongs to.
    fingerprint: Fingerprint,
    blocks: Vec<DamagedBlock>,
    /// Shards of which nothing is read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lost: Vec<String>,
}

/// What is known of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ShardDamage {
    /// It is not opened.
    pub(crate) is_lost: bool,
    pub(crate) blocks: Vec<u64>,
}

/// Writes what [`verify`](crate::verify) has found damaged to `damage.json` in the folder, for [`OnDamage::Skip`]: blocks, and shards that
/// are missing, of another size or without a usable header as lost; a list that is there is replaced, or removed if nothing is
/// damaged. Copy it to every machine that has a copy of the folder.
///
/// # Errors
/// What is wrong besides that: a shard that may not be read, say, is not damaged. A `tokenizer.json` of other tokens, or that
/// cannot be read, is passed over.
/// [`Error::Io`].
pub fn record_damage(folder: &Path, found: &Verified) -> Result<()> {
    // Of a tokenizer no sample is made: it has no place in the list.
    let is_beside =
        |error: &Error| matches!(error, Error::OtherTokenizer { .. } | Error::Tokenizer { .. });
    let mut others = found.damage.iter().filter(|error| !is_beside(error));
    let other = others.find(|error| !is_damaged(error) && !is_lost(error));
    if let Some(error) = other {
        let reason =
            "only what is damaged or missing can be left out; see to it that the shard can be read";
        return Err(Error::option("damage", error, reason));
    }
    let path = folder.join(DAMAGE_FILE);
    if found.blocks.is_empty() && found.lost.is_empty() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(error))
            }
            _ => Ok(()),
        };
    }
    let fingerprint = if RecordIndex::is_in(folder) {
        RecordIndex::read(folder)?.fingerprint
    } else {
        Index::read(folder)?.fingerprint
    };
    let (blocks, lost) = (found.blocks.clone(), found.lost.clone());
    let format = FORMAT.to_owned();
    let list = DamageList { format, version: VERSION, fingerprint, blocks, lost };
    let mut json = serde_json::to_vec_pretty(&list).unwrap_or_default();
    json.push(b'\n');
    let partial = partial_path(&path);
    write_synced(&partial, &json)?;
    fs::rename(&partial, &path).map_err(Error::io("rename", &partial))
}

/// Whether a block is known not to hold what was written.
pub(crate) fn is_damaged(error: &Error) -> bool {
    match error.root() {
        Error::Damaged { .. } => true,
        Error::Io { cause, .. } => {
            cause.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
        }
        _ => false,
    }
}

/// Whether a shard is not there as it was written.
pub(crate) fn is_lost(error: &Error) -> bool {
    match error.root() {
        Error::WrongSize { .. }
        | Error::BadHeader { .. }
        | Error::MissingTensor { .. }
        | Error::WrongDType { .. }
        | Error::WrongShape { .. } => true,
        Error::Io { cause, .. } => cause.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// What is listed in a folder of this fingerprint, for each of its shards.
pub(crate) fn read(
    folder: &dyn Folder,
    fingerprint: Fingerprint,
    shards: &[Listed<'_>],
) -> Result<Vec<ShardDamage>> {
    let mut known = vec![ShardDamage::default(); shards.len()];
    let Some(source) = folder.find(DAMAGE_FILE)? else { return Ok(known) };
    let file = Bytes::of(source, None)?;
    let bad = |reason: String| Error::BadDamageList { path: file.path().to_path_buf(), reason };
    if file.len() > INDEX_BYTES_MAX {
        return Err(bad(format!("{} bytes are too many for a list of damage", file.len())));
    }
    let mut scratch = Vec::new();
    let text = file.read(0, to_usize(file.len()), &mut scratch)?;
    let list = json::parse::<DamageList>(text, VALUE_BYTES);
    file.check(0..file.len())?;
    let list = list.map_err(|error| bad(format!("not a list of damage: {error}")))?;
    if list.format != FORMAT || list.version != VERSION {
        let DamageList { format, version, .. } = list;
        let ours = format!("this program reads {FORMAT} version {VERSION}");
        return Err(bad(format!("format {format} version {version}, {ours}")));
    }
    if list.fingerprint != fingerprint {
        let theirs = list.fingerprint;
        return Err(bad(format!("it is of the data {theirs}, not of {fingerprint}")));
    }
    let find = |name: &str| shards.iter().position(|shard| shard.file == name);
    for DamagedBlock { file: name, block } in list.blocks {
        let has = |&at: &usize| {
            Layout::of(shards[at].file_bytes).is_some_and(|layout| block < layout.blocks)
        };
        let Some(at) = find(&name).filter(has) else {
            return Err(bad(format!("there is no block {block} of `{name}`")));
        };
        known[at].blocks.push(block);
    }
    for name in list.lost {
        let at = find(&name).ok_or_else(|| bad(format!("there is no shard `{name}`")))?;
        known[at].is_lost = true;
    }
    Ok(known)
}

/// Ranges in ascending order, none of which touches another.
pub(crate) fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    let mut out: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// Samples that are left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holes {
    ranges: Vec<Range<u64>>,
    /// The first sample that is good.
    good: u64,
    sample_count: u64,
}

impl Holes {
    /// Ranges of samples out of `sample_count`.
    pub(crate) fn new(ranges: Vec<Range<u64>>, sample_count: u64) -> Result<Self> {
        let ranges = merged(ranges);
        let good = ranges.first().filter(|first| first.start == 0).map_or(0, |first| first.end);
        if good >= sample_count {
            let reason = "every sample is damaged: copy or prepare the data again";
            return Err(Error::option("on_damage", "skip", reason));
        }
        Ok(Holes { ranges, good, sample_count })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Says in few characters which samples they are: how many, and a fingerprint.
    pub(crate) fn summary(&self) -> String {
        if self.is_empty() {
            return "none".to_owned();
        }
        let count: u64 = self.ranges.iter().map(|range| range.end - range.start).sum();
        let sum = Fingerprinter::new("damaged samples 1");
        let sum = self.ranges.iter().fold(sum, |sum, r| sum.number(r.start).number(r.end));
        format!("{count} ({})", sum.finish())
    }

    /// What is read in place of a sample that is left out.
    #[inline]
    pub(crate) fn instead(&self, id: u64) -> Option<u64> {
        let at = self.ranges.partition_point(|range| range.end <= id);
        let range = self.ranges.get(at).filter(|range| range.contains(&id))?;
        Some(if range.end < self.sample_count { range.end } else { self.good })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(merged(vec![5..7, 0..2, 2..3, 6..9, 4..4]), [0..3, 5..9]);
        assert_eq!(merged(Vec::new()), []);
    }

    #[test]
    fn a_good_sample_stands_in_for_one_that_is_left_out() {
        let holes = Holes::new(vec![0..2, 5..6, 8..10], 10).unwrap();
        let instead: Vec<Option<u64>> = (0..10).map(|id| holes.instead(id)).collect();
        let (two, six) = (Some(2), Some(6));
        assert_eq!(instead, [two, two, None, None, None, six, None, None, two, two]);
        assert!(Holes::new(vec![0..4, 4..10], 10).is_err());
        assert!(Holes::default().instead(3).is_none());
    }
}
