//! Samples in damaged blocks that are left out, alike on all ranks.

use std::fs::{self, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use phalanx_data::batches::{Rows, Scratch};
use phalanx_data::damage::{record_damage, verify};
use phalanx_data::fingerprint::Fingerprint;
use phalanx_data::format::TokenStream;
use phalanx_data::progress::Silent;
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::samples::{Documents, Mixture};
use phalanx_data::{
    Access, CausalText, Column, DType, Error, Loader, LoaderOptions, MaskedText, Masking,
    MicroBatch, OnDamage, Order, Result, Samples, Tail, IGNORED,
};

use crate::support::write_tokens;

const LEN: usize = 34;

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open the shard");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], at).expect("damage");
}

fn record(folder: &Path) -> usize {
    let found = verify(folder, NonZeroUsize::new(2), &Silent).expect("it can be verified");
    record_damage(folder, &found).expect("the list");
    found.blocks.len()
}

fn masked(folder: &Path) -> Arc<dyn Samples> {
    let masking = Masking::default();
    Arc::new(MaskedText::open(folder, LEN, masking, Access::Read).expect("samples"))
}

/// What the ranks of a world deliver in an epoch: sample, whether it counts, whether it has labels.
fn epoch(
    samples: &Arc<dyn Samples>,
    world_size: usize,
    threads: usize,
    order: Order,
) -> Vec<(u64, bool, bool)> {
    let mut ranks: Vec<Loader> = (0..world_size)
        .map(|rank| {
            let options = LoaderOptions {
                on_damage: OnDamage::Skip,
                order,
                tail: Tail::Exact,
                epochs: Some(1),
                global_batch: 48,
                seed: 5,
                rank,
                world_size,
                threads,
                ..Default::default()
            };
            Loader::new(Arc::clone(samples), options).expect("a loader")
        })
        .collect();
    let (mut all, mut counted) = (Vec::new(), 0);
    while !ranks[0].is_at_end() {
        let (mut valid, mut global_valid, mut left_out) = (0, Vec::new(), Vec::new());
        for rank in &mut ranks {
            let step = rank.next_step().expect("a step");
            assert_eq!(
                step.valid,
                step.micro_batches.iter().map(phalanx_data::Batch::valid_count).sum::<usize>()
            );
            valid += step.valid;
            left_out.push(step.left_out);
            global_valid.push(step.global_valid);
            for batch in &step.micro_batches {
                for (row, (sample, &is_valid)) in
                    batch.samples().iter().zip(batch.valid()).enumerate()
                {
                    let labels = &batch.labels()[row * LEN..(row + 1) * LEN];
                    let has_labels = labels.iter().any(|&label| label != IGNORED);
                    all.push((sample.id, is_valid, has_labels));
                }
            }
        }
        assert!(global_valid.iter().all(|&one| one == valid), "{global_valid:?} of {valid}");
        let size = 48.min(usize::try_from(samples.sample_count()).unwrap() - counted);
        counted += size;
        assert!(left_out.iter().all(|&one| one == size - valid), "{left_out:?}");
    }
    all
}

/// What is damaged at a part's ragged end is no sample of the next part's.
#[test]
fn damage_at_the_end_of_a_part_of_a_mixture_stays_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    write_tokens(&first, 2001, 500, 1 << 30);
    write_tokens(&second, 2000, 500, 1 << 30);
    let file = first.join("tokens-00000.safetensors");
    flip(&file, fs::metadata(&file).unwrap().len() - 3);
    assert_eq!(record(&first), 1);
    let (first, second) = (masked(&first), masked(&second));
    let count = first.sample_count();
    let damaged = |samples: &dyn Samples| samples.damaged().expect("the list");
    let beyond = damaged(&*first).iter().any(|range| range.end > count);
    assert!(beyond, "the part's own damage ends in its ragged tail: {:?}", damaged(&*first));
    let mixture = Mixture::new(vec![(first, 1.0), (second, 1.0)]).expect("a mixture");
    let mixed = damaged(&mixture);
    assert!(!mixed.is_empty() && mixed.iter().all(|range| range.end <= count), "{mixed:?}");
}

