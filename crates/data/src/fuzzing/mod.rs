//! Every parser of files and answers as a function of bytes: for property tests
//! (`tests/malformed.rs`) and fuzzers (`fuzz/`).
//!
//! A target makes cases of bytes. Where a checksum or a fingerprint would end each attempt, the
//! case has a right one, so that what lies behind it is reached.

mod folder;
mod kept;
mod seeds;
#[cfg(feature = "parquet")]
mod tables;

use std::fmt;
use std::sync::Arc;

use crate::batches::{Column, DType, Scratch};
use crate::cast::to_u64;
use crate::convert::json_field::json_text;
use crate::fingerprint::Fingerprint;
use crate::format::bytes::SizedSource;
use crate::format::header::SafetensorsHeader;
use crate::format::index::{FolderIndex, INDEX_FILE};
use crate::format::layout::{BlockLayout, BLOCK_BYTES, PAGE_BLOCKS};
use crate::format::{
    json, Continuations, MegatronTokens, SpecialTokens, TokenIndex, TokenShard, TokenStream, Tokens,
};
use crate::loader::{Buckets, Loader, LoaderOptions, LoaderState};
use crate::order::Tail;
use crate::records::{Field, RecordIndex, RecordSamples, RecordShard, Records};
use crate::samples::{from_fn, FixedBatches, Samples};
use crate::source::Folder;
use folder::MemoryFolder;

/// Something to be read.
pub struct Case {
    /// Bytes of all files in it.
    pub bytes: usize,
    /// Reads it: whatever the bytes are, that ends, does not panic, and takes no more memory than
    /// [`FuzzTarget::memory`] says. Gives whether anything could be read.
    pub read: Box<dyn Fn() -> bool>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// A parser.
#[derive(Clone, Copy, Debug)]
pub struct FuzzTarget {
    /// Its name.
    pub name: &'static str,
    /// What is right, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The cases that bytes make. None if they cannot be what is parsed at all.
    pub cases: fn(&[u8]) -> Vec<Case>,
    /// The memory that a case may take, in bytes: for each byte of its files, and beside that.
    pub memory: (usize, usize),
}

/// Twice the files; a block, and what libraries take for themselves.
const TWICE: (usize, usize) = (2, (1 << 20) + (64 << 10));

/// What the tokenizers crate makes of a file is its own affair: maps of each token, both ways, and
/// automata.
const TOKENIZER: (usize, usize) = (256, 64 << 20);

/// Zstandard makes at most 2^15 bytes of one; a dictionary and a batch may take as much again.
#[cfg(feature = "parquet")]
const TABLE: (usize, usize) = (4 << 15, 2 << 20);

const fn target(
    name: &'static str,
    seeds: fn() -> Vec<Vec<u8>>,
    cases: fn(&[u8]) -> Vec<Case>,
) -> FuzzTarget {
    FuzzTarget { name, seeds, cases, memory: TWICE }
}

/// All of them.
pub const TARGETS: &[FuzzTarget] = &[
    target("token_index", seeds::token_index, token_index),
    target("token_shard", seeds::token_shard, token_shard),
    target("record_index", seeds::record_index, record_index),
    target("record_shard", seeds::record_shard, record_shard),
    target("damage_list", seeds::damage_list, damage_list),
    target("megatron_index", seeds::megatron_index, megatron_index),
    target("fixed_batches", seeds::fixed_batches, fixed_batches),
    target("arrays", seeds::arrays, arrays),
    target("kept_blocks", kept::right, kept::cases),
    target("tokenizer", seeds::tokenizer, tokenizer),
    FuzzTarget {
        memory: TOKENIZER,
        ..target("converter_tokenizer", seeds::converter_tokenizer, converter_tokenizer)
    },
    target("loader_state", seeds::loader_state, loader_state),
    target("journal", seeds::journal, journal),
    target("json_line", seeds::json_line, json_line),
    #[cfg(feature = "http")]
    target("http_answer", seeds::http_answer, http_answer),
    #[cfg(feature = "parquet")]
    FuzzTarget { memory: TABLE, ..target("table", tables::right, tables::cases) },
];

/// Vocabularies of both widths.
const VOCABULARIES: [u32; 2] = [500, 70_000];
const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, 3, 4);

