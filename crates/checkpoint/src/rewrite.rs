//! A checkpoint written anew with another number of shards: for fewer files, or more that are read at once.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::Cause;
use crate::folder::Target;
use crate::fs::Fs;
use crate::manifest::{Manifest, Sums};
use crate::saver::Layouts;
use crate::snapshot::Snapshot;
use crate::tensors::Tensors;
use crate::{Checkpoint, Error, Extent, Result};

impl Checkpoint {
    /// Writes the same tensors and values into a folder of checkpoints, as this many shards. Gives the new checkpoint's folder.
    ///
    /// Memory is that of one shard. Every block that is read is compared.
    ///
    /// # Errors
    /// [`Error::Exists`] when the folder has a checkpoint of this step; those of reading and writing.
    pub fn rewrite(
        &self,
        folder: &Path,
        shards: NonZeroUsize,
        fs: &Arc<dyn Fs>,
    ) -> Result<PathBuf> {
        let snapshot = self.as_snapshot();
        let layouts = Layouts::new(&vec![snapshot.held()?; shards.get()])?;
        let (root, step) = (folder.to_path_buf(), self.step());
        let target = Target { fs: Arc::clone(fs), root, step, nonce: 0 };
        if fs.list(&target.complete()).is_ok() {
            return Err(Error::Exists { path: target.complete() });
        }
        target.abandon()?;
        let written = self.write_shards(&target, &layouts, &snapshot);
        if written.is_err() {
            // The first error is the one to tell.
            drop(target.abandon());
        }
        written
    }

    fn write_shards(
        &self,
        target: &Target,
        layouts: &Layouts,
        snapshot: &Snapshot<'_>,
    ) -> Result<PathBuf> {
        let (mut file, mut sums) = (Buffer::default(), Vec::new());
        for rank in 0..layouts.files.len() {
            file.resize(layouts.bytes_of(rank)?);
            layouts.fill(rank, snapshot, &mut file)?;
            let name = layouts.file_name(rank);
            let never = AtomicBool::new(false);
            sums.push(Sums(target.write_shard(&name, &file, layouts.bytes(), &never)?));
        }
        let (values, rank_values) = self.values_text();
        let (files, tensors) = (layouts.file_entries(sums), layouts.tensor_entries(None));
        target.commit(&Manifest::new(self.step(), files, tensors, values, rank_values))
    }

    /// Its tensors as something to be saved.
    fn as_snapshot(&self) -> Snapshot<'_> {
        let mut snapshot = Snapshot::new();
        for name in self.names() {
            let Some(spec) = self.spec(name) else { continue };
            let read = move |extent: &Extent, out: &mut [u8]| -> std::result::Result<(), Cause> {
                Ok(self.read(name, extent, out)?)
            };
            snapshot.part(name, spec.dtype, spec.shape, Extent::whole(spec.shape), read);
        }
        snapshot
    }
}
