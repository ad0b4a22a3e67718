//! Records, fixed batches, lists of damage and tokenizers of a folder that is not local: a `Folder` of this test.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use phalanx_data::batches::Scratch;
use phalanx_data::damage::{record_damage, verify, verify_from};
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter, Tokens};
use phalanx_data::progress::Silent;
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::samples::{Documents, FixedBatches, Mixture, Objective, PaddedText};
use phalanx_data::source::{Folder, LocalFolder, Source};
use phalanx_data::{
    Access, CausalText, DType, Error, Loader, LoaderOptions, MaskedText, Masking, Order, Result,
    Samples, Tail,
};
use safetensors::tensor::{Dtype, TensorView};

/// A folder behind a wall: it gives bytes, and remembers what was asked of it.
#[derive(Debug)]
struct Far {
    inner: LocalFolder,
    asked: Arc<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    opened: Mutex<Vec<String>>,
    /// File, start and end of what will be needed, and of what was read.
    needed: Mutex<Vec<(PathBuf, u64, u64)>>,
    read: Mutex<Vec<(PathBuf, u64, u64)>>,
}

impl Asked {
    /// Whether it was said that a part of a file will be needed.
    fn is_for(&self, (path, start, end): &(PathBuf, u64, u64)) -> bool {
        // A sample may begin in one block and its last label lie in the next.
        let is_in = |(file, from, to): &(PathBuf, u64, u64)| {
            file == path && from <= start && (end <= to || start < to)
        };
        self.needed.lock().unwrap().iter().any(is_in)
    }
}

#[derive(Debug)]
struct FarFile {
    inner: Arc<dyn Source>,
    asked: Arc<Asked>,
}

impl Far {
    fn new(path: &Path) -> Self {
        Far { inner: LocalFolder::new(path, Access::Read), asked: Arc::default() }
    }
}

impl Folder for Far {
    fn name(&self) -> &Path {
        Path::new("far")
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        self.asked.opened.lock().unwrap().push(name.to_owned());
        let (inner, asked) = (self.inner.open(name)?, Arc::clone(&self.asked));
        Ok(Arc::new(FarFile { inner, asked }))
    }
}

impl Source for FarFile {
    fn name(&self) -> &Path {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        self.asked.read.lock().unwrap().push((self.name().to_path_buf(), offset, end));
        self.inner.read_at(offset, out)
    }