#[test]
fn samples_in_listed_blocks_do_not_count_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 15_000, 500, 1 << 30);
    let good = masked(&target);
    flip(&target.join("tokens-00000.safetensors"), 2_300_000);
    assert_eq!(record(&target), 1);
    let samples = masked(&target);
    assert_eq!(samples.fingerprint(), good.fingerprint(), "saved states stay good");

    // Block 2 holds these bytes of the file, of which tokens are two each after the header.
    let window = LEN as u64 - 2;
    let tokens = ((2 << 20) - 4096) / 2..((3 << 20) - 4096) / 2;
    let is_damaged = |id: u64| id * window < tokens.end && (id + 1) * window > tokens.start;
    let expected_damage = (0..samples.sample_count()).filter(|&id| is_damaged(id)).count();
    let mut reference = None;
    for order in [Order::Sequential, Order::Shuffled, Order::Blocks { block: 512, window: 4 }] {
        for (world_size, threads) in [(1, 0), (2, 1), (3, 2)] {
            let all = epoch(&samples, world_size, threads, order);
            // A rank that has nothing in the last step goes through it with a row that does not count.
            assert!(all.len() as u64 - samples.sample_count() <= world_size as u64);
            assert!(all.iter().all(|(id, ..)| !is_damaged(*id)), "another one stands in");
            assert!(all.iter().all(|(_, valid, labels)| valid == labels));
            let mut counted: Vec<u64> =
                all.iter().filter(|(_, valid, _)| *valid).map(|(id, ..)| *id).collect();
            counted.sort_unstable();
            assert_eq!(
                counted.len() + expected_damage,
                usize::try_from(samples.sample_count()).unwrap()
            );
            let reference: &mut Vec<u64> = reference.get_or_insert_with(|| counted.clone());
            assert_eq!(&counted, reference, "every good sample once");
        }
    }
}

#[test]
fn the_next_token_of_a_sample_before_a_damaged_block_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 15_000, 500, 1 << 30);
    flip(&target.join("tokens-00000.safetensors"), 1_500_000);
    record(&target);
    // 32 tokens are 64 bytes: a sample ends where the block begins.
    let stream = Arc::new(TokenStream::open(&target, Access::Map).unwrap());
    let samples = CausalText::new(stream, 32, Documents::Joined).unwrap();
    let (first, end) = (((1_u64 << 20) - 4096) / 64, ((2_u64 << 20) - 4096) / 64);
    let damaged = samples.damaged().unwrap();
    assert_eq!((damaged.len(), &damaged[0]), (1, &(first - 1..end)));
    let options = LoaderOptions {
        on_damage: OnDamage::Skip,
        order: Order::Sequential,
        epochs: Some(1),
        ..Default::default()
    };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    assert!(loader.steps().all(|step| step.is_ok()));
}

#[test]
fn without_the_option_or_the_list_damage_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 15_000, 500, 1 << 30);
    let path = target.join("tokens-00000.safetensors");
    flip(&path, 2_300_000);
    let first_error = |on_damage| {
        let options = LoaderOptions { on_damage, epochs: Some(1), ..Default::default() };
        let mut loader = Loader::new(masked(&target), options).unwrap();
        let error = loader.steps().find_map(Result::err);
        error
    };
    let error = first_error(OnDamage::Skip);
    assert!(matches!(error, Some(Error::Damaged { block: 2, .. })), "not listed yet: {error:?}");
    record(&target);
    let error = first_error(OnDamage::Fail);
    assert!(matches!(error, Some(Error::Damaged { block: 2, .. })), "{error:?}");
    assert!(first_error(OnDamage::Skip).is_none());

    // Another block goes bad later.
    flip(&path, 700_000);
    let error = first_error(OnDamage::Skip);
    assert!(matches!(error, Some(Error::Damaged { block: 0, .. })), "{error:?}");
    assert_eq!(record(&target), 2);
    assert!(first_error(OnDamage::Skip).is_none());

    // The shard is copied again: the list goes.
    flip(&path, 2_300_000);
    flip(&path, 700_000);
    assert_eq!(record(&target), 0);
    assert!(!target.join("damage.json").exists());
    assert!(first_error(OnDamage::Skip).is_none());
}

#[test]
fn what_cannot_be_left_out_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 15_000, 500, 1 << 30);
    let path = target.join("tokens-00000.safetensors");
    let skip = || LoaderOptions { on_damage: OnDamage::Skip, ..Default::default() };
    flip(&path, 2_300_000);
    record(&target);
    // Without their checksums all blocks are unknown.
    let len = fs::metadata(&path).unwrap().len();
    flip(&path, len - 1);
    record(&target);
    let error = Loader::new(masked(&target), skip()).unwrap_err().to_string();
    assert!(error.contains("every sample is damaged"), "{error}");

    let list = target.join("damage.json");
    let good = fs::read_to_string(&list).unwrap();
    let error = |text: &str| {
        fs::write(&list, text).unwrap();
        TokenStream::open(&target, Access::Read).unwrap_err().to_string()
    };
    assert!(error("{").contains("not a list of damage"));
    assert!(error(&good.replace("phalanx-damage", "other")).contains("format other"));
    assert!(error(&good.replace("tokens-00000", "tokens-00009")).contains("there is no block"));
    let fingerprint =
        phalanx_data::format::TokenIndex::read(&target).unwrap().fingerprint.to_string();
    let other = good.replace(&fingerprint, "0123456789abcdef");
    assert!(error(&other).contains("it is of the data"));

    // What is in the place of a shard is no shard at all.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let found = verify(&target, None, &Silent).unwrap();
    let error = record_damage(&target, &found).unwrap_err().to_string();
    assert!(error.contains("only what is damaged or missing can be left out"), "{error}");
}

