//! Everything of a checkpoint compared: each block, and each shard's header with the manifest.

use std::collections::BTreeMap;

use super::{Checkpoint, Shard};
use crate::cast::{to_u64, to_usize};
use crate::header::Header;
use crate::manifest::{TensorEntry, BLOCK_BYTES};
use crate::plan::byte_count;
use crate::shard::{data_start, piece_name, LENGTH_BYTES};
use crate::{Dtype, Error, Result};

/// What [`Checkpoint::verify`] found.
#[derive(Debug)]
#[non_exhaustive]
pub struct Verified {
    /// Files that were read.
    pub files: usize,
    /// Blocks that were compared.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is not as it was written; empty if all is good.
    pub damage: Vec<Error>,
}

/// The pieces of a file: where each ends, and its tensor.
type Ends<'a> = BTreeMap<u64, &'a str>;

/// What a header says of a piece: element type, shape, and its first byte in the file.
type Described<'a> = (Dtype, &'a [u64], u64);

impl Checkpoint {
    /// Reads everything once and compares it. Damage is collected, not returned as an error.
    pub fn verify(&self) -> Verified {
        let (files, bytes) = (self.shards.len(), self.bytes());
        let mut found = Verified { files, blocks: 0, bytes, damage: Vec::new() };
        let mut buffer = Vec::new();
        for (at, shard) in self.shards.iter().enumerate() {
            let before = found.damage.len();
            let ends = self.ends(at);
            for block in 0..shard.block_count() {
                let first = ends.range(block * to_u64(BLOCK_BYTES) + 1..).next();
                let tensor = first.map(|(_, tensor)| *tensor);
                found.damage.extend(shard.check(block, &mut buffer, tensor).err());
                found.blocks += 1;
            }
            if found.damage.len() == before {
                found.damage.extend(self.check_header(at, shard).err());
            }
        }
        found
    }

    fn pieces_of(
        &self,
        file: usize,
    ) -> impl Iterator<Item = (&TensorEntry, &crate::manifest::Piece)> {
        self.manifest.tensors.iter().flat_map(move |tensor| {
            let pieces = tensor.pieces.iter().filter(move |piece| piece.file == file);
            pieces.map(move |piece| (tensor, piece))
        })
    }

    fn ends(&self, file: usize) -> Ends<'_> {
        let pieces = self.pieces_of(file).filter(|(_, piece)| !piece.extent.is_empty());
        let end = |(tensor, piece): (&TensorEntry, &crate::manifest::Piece)| {
            piece.offset + byte_count(&piece.extent, tensor.dtype)
        };
        pieces.map(|pair| (end(pair), pair.0.name.as_str())).collect()
    }

    /// Whether the header that others read the file by says the same as the manifest.
    fn check_header(&self, file: usize, shard: &Shard) -> Result<()> {
        let bad = |reason: String| Error::BadWeights { path: shard.path.clone(), reason };
        let mut length = [0; LENGTH_BYTES];
        shard.read(0, &mut length, None)?;
        let start = data_start(length, shard.bytes)
            .ok_or_else(|| bad("its header is longer than the file".to_owned()))?;
        let mut text = vec![0; to_usize(start) - LENGTH_BYTES];
        shard.read(to_u64(LENGTH_BYTES), &mut text, None)?;
        let header = Header::parse(&text, shard.bytes).map_err(bad)?;
        let described: BTreeMap<&str, Described<'_>> = header
            .tensors
            .iter()
            .map(|one| (one.name.as_str(), (one.dtype, one.shape.as_slice(), one.offset)))
            .collect();
        let pieces = self.pieces_of(file).map(|(tensor, piece)| {
            let name = piece_name(&tensor.name, &tensor.shape, &piece.extent);
            (name, (tensor.dtype, piece.extent.len(), piece.offset))
        });
        let pieces: Vec<_> = pieces.collect();
        let expected: BTreeMap<&str, Described<'_>> =
            pieces.iter().map(|(name, about)| (name.as_str(), *about)).collect();
        if expected != described {
            return Err(bad(
                "its header and the manifest do not describe the same tensors".to_owned()
            ));
        }
        Ok(())
    }
}