fn case(bytes: usize, read: impl Fn() -> bool + 'static) -> Case {
    Case { bytes, read: Box::new(read) }
}

/// A folder, once read and once mapped.
fn in_folder(
    files: &[(&str, &[u8])],
    read: impl Fn(&MemoryFolder) -> bool + Copy + 'static,
) -> Vec<Case> {
    let one = |is_mapped| {
        let folder = MemoryFolder::new(files, is_mapped);
        case(folder.bytes(), move || read(&folder))
    };
    vec![one(false), one(true)]
}

/// Right checksums at the end of what may be a shard; gives those of their pages.
fn seal(file: &mut [u8]) -> Option<Vec<u32>> {
    let layout = BlockLayout::of(to_u64(file.len()))?;
    let content = usize::try_from(layout.content_bytes).ok()?;
    let (content, sums) = file.split_at_mut(content);
    for (block, sum) in content.chunks(BLOCK_BYTES).zip(sums.chunks_exact_mut(4)) {
        sum.copy_from_slice(&crc32c::crc32c(block).to_le_bytes());
    }
    let page = usize::try_from(PAGE_BLOCKS).ok()? * 4;
    Some(sums.chunks(page).map(crc32c::crc32c).collect())
}

fn header(file: &[u8]) -> Option<SafetensorsHeader> {
    let memory = MemoryFolder::new(&[("f", file)], false);
    SafetensorsHeader::read(&SizedSource::of(Folder::open(&memory, "f").ok()?, None).ok()?).ok()
}

/// How long a tensor says it is; 1 if it says nothing.
fn rows(header: Option<&SafetensorsHeader>, name: &str) -> u64 {
    let span = header.and_then(|header| header.tensor(name).ok());
    span.and_then(|span| span.shape.first().copied()).map_or(1, to_u64)
}

/// Some tokens and documents, and what samples of them would ask for.
fn read_tokens(tokens: &dyn Tokens) -> bool {
    let (mut scratch, mut out) = (Scratch::default(), [0; 64]);
    let mut is_read = false;
    for start in (0..tokens.token_count()).step_by(64).take(100) {
        let len = (tokens.token_count() - start).min(64);
        let out = &mut out[..usize::try_from(len).unwrap_or(64)];
        is_read |= tokens.read(start, out, &mut scratch, &"a sample").is_ok();
    }
    for document in 0..tokens.document_count().min(100) {
        is_read |= tokens.document(document, &mut scratch).is_ok();
    }
    let last = tokens.document_count().saturating_sub(1);
    is_read |= tokens.document(last, &mut scratch).is_ok();
    tokens.will_need(0..tokens.token_count());
    drop((tokens.damaged_documents(), tokens.continuations()));
    is_read
}

fn read_token_folder(folder: &MemoryFolder) -> bool {
    TokenStream::open_from(folder).is_ok_and(|stream| {
        let is_read = read_tokens(&stream);
        is_read & stream.verify().is_ok()
    })
}

fn token_index(bytes: &[u8]) -> Vec<Case> {
    let shard = seeds::tokens();
    let files: [(&str, &[u8]); 2] = [(INDEX_FILE, bytes), ("tokens-00000.safetensors", &shard)];
    let mut cases = in_folder(&files, read_token_folder);
    if let Ok(index) = serde_json::from_slice::<TokenIndex>(bytes) {
        let sealed = json::to_bytes(&index.with_right_fingerprint());
        cases.extend(in_folder(&[(INDEX_FILE, &sealed), files[1]], read_token_folder));
    }
    cases
}