#[test]
fn records_of_fixed_fields_are_left_out_too() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let fields =
        vec![Field::fixed("image", DType::U8, [1000]), Field::fixed("label", DType::I64, [])];
    let mut writer = RecordWriter::create(&target, fields, 1 << 30).unwrap();
    for record in 0..4000_i64 {
        let image = vec![u8::try_from(record % 251).unwrap(); 1000];
        writer.push(&[ColumnValue::of(&image), ColumnValue::of(&[record])]).unwrap();
    }
    writer.finish().unwrap();
    flip(&target.join("records-00000.safetensors"), 2_500_000);
    assert_eq!(record(&target), 1);
    let records = RecordSamples::new(Records::open(&target, Access::Read).unwrap()).unwrap();
    let ranges = records.damaged().unwrap();
    // Labels come first (8 bytes each), images after them.
    let (first, end) = ((2_u64 << 20) - 4096 - 32_000, (3_u64 << 20) - 4096 - 32_000);
    assert!(ranges.contains(&(first / 1000..end.div_ceil(1000))), "{ranges:?}");
    let options =
        LoaderOptions { on_damage: OnDamage::Skip, epochs: Some(1), ..Default::default() };
    let mut loader = Loader::new(Arc::new(records), options).unwrap();
    let counted: usize = loader.steps().map(|step| step.unwrap().valid).sum();
    let damaged = usize::try_from(end.div_ceil(1000) - first / 1000).unwrap();
    assert_eq!(counted, 4000 - damaged);
}

/// Samples of different lengths, some of them damaged, that note who asks how long they are.
struct Watched {
    columns: [Column; 1],
    asked_by: Mutex<Vec<ThreadId>>,
}

impl Samples for Watched {
    fn sample_count(&self) -> u64 {
        400
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint(0)
    }

    fn sample_len(&self, id: u64, _scratch: &mut Scratch) -> Result<usize> {
        self.asked_by.lock().unwrap().push(std::thread::current().id());
        Ok(usize::try_from(id % 50).unwrap() + 1)
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        Ok(vec![3..40, 390..400])
    }

    fn fill(&self, _: u64, _: &mut Rows<'_>, _: &mut Scratch) -> Result<()> {
        Ok(())
    }
}

#[test]
fn what_is_left_out_of_similar_lengths_is_counted_by_the_threads() {
    for threads in [0, 2] {
        let watched = Arc::new(Watched {
            columns: [Column::padded("x", DType::U8, [50])],
            asked_by: Mutex::default(),
        });
        let two = NonZeroUsize::new(2).unwrap();
        let mut ranks = [0, 1].map(|rank| {
            let options = LoaderOptions {
                on_damage: OnDamage::Skip,
                tail: Tail::Exact,
                epochs: Some(2),
                bucketing: 4,
                global_batch: 16,
                micro_batch: MicroBatch::Count(two),
                rank,
                world_size: 2,
                threads,
                ..Default::default()
            };
            Loader::new(Arc::<Watched>::clone(&watched), options).unwrap()
        });
        let (mut valid, mut left_out) = (0, 0);
        while !ranks[0].is_at_end() {
            let steps = ranks.each_mut().map(|rank| rank.next_step().unwrap());
            for step in &steps {
                let counted = step.micro_batches.iter().map(phalanx_data::Batch::valid_count);
                assert_eq!(counted.sum::<usize>(), step.valid);
                assert_eq!(step.global_valid + step.left_out, 16);
                assert_eq!(step.left_out, steps[0].left_out);
            }
            assert_eq!(steps[0].valid + steps[1].valid, steps[0].global_valid);
            valid += steps[0].global_valid;
            left_out += steps[0].left_out;
        }
        assert_eq!((valid, left_out), (2 * (400 - 47), 2 * 47));
        let asked_by = watched.asked_by.lock().unwrap();
        let is_here = asked_by.contains(&std::thread::current().id());
        assert_eq!(is_here, threads == 0, "{threads} threads");
    }
}
