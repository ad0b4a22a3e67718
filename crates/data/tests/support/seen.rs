//! What progress says, added up.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use phalanx_data::progress::Event;

/// What progress says of the last stage: bytes to do and bytes done, event by event.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<(u64, Vec<u64>)>);

impl Seen {
    pub(crate) fn note(&self, event: Event<'_>) {
        let mut seen = self.0.lock().unwrap();
        match event {
            Event::Begin { total_bytes, .. } => *seen = (total_bytes, Vec::new()),
            Event::Advance { bytes, .. } => seen.1.push(bytes),
            _ => {}
        }
    }

    /// All of the file was to be done and was done, and not at once.
    pub(crate) fn is_all_of(&self, path: &Path) {
        let (seen, bytes) = (self.0.lock().unwrap(), fs::metadata(path).unwrap().len());
        assert_eq!((seen.0, seen.1.iter().sum()), (bytes, bytes), "{}", path.display());
        let most = seen.1.iter().max().unwrap();
        assert!(*most < bytes, "{}: {:?}", path.display(), seen.1);
    }
}
