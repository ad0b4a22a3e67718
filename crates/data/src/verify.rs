//! [`verify`]: every block of every shard of a folder, on all processors.

use std::num::NonZeroUsize;
use std::path::Path;

use rayon::prelude::*;

use crate::damage::DamagedBlock;
use crate::error::{Error, Result};
use crate::format::bytes::{Access, Bytes};
use crate::format::checked::Checked;
use crate::format::files::Listed;
use crate::format::{Index, ShardEntry, TokenStream};
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
    /// The damaged blocks among that, and those whose checksums are damaged.
    pub blocks: Vec<DamagedBlock>,
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
    progress.report(Event::Begin { stage: Stage::Verifying, total_bytes });
    let opened: Vec<Result<Checked>> = listed
        .iter()
        .map(|file| {
            let path = folder.join(file.file);
            let bytes = Bytes::open(&path, Access::Read, Some(file.file_bytes))?;
            Ok(Checked::new(bytes, file.crc32c))
        })
        .collect();
    let blocks: Vec<(usize, &Checked, u64)> = opened
        .iter()
        .enumerate()
        .filter_map(|(at, file)| Some((at, file.as_ref().ok()?)))
        .flat_map(|(at, file)| (0..file.block_count()).map(move |block| (at, file, block)))
        .collect();
    let found: Vec<(usize, u64, Error)> = blocks
        .par_iter()
        .map_init(Vec::new, |scratch, &(at, file, block)| {
            let error = file.check_block(block, scratch, &"everything").err();
            let range = file.block(block);
            let bytes = range.end - range.start;
            progress.report(Event::Advance { stage: Stage::Verifying, bytes });
            error.map(|error| (at, block, error))
        })
        .flatten_iter()
        .collect();
    progress.report(Event::End { stage: Stage::Verifying });
    let block_count = crate::cast::to_u64(blocks.len());
    let is_damaged = |error: &Error| matches!(error, Error::Damaged { .. });
    let damaged_blocks = found
        .iter()
        .filter(|(_, _, error)| is_damaged(error))
        .map(|(at, block, _)| DamagedBlock { file: listed[*at].file.to_owned(), block: *block })
        .collect();
    let mut damage: Vec<(usize, Error)> =
        found.into_iter().map(|(at, _, error)| (at, error)).collect();
    let unopened = opened.into_iter().enumerate();
    damage.extend(unopened.filter_map(|(at, file)| file.err().map(|error| (at, error))));
    // Stable: blocks of one file stay in their order.
    damage.sort_by_key(|(at, _)| *at);
    // A page of checksums is found damaged by each of its blocks.
    damage.dedup_by(|(at, error), (before_at, before)| {
        at == before_at && place(error).is_some() && place(error) == place(before)
    });
    let damage = damage.into_iter().map(|(_, error)| error).collect();
    let file_count = listed.len();
    Verified { file_count, block_count, bytes: total_bytes, damage, blocks: damaged_blocks }
}

/// Where a damaged block begins.
fn place(error: &Error) -> Option<u64> {
    match error {
        Error::Damaged { offset, .. } => Some(*offset),
        _ => None,
    }
}
