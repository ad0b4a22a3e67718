//! Either form: a checkpoint or weights, whatever a path holds; and a selection of their tensors.

use std::path::Path;

use crate::extent::Extent;
use crate::folder::is_checkpoint;
use crate::tensors::{Spec, Tensors};
use crate::{Checkpoint, Folder, Result, Weights};

/// What a path holds.
#[derive(Debug)]
#[non_exhaustive]
pub enum Opened {
    /// A checkpoint; of a folder of them the newest.
    Checkpoint(Checkpoint),
    /// Files of weights.
    Weights(Weights),
}

impl Opened {
    /// Opens a checkpoint, the newest of a folder of them, or weights.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound) when it is none of them; those of [`Checkpoint::open`] and [`Weights::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if is_checkpoint(path) {
            return Ok(Opened::Checkpoint(Checkpoint::open(path)?));
        }
        if path.is_dir() {
            if let Some(newest) = Folder::new(path).newest()? {
                return Ok(Opened::Checkpoint(newest));
            }
        }
        Ok(Opened::Weights(Weights::open(path)?))
    }

    /// The checkpoint, if it is one.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Opened::Checkpoint(checkpoint) => Some(checkpoint),
            Opened::Weights(_) => None,
        }
    }

    /// Its tensors.
    pub fn tensors(&self) -> &dyn Tensors {
        match self {
            Opened::Checkpoint(checkpoint) => checkpoint,
            Opened::Weights(weights) => weights,
        }
    }
}

/// The tensors whose names begin with a prefix, without it.
#[derive(Clone, Copy)]
pub struct Selected<'a> {
    tensors: &'a dyn Tensors,
    prefix: &'a str,
}

impl<'a> Selected<'a> {
    /// Those tensors.
    pub fn new(tensors: &'a dyn Tensors, prefix: &'a str) -> Self {
        Selected { tensors, prefix }
    }

    fn inner(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl std::fmt::Debug for Selected<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Selected").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Tensors for Selected<'_> {
    fn names(&self) -> Vec<&str> {
        let names = self.tensors.names().into_iter();
        names
            .filter_map(|name| name.strip_prefix(self.prefix))
            .filter(|name| !name.is_empty())
            .collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        self.tensors.spec(&self.inner(name))
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()> {
        self.tensors.read(&self.inner(name), extent, out)
    }
}