    fn will_need(&self, range: std::ops::Range<u64>) {
        let asked = (self.name().to_path_buf(), range.start, range.end);
        self.asked.needed.lock().unwrap().push(asked);
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn write_records(target: &Path) {
    let fields = vec![Field::fixed("label", DType::I64, []), Field::variable("sound", DType::I16)];
    let mut writer = RecordWriter::create(target, fields, 1 << 20).unwrap();
    for record in 0..3000_i64 {
        let len = usize::try_from(record % 997).unwrap();
        let sound = vec![i16::try_from(record).unwrap(); len];
        writer.push(&[ColumnValue::of(&[record]), ColumnValue::of(&sound)]).unwrap();
    }
    writer.finish().unwrap();
}

fn write_tokens(target: &Path, tokenizer: &[u8]) {
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(target, tokenizer, 500, special, 1 << 20).unwrap();
    for document in 0..15_000_u32 {
        let tokens: Vec<u32> = (0..100).map(|at| 5 + (document * 7 + at * at) % 495).collect();
        writer.tokens(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(0).unwrap();
}

#[test]
fn records_are_those_of_the_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    write_records(&target);
    let far = Far::new(&target);
    let (near, far_records) =
        (Records::open(&target, Access::Map).unwrap(), Records::open_from(&far).unwrap());
    assert_eq!(near.index(), far_records.index());
    assert!(near.index().shards.len() > 1);
    let mut scratch = Scratch::default();
    for record in (0..3000).step_by(7) {
        let count = near.elements(record, 1, &mut scratch).unwrap();
        assert_eq!(far_records.elements(record, 1, &mut scratch).unwrap(), count);
        let (mut a, mut b) = (vec![0; 2 * count], vec![1; 2 * count]);
        near.read(record, 1, &mut a, &mut scratch).unwrap();
        far_records.read(record, 1, &mut b, &mut scratch).unwrap();
        assert_eq!(a, b);
    }
    // Bounds are read many at a time.
    far.asked.read.lock().unwrap().clear();
    let samples = RecordSamples::new(far_records).unwrap();
    assert!(far.asked.read.lock().unwrap().len() < 20, "{:?}", far.asked.read.lock().unwrap());
    let mut loader = Loader::new(Arc::new(samples), LoaderOptions::default()).unwrap();
    for batch in &loader.next_step().unwrap().micro_batches {
        assert_eq!(batch.get::<i64>("label").unwrap().len(), 32);
    }
}

#[test]
fn a_far_folder_is_verified_and_its_list_of_damage_is_heeded() {
    let folder = tempfile::tempdir().unwrap();
    let (records, tokens) = (folder.path().join("records"), folder.path().join("tokens"));
    write_records(&records);
    write_tokens(&tokens, b"{}");
    let check = |path: &Path, shard: &str| {
        assert!(verify_from(&Far::new(path), None, &Silent).unwrap().damage.is_empty());
        flip(&path.join(shard), 900_000);
        let found = verify_from(&Far::new(path), None, &Silent).unwrap();
        assert_eq!((found.damage.len(), found.blocks.len()), (1, 1), "{:?}", found.damage);
        let near = verify(path, None, &Silent).unwrap();
        assert_eq!((near.blocks, near.bytes), (found.blocks.clone(), found.bytes));
        record_damage(path, &found).unwrap();
    };
    check(&records, "records-00000.safetensors");
    check(&tokens, "tokens-00000.safetensors");
    let far_records = Records::open_from(&Far::new(&records)).unwrap();
    assert!(!far_records.damaged().unwrap().is_empty());
    let far_tokens = TokenStream::open_from(&Far::new(&tokens)).unwrap();
    assert_eq!(far_tokens.damaged().len(), 1);
    let missing = verify_from(&Far::new(folder.path()), None, &Silent).unwrap_err();
    assert!(missing.to_string().contains("index.json"), "{missing}");
}

#[test]
fn fixed_batches_are_read_in_large_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<u8> = (0..4000 * 16_i64).flat_map(|at| (at % 100).to_le_bytes()).collect();
    let tensor =
        || safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![4000, 16], &values);
    let tensors = [("input_ids", tensor().unwrap()), ("labels", tensor().unwrap())];
    fs::write(folder.path().join("f"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    let far = Far::new(folder.path());
    let batches = FixedBatches::open_from(&far, "f").unwrap();
    let near = FixedBatches::open(&folder.path().join("f")).unwrap();
    assert_eq!(batches.fingerprint(), near.fingerprint());
    assert_eq!((batches.sample_count(), batches.id_max()), (4000, 99));
    assert!(far.asked.read.lock().unwrap().len() < 12, "{:?}", far.asked.read.lock().unwrap());
    let none = FixedBatches::open_from(&far, "g").unwrap_err();
    assert!(none.to_string().starts_with("cannot open"), "{none}");
}

#[test]
fn whole_words_are_found_by_the_tokenizer_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let json = r###"{"model": {"type": "WordPiece", "continuing_subword_prefix": "##",
        "vocab": {"[CLS]": 2, "run": 5, "##ning": 6}}}"###;
    write_tokens(&target, json.as_bytes());
    let masking = Masking { whole_words: true, ..Default::default() };
    let open = || {
        let stream = TokenStream::open_from(&Far::new(&target)).unwrap();
        MaskedText::new(Arc::new(stream), 64, masking)
    };
    let near = MaskedText::open(&target, 64, masking, Access::Map).unwrap();
    assert_eq!(open().unwrap().fingerprint(), near.fingerprint());

    // Another tokenizer has other words: masks would silently be others on this machine.
    let path = target.join("tokenizer.json");
    fs::write(&path, json.replace("##ning", "##ting")).unwrap();
    let error = open().unwrap_err();
    assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
    assert!(error.to_string().contains("not the tokenizer of these tokens"), "{error}");
    fs::remove_file(&path).unwrap();
    let absent = open().unwrap_err().to_string();
    assert!(absent.contains("it is not there") && absent.contains("tokenizer.json"), "{absent}");
}

#[test]
fn what_a_shuffle_in_blocks_reads_was_asked_for_before() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, b"{}");
    let [far, twin] = [(); 2].map(|()| Far::new(&target));
    let loader = |of: &Far| {
        let stream = Arc::new(TokenStream::open_from(of).unwrap());
        // Checksums are compared when a block is first touched: reads of whole blocks that are not of interest here.
        stream.verify().unwrap();
        let samples = CausalText::new(stream, 64, Documents::Joined).unwrap();
        let options = LoaderOptions {
            order: Order::Blocks { block: 512, window: 4 },
            global_batch: 64,
            threads: 0,
            epochs: Some(1),
            ..Default::default()
        };
        Loader::new(Arc::new(samples), options).unwrap()
    };
    let (own, before) = (loader(&far), loader(&twin));
    let steps = own.steps_per_epoch();
    all_is_asked_for_before((own, &far.asked), (before, &twin.asked), steps);
    let needed: u64 = far.asked.needed.lock().unwrap().iter().map(|(_, from, to)| to - from).sum();
    let tokens = TokenStream::open(&target, Access::Read).unwrap().token_count();
    assert!(needed < 2 * tokens + 2 * tokens / 10, "each byte once: {needed} of {tokens} tokens");
}

