//! Which text files there are, and the key under which what is made of them is kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;

/// Folders deeper than this are a loop or a mistake.
const DEPTH_MAX: usize = 16;

/// One text file: a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TextFile {
    pub(super) path: PathBuf,
    /// Relative to the folder that was given.
    pub(super) name: String,
    pub(super) bytes: u64,
    modified_ns: u128,
}

impl TextFile {
    fn look(path: &Path, name: String) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
        let modified = metadata.modified().map_err(Error::io("read the time of", path))?;
        // Files from before 1970 are told apart by name and size.
        let modified_ns = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        Ok(TextFile { path: path.to_path_buf(), name, bytes: metadata.len(), modified_ns })
    }

    /// Fails if the file is not what it was when it was found.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        match TextFile::look(&self.path, self.name.clone()) {
            Ok(now) if now == *self => Ok(()),
            _ => Err(Error::TextChanged { path: self.path.clone() }),
        }
    }

    pub(super) fn add_to(&self, sum: Fingerprinter) -> Fingerprinter {
        sum.bytes(self.name.as_bytes()).number(self.bytes).bytes(&self.modified_ns.to_le_bytes())
    }
}

/// The text under a path: the file itself, or all `.txt` files of a folder and its subfolders, sorted by name. Hidden folders
/// and links to folders are passed over.
pub(super) fn list(path: &Path) -> Result<Vec<TextFile>> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_file() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Ok(vec![TextFile::look(path, name)?]);
    }
    let mut files = Vec::new();
    walk(path, "", DEPTH_MAX, &mut files)?;
    if files.is_empty() {
        return Err(Error::NoText { path: path.to_path_buf() });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn walk(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<TextFile>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let kind = entry.file_type().map_err(Error::io("look at", &path))?;
        let relative = format!("{prefix}{name}");
        if name.starts_with('.') {
            continue;
        }
        if kind.is_dir() && depth > 0 {
            walk(&path, &format!("{relative}/"), depth - 1, files)?;
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("txt"))
            && fs::metadata(&path).map_err(Error::io("open", &path))?.is_file()
        {
            files.push(TextFile::look(&path, relative)?);
        }
    }
    Ok(())
}
