//! The open shards of a folder as one row of elements, but for those that are lost.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::damage_list::{self, merged, ShardDamage};
use super::index::ShardEntry;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::source::Folder;

/// The shards, in order.
#[derive(Debug)]
pub(crate) struct OpenShards<S> {
    paths: Vec<PathBuf>,
    /// `None`: the list of damage says that it is lost.
    shards: Vec<Option<S>>,
    damage: Vec<ShardDamage>,
}

impl<S> OpenShards<S> {
    /// Opens what an index of that fingerprint lists, but for what is known to be lost.
    pub(crate) fn open<E: ShardEntry>(
        folder: &dyn Folder,
        fingerprint: Fingerprint,
        entries: &[E],
        open: impl Fn(&E) -> Result<S>,
    ) -> Result<Self> {
        let listed: Vec<_> = entries.iter().map(E::listed).collect();
        let damage = damage_list::read(folder, fingerprint, &listed)?;
        let paths = listed.iter().map(|shard| folder.name().join(shard.file)).collect();
        let shards = entries.iter().zip(&damage).map(|(entry, known)| match known.is_lost {
            true => Ok(None),
            false => open(entry).map(Some),
        });
        let shards = shards.collect::<Result<_>>()?;
        Ok(OpenShards { paths, shards, damage })
    }

    /// A shard, unless it is lost. `reading` says in errors what was to be read.
    #[inline]
    pub(crate) fn get(&self, at: usize, reading: &dyn Display) -> Result<&S> {
        self.shards[at].as_ref().ok_or_else(|| {
            let (path, reading) = (self.paths[at].clone(), reading.to_string());
            Error::Lost { path, reading }
        })
    }

    /// A shard, if there is one of that number and it is not lost.
    #[inline]
    pub(crate) fn find(&self, at: usize) -> Option<&S> {
        self.shards.get(at)?.as_ref()
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.len()
    }

    pub(crate) fn path(&self, at: usize) -> &Path {
        &self.paths[at]
    }

    /// Those that are not lost: number, shard and its damaged blocks.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &S, &[u64])> {
        let all = self.shards.iter().zip(&self.damage).enumerate();
        all.filter_map(|(at, (shard, known))| Some((at, shard.as_ref()?, &*known.blocks)))
    }

    /// Of each shard what `of_blocks` finds in its damaged blocks, or all of it if it is lost:
    /// ascending, counted as `starts` counts, which says where shards begin and the last one ends.
    pub(crate) fn damaged(
        &self,
        starts: &[u64],
        of_blocks: impl Fn(usize, &S, &[u64]) -> Result<Vec<Range<u64>>>,
    ) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        for (at, (shard, known)) in self.shards.iter().zip(&self.damage).enumerate() {
            let start = starts[at];
            match shard {
                None => all.push(start..starts[at + 1]),
                Some(_) if known.blocks.is_empty() => {}
                Some(shard) => {
                    let within = of_blocks(at, shard, &known.blocks)?;
                    all.extend(within.iter().map(|one| start + one.start..start + one.end));
                }
            }
        }
        Ok(merged(all))
    }

    /// Calls `each` for every shard that is not lost and holds some of the elements: with these,
    /// counted within the shard, and the shard's first element.
    pub(crate) fn for_range(
        &self,
        starts: &[u64],
        elements: &Range<u64>,
        mut each: impl FnMut(&S, Range<u64>, u64),
    ) {
        for (shard, bounds) in self.shards.iter().zip(starts.windows(2)) {
            let (start, end) = (elements.start.max(bounds[0]), elements.end.min(bounds[1]));
            if let Some(shard) = shard.as_ref().filter(|_| start < end) {
                each(shard, start - bounds[0]..end - bounds[0], bounds[0]);
            }
        }
    }
}

/// Where each shard starts, and where the last one ends. The index has checked that nothing
/// overflows.
pub(crate) fn running_sums(counts: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut sums = vec![0];
    let mut end = 0_u64;
    for count in counts {
        end = end.saturating_add(count);
        sums.push(end);
    }
    sums
}

/// The number of the shard that holds an element.
#[inline]
pub(crate) fn shard_of(starts: &[u64], element: u64) -> usize {
    starts.partition_point(|&start| start <= element).saturating_sub(1)
}
