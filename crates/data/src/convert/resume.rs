//! Going on with what an interrupted run of the same conversion has done.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::journal::{self, FoundJournal, JournalEntry};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::format::folder::{is_free, partial_path};
use crate::format::index::ShardEntry;
use crate::format::lock::{self, Lock};
use crate::progress::{Event, Progress};

/// Keeps others away from `output`, whose parent folders are made.
pub(crate) fn lock(output: &Path) -> Result<Lock> {
    if output.file_name().is_none() {
        return Err(Error::option("output", output.display(), "give the name of a new folder"));
    }
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty());
    let not_writable = |cause| Error::CacheNotWritable { path: output.to_path_buf(), cause };
    fs::create_dir_all(parent.unwrap_or(Path::new("."))).map_err(not_writable)?;
    lock::acquire(&lock::path_for(output), Duration::ZERO, || {})
}

/// What a finished output says of its shards; `None` if nothing is there. Anything else that is
/// there is an error.
pub(crate) fn finished<S: ShardEntry>(
    output: &Path,
    key: Fingerprint,
    is_output: impl FnOnce(&Path) -> bool,
) -> Result<Option<Vec<JournalEntry<S>>>> {
    if is_free(output)? {
        return Ok(None);
    }
    let exists = || Error::OutputExists { path: output.to_path_buf() };
    if !is_output(output) {
        return Err(exists());
    }
    match journal::read(output, key)? {
        FoundJournal::Shards(entries) => Ok(Some(entries)),
        _ => Err(exists()),
    }
}

/// What an earlier run of the same conversion has done, if `is_usable` says that its folder can be
/// used.
pub(crate) fn half_done<S: ShardEntry>(
    output: &Path,
    key: Fingerprint,
    restart: bool,
    is_usable: impl FnOnce(&Path) -> bool,
    progress: &dyn Progress,
) -> Result<Vec<JournalEntry<S>>> {
    let partial = partial_path(output);
    match journal::read(&partial, key)? {
        FoundJournal::Shards(entries) if !restart && is_usable(&partial) => {
            if !entries.is_empty() {
                let shards = journal::count(&entries);
                progress.report(Event::Notice(&format!(
                    "going on after {shards} shards that an interrupted run has finished"
                )));
            }
            Ok(entries)
        }
        FoundJournal::Other if !restart => Err(Error::OtherConversion { path: partial }),
        _ => {
            match fs::remove_dir_all(&partial) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &partial)(error));
                }
                _ => {}
            }
            Ok(Vec::new())
        }
    }
}

/// After an error of the conversion with that key: says what of it is kept, and how to go on. It is
/// quiet if nothing is.
pub(crate) fn tell_what_stays<S: ShardEntry>(
    output: &Path,
    key: Fingerprint,
    error: &Error,
    progress: &dyn Progress,
) {
    let partial = partial_path(output);
    let Ok(FoundJournal::Shards(entries)) = journal::read::<S>(&partial, key) else { return };
    if entries.is_empty() {
        return;
    }
    let (shards, partial) = (journal::count(&entries), partial.display());
    let what = match error.root() {
        Error::TextChanged { .. } => format!(
            "finished shards in {partial} ({shards}) are of the input as it was: \
             repeat the command with --restart to convert it as it is"
        ),
        // Nothing that was given is wrong.
        Error::Io { .. } | Error::CacheNotWritable { .. } => {
            format!("finished shards stay in {partial} ({shards}): the same command goes on there")
        }
        _ => format!(
            "finished shards stay in {partial} ({shards}): the same command goes on there, \
             and with --restart it begins again, as it must after a change of the input"
        ),
    };
    progress.report(Event::Notice(&what));
}
