//! `damage.json`: the blocks and shards of a folder that are known to be damaged.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::bytes::SizedSource;
use super::index::{ShardFile, INDEX_BYTES_MAX, VALUE_BYTES};
use super::json;
use super::layout::BlockLayout;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::source::Folder;

/// The list of a folder.
pub(crate) const DAMAGE_FILE: &str = "damage.json";

const FORMAT: &str = "phalanx-damage";
const VERSION: u32 = 1;

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

/// The list of a folder of that fingerprint.
pub(crate) fn to_json(
    fingerprint: Fingerprint,
    blocks: Vec<DamagedBlock>,
    lost: Vec<String>,
) -> Vec<u8> {
    let format = FORMAT.to_owned();
    json::to_bytes(&DamageList { format, version: VERSION, fingerprint, blocks, lost })
}

/// What is listed in a folder of this fingerprint, for each of its shards.
pub(crate) fn read(
    folder: &dyn Folder,
    fingerprint: Fingerprint,
    shards: &[ShardFile<'_>],
) -> Result<Vec<ShardDamage>> {
    let mut known = vec![ShardDamage::default(); shards.len()];
    let Some(source) = folder.find(DAMAGE_FILE)? else { return Ok(known) };
    let file = SizedSource::of(source, None)?;
    let bad = |reason: String| Error::BadDamageList { path: file.path().to_path_buf(), reason };
    let limits = (INDEX_BYTES_MAX, VALUE_BYTES);
    let list: DamageList = json::read(&file, limits, "a list of damage", bad)?;
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
            BlockLayout::of(shards[at].file_bytes).is_some_and(|layout| block < layout.blocks)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(merged(vec![5..7, 0..2, 2..3, 6..9, 4..4]), [0..3, 5..9]);
        assert_eq!(merged(Vec::new()), []);
    }
}
