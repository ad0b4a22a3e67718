//! Changed files of a prepared folder, of Megatron and of fixed batches: tokens or an error, no panic, no signal, and no allocation
//! beyond twice the file. For three seconds each; `PHALANX_FUZZ_SECONDS` says otherwise.
#![expect(unsafe_code, reason = "an allocator that measures implements an unsafe trait")]
#![expect(
    clippy::panic_in_result_fn,
    clippy::shadow_unrelated,
    reason = "a failed assertion is a failed test; each kind of file has its own counts"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use phalanx_data::permutation::Permutation;
use phalanx_data::{
    Access, FixedBatches, MegatronTokens, Scratch, SpecialTokens, TokenStream, TokenWriter, Tokens,
};
use safetensors::tensor::{Dtype, TensorView};

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

/// Two documents of 1500 and 2500 tokens, byte by byte as the format is published.
fn write_megatron(folder: &Path) -> std::io::Result<()> {
    let mut idx = b"MMIDIDX\0\0".to_vec();
    idx.extend(1_u64.to_le_bytes());
    idx.push(8);
    idx.extend([2_u64, 3].iter().flat_map(|count| count.to_le_bytes()));
    idx.extend([1500_i32, 2500].iter().flat_map(|length| length.to_le_bytes()));
    idx.extend([0_i64, 3000].iter().flat_map(|offset| offset.to_le_bytes()));
    idx.extend([0_i64, 1, 2].iter().flat_map(|first| first.to_le_bytes()));
    let bin: Vec<u8> = (0..4000_u16).flat_map(|at| (at % 777).to_le_bytes()).collect();
    fs::write(folder.join("corpus.idx"), idx)?;
    fs::write(folder.join("corpus.bin"), bin)
}

/// Some tokens, all documents.
fn read_some(tokens: &dyn Tokens) -> phalanx_data::Result<()> {
    let (mut scratch, mut out) = (Scratch::default(), [0; 64]);
    for start in (0..tokens.token_count().min(5000)).step_by(64) {
        let len = usize::try_from(tokens.token_count() - start).map_or(64, |left| left.min(64));
        tokens.read(start, &mut out[..len], &mut scratch, &"a sample")?;
    }
    for document in 0..tokens.document_count().min(100) {
        tokens.document(document, &mut scratch)?;
    }
    Ok(())
}

/// Changes one of some files of a folder, over and over, and reads; gives the rounds and the errors.
fn change(
    folder: &Path,
    names: &[&str],
    read: impl Fn(Access) -> phalanx_data::Result<()>,
) -> std::io::Result<(u64, u64)> {
    let seconds = std::env::var("PHALANX_FUZZ_SECONDS")
        .map_or(3, |text| text.parse().expect("PHALANX_FUZZ_SECONDS is a whole number"));
    let limit = Duration::from_secs(seconds);
    let originals: Vec<Vec<u8>> =
        names.iter().map(|name| fs::read(folder.join(name))).collect::<std::io::Result<_>>()?;
    let largest_file = originals.iter().map(Vec::len).max().unwrap_or(0);
    let (started, mut round, mut errors) = (Instant::now(), 0_u64, 0_u64);
    while started.elapsed() < limit {
        round += 1;
        let draw = |purpose, below: usize| {
            let at = Permutation::new(below as u64, round, purpose).at(0);
            usize::try_from(at).unwrap_or(0)
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
        let path = folder.join(names[which]);
        fs::write(&path, &bytes)?;
        let file_bytes = bytes.len().max(largest_file);
        LARGEST.0.store(0, Ordering::Relaxed);
        for access in [Access::Read, Access::Map] {
            errors += u64::from(read(access).is_err());
        }
        let largest = LARGEST.0.load(Ordering::Relaxed);
        assert!(
            largest <= 2 * file_bytes + SMALL,
            "round {round}: {largest} of {file_bytes} bytes"
        );
        fs::write(&path, &originals[which])?;
    }
    Ok((round, errors))
}

/// One test: the allocations of another one would be measured as well.
#[test]
fn any_change_of_files_is_tokens_or_an_error_within_twice_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write(&target).unwrap();
    assert_eq!(TokenStream::open(&target, Access::Read).unwrap().damaged().len(), 1);
    let names = ["index.json", "tokens-00000.safetensors", "damage.json"];
    let (rounds, errors) = change(&target, &names, |access| {
        let stream = TokenStream::open(&target, access)?;
        read_some(&stream)?;
        stream.verify()
    })
    .unwrap();
    assert!(errors > rounds, "{errors} errors in {rounds} rounds");
    TokenStream::open(&target, Access::Map).unwrap().verify().unwrap();

    write_megatron(folder.path()).unwrap();
    let prefix = folder.path().join("corpus");
    let (rounds, errors) = change(folder.path(), &["corpus.idx", "corpus.bin"], |access| {
        read_some(&MegatronTokens::open(&prefix, 777, access)?)
    })
    .unwrap();
    assert!(errors > rounds / 4, "{errors} errors in {rounds} rounds");

    // Batches made elsewhere.
    let values: Vec<u8> = (0..64 * 32_i64).flat_map(|at| (at % 100).to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::I64, vec![64, 32], &values).unwrap();
    let labels = TensorView::new(Dtype::I64, vec![64, 32], &values).unwrap();
    let file = folder.path().join("batches.safetensors");
    let bytes = safetensors::serialize([("input_ids", tensor), ("labels", labels)], None).unwrap();
    fs::write(&file, bytes).unwrap();
    let (rounds, errors) =
        change(folder.path(), &["batches.safetensors"], |_| FixedBatches::open(&file).map(drop))
            .unwrap();
    assert!(errors > rounds / 4, "{errors} errors in {rounds} rounds");
}
