//! Whatever bytes a parser is given: data or an error, no panic, and no more memory than twice the files and a megabyte. Each parser
//! for a second, from right files that are changed over and over; `PHALANX_FUZZ_SECONDS` says otherwise, and `PHALANX_FUZZ_SEED`
//! (a number; 0) makes other changes. With a nightly toolchain `fuzz/` does the same led by coverage.
#![expect(unsafe_code, reason = "an allocator that measures implements an unsafe trait")]
#![expect(clippy::print_stdout, reason = "shown if a test fails")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;
use std::time::{Duration, Instant};

use phalanx_data::fuzzing::{Case, FuzzTarget, TARGETS};

/// Counts what each thread has allocated, and the most of it at once: tests run side by side.
struct Measuring;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static MEASURING: Measuring = Measuring;

/// A thread that ends has no counters any more.
fn count(change: impl Fn(usize) -> usize) {
    let live = LIVE.try_with(|live| {
        live.set(change(live.get()));
        live.get()
    });
    if let Ok(live) = live {
        PEAK.try_with(|peak| peak.set(peak.get().max(live))).ok();
    }
}

// SAFETY: every call is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|live| live.saturating_add(layout.size()));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(|live| live.saturating_sub(layout.size()));
        // SAFETY: the caller keeps the contract of `dealloc`; the memory came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(|live| live.saturating_sub(layout.size()).saturating_add(size));
        // SAFETY: the caller keeps the contract of `realloc`; the memory came from the system's allocator.
        unsafe { System.realloc(memory, layout, size) }
    }
}

thread_local! {
    static IS_READING: Cell<bool> = const { Cell::new(false) };
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of libraries that the converters catch are not printed: they would fill memory. What was not caught is told by [`read`].
fn keep_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |about| {
            if IS_READING.get() {
                LAST_PANIC.set(about.to_string());
            } else {
                default(about);
            }
        }));
    });
}

/// Reads a case; gives whether anything could be read.
fn read(target: &FuzzTarget, case: &Case) -> bool {
    keep_quiet();
    LAST_PANIC.take();
    let before = LIVE.get();
    PEAK.set(before);
    IS_READING.set(true);
    let is_read = catch_unwind(AssertUnwindSafe(|| (case.read)()));
    IS_READING.set(false);
    let taken = PEAK.get() - before;
    let (FuzzTarget { name, memory: (times, besides), .. }, bytes) = (target, case.bytes);
    assert!(taken <= times * bytes + besides, "{name}: {taken} of {bytes} bytes");
    is_read.unwrap_or_else(|_| panic!("{name}: {}", LAST_PANIC.take()))
}

/// Numbers that seem random: xorshift of 64 bits.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).unwrap_or(0)
    }
}

const WORDS: &[&str] = &[
    "0",
    "-1",
    "1",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "1e300",
    "0.5",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[0,0]",
    ",",
    ":",
    "\\u0000",
    "\\ud800",
    "U64",
    "BOOL",
    "F4",
    "../x",
    "b1x1",
    "b0x0",
    "b18446744073709551615x2",
    "##",
    "bytes 5-5/6",
];

/// One change, of the kinds that break parsers.
fn change(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    // Most of the interest is in the first bytes: lengths, the header.
    let near = if numbers.below(2) == 0 { 400.min(bytes.len()) } else { bytes.len() };
    let at = numbers.below(near);
    let end = (at + numbers.below(40)).min(bytes.len());
    match numbers.below(9) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes.truncate(at),
        2 => {
            let extreme =
                [0, 1, 2, u64::MAX, 1 << 63, 1 << 32, 99_999_999, 65_535][numbers.below(8)];
            let len = [1, 2, 4, 8][numbers.below(4)].min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&extreme.to_le_bytes()[..len]);
        }
        3 => {
            let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            bytes.splice(at..at + digits, WORDS[numbers.below(WORDS.len())].bytes());
        }
        4 => drop(bytes.splice(at..end, WORDS[numbers.below(WORDS.len())].bytes())),
        5 => drop(bytes.drain(at..end)),
        6 => {
            // A number as Thrift has it: seven bits a byte, the sign last.
            let more = bytes[at..].iter().take_while(|&&byte| byte >= 0x80).count();
            let after = (at + more + 1).min(bytes.len());
            let new: &[u8] = [
                &[0xFE, 0xFF, 0xFF, 0xFF, 0x0F][..],
                &[0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1],
                &[0x80, 0x80, 0x80, 0x08],
                &[1],
            ][numbers.below(4)];
            bytes.splice(at..after, new.iter().copied());
        }
        7 => {
            let part = bytes[at..end].repeat(1 + numbers.below(20));
            bytes.splice(at..at, part);
        }
        _ => bytes.extend_from_within(at..end),
    }
}