fn token_shard(bytes: &[u8]) -> Vec<Case> {
    let mut shard = bytes.to_vec();
    let Some(crc32c) = seal(&mut shard) else { return Vec::new() };
    let header = header(&shard);
    let file = "tokens-00000.safetensors".to_owned();
    let entry = TokenShard {
        file_bytes: to_u64(shard.len()),
        token_count: rows(header.as_ref(), "tokens"),
        document_count: rows(header.as_ref(), "doc_offsets").saturating_sub(1),
        crc32c,
        file,
    };
    let mut cases = Vec::new();
    for vocab_size in VOCABULARIES {
        let tokenizer = Fingerprint(1);
        let index = TokenIndex::new(vocab_size, SPECIAL, tokenizer, 0, vec![entry.clone()]);
        let list = seeds::damage_of(index.fingerprint, "tokens-00000.safetensors");
        let json = json::to_bytes(&index);
        let files: [(&str, &[u8]); 3] =
            [(INDEX_FILE, &json), (&entry.file, &shard), ("damage.json", &list)];
        cases.extend(in_folder(&files[..2], read_token_folder));
        cases.extend(in_folder(&files, read_token_folder));
    }
    cases
}

fn read_record_folder(folder: &MemoryFolder) -> bool {
    let Ok(records) = Records::open_from(folder) else { return false };
    let mut scratch = Scratch::default();
    let mut is_read = records.damaged().is_ok();
    let count = records.record_count();
    for record in (0..count.min(50)).chain([count.saturating_sub(1)]) {
        for (field, about) in records.fields().iter().enumerate() {
            let Ok(len) = records.elements(record, field, &mut scratch) else { continue };
            // What the file says is no more than it has.
            let mut out = vec![0; len.saturating_mul(about.dtype.bytes())];
            is_read |= records.read(record, field, &mut out, &mut scratch).is_ok();
        }
    }
    let samples = RecordSamples::new(records);
    is_read & samples.is_ok_and(|samples| samples.damaged().is_ok())
}

fn record_index(bytes: &[u8]) -> Vec<Case> {
    let shard = seeds::records();
    let files: [(&str, &[u8]); 2] = [(INDEX_FILE, bytes), ("records-00000.safetensors", &shard)];
    let mut cases = in_folder(&files, read_record_folder);
    if let Ok(index) = serde_json::from_slice::<RecordIndex>(bytes) {
        let sealed = json::to_bytes(&index.with_right_fingerprint());
        cases.extend(in_folder(&[(INDEX_FILE, &sealed), files[1]], read_record_folder));
    }
    cases
}

fn record_shard(bytes: &[u8]) -> Vec<Case> {
    let mut shard = bytes.to_vec();
    let Some(crc32c) = seal(&mut shard) else { return Vec::new() };
    let header = header(&shard);
    let fields: Vec<Field> = seeds::fields();
    let file = "records-00000.safetensors".to_owned();
    let (file_bytes, record_count) = (to_u64(shard.len()), rows(header.as_ref(), &fields[0].name));
    let entry = RecordShard { file, file_bytes, record_count, crc32c, longest: Vec::new() };
    let index = RecordIndex::new(fields, vec![entry.clone()]);
    let list = seeds::damage_of(index.fingerprint, &entry.file);
    let json = json::to_bytes(&index);
    let files: [(&str, &[u8]); 3] =
        [(INDEX_FILE, &json), (&entry.file, &shard), ("damage.json", &list)];
    let mut cases = in_folder(&files[..2], read_record_folder);
    cases.extend(in_folder(&files, read_record_folder));
    cases
}

