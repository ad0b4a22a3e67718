//! What a rank died of, where torchrun looks for it.
//!
//! Source: `torch/distributed/elastic/multiprocessing/errors` of torch 2.11, which reads the file that
//! `TORCHELASTIC_ERROR_FILE` names when a worker has failed.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::panic;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use phalanx_rendezvous::environment::torchrun_error_file;

/// Leaves `message` where torchrun finds it, which then shows it as this rank's failure instead of an exit code alone.
///
/// For the last error of a rank, just before it ends. Under other launchers it does nothing: they show what ranks print.
/// The first message of a process stays; a file that cannot be written is logged.
pub fn record_failure(message: &str) {
    if let Some(path) = torchrun_error_file() {
        if let Err(error) = write(&path, message) {
            tracing::warn!(path = %path.display(), %error, "torchrun will not learn what this rank died of");
        }
    }
}

/// From now on a panic is recorded as by [`record_failure`], before the hook that was there runs.
pub fn record_panics() {
    if torchrun_error_file().is_none() {
        return;
    }
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("without a name").to_owned();
        record_failure(&format!("thread {thread}: {info}"));
        before(info);
    }));
}

fn write(path: &Path, message: &str) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut file = match OpenOptions::new().write(true).create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        opened => opened?,
    };
    file.write_all(json(message, now).as_bytes())
}

/// torchrun prints the call stack where there is one, and else the message.
fn json(message: &str, unix_seconds: u64) -> String {
    let extra =
        serde_json::json!({ "py_callstack": message, "timestamp": unix_seconds.to_string() });
    serde_json::json!({ "message": { "message": message, "extraInfo": extra } }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_message_is_written_as_torchrun_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        write(&path, "rank 3: \"no\"\nmemory").unwrap();
        write(&path, "what followed").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["message"]["message"], "rank 3: \"no\"\nmemory");
        let time = read["message"]["extraInfo"]["timestamp"].as_str().unwrap();
        assert!(time.parse::<u64>().unwrap() > 1_600_000_000, "{time}");
        assert!(write(Path::new("/no/such/folder/error.json"), "x").is_err());
    }
}