fn target(name: &str) -> &'static FuzzTarget {
    TARGETS.iter().find(|target| target.name == name).expect("there is such a target")
}

/// What a variable says, or what holds without it.
fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// Changes right files and reads them, until the time is over.
fn fuzz(name: &str) {
    let target = target(name);
    let seconds = number("PHALANX_FUZZ_SECONDS", 1);
    let seeds = (target.seeds)();
    for seed in &seeds {
        let cases = (target.cases)(seed);
        // By count: read so many passes the wide files as narrow ones, and the other way round.
        let good = cases.iter().filter(|case| read(target, case)).count();
        assert!(good > 0 || name == "http_answer", "{name}: a right file cannot be read");
    }
    let (started, limit) = (Instant::now(), Duration::from_secs(seconds));
    let first = number("PHALANX_FUZZ_SEED", 0);
    // Shown if the test fails.
    println!("{name}: changes of PHALANX_FUZZ_SEED={first}");
    let mut numbers = Numbers((0x9E37_79B9_7F4A_7C15 ^ first).max(1));
    let (mut rounds, mut good, mut bad) = (0_u64, 0_u64, 0_u64);
    while started.elapsed() < limit || rounds < 50 {
        rounds += 1;
        let mut bytes = seeds[numbers.below(seeds.len())].clone();
        for _ in 0..=numbers.below(4) {
            change(&mut bytes, &mut numbers);
        }
        for case in (target.cases)(&bytes) {
            if read(target, &case) {
                good += 1;
            } else {
                bad += 1;
            }
        }
    }
    println!("{name}: {rounds} rounds, {good} cases read, {bad} not");
    assert!(good > 0 && bad > 0, "{name}: {good} good and {bad} bad of {rounds} rounds");
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            fuzz(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_test() {
            let tested = [$(stringify!($name)),*];
            let missing: Vec<&str> =
                TARGETS.iter().map(|target| target.name).filter(|name| !tested.contains(name)).collect();
            let others = missing.iter().any(|name| !["http_answer", "table"].contains(name));
            assert!(!others, "{missing:?}");
        }
    };
}

targets! {
    token_index token_shard record_index record_shard damage_list megatron_index fixed_batches
    arrays kept_blocks tokenizer converter_tokenizer loader_state journal json_line
}

#[test]
fn every_target_has_a_fuzzer() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/Cargo.toml");
    let manifest = std::fs::read_to_string(manifest).expect("the fuzzers' manifest is there");
    let binaries = manifest.split("[[bin]]").skip(1);
    let mut names: Vec<&str> = binaries.filter_map(|text| text.split('"').nth(1)).collect();
    let targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let has = |feature: bool, name: &str| feature || targets.contains(&name);
    names.retain(|name| {
        has(*name != "http_answer" || cfg!(feature = "http"), name)
            && has(*name != "table" || cfg!(feature = "parquet"), name)
    });
    assert_eq!(names, targets);
}

#[cfg(feature = "http")]
#[test]
fn http_answer() {
    fuzz("http_answer");
}

#[cfg(feature = "parquet")]
#[test]
fn table() {
    fuzz("table");
}

/// Rows of a byte: nothing that is remembered of each may be more than it.
#[test]
fn an_array_of_single_bytes_takes_twice_its_file() {
    let count = 3 << 20;
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{count}],"data_offsets":[0,{count}]}}}}"#);
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length, header.as_bytes(), &vec![7; count]].concat();
    let target = target("arrays");
    assert!((target.cases)(&file).iter().all(|case| read(target, case)));
}

