//! [`verify`]: every block of every shard of a folder, on all processors.

use std::num::NonZeroUsize;
use std::path::Path;

use rayon::prelude::*;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::format::bytes::{Access, Bytes};
use crate::format::files::Listed;
use crate::format::{Index, ShardEntry, TokenStream, BLOCK_BYTES};
use crate::pool::in_pool;
use crate::progress::{Event, Progress, Stage};
use crate::records::{RecordIndex, RecordShard, Records};

/// What [`verify`] read and what it found wrong.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Verified {
    /// Files that the index names.
    pub file_count: usize,
    /// Blocks with a checksum of their own.
    pub block_count: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// What is wrong, in the order of the files: damaged blocks, missing files, files of another size. Empty: all is good.
    pub damage: Vec<Error>,
}

/// Reads every shard of a prepared folder (of tokens or records) once, on all processors, and compares all checksums. Damage does not end it:
/// everything that is wrong is listed. If no block is damaged, headers are checked as well.
///
/// # Errors
/// If the index itself cannot be used, and [`Error::InvalidOption`] if the threads cannot be started.
pub fn verify(
    folder: &Path,
    threads: Option<NonZeroUsize>,
    progress: &dyn Progress,
) -> Result<Verified> {
    if RecordIndex::is_in(folder) {
        let index = RecordIndex::read(folder)?;
        let listed: Vec<_> = index.shards.iter().map(RecordShard::listed).collect();
        let mut found = in_pool(threads, || check(folder, &listed, progress))?;
        if found.damage.is_empty() {
            found.damage.extend(Records::open(folder, Access::Read).err());
        }
        return Ok(found);
    }
    let index = Index::read(folder)?;
    let listed: Vec<_> = index.shards.iter().map(ShardEntry::listed).collect();
    let mut found = in_pool(threads, || check(folder, &listed, progress))?;
    if found.damage.is_empty() {
        found.damage.extend(TokenStream::open(folder, Access::Read).err());
    }
    Ok(found)
}

/// Compares all blocks of all files. Must run in a rayon pool.
fn check(folder: &Path, listed: &[Listed<'_>], progress: &dyn Progress) -> Verified {
    let total_bytes = listed.iter().map(|file| file.file_bytes).sum();
    let block_count = listed.iter().map(|file| to_u64(file.crc32c.len())).sum();
    progress.report(Event::Begin { stage: Stage::Verifying, total_bytes });
    let opened: Vec<Result<Bytes>> = listed
        .iter()
        .map(|file| Bytes::open(&folder.join(file.file), Access::Read, Some(file.file_bytes)))
        .collect();
    let blocks: Vec<(usize, usize)> = listed
        .iter()
        .enumerate()
        .filter(|(at, _)| opened[*at].is_ok())
        .flat_map(|(at, file)| (0..file.crc32c.len()).map(move |block| (at, block)))
        .collect();
    let damaged: Vec<(usize, Error)> = blocks
        .par_iter()
        .map_init(Vec::new, |scratch, &(at, block)| {
            let Ok(file) = &opened[at] else { return None };
            let error = check_block(file, block, listed[at].crc32c[block], scratch).err();
            let start = to_u64(block * BLOCK_BYTES);
            let bytes = file.len().saturating_sub(start).min(to_u64(BLOCK_BYTES));
            progress.report(Event::Advance { stage: Stage::Verifying, bytes });
            error.map(|error| (at, error))
        })
        .flatten_iter()
        .collect();
    progress.report(Event::End { stage: Stage::Verifying });
    let mut damage = damaged;
    let unopened = opened.into_iter().enumerate();
    damage.extend(unopened.filter_map(|(at, file)| file.err().map(|error| (at, error))));
    // Stable: blocks of one file stay in their order.
    damage.sort_by_key(|(at, _)| *at);
    let damage = damage.into_iter().map(|(_, error)| error).collect();
    Verified { file_count: listed.len(), block_count, bytes: total_bytes, damage }
}

fn check_block(file: &Bytes, block: usize, expected: u32, scratch: &mut Vec<u8>) -> Result<()> {
    let offset = to_u64(block * BLOCK_BYTES);
    let len = to_usize((file.len() - offset).min(to_u64(BLOCK_BYTES)));
    let actual = crc32c::crc32c(file.read(offset, len, scratch)?);
    file.check(offset..offset + to_u64(len))?;
    if actual == expected {
        return Ok(());
    }
    let (path, block) = (file.path().to_path_buf(), to_u64(block));
    let reading = "everything".to_owned();
    Err(Error::Damaged { path, block, offset, expected, actual, reading })
}
