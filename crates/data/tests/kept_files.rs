//! `CachedFolder` over sources of somebody else's: many of them, and such as panic. Alone in its process, whose limits it changes.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![expect(clippy::panic_in_result_fn, reason = "a source that panics is what is tried")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::source::{CachedFolder, Folder, Source};
use phalanx_data::Result;
use rustix::process::{getrlimit, setrlimit, Resource};

const BLOCK: u64 = 1 << 20;

/// A folder that has every file: of four blocks, each byte of which is the block's number. Block 1 cannot be read without a panic.
#[derive(Debug, Default)]
struct Invented {
    reads: Arc<AtomicU64>,
}

#[derive(Debug)]
struct File {
    name: PathBuf,
    reads: Arc<AtomicU64>,
}

impl Folder for Invented {
    fn name(&self) -> &Path {
        Path::new("invented")
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        Ok(Arc::new(File { name: PathBuf::from(name), reads: Arc::clone(&self.reads) }))
    }
}

impl Source for File {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> u64 {
        4 * BLOCK
    }

    fn version(&self) -> Option<String> {
        Some("1".to_owned())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let block = u8::try_from(offset / BLOCK).unwrap();
        assert!(block != 1, "this source panics");
        out.fill(block);
        Ok(())
    }
}

#[test]
fn more_files_than_may_be_open_and_sources_that_panic() {
    let folder = tempfile::tempdir().unwrap();
    let invented = Invented::default();
    let reads = Arc::clone(&invented.reads);
    let cached = CachedFolder::new(invented, folder.path(), 1 << 30).unwrap();

    let limit = getrlimit(Resource::Nofile);
    assert!(limit.maximum.is_none_or(|most| most > 200), "this test needs 200 open files");
    let few = || rustix::process::Rlimit { current: Some(64), ..limit };
    // Made anew, and found again.
    for round in 0..2 {
        setrlimit(Resource::Nofile, few()).unwrap();
        let files: Vec<_> = (0..100).map(|at| cached.open(&at.to_string()).unwrap()).collect();
        let mut bytes = [9; 10];
        files[99].read_at(2 * BLOCK, &mut bytes).unwrap();
        assert_eq!(bytes, [2; 10]);
        assert_eq!(reads.load(Ordering::SeqCst), 1, "in round {round} the block is there");
        setrlimit(Resource::Nofile, limit).unwrap();
    }

    // Each panic ends what was to be fetched with it, and no more: more of them than there are threads that fetch.
    let file = cached.open("panics").unwrap();
    for _ in 0..10 {
        let before = reads.load(Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(60);
        while reads.load(Ordering::SeqCst) == before {
            assert!(Instant::now() < deadline, "nobody fetches any more");
            // An earlier panic that is still on its way takes with it what is asked meanwhile.
            file.will_need(BLOCK..2 * BLOCK);
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
    file.read_at(3 * BLOCK, &mut [0; 10]).unwrap();
}