/// A file whose text holds very many very small values.
fn compact(before: &str, value: &str, after: &str) -> Vec<u8> {
    let count = (4 << 20) / value.len();
    [before, &value.repeat(count), after].concat().into_bytes()
}

/// The header of a safetensors file, and some data.
fn with_header(json: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json, &[0; 4096]].concat()
}

#[test]
fn huge_compact_json_is_an_error_within_twice_the_file() {
    let refused = |name: &str, bytes: &[u8]| {
        let target = target(name);
        for case in (target.cases)(bytes) {
            read(target, &case);
        }
    };
    let shape =
        compact(r#"{"input_ids":{"dtype":"I64","data_offsets":[0,4096],"shape":[0"#, ",0", "]}}");
    refused("fixed_batches", &with_header(&shape));
    let about = compact(r#"{"__metadata__":{"a":""#, r#"","b":""#, r#""}}"#);
    refused("fixed_batches", &with_header(&about));
    let tensors: String = (0..60_000)
        .map(|at| format!(r#""{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#))
        .collect();
    let tensors =
        format!(r#"{{{tensors}"z":{{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}}}"#);
    refused("fixed_batches", &with_header(tensors.as_bytes()));
    refused("token_shard", &with_header(tensors.as_bytes()));
    refused("arrays", &with_header(tensors.as_bytes()));
    let long = compact(
        r#"{"z":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]},"__metadata__":{"a":""#,
        "a",
        r#""}}"#,
    );
    refused("fixed_batches", &with_header(&long));

    let crc = r#"{"format":"phalanx-tokens","version":2,"creator":"","dtype":"U16","vocab_size":9,"special":{},"tokenizer":"0000000000000000","token_count":0,"document_count":0,"source_bytes":0,"block_bytes":1048576,"fingerprint":"0000000000000000","shards":[{"file":"a","file_bytes":0,"token_count":0,"document_count":0,"crc32c":[0"#;
    refused("token_index", &compact(crc, ",0", "]}]}"));
    let shard = r#",{"file":"a","file_bytes":0,"token_count":0,"document_count":0,"crc32c":[]}"#;
    refused("token_index", &compact(&format!("{crc}]}}"), shard, "]}"));
    let fields = r#"{"format":"phalanx-records","version":2,"creator":"","record_count":0,"block_bytes":1048576,"fingerprint":"0000000000000000","shards":[],"fields":[{"name":"a","dtype":"U8","shape":[0"#;
    refused("record_index", &compact(fields, ",0", "]}]}"));

    let list = r#"{"format":"phalanx-damage","version":1,"fingerprint":"0000000000000000","blocks":[{"file":"a","block":0}"#;
    refused("damage_list", &compact(list, r#",{"file":"a","block":0}"#, "]}"));
    refused("damage_list", &compact(&format!(r#"{list}],"lost":["a""#), r#","b""#, "]}"));
    let head = "{\"format\":\"phalanx-conversion\",\"version\":1,\"key\":\"0000000000000007\"}\n";
    let line =
        r#"{"shard":{"file":"a","file_bytes":9,"token_count":5,"document_count":1,"crc32c":[1"#;
    let rest = "]},\"next\":{\"file\":0,\"offset\":0,\"line\":0},\"counts\":{\"skipped_lines\":0,\"unknown_tokens\":0}}\n";
    refused("journal", &compact(&format!("{head}{line}"), ",1", rest));
    refused("journal", &compact(head, &format!("{line}{rest}"), ""));
    refused("journal", &compact(head, "\n", ""));

    let vocabulary = r#"{"model":{"type":"WordPiece","vocab":{"a":0"#;
    refused("tokenizer", &compact(vocabulary, r###","##":1"###, "}}}"));
    refused("tokenizer", &compact(r#"{"model":{"type":"BPE","merges":["#, "0,", "0]}}"));
    refused("json_line", &compact(r#"{"a":[0"#, ",0", r#"],"text":"b"}"#));
    refused("loader_state", &compact(r#"{"epoch":[0"#, ",0", "]}"));
}
