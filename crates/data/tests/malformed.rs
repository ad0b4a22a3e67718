//! Changed files of a prepared folder: tokens or an error, no panic, no signal, and no allocation beyond twice the file. For three
//! seconds; `PHALANX_FUZZ_SECONDS` says otherwise.
#![expect(unsafe_code, reason = "an allocator that measures implements an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use phalanx_data::permutation::Permutation;
use phalanx_data::{Access, Scratch, SpecialTokens, TokenStream, TokenWriter};

/// Remembers the largest allocation.
struct Largest(AtomicUsize);

#[global_allocator]
static LARGEST: Largest = Largest(AtomicUsize::new(0));

// SAFETY: every call is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`; the memory came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.0.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `realloc`; the memory came from the system's allocator.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// What buffers of the libraries take, whatever the file.
const SMALL: usize = 64 << 10;

/// A prepared folder of one shard, whose first block is listed as damaged.
fn write(target: &Path) -> anyhow::Result<()> {
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(target, b"{}", 500, special, 1 << 20)?;
    for document in 0..40_u32 {
        writer.tokens(&[5 + document; 50])?;
        writer.end_document()?;
    }
    let index = writer.finish(0)?;
    let list = serde_json::json!({
        "format": "phalanx-damage", "version": 1, "fingerprint": index.fingerprint,
        "blocks": [{"file": "tokens-00000.safetensors", "block": 0}],
    });
    fs::write(target.join("damage.json"), list.to_string())?;
    Ok(())
}

#[test]
fn any_change_of_a_prepared_folder_is_tokens_or_an_error_within_twice_the_file() {
    let seconds = std::env::var("PHALANX_FUZZ_SECONDS").map_or(3, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write(&target).unwrap();
    assert_eq!(TokenStream::open(&target, Access::Read).unwrap().damaged().len(), 1);
    let names = ["index.json", "tokens-00000.safetensors", "damage.json"];
    let originals = names.map(|name| fs::read(target.join(name)).unwrap());
    let (started, mut round, mut errors) = (Instant::now(), 0_u64, 0_u64);
    while started.elapsed() < Duration::from_secs(seconds) {
        round += 1;
        let draw = |purpose, below: usize| {
            let at = Permutation::new(below as u64, round, purpose).at(0);
            usize::try_from(at).unwrap()
        };
        let which = draw(0, names.len());
        let mut bytes = originals[which].clone();
        // Most of the interest is in the first bytes: lengths, the header.
        let near = if draw(1, 2) == 0 { 400.min(bytes.len()) } else { bytes.len() };
        let at = draw(2, near);
        match draw(3, 4) {
            0 => bytes[at] ^= 1 << draw(4, 8),
            1 => bytes.truncate(at),
            2 => {
                let extreme = [0, 1, u64::MAX, 1 << 63, 1 << 32, 99_999_999][draw(5, 6)];
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&extreme.to_le_bytes()[..end - at]);
            }
            _ => {
                let number =
                    ["0", "-1", "18446744073709551615", "1e300", "99999999999"][draw(6, 5)];
                let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(at..at + digits, number.bytes());
            }
        }
        let path = target.join(names[which]);
        fs::write(&path, &bytes).unwrap();
        let file_bytes = bytes.len().max(originals[1].len());
        LARGEST.0.store(0, Ordering::Relaxed);
        for access in [Access::Read, Access::Map] {
            let read = TokenStream::open(&target, access).and_then(|stream| {
                let mut scratch = Scratch::default();
                let mut tokens = [0; 64];
                for start in (0..stream.token_count().min(5000)).step_by(64) {
                    let len = usize::try_from(stream.token_count() - start).unwrap().min(64);
                    stream.read(start, &mut tokens[..len], &mut scratch, &"a sample")?;
                }
                for document in 0..stream.document_count().min(100) {
                    stream.document(document, &mut scratch)?;
                }
                stream.verify()
            });
            errors += u64::from(read.is_err());
        }
        let largest = LARGEST.0.load(Ordering::Relaxed);
        assert!(
            largest <= 2 * file_bytes + SMALL,
            "round {round}: {largest} of {file_bytes} bytes"
        );
        fs::write(&path, &originals[which]).unwrap();
    }
    assert!(errors > round, "{errors} errors in {round} rounds");
    TokenStream::open(&target, Access::Map).unwrap().verify().unwrap();
}
