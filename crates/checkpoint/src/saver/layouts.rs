//! The plan of a save as files: computed once, and again only when a rank's tensors change.

use crate::manifest::{FileEntry, Piece, Sums, TensorEntry};
use crate::plan::{Held, Plan};
use crate::shard::{file_name, lay_out, Layout};
use crate::snapshot::Snapshot;
use crate::{Error, Result};

/// Which bytes lie where, for all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Layouts {
    pub(crate) plan: Plan,
    /// Each rank's file.
    pub(crate) files: Vec<Layout>,
}

impl Layouts {
    /// From what each rank holds. All ranks come to the same.
    pub(crate) fn new(held: &[Vec<Held>]) -> Result<Self> {
        let plan = Plan::new(held)?;
        let files = (0..held.len()).map(|rank| lay_out(&plan, rank)).collect::<Result<_>>()?;
        Ok(Layouts { plan, files })
    }

    /// Without the headers of other ranks' files, which together may be large.
    pub(super) fn for_rank(mut self, rank: usize) -> Self {
        let others = self.files.iter_mut().enumerate().filter(|(other, _)| *other != rank);
        others.for_each(|(_, file)| file.header = Vec::new());
        self
    }

    /// The bytes of the whole checkpoint, but its manifest.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    pub(crate) fn file_name(&self, rank: usize) -> String {
        file_name(rank, self.files.len())
    }

    /// How long a rank's file is.
    pub(crate) fn bytes_of(&self, rank: usize) -> Result<usize> {
        Ok(crate::cast::to_usize(self.layout(rank)?.bytes))
    }

    fn layout(&self, rank: usize) -> Result<&Layout> {
        self.files.get(rank).ok_or_else(|| {
            let reason = format!("there is no rank {rank} of {}", self.files.len());
            Error::OutOfStep { reason }
        })
    }

    /// Copies a rank's share to what becomes its file, [`bytes_of`](Self::bytes_of) long.
    pub(crate) fn fill(&self, rank: usize, snapshot: &Snapshot<'_>, file: &mut [u8]) -> Result<()> {
        let layout = self.layout(rank)?;
        file[..layout.header.len()].copy_from_slice(&layout.header);
        for piece in &layout.pieces {
            snapshot.copy(&piece.tensor, &piece.extent, &mut file[Layout::range(piece)])?;
        }
        Ok(())
    }

    /// The manifest's list of files, with each rank's checksums.
    pub(crate) fn file_entries(&self, sums: Vec<Sums>) -> Vec<FileEntry> {
        let files = self.files.iter().zip(sums).enumerate();
        files
            .map(|(rank, (file, crc32c))| FileEntry {
                name: self.file_name(rank),
                bytes: file.bytes,
                crc32c,
            })
            .collect()
    }

    /// The manifest's list of tensors; of those that one rank writes if it is given.
    pub(crate) fn tensor_entries(&self, only: Option<usize>) -> Vec<TensorEntry> {
        let mut entries: Vec<TensorEntry> = self.plan.tensors.iter().map(empty_entry).collect();
        for (file, layout) in self.files.iter().enumerate() {
            if only.is_some_and(|rank| rank != file) {
                continue;
            }
            for placed in &layout.pieces {
                let found = entries.binary_search_by(|entry| entry.name.cmp(&placed.tensor));
                let (offset, extent) = (placed.offset, placed.extent.clone());
                if let Some(entry) = found.ok().and_then(|at| entries.get_mut(at)) {
                    entry.pieces.push(Piece { file, offset, extent });
                }
            }
        }
        entries
    }
}

fn empty_entry(tensor: &crate::plan::Planned) -> TensorEntry {
    let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
    TensorEntry { name, dtype, shape, pieces: Vec::new() }
}
