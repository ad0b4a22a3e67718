//! A rank's share of a snapshot in one buffer that describes itself, for a neighbour to keep.
//!
//! ```text
//!      the shard, as it would lie in a file
//!      the description: JSON that guards itself, as a manifest does
//! u64  bytes of the description
//! ```
//!
//! The shard comes first, so that it is copied once: its checksums are known when all of it is there.
//!
//! All ranks' buffers together are a checkpoint, without a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::cast::{to_u64, to_usize};
use crate::fs::Source;
use crate::manifest::{
    seal_json, unseal_json, FileEntry, Manifest, Sums, TensorEntry, BLOCK_BYTES,
};
use crate::reading::Shard;
use crate::saver::Layouts;
use crate::{Checkpoint, Error, Result};

const LENGTH_BYTES: usize = 8;

/// Whose share a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) step: u64,
    /// The same on all ranks of one snapshot.
    pub(crate) nonce: u64,
    pub(crate) rank: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Share {
    about: About,
    world_size: usize,
    file: FileEntry,
    /// All tensors, with the pieces that lie in this share.
    tensors: Vec<TensorEntry>,
    values: Box<RawValue>,
    rank_values: Box<RawValue>,
}

/// Whose share of which snapshot a buffer holds, all of it compared with its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotShare {
    /// After which step the snapshot was made.
    pub step: u64,
    /// The same on all ranks of one snapshot, and on no other.
    pub nonce: u64,
    /// Whose share it is.
    pub rank: usize,
    /// How many ranks have a share of it.
    pub world_size: usize,
}

impl SnapshotShare {
    /// Reads a buffer of [`Saver::capture`](crate::Saver::capture) from its first byte to its last, block by block.
    ///
    /// # Errors
    /// [`Error::BadManifest`] or [`Error::Damaged`] when it is not what it was; [`Error::Io`].
    pub fn verify(source: Arc<dyn Source>) -> Result<Self> {
        let share = decode(&*source)?;
        let About { step, nonce, rank } = share.about;
        let shard = open(source, &share.file)?;
        let mut buffer = Vec::new();
        (0..shard.block_count()).try_for_each(|block| shard.check(block, &mut buffer, None))?;
        Ok(Self { step, nonce, rank, world_size: share.world_size })
    }
}

/// Makes the buffer of a rank's file, to which it appends.
pub(crate) fn describe(
    layouts: &Layouts,
    about: About,
    (values, rank_values): (Box<RawValue>, Box<RawValue>),
    file: &mut Vec<u8>,
) -> Result<()> {
    let crc32c = Sums(file.chunks(BLOCK_BYTES).map(crc32c::crc32c).collect());
    let share = Share {
        about,
        world_size: layouts.files.len(),
        file: FileEntry { name: layouts.file_name(about.rank), bytes: to_u64(file.len()), crc32c },
        tensors: layouts.tensor_entries(Some(about.rank)),
        values,
        rank_values,
    };
    let text = seal_json(&share, "a snapshot")?;
    file.extend_from_slice(&text);
    file.extend_from_slice(&to_u64(text.len()).to_le_bytes());
    Ok(())
}

impl Checkpoint {
    /// Of all ranks' buffers of one [`Saver::capture`](crate::Saver::capture), in any order; buffers of one rank may come several times.
    /// They are read where they are, as a checkpoint's files.
    ///
    /// # Errors
    /// [`Error::BadManifest`] when a buffer is not what it was, when one is missing, or when they are not of one snapshot; [`Error::Io`].
    pub fn from_snapshots(sources: Vec<Arc<dyn Source>>) -> Result<Self> {
        let mut found = Vec::new();
        for source in sources {
            found.push((decode(&*source)?, source));
        }
        found.sort_by_key(|(share, _)| share.about.rank);
        found.dedup_by_key(|(share, _)| share.about.rank);
        let (shares, by_rank): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let manifest = assemble(shares)?;
        let files = manifest.files.iter().zip(by_rank);
        let shards = files.map(|(file, source)| open(source, file)).collect::<Result<_>>()?;
        Self::of_parts(label().to_path_buf(), manifest, shards)
    }
}

/// The shard at the beginning of a buffer.
fn open(source: Arc<dyn Source>, file: &FileEntry) -> Result<Shard> {
    let front = Front { source, bytes: file.bytes };
    Shard::open(PathBuf::from(&file.name), Arc::new(front), file.bytes, file.crc32c.0.clone())
}

/// What errors call a snapshot.
fn label() -> &'static Path {
    Path::new("snapshot in memory")
}

fn bad(reason: impl Into<String>) -> Error {
    Error::BadManifest { path: label().to_path_buf(), reason: reason.into() }
}

/// What a buffer holds; its shard is as long as it should be.
fn decode(source: &dyn Source) -> Result<Share> {
    let io = |error| Error::io("read", label())(error);
    let bytes = source.bytes().map_err(io)?;
    let end = bytes.checked_sub(to_u64(LENGTH_BYTES)).ok_or_else(|| bad("it is too short"))?;
    let mut length = [0; LENGTH_BYTES];
    source.read_at(end, &mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    let start = end.checked_sub(length).ok_or_else(|| bad("it is cut off"))?;
    let mut text = vec![0; to_usize(length)];
    source.read_at(start, &mut text).map_err(io)?;
    let share: Share = unseal_json(&text, label())?;
    if start != share.file.bytes {
        return Err(bad(format!("it has {start} bytes, expected {}", share.file.bytes)));
    }
    Ok(share)
}

/// The manifest of shares that are sorted by rank.
fn assemble(shares: Vec<Share>) -> Result<Manifest> {
    let Some(first) = shares.first().cloned() else { return Err(bad("there is none")) };
    let (about, world_size) = (first.about, first.world_size);
    let mut tensors: Vec<TensorEntry> = Vec::new();
    let (mut files, mut rank_values) = (Vec::new(), Vec::new());
    for (rank, share) in shares.into_iter().enumerate() {
        if share.about != (About { rank, ..about }) || share.world_size != world_size {
            return Err(bad(format!(
                "the share of rank {rank} is missing, or of another snapshot"
            )));
        }
        merge(&mut tensors, share.tensors)?;
        files.push(share.file);
        rank_values.push(share.rank_values);
    }
    if files.len() != world_size {
        return Err(bad(format!("{} of {world_size} ranks' shares are there", files.len())));
    }
    let manifest = Manifest::new(about.step, files, tensors, first.values, rank_values);
    manifest.check().map_err(bad)?;
    Ok(manifest)
}

fn merge(tensors: &mut Vec<TensorEntry>, more: Vec<TensorEntry>) -> Result<()> {
    if tensors.is_empty() {
        *tensors = more;
        return Ok(());
    }
    let what = |one: &TensorEntry| (one.name.clone(), one.dtype, one.shape.clone());
    if !tensors.iter().map(what).eq(more.iter().map(what)) {
        return Err(bad("shares describe different tensors"));
    }
    for (tensor, other) in tensors.iter_mut().zip(more) {
        tensor.pieces.extend(other.pieces);
    }
    Ok(())
}

/// The first bytes of a buffer.
#[derive(Debug)]
struct Front {
    source: Arc<dyn Source>,
    bytes: u64,
}

impl Source for Front {
    fn bytes(&self) -> std::io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.source.read_at(offset, out)
    }
}
