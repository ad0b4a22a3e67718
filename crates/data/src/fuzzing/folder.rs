//! A folder in memory.

use std::path::Path;
use std::sync::Arc;

use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};
use crate::source::{Folder, Source};

#[derive(Clone, Debug)]
pub(super) struct Memory(Vec<Arc<File>>);

#[derive(Debug)]
struct File {
    name: String,
    bytes: Vec<u8>,
    is_mapped: bool,
}

impl Memory {
    pub(super) fn new(files: &[(&str, &[u8])], is_mapped: bool) -> Self {
        let file = |&(name, bytes): &(&str, &[u8])| {
            Arc::new(File { name: name.to_owned(), bytes: bytes.to_vec(), is_mapped })
        };
        Memory(files.iter().map(file).collect())
    }

    /// Of all files.
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|file| file.bytes.len()).sum()
    }
}

impl Folder for Memory {
    fn name(&self) -> &Path {
        Path::new("memory")
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        let missing = || Error::io("open", name.as_ref())(std::io::ErrorKind::NotFound.into());
        let file = self.0.iter().find(|file| file.name == name).ok_or_else(missing)?;
        Ok(Arc::<File>::clone(file))
    }
}

impl Source for File {
    fn name(&self) -> &Path {
        Path::new(&self.name)
    }

    fn size(&self) -> u64 {
        to_u64(self.bytes.len())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        // Who reads has compared the range with the size.
        out.copy_from_slice(&self.bytes[to_usize(offset)..][..out.len()]);
        Ok(())
    }

    fn mapped(&self) -> Option<&[u8]> {
        self.is_mapped.then_some(&self.bytes)
    }
}
