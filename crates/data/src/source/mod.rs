//! Where bytes come from: files that are read or mapped, files of a web server, and whatever else
//! implements [`Source`].

#[cfg(feature = "http")]
mod answer;
pub(crate) mod cache;
mod file;
mod filesystem;
#[cfg(feature = "http")]
mod http;
mod local;
mod map;
mod only;
mod sigbus;
#[cfg(feature = "http")]
mod tls;

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

pub use cache::CachedFolder;
#[cfg(feature = "http")]
pub use http::{HttpFolder, HttpOptions};
pub(crate) use local::open_file;
pub use local::{Access, LocalFolder};

/// Reads an answer to a request for bytes 5 to 9: its status in two bytes, then what it says that
/// it brings.
#[cfg(all(feature = "http", feature = "testing"))]
pub(crate) fn fuzzed_answer(bytes: &[u8]) -> bool {
    let Some((status, field)) = bytes.split_first_chunk() else { return false };
    let field = std::str::from_utf8(field).ok();
    let size = field.and_then(answer::size_of_unsatisfied);
    match answer::part(u16::from_le_bytes(*status), field, 5, 10) {
        Ok(part) => {
            assert!((1..=5).contains(&part.len) && part.total >= 5 + part.len, "{part:?}");
            true
        }
        Err(_) => size.is_some(),
    }
}

/// One file: a fixed number of bytes that can be read in any order, from many threads at once.
///
/// The size is that at opening. A source whose bytes change or go away must give an error, not
/// other bytes.
pub trait Source: Send + Sync + Debug {
    /// What errors call it: a path, an address.
    fn name(&self) -> &Path;

    /// How many bytes it has.
    fn size(&self) -> u64;

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::WrongSize`] if there are fewer, or what kept them from
    /// being read. A source of yours may use [`Error::Io`].
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// All bytes, if they lie in memory. They are then used in place of [`read_at`](Self::read_at),
    /// and [`check_mapped`](Self::check_mapped) is called after each use.
    fn mapped(&self) -> Option<&[u8]> {
        None
    }

    /// Whether what was just taken from a range of [`mapped`](Self::mapped) was the file's content.
    ///
    /// # Errors
    /// If the file was cut off or the storage failed meanwhile.
    fn check_mapped(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    /// Bytes that will be read soon, in some order: they can be fetched from the disk. Must return
    /// at once, and reports no error: whoever reads the bytes gets it.
    fn will_need(&self, _range: Range<u64>) {}

    /// What tells this content from another of the same name and size: an `ETag`, a time of change.
    /// `None`: nothing is known; such files are not kept by a [`CachedFolder`].
    fn version(&self) -> Option<String> {
        None
    }

    /// Lets go of local copies of a range that turned out damaged. `true`: reading again may give
    /// other bytes.
    fn forget(&self, _range: Range<u64>) -> bool {
        false
    }
}

/// Files by name.
///
/// ```
/// use std::{path::Path, sync::Arc};
/// use phalanx_data::format::{TokenStream, Tokens};
/// use phalanx_data::source::{Folder, Source};
/// use phalanx_data::{Error, Result};
///
/// /// A folder in memory.
/// #[derive(Debug)]
/// struct Memory(Vec<(String, Vec<u8>)>);
///
/// #[derive(Debug)]
/// struct File(String, Vec<u8>);
///
/// impl Folder for Memory {
///     fn name(&self) -> &Path {
///         Path::new("memory")
///     }
///     fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
///         let missing = || Error::Io {
///             action: "open", path: name.into(), cause: std::io::ErrorKind::NotFound.into(),
///         };
///         let (name, bytes) = self.0.iter().find(|file| file.0 == name).ok_or_else(missing)?;
///         Ok(Arc::new(File(name.clone(), bytes.clone())))
///     }
/// }
///
/// impl Source for File {
///     fn name(&self) -> &Path {
///         Path::new(&self.0)
///     }
///     fn size(&self) -> u64 {
///         self.1.len() as u64
///     }
///     fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
///         // The caller has compared the range with the size.
///         out.copy_from_slice(&self.1[offset as usize..][..out.len()]);
///         Ok(())
///     }
/// }
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let (path, special) = (folder.path().join("t"), phalanx_data::format::SpecialTokens::bert(0, 1, 2, 3, 4));
/// # let mut writer = phalanx_data::format::TokenWriter::create(&path, b"{}", 100, special, 1 << 20)?;
/// # writer.tokens(&[7, 8, 3])?;
/// # writer.end_document()?;
/// # writer.finish(0)?;
/// # let read = |name: &str| (name.to_owned(), std::fs::read(path.join(name)).unwrap());
/// let memory = Memory(vec![read("index.json"), read("tokens-00000.safetensors")]);
/// let stream = TokenStream::open_from(&memory)?;
/// assert_eq!(stream.token_count(), 3);
/// # let mut tokens = [0; 3];
/// # stream.read(0, &mut tokens, &mut Default::default(), &"all")?;
/// # assert_eq!(tokens, [7, 8, 3]);
/// # Ok::<(), phalanx_data::Error>(())
/// ```
pub trait Folder: Send + Sync + Debug {
    /// What errors call it.
    fn name(&self) -> &Path;

    /// Opens the file `name`, which has no `/` in it.
    ///
    /// # Errors
    /// If it is not there or cannot be opened.
    fn open(&self, name: &str) -> Result<Arc<dyn Source>>;

    /// Opens the file `name`, if there is one.
    ///
    /// # Errors
    /// If it is there and cannot be opened.
    fn find(&self, name: &str) -> Result<Option<Arc<dyn Source>>> {
        match self.open(name) {
            Ok(source) => Ok(Some(source)),
            Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