fn damage_list(bytes: &[u8]) -> Vec<Case> {
    let (tokens, records) = (seeds::token_index(), seeds::record_index());
    let (shard, other) = (seeds::tokens(), seeds::records());
    let files: [(&str, &[u8]); 3] =
        [(INDEX_FILE, &tokens[0]), ("tokens-00000.safetensors", &shard), ("damage.json", bytes)];
    // What is lost cannot be read, but the list can.
    let mut cases = in_folder(&files, |folder| {
        read_token_folder(folder);
        TokenStream::open_from(folder).is_ok()
    });
    let of_records: [(&str, &[u8]); 3] =
        [(INDEX_FILE, &records[0]), ("records-00000.safetensors", &other), ("damage.json", bytes)];
    cases.extend(in_folder(&of_records, |folder| {
        read_record_folder(folder);
        Records::open_from(folder).is_ok()
    }));
    cases
}

fn megatron_index(bytes: &[u8]) -> Vec<Case> {
    let bin: Vec<u8> = (0..4000_u16).flat_map(|at| (at % 777).to_le_bytes()).collect();
    in_folder(&[("c.idx", bytes), ("c.bin", &bin)], |folder| {
        MegatronTokens::open_from(folder, "c", 777).is_ok_and(|tokens| read_tokens(&tokens))
    })
}

fn fixed_batches(bytes: &[u8]) -> Vec<Case> {
    in_folder(&[("f", bytes)], |folder| FixedBatches::open_from(folder, "f").is_ok())
}

/// A parser of text alone.
fn text(bytes: &[u8], read: impl Fn(&[u8]) -> bool + 'static) -> Vec<Case> {
    let owned = bytes.to_vec();
    vec![case(bytes.len(), move || read(&owned))]
}

fn tokenizer(bytes: &[u8]) -> Vec<Case> {
    text(bytes, |json| {
        let of = |vocab_size| Continuations::of_json(json, vocab_size, "tokenizer.json".as_ref());
        of(1000).is_ok() & of(u32::MAX).is_ok()
    })
}

fn converter_tokenizer(bytes: &[u8]) -> Vec<Case> {
    text(bytes, crate::text::encoder::fuzzed)
}

fn arrays(bytes: &[u8]) -> Vec<Case> {
    in_folder(&[("f", bytes)], |folder| {
        Folder::open(folder, "f").is_ok_and(crate::records::arrays::fuzzed)
    })
}

fn loader_state(bytes: &[u8]) -> Vec<Case> {
    text(bytes, |json| {
        serde_json::from_slice::<LoaderState>(json).is_ok_and(|state| {
            // What was read is written and read again as it is.
            let written = serde_json::to_vec(&state).unwrap_or_default();
            let again = serde_json::from_slice::<LoaderState>(&written);
            assert!(again.is_ok_and(|again| again == state), "{state:?}");
            let columns = vec![Column::new("x", DType::U8, [])];
            let samples = from_fn(100, columns, "", |_, _, _| Ok(()));
            // Batches of a run's own size, however large the state says that they were.
            let buckets = state.buckets.filter(|sizes| sizes.batches.max(sizes.global_batch) <= 64);
            let sizes = buckets.unwrap_or(Buckets { batches: 0, global_batch: 32 });
            let options = LoaderOptions {
                seed: state.seed,
                order: state.order,
                bucketing: sizes.batches,
                global_batch: usize::try_from(sizes.global_batch).unwrap_or(32),
                threads: 0,
                tail: Tail::Exact,
                ..Default::default()
            };
            let own = LoaderState { fingerprint: samples.fingerprint(), ..state };
            Loader::resume(Arc::new(samples), options, &own)
                .is_ok_and(|mut loader| loader.next_step().is_ok())
        })
    })
}

fn journal(bytes: &[u8]) -> Vec<Case> {
    text(bytes, crate::convert::journal::parses)
}

fn json_line(bytes: &[u8]) -> Vec<Case> {
    text(bytes, |line| {
        std::str::from_utf8(line).is_ok_and(|line| {
            let nested = json_text(line, "page.body").is_ok();
            json_text(line, "text").is_ok() | nested
        })
    })
}

#[cfg(feature = "http")]
fn http_answer(bytes: &[u8]) -> Vec<Case> {
    text(bytes, crate::source::fuzzed_answer)
}
