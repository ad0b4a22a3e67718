//! Which files there are to convert, and what tells that they have changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::options::Format;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprinter;
use crate::format::index::is_output;
use crate::progress::{Event, Progress};

/// Folders deeper than this are a loop or a mistake.
const DEPTH_MAX: usize = 16;

/// A file of input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    /// Relative to the folder that was given.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    modified_ns: u128,
}

impl InputFile {
    fn look(path: &Path, name: String) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
        let modified = metadata.modified().map_err(Error::io("read the time of", path))?;
        // Files from before 1970 are told apart by name and size.
        let modified_ns = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        Ok(InputFile { path: path.to_path_buf(), name, bytes: metadata.len(), modified_ns })
    }

    /// Fails if the file is not what it was when it was found.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        match InputFile::look(&self.path, self.name.clone()) {
            Ok(now) if now == *self => Ok(()),
            _ => Err(Error::TextChanged { path: self.path.clone() }),
        }
    }

    pub(crate) fn add_to(&self, sum: Fingerprinter) -> Fingerprinter {
        sum.bytes(self.name.as_bytes()).number(self.bytes).bytes(&self.modified_ns.to_le_bytes())
    }
}

/// The text under a path: the file itself, or all `.txt` files of a folder and its subfolders,
/// sorted by name. Hidden folders, links to folders and folders that this crate has made are passed
/// over.
pub(crate) fn list_text(path: &Path) -> Result<InputFiles> {
    let mut found = InputFiles::default();
    list_one(path, Format::Text.extensions(), &mut found)?;
    if found.files.is_empty() {
        return Err(Error::NoText { path: path.to_path_buf() });
    }
    Ok(found)
}

/// What is under a path.
#[derive(Debug, Default)]
pub(crate) struct InputFiles {
    pub(crate) files: Vec<InputFile>,
    /// Folders that this crate has made.
    outputs: Vec<PathBuf>,
}

impl InputFiles {
    /// Says which folders were passed over.
    pub(crate) fn tell(&self, progress: &dyn Progress) {
        for path in &self.outputs {
            progress.report(Event::Notice(&format!(
                "{} is passed over: it holds tokens or records",
                path.display()
            )));
        }
    }
}

/// The files under all paths, in the order of the paths: files as they are given, of folders those
/// with a known extension.
pub(crate) fn list_named(
    paths: &[PathBuf],
    known: &[&str],
    progress: &dyn Progress,
) -> Result<Vec<InputFile>> {
    if paths.is_empty() {
        return Err(Error::option("input", "empty", "give at least one file or folder"));
    }
    let mut found = InputFiles::default();
    for path in paths {
        let nothing = || Error::NoInput { path: path.clone(), expected: known.join(", ") };
        // A broken link counts as nothing; a path that cannot be looked at is another error.
        if !path.try_exists().map_err(Error::io("look at", path))? {
            return Err(nothing());
        }
        let before = found.files.len();
        list_one(path, known, &mut found)?;
        if found.files.len() == before {
            found.tell(progress);
            return Err(nothing());
        }
    }
    found.tell(progress);
    Ok(found.files)
}

/// The same, and their format: as given, or told from their names.
pub(crate) fn list(
    paths: &[PathBuf],
    format: Option<Format>,
    progress: &dyn Progress,
) -> Result<(Vec<InputFile>, Format)> {
    let known: Vec<&str> = match format {
        Some(one) => one.extensions().to_vec(),
        None => Format::ALL.iter().flat_map(|one| one.extensions()).copied().collect(),
    };
    let files = list_named(paths, &known, progress)?;
    if let Some(given) = format {
        return Ok((files, given));
    }
    let mut formats = files.iter().map(|file| format_of(&file.path));
    let first = formats.next().flatten();
    match first {
        Some(one) if formats.all(|other| other == first) => Ok((files, one)),
        _ => {
            let reason =
                "the files are of different kinds, or of one that their names do not tell: \
                          say which with --format";
            Err(Error::option("format", "not given", reason))
        }
    }
}

fn format_of(path: &Path) -> Option<Format> {
    Format::ALL.into_iter().find(|format| has_extension(path, format.extensions()))
}

fn has_extension(path: &Path, known: &[&str]) -> bool {
    let extension = path.extension().unwrap_or_default();
    known.iter().any(|one| extension.eq_ignore_ascii_case(one))
}

/// A file is taken whatever it is called; of a folder, files with a known extension.
fn list_one(path: &Path, extensions: &[&str], all: &mut InputFiles) -> Result<()> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_file() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        all.files.push(InputFile::look(path, name)?);
        return Ok(());
    }
    let mut found = InputFiles::default();
    walk(path, "", DEPTH_MAX, extensions, &mut found)?;
    found.files.sort_by(|a, b| a.name.cmp(&b.name));
    found.outputs.sort();
    all.files.append(&mut found.files);
    all.outputs.append(&mut found.outputs);
    Ok(())
}

fn walk(
    folder: &Path,
    prefix: &str,
    depth: usize,
    extensions: &[&str],
    found: &mut InputFiles,
) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let kind = entry.file_type().map_err(Error::io("look at", &path))?;
        let relative = format!("{prefix}{name}");
        if name.starts_with('.') {
            continue;
        }
        if kind.is_dir() && depth > 0 {
            // What was made of this input may lie in it.
            if is_output(&path) {
                found.outputs.push(path);
                continue;
            }
            walk(&path, &format!("{relative}/"), depth - 1, extensions, found)?;
        } else if has_extension(&path, extensions)
            && fs::metadata(&path).map_err(Error::io("open", &path))?.is_file()
        {
            found.files.push(InputFile::look(&path, relative)?);
        }
    }
    Ok(())
}
