//! What a `CachedFolder` finds on this machine: whatever that is, what is read through it is right,
//! or an error.

use std::fs;
use std::sync::OnceLock;

use super::folder::{MemoryFolder, Temporary};
use super::{case, seeds, Case};
use crate::batches::Scratch;
use crate::cast::{to_u64, to_usize};
use crate::error::Result;
use crate::format::index::INDEX_FILE;
use crate::format::{TokenStream, Tokens};
use crate::source::cache::{BLOCK_BYTES, ENTRY_BYTES, PAGE, PRESENT};
use crate::source::{CachedFolder, Folder};

const SHARD: &str = "tokens-00000.safetensors";

/// A prepared folder far away, whose shard has one block or two.
fn far(is_large: bool) -> MemoryFolder {
    let (index, shard) = seeds::token_folder(if is_large { 15_000 } else { 40 });
    MemoryFolder::new(&[(INDEX_FILE, &index), (SHARD, &shard)], false)
}

/// Calls `each` with all tokens, part by part, and the number of the first.
fn tokens(folder: &dyn Folder, mut each: impl FnMut(usize, &[i64])) -> Result<()> {
    let stream = TokenStream::open_from(folder)?;
    let (mut part, mut scratch) = ([0; 5000], Scratch::default());
    for start in (0..to_usize(stream.token_count())).step_by(part.len()) {
        let len = part.len().min(to_usize(stream.token_count()) - start);
        stream.read(to_u64(start), &mut part[..len], &mut scratch, &"a part")?;
        each(start, &part[..len]);
    }
    Ok(())
}

/// A far folder, and what is kept of it.
struct Right {
    far: MemoryFolder,
    tokens: Vec<i64>,
    /// The file of the shard's blocks, if everything was read.
    name: String,
    blocks: Vec<u8>,
}

impl Right {
    fn of(is_large: bool) -> Option<&'static Self> {
        static RIGHT: [OnceLock<Option<Right>>; 2] = [const { OnceLock::new() }; 2];
        RIGHT[usize::from(is_large)].get_or_init(|| Self::make(far(is_large))).as_ref()
    }

    fn make(far: MemoryFolder) -> Option<Self> {
        let place = Temporary::new()?;
        let mut all = Vec::new();
        let folder = CachedFolder::new(far.clone(), place.path(), 1 << 30).ok()?;
        tokens(&folder, |_, part| all.extend_from_slice(part)).ok()?;
        let files = fs::read_dir(place.path()).ok()?.flatten();
        let largest = files.max_by_key(|file| file.metadata().map_or(0, |about| about.len()))?;
        let name = largest.file_name().to_str()?.to_owned();
        let blocks = fs::read(largest.path()).ok()?;
        Some(Right { far, tokens: all, name, blocks })
    }
}

/// That of two blocks takes long, and comes seldom.
pub(super) fn right() -> Vec<Vec<u8>> {
    let blocks = |is_large| Right::of(is_large).map(|right| right.blocks.clone());
    std::iter::repeat_n(false, 15).chain([true]).filter_map(blocks).collect()
}

/// With the right beginning and length, and the sums of its blocks as they are.
fn seal(bytes: &[u8], right: &[u8], file_bytes: u64) -> Vec<u8> {
    let mut sealed = bytes.to_vec();
    sealed.resize(right.len(), 0);
    let page = to_usize(PAGE);
    sealed[..page].copy_from_slice(&right[..page]);
    let (about, data) = sealed.split_at_mut(right.len() - to_usize(file_bytes));
    let sums = about[page..].chunks_exact_mut(to_usize(ENTRY_BYTES));
    for (block, entry) in data.chunks(to_usize(BLOCK_BYTES)).zip(sums) {
        let sum = PRESENT + u64::from(crc32c::crc32c(block));
        entry.copy_from_slice(&sum.to_le_bytes());
    }
    sealed
}

/// Reads everything through a folder in which `found` was found. Gives whether it was used.
fn read(right: &Right, found: &[u8]) -> bool {
    let Some(place) = Temporary::new() else { return false };
    let is_written = fs::write(place.path().join(&right.name), found);
    let folder = CachedFolder::new(right.far.clone(), place.path(), 1 << 30);
    let (Ok(()), Ok(folder)) = (is_written, folder) else { return false };
    let before = right.far.reads(SHARD);
    let is_read = tokens(&folder, |start, part| {
        assert!(part == &right.tokens[start..start + part.len()], "wrong tokens from {start} on");
    });
    is_read.is_ok() && right.far.reads(SHARD) == before
}

pub(super) fn cases(bytes: &[u8]) -> Vec<Case> {
    let Some(right) = Right::of(bytes.len() > to_usize(BLOCK_BYTES)) else { return Vec::new() };
    let sealed = seal(bytes, &right.blocks, right.far.size(SHARD));
    let one = |found: Vec<u8>| case(right.far.bytes() + found.len(), move || read(right, &found));
    vec![one(bytes.to_vec()), one(sealed)]
}
