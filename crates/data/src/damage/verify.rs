//! [`verify`]: every block of every shard of a folder, on all processors.

use std::num::NonZeroUsize;
use std::path::Path;

use rayon::prelude::*;

use crate::cast::to_u64;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::format::bytes::SizedSource;
use crate::format::checked::Checked;
use crate::format::continuations::{fingerprint_of, TOKENIZER_FILE};
use crate::format::damage_list::DamagedBlock;
use crate::format::index::{ShardEntry, ShardFile};
use crate::format::{shard, TokenIndex, TokenShard};
use crate::progress::{Event, Progress, Stage};
use crate::records::{reader, RecordIndex, RecordShard};
use crate::source::{Access, Folder, LocalFolder};
use crate::threads::in_pool;

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
    /// What is wrong, in the order of the files: damaged blocks, missing files, files of another
    /// size; at last a `tokenizer.json` that is not the one of the tokens, or cannot be read.
    /// Empty: all is good.
    pub damage: Vec<Error>,
    /// The damaged blocks among that, and those whose checksums are damaged.
    pub blocks: Vec<DamagedBlock>,
    /// The shards among that of which nothing can be used: missing, of another size, or without a
    /// usable header.
    pub lost: Vec<String>,
}

/// Reads every shard of a prepared folder (of tokens or records) once, on all processors, and
/// compares all checksums, and the fingerprint of `tokenizer.json` if there is one. Damage does not
/// end it: everything that is wrong is listed.
///
/// # Errors
/// If the index itself cannot be used, and [`Error::InvalidOption`] if the threads cannot be
/// started.
pub fn verify(
    folder: &Path,
    threads: Option<NonZeroUsize>,
    progress: &dyn Progress,
) -> Result<Verified> {
    verify_from(&LocalFolder::new(folder, Access::Read), threads, progress)
}

/// As [`verify`], of a folder wherever it lies.
///
/// # Errors
/// As [`verify`], and what the folder says when its index is read.
pub fn verify_from(
    folder: &dyn Folder,
    threads: Option<NonZeroUsize>,
    progress: &dyn Progress,
) -> Result<Verified> {
    if RecordIndex::is_in_folder(folder)? {
        let RecordIndex { shards, fields, .. } = RecordIndex::read_from(folder)?;
        let listed: Vec<_> = shards.iter().map(RecordShard::listed).collect();
        let open = |at: usize| reader::OpenRecordShard::open(folder, &shards[at], &fields).err();
        return in_pool(threads, || check(folder, &listed, &open, progress));
    }
    let TokenIndex { shards, dtype, tokenizer, .. } = TokenIndex::read_from(folder)?;
    let listed: Vec<_> = shards.iter().map(TokenShard::listed).collect();
    let open = |at: usize| shard::OpenTokenShard::open(folder, &shards[at], dtype).err();
    let mut found = in_pool(threads, || check(folder, &listed, &open, progress))?;
    found.damage.extend(check_tokenizer(folder, tokenizer).err());
    Ok(found)
}

/// Compares `tokenizer.json`, where there is one, with what the index says of it. That it cannot be
/// read is an error of its own kind, which is told from one of a shard.
fn check_tokenizer(folder: &dyn Folder, expected: Fingerprint) -> Result<()> {
    compare_tokenizer(folder, expected).map_err(|error| match error {
        Error::OtherTokenizer { .. } => error,
        _ => {
            let action = "compare the tokenizer with its fingerprint";
            Error::Tokenizer { action, message: error.to_string() }
        }
    })
}

fn compare_tokenizer(folder: &dyn Folder, expected: Fingerprint) -> Result<()> {
    // The folder was written without one.
    if expected == fingerprint_of(b"{}") {
        return Ok(());
    }
    let Some(source) = folder.find(TOKENIZER_FILE)? else { return Ok(()) };
    let file = SizedSource::of(source, None)?;
    let actual = fingerprint_of(&file.read_all()?);
    if actual != expected {
        let path = file.path().to_path_buf();
        return Err(Error::OtherTokenizer { path, expected, actual });
    }
    Ok(())
}

/// Compares all blocks of all files. Must run in a rayon pool. `open` says what is wrong with a
/// file's header.
fn check(
    folder: &dyn Folder,
    listed: &[ShardFile<'_>],
    open: &(dyn Fn(usize) -> Option<Error> + Sync),
    progress: &dyn Progress,
) -> Verified {
    let total_bytes = listed.iter().map(|file| file.file_bytes).sum();
    progress.report(Event::Begin { stage: Stage::Verifying, total_bytes });
    let opened: Vec<Result<Checked>> = listed
        .iter()
        .map(|file| {
            let bytes = SizedSource::of(folder.open(file.file)?, Some(file.file_bytes))?;
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
    let block_count = to_u64(blocks.len());
    let damaged_blocks: Vec<DamagedBlock> = found
        .iter()
        .filter(|(_, _, error)| is_damaged(error))
        .map(|(at, block, _)| DamagedBlock { file: listed[*at].file.to_owned(), block: *block })
        .collect();
    let mut damage: Vec<(usize, Error)> =
        found.into_iter().map(|(at, _, error)| (at, error)).collect();
    let unopened = opened.into_iter().enumerate();
    // A damaged header is found by the block that it lies in, and makes the whole shard useless.
    let unopened: Vec<(usize, Error)> =
        unopened.filter_map(|(at, file)| Some((at, file.err().or_else(|| open(at))?))).collect();
    // Also a header that a disk cannot read: whoever opens the shard meets it again.
    let is_shut = |at: usize| unopened.iter().any(|(of, error)| *of == at && is_damaged(error));
    let shut: Vec<bool> = (0..listed.len()).map(is_shut).collect();
    damage.extend(unopened);
    let is_shard_lost =
        |at: usize| shut[at] || damage.iter().any(|(of, error)| *of == at && is_lost(error));
    let lost = (0..listed.len()).filter(|&at| is_shard_lost(at));
    let lost: Vec<String> = lost.map(|at| listed[at].file.to_owned()).collect();
    // Stable: blocks of one file stay in their order.
    damage.sort_by_key(|(at, _)| *at);
    // A page of checksums is found damaged by each of its blocks.
    damage.dedup_by(|(at, error), (before_at, before)| {
        at == before_at && place(error).is_some() && place(error) == place(before)
    });
    let damage = damage.into_iter().map(|(_, error)| error).collect();
    let (file_count, bytes) = (listed.len(), total_bytes);
    Verified { file_count, block_count, bytes, damage, blocks: damaged_blocks, lost }
}

/// Where a damaged block begins.
fn place(error: &Error) -> Option<u64> {
    match error {
        Error::Damaged { offset, .. } => Some(*offset),
        _ => None,
    }
}

/// Whether a block is known not to hold what was written.
pub(super) fn is_damaged(error: &Error) -> bool {
    match error.root() {
        Error::Damaged { .. } => true,
        Error::Io { cause, .. } => {
            cause.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
        }
        _ => false,
    }
}

/// Whether a shard is not there as it was written.
pub(super) fn is_lost(error: &Error) -> bool {
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
