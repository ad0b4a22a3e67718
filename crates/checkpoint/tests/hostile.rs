//! Manifests and headers that somebody made up: errors, in memory bounded by their size.

#![expect(unsafe_code, reason = "gate: an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use phalanx_checkpoint::{Checkpoint, Weights};

/// Counts what is allocated, and the most that ever was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands on to the system's allocator, and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `act` allocates at any time.
fn peak(act: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    act();
    PEAK.load(Ordering::Relaxed).saturating_sub(before)
}

/// A manifest with a right seal, whatever is in it.
fn sealed(content: &str) -> Vec<u8> {
    let content = content.strip_suffix('}').unwrap_or(content);
    let seal = crc32c::crc32c(content.as_bytes());
    format!("{content},\"manifest_crc32c\":\"{seal:08x}\"}}\n").into_bytes()
}

fn manifest(files: &str, tensors: &str, values: &str) -> Vec<u8> {
    sealed(&format!(
        "{{\"format\":\"phalanx-checkpoint\",\"version\":1,\"step\":1,\"world_size\":1,\
         \"block_bytes\":1048576,\"files\":[{files}],\"tensors\":[{tensors}],\
         \"values\":{values},\"rank_values\":[null]}}"
    ))
}

fn tensor(shape: &str, pieces: &str) -> String {
    format!("{{\"name\":\"w\",\"dtype\":\"F32\",\"shape\":{shape},\"pieces\":[{pieces}]}}")
}

fn manifests() -> Vec<(&'static str, Vec<u8>)> {
    let file = |bytes: u64| format!("{{\"name\":\"a\",\"bytes\":{bytes},\"crc32c\":\"\"}}");
    // So large that every piece lies in it.
    let sums = "0".repeat(8 * 22_889);
    let large = format!("{{\"name\":\"a\",\"bytes\":24000000000,\"crc32c\":\"{sums}\"}}");
    let piece = "{\"file\":0,\"offset\":0,\"box\":{\"start\":[],\"len\":[]}}";
    let many = |text: &str, count: usize| [text].repeat(count).join(",");
    let bars: Vec<String> = (0..6000)
        .map(|n| {
            let (half, odd) = (n / 2, n % 2);
            format!(
                "{{\"file\":0,\"offset\":0,\"box\":{{\"start\":[{n},{half},{odd}],\"len\":[1000000,1,1]}}}}"
            )
        })
        .collect();
    vec![
        ("a file of 2^63 bytes", manifest(&file(1 << 63), "", "null")),
        ("a shape without end", manifest("", &tensor("[9223372036854775807,9]", ""), "null")),
        (
            "many dimensions",
            manifest("", &tensor(&format!("[{}]", many("1", 100_000)), ""), "null"),
        ),
        ("many pieces", manifest("", &tensor("[]", &many(piece, 50_000)), "null")),
        (
            "pieces across each other",
            manifest(&large, &tensor("[2000000,2000000,2]", &bars.join(",")), "null"),
        ),
        ("many tensors", manifest("", &many(&tensor("[0]", ""), 50_000), "null")),
        (
            "a deep shape",
            manifest("", &tensor(&("[".repeat(1 << 20) + &"]".repeat(1 << 20)), ""), "null"),
        ),
        ("many values", manifest("", "", &format!("[{}]", many("0", 2_000_000)))),
        ("deep values", manifest("", "", &("[".repeat(1 << 20) + &"]".repeat(1 << 20)))),
        ("nothing", Vec::new()),
        ("no object", sealed("[1,2,3]")),
    ]
}

/// Both in one test: what others allocate meanwhile would be counted.
#[test]
fn made_up_files_take_memory_by_their_size_and_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    for (what, text) in manifests() {
        std::fs::write(folder.path().join("manifest.json"), &text).unwrap();
        let peak = peak(|| {
            // Values stay text until somebody asks for them.
            if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
                assert!(what.ends_with("values"), "{what}");
                assert_eq!(checkpoint.step(), 1);
            }
        });
        assert!(peak <= 8 * text.len() + (1 << 20), "{what}: {peak} bytes for {}", text.len());
    }
    for (what, header) in headers() {
        check_header(folder.path(), what, &header);
    }
}

fn headers() -> Vec<(&'static str, Vec<u8>)> {
    let with_length =
        |text: String| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let tensor =
        |n: usize| format!("\"{n}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let tensors: Vec<String> = (0..20_000).map(tensor).collect();
    vec![
        ("2^63 bytes", (1_u64 << 63).to_le_bytes().to_vec()),
        ("all bytes", u64::MAX.to_le_bytes().to_vec()),
        ("a gigabyte", (1_u64 << 30).to_le_bytes().to_vec()),
        ("deep", with_length("[".repeat(1 << 20))),
        ("wide", with_length(format!("{{\"w\":[{}0]}}", "0,".repeat(1 << 20)))),
        ("many tensors", with_length(format!("{{{}}}", tensors.join(",")))),
    ]
}

fn check_header(folder: &Path, what: &str, bytes: &[u8]) {
    let path = folder.join("w.safetensors");
    std::fs::write(&path, bytes).expect("write");
    let peak = peak(|| drop(Weights::open(&path)));
    assert!(peak <= 8 * bytes.len() + (1 << 20), "{what}: {peak} bytes for {}", bytes.len());
}
