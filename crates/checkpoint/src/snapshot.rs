//! What one rank wants saved: tensors or boxes of them, and values.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::content::{Content, Plain};
use crate::extent::Extent;
use crate::plan::Held;
use crate::tensors::{check_read, Spec, Tensors};
use crate::{Dtype, Error, Result};

/// What one rank wants saved. It borrows memory: nothing is copied before [`Saver::save`](crate::Saver::save).
///
/// # Example
/// ```
/// use phalanx_checkpoint::{Dtype, Extent, Plain, Snapshot};
/// let (weights, shard) = ([0_u8; 24], [0_u8; 8]);
/// let mut snapshot = Snapshot::new();
/// snapshot.whole("model/w", Dtype::F32, &[2, 3], &weights);
/// let mine = Extent::new(&[2], &[2]);
/// snapshot.part("optimizer/m", Dtype::F32, &[4], mine.clone(), Plain::new(&shard, &mine, 4));
/// snapshot.values(serde_json::json!({ "epoch": 3 }));
/// ```
#[derive(Default)]
pub struct Snapshot<'a> {
    tensors: BTreeMap<String, Entry<'a>>,
    conflict: Option<(String, String)>,
    values: Value,
    rank_values: Value,
}

struct Entry<'a> {
    dtype: Dtype,
    shape: Vec<u64>,
    parts: Vec<(Extent, Box<dyn Content + 'a>)>,
}

impl<'a> Snapshot<'a> {
    /// One with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor of which this rank holds everything, as contiguous bytes. Other ranks may hold it, too: it is written once.
    pub fn whole(&mut self, name: &str, dtype: Dtype, shape: &[u64], bytes: &'a [u8]) {
        let extent = Extent::whole(shape);
        let plain = Plain::new(bytes, &extent, dtype.bytes());
        self.part(name, dtype, shape, extent, plain);
    }

    /// Adds a box of a tensor of this (whole) shape. A tensor may have several boxes. All ranks' boxes must be equal or disjoint, and
    /// together be the tensor; what a rank holds nothing of it need not name.
    pub fn part(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        extent: Extent,
        content: impl Content + 'a,
    ) {
        let new = || Entry { dtype, shape: shape.to_vec(), parts: Vec::new() };
        let entry = self.tensors.entry(name.to_owned()).or_insert_with(new);
        if (entry.dtype, entry.shape.as_slice()) != (dtype, shape) {
            let reason =
                format!("it is both {} {:?} and {dtype} {shape:?}", entry.dtype, entry.shape);
            self.conflict = Some((name.to_owned(), reason));
            return;
        }
        entry.parts.push((extent, Box::new(content)));
    }

    /// Values of the program that are the same on all ranks: configuration, schedule, scale of losses. Rank 0's count. Numbers come
    /// back with the same bits; those that JSON does not have (infinities, not a number) as null.
    pub fn values(&mut self, values: Value) {
        self.values = values;
    }

    /// Values of this rank alone: its random state, its place in the data.
    pub fn rank_values(&mut self, values: Value) {
        self.rank_values = values;
    }

    pub(crate) fn both_values(&self) -> (&Value, &Value) {
        (&self.values, &self.rank_values)
    }

    /// What this rank holds, sorted by name.
    pub(crate) fn held(&self) -> Result<Vec<Held>> {
        if let Some((tensor, reason)) = &self.conflict {
            return Err(Error::Mismatch { tensor: tensor.clone(), reason: reason.clone() });
        }
        let held = self.tensors.iter().map(|(name, entry)| Held {
            name: name.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            extents: entry.parts.iter().map(|(extent, _)| extent.clone()).collect(),
        });
        Ok(held.collect())
    }

    /// Copies a box that lies in one of those that were added.
    pub(crate) fn copy(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()> {
        let entry = self.tensors.get(name).ok_or_else(|| no_tensor(name))?;
        if extent.is_empty() {
            return Ok(());
        }
        let around = |held: &Extent| held.intersection(extent).as_ref() == Some(extent);
        let part = entry.parts.iter().find(|(held, _)| around(held));
        let copied = match part {
            Some((_, content)) => content.copy(extent, out),
            None => Err("no box of this rank has it".into()),
        };
        copied.map_err(|cause| Error::Content {
            tensor: name.to_owned(),
            extent: extent.to_string(),
            cause,
        })
    }
}

/// A snapshot of whole tensors can be read as what it is: to be written as weights.
impl Tensors for Snapshot<'_> {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        let entry = self.tensors.get(name)?;
        Some(Spec { dtype: entry.dtype, shape: &entry.shape })
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()> {
        let spec = self.spec(name).ok_or_else(|| no_tensor(name))?;
        check_read(name, spec, extent, out)?;
        self.copy(name, extent, out)
    }
}

impl std::fmt::Debug for Snapshot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

fn no_tensor(name: &str) -> Error {
    Error::NoTensor { path: "the snapshot".into(), tensor: name.to_owned() }
}