/// What each step reads was asked for when the step before it was delivered, at the latest. What it will read, a twin of the loader tells,
/// which is a step ahead; the thread that asks may be some time about it on a busy machine.
fn all_is_asked_for_before(
    (mut loader, asked): (Loader, &Asked),
    (mut twin, seen): (Loader, &Asked),
    steps: u64,
) {
    for step in 0..steps {
        for read in [&seen.read, &asked.read] {
            read.lock().unwrap().clear();
        }
        twin.next_step().unwrap();
        let started = Instant::now();
        for read in seen.read.lock().unwrap().iter() {
            while !asked.is_for(read) {
                assert!(started.elapsed() < Duration::from_secs(60), "{read:?} in step {step}");
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        loader.next_step().unwrap();
        let read = asked.read.lock().unwrap();
        assert!(*read == *seen.read.lock().unwrap() && !read.is_empty(), "{step}");
    }
}

#[test]
fn parts_of_a_mixture_are_asked_for_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for rows in [600_i64, 200] {
        let ids: Vec<u8> = (0..rows * 8).flat_map(|at| (at % 97).to_le_bytes()).collect();
        let shape = vec![usize::try_from(rows).unwrap(), 8];
        let view = || TensorView::new(Dtype::I64, shape.clone(), &ids).unwrap();
        let tensors = [("input_ids", view()), ("labels", view())];
        let file = folder.path().join(format!("{rows}.safetensors"));
        fs::write(file, safetensors::serialize(tensors, None).unwrap()).unwrap();
    }
    let [far, twin] = [(); 2].map(|()| Far::new(folder.path()));
    let loader = |of: &Far| {
        let parts = [("600.safetensors", 3.0), ("200.safetensors", 1.0)].map(|(name, weight)| {
            let fixed: Arc<dyn Samples> = Arc::new(FixedBatches::open_from(of, name).unwrap());
            (fixed, weight)
        });
        let options = LoaderOptions {
            order: Order::Blocks { block: 16, window: 3 },
            tail: Tail::Wrap,
            global_batch: 8,
            threads: 0,
            ..Default::default()
        };
        Loader::new(Arc::new(Mixture::new(parts.into()).unwrap()), options).unwrap()
    };
    let (own, before) = (loader(&far), loader(&twin));
    let steps = 3 * own.steps_per_epoch();
    all_is_asked_for_before((own, &far.asked), (before, &twin.asked), steps);
    let mut scratch = Scratch::default();
    let fixed = FixedBatches::open_from(&far, "200.safetensors").unwrap();
    far.asked.needed.lock().unwrap().clear();
    fixed.will_need(190..1000, &mut scratch);
    fixed.will_need(1000..1001, &mut scratch);
    let needed = far.asked.needed.lock().unwrap();
    let lens: Vec<u64> = needed.iter().map(|(_, start, end)| end - start).collect();
    assert_eq!(lens, [10 * 64, 10 * 64], "what there is, of both columns");
}

#[test]
fn samples_of_any_length_are_asked_for_by_their_bounds() {
    let folder = tempfile::tempdir().unwrap();
    write_records(&folder.path().join("records"));
    write_tokens(&folder.path().join("tokens"), b"{}");
    let asked = |source: &Far, samples: &dyn Samples, range| -> Vec<u64> {
        source.asked.needed.lock().unwrap().clear();
        samples.will_need(range, &mut Scratch::default());
        let needed = source.asked.needed.lock().unwrap();
        needed.iter().map(|(_, start, end)| end - start).collect()
    };
    let far = Far::new(&folder.path().join("records"));
    let records = RecordSamples::new(Records::open_from(&far).unwrap()).unwrap();
    // Sounds of 10 to 19 elements, and as many labels.
    let sounds = (10..20).sum::<u64>() * 2;
    assert_eq!(asked(&far, &records, 10..20), [80, sounds]);
    assert_eq!(asked(&far, &records, 0..0), [0; 0]);
    assert_eq!(asked(&far, &records, 5000..6000), [0; 0]);
    let far_tokens = Far::new(&folder.path().join("tokens"));
    let stream = Arc::new(TokenStream::open_from(&far_tokens).unwrap());
    let padded = PaddedText::new(stream, 64, Objective::Causal).unwrap();
    assert_eq!(asked(&far_tokens, &padded, 3..10), [7 * 100 * 2]);
    assert_eq!(asked(&far_tokens, &padded, 0..0), [0; 0]);
    assert_eq!(asked(&far_tokens, &padded, 14_999..20_000), [0; 0], "no such document");
}
