//! Shards that are gone, and samples of any length in damaged blocks: left out where they are listed, alike on all ranks.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::damage::{record_damage, verify, Verified};
use phalanx_data::format::{TokenStream, Tokens};
use phalanx_data::progress::Silent;
use phalanx_data::records::{ColumnValue, Field, RecordSamples, RecordWriter, Records};
use phalanx_data::samples::{Objective, PaddedText};
use phalanx_data::{
    Access, Batch, DType, Error, Loader, LoaderOptions, MaskedText, Masking, OnDamage, Samples,
    Tail,
};

use crate::support::write_tokens;

const LEN: usize = 34;
const DOCUMENTS: u64 = 31_000;

fn shard(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("tokens-{number:05}.safetensors"))
}

/// Overwrites eight bytes.
fn damage(path: &Path, at: u64) {
    let file = OpenOptions::new().write(true).open(path).expect("open the shard");
    file.write_all_at(&[0xA5; 8], at).expect("damage");
}

fn record(folder: &Path) -> Verified {
    let found = verify(folder, None, &Silent).expect("it can be verified");
    record_damage(folder, &found).expect("the list");
    found
}

/// The samples that count in an epoch over some ranks, each once; all ranks agree in how many those are. They are the same
/// with and without batches of similar length.
fn counted(samples: &Arc<dyn Samples>, world_size: usize) -> BTreeSet<u64> {
    let by_length = [0, 5].map(|bucketing| counted_with(samples, world_size, bucketing));
    assert_eq!(by_length[0], by_length[1]);
    by_length.into_iter().next().expect("two")
}

fn counted_with(samples: &Arc<dyn Samples>, world_size: usize, bucketing: u64) -> BTreeSet<u64> {
    let mut ranks: Vec<Loader> = (0..world_size)
        .map(|rank| {
            let options = LoaderOptions {
                on_damage: OnDamage::Skip,
                tail: Tail::Exact,
                epochs: Some(1),
                global_batch: 64,
                bucketing,
                rank,
                world_size,
                ..Default::default()
            };
            Loader::new(Arc::clone(samples), options).expect("a loader")
        })
        .collect();
    let mut all = BTreeSet::new();
    while !ranks[0].is_at_end() {
        let (mut valid, mut expected) = (0, Vec::new());
        for rank in &mut ranks {
            let step = rank.next_step().expect("a step");
            expected.push(step.global_valid);
            let counts = |batch: &Batch| batch.valid().iter().filter(|&&valid| valid).count();
            assert_eq!(step.valid, step.micro_batches.iter().map(counts).sum::<usize>());
            for batch in &step.micro_batches {
                for (sample, _) in batch.samples().iter().zip(batch.valid()).filter(|(_, &v)| v) {
                    assert!(all.insert(sample.id), "sample {} twice", sample.id);
                    valid += 1;
                }
            }
        }
        assert!(expected.iter().all(|&one| one == valid), "{expected:?} of {valid}");
    }
    all
}

fn masked(folder: &Path) -> phalanx_data::Result<Arc<dyn Samples>> {
    Ok(Arc::new(MaskedText::open(folder, LEN, Masking::default(), Access::Read)?))
}

/// A folder of some shards, in which something is done to shard 1.
fn with_bad_shard(bad: impl Fn(&Path)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("tokens");
    write_tokens(&target, 1600, 500, 80_000);
    assert!(TokenStream::open(&target, Access::Read).expect("good").index().shards.len() > 3);
    bad(&shard(&target, 1));
    (folder, target)
}

#[test]
fn a_shard_that_is_missing_or_cut_off_or_without_a_header_is_left_out_on_all_ranks() {
    let cases: [fn(&Path); 4] = [
        |path| fs::remove_file(path).unwrap(),
        |path| OpenOptions::new().write(true).open(path).unwrap().set_len(5000).unwrap(),
        |path| fs::write(path, b"").unwrap(),
        |path| damage(path, 20),
    ];
    for (number, bad) in cases.into_iter().enumerate() {
        let (_keep, target) = with_bad_shard(bad);
        assert!(masked(&target).is_err(), "case {number}: not listed");
        let found = record(&target);
        assert_eq!(found.lost, ["tokens-00001.safetensors"], "case {number}");
        let samples = masked(&target).unwrap();

        let shards = TokenStream::open(&target, Access::Read).unwrap().index().shards.clone();
        let first = shards[0].token_count;
        let lost = first..first + shards[1].token_count;
        let window = LEN as u64 - 2;
        let touches = |id: u64| id * window < lost.end && (id + 1) * window > lost.start;
        let good: BTreeSet<u64> = (0..samples.sample_count()).filter(|&id| !touches(id)).collect();
        assert!(good.len() > 1000 && good.len() < usize::try_from(samples.sample_count()).unwrap());
        for world_size in [1, 3] {
            assert_eq!(counted(&samples, world_size), good, "case {number}");
        }

        // Who does not leave it out is told where it was.
        let mut scratch = Scratch::default();
        let stream = TokenStream::open(&target, Access::Read).unwrap();
        let error = stream.read(lost.start, &mut [0; 8], &mut scratch, &"sample 7").unwrap_err();
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("sample 7") && text.contains("tokens-00001"), "{text}");
        assert!(text.contains("OnDamage::Skip"), "{text}");
        assert!(matches!(stream.verify(), Err(Error::Lost { .. })));
    }
}

#[test]
fn a_shard_that_comes_back_is_read_when_the_list_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 1600, 500, 80_000);
    let (path, aside) = (shard(&target, 2), folder.path().join("aside"));
    let all = counted(&masked(&target).unwrap(), 1);
    fs::rename(&path, &aside).unwrap();
    assert_eq!(record(&target).lost.len(), 1);
    assert!(counted(&masked(&target).unwrap(), 2).len() < all.len());
    fs::rename(&aside, &path).unwrap();
    assert!(record(&target).damage.is_empty());
    assert!(!target.join("damage.json").exists());
    assert_eq!(counted(&masked(&target).unwrap(), 2), all);
}

/// The documents of a stream, in full.
fn documents(folder: &Path) -> Vec<std::ops::Range<u64>> {
    let stream = TokenStream::open(folder, Access::Map).unwrap();
    let mut scratch = Scratch::default();
    (0..stream.document_count()).map(|at| stream.document(at, &mut scratch).unwrap()).collect()
}

#[test]
fn documents_in_damaged_blocks_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, u32::try_from(DOCUMENTS).unwrap(), 500, 1 << 30);
    let path = shard(&target, 0);
    let bounds = documents(&target);
    let tokens = bounds.last().unwrap().end;
    // Bounds lie behind the tokens, at an odd place: some straddle two blocks.
    let offsets = 4096 + 2 * tokens;
    let block = |at: u64| (at >> 20 << 20)..((at >> 20) + 1) << 20;
    let meets =
        |a: &std::ops::Range<u64>, b: &std::ops::Range<u64>| a.start < b.end && b.start < a.end;
    let whole = fs::read(&path).unwrap();
    // Tokens, and tokens with bounds.
    let last_of_tokens = 4096 + 2 * tokens - 100;
    assert!(block(last_of_tokens).contains(&(offsets + 9)));
    for places in [
        vec![1_500_000],
        vec![offsets + 120_000],
        vec![last_of_tokens],
        vec![1_200_000, last_of_tokens],
    ] {
        fs::write(&path, &whole).unwrap();
        for &at in &places {
            damage(&path, at);
        }
        assert_eq!(record(&target).blocks.len(), places.len());
        let good: BTreeSet<u64> = (0..DOCUMENTS)
            .filter(|&id| {
                let document = &bounds[usize::try_from(id).unwrap()];
                let own = 4096 + 2 * document.start..4096 + 2 * document.end;
                let entries = offsets + 8 * id..offsets + 8 * id + 16;
                places.iter().all(|&at| !meets(&own, &block(at)) && !meets(&entries, &block(at)))
            })
            .collect();
        assert!(!good.is_empty() && good.len() < bounds.len(), "{places:?}");
        for access in [Access::Read, Access::Map] {
            let stream = Arc::new(TokenStream::open(&target, access).unwrap());
            let samples = PaddedText::new(stream, 64, Objective::Causal).unwrap();
            assert_eq!(counted(&(Arc::new(samples) as Arc<dyn Samples>), 2), good, "{places:?}");
        }
    }
}

#[test]
fn records_of_any_length_are_left_out_too() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    let fields = vec![Field::fixed("label", DType::I64, []), Field::variable("sound", DType::I16)];
    let mut writer = RecordWriter::create(&target, fields, 4 << 20).unwrap();
    let len = |record: i64| usize::try_from(record % 997).unwrap();
    for record in 0..6000_i64 {
        let sound = vec![i16::try_from(record).unwrap(); len(record)];
        writer.push(&[ColumnValue::of(&[record]), ColumnValue::of(&sound)]).unwrap();
    }
    let index = writer.finish().unwrap();
    assert!(index.shards.len() > 1);
    let open = || RecordSamples::new(Records::open(&target, Access::Read).unwrap());
    let samples = |made: RecordSamples| Arc::new(made) as Arc<dyn Samples>;
    assert_eq!(counted(&samples(open().unwrap()), 2).len(), 6000);

    let path = target.join("records-00000.safetensors");
    damage(&path, 2_500_000);
    assert_eq!(record(&target).blocks.len(), 1);
    let damaged = open().unwrap().damaged().unwrap();
    let lost: u64 = damaged.iter().map(|range| range.end - range.start).sum();
    // A block holds some thousand sounds, of a kilobyte on average.
    assert!((900..1300).contains(&lost), "{lost}");
    let good: BTreeSet<u64> =
        (0..6000).filter(|id| !damaged.iter().any(|range| range.contains(id))).collect();
    assert_eq!(counted(&samples(open().unwrap()), 3), good);

    // Bounds are damaged as well; then the whole shard is gone.
    let bytes = fs::read(&path).unwrap();
    let header = String::from_utf8_lossy(&bytes[8..4096]).trim_end().to_owned();
    let header: serde_json::Value = serde_json::from_str(&header).unwrap();
    let offsets = header["sound.offsets"]["data_offsets"][0].as_u64().unwrap();
    damage(&path, 4096 + offsets + 100);
    assert_eq!(record(&target).blocks.len(), 2);
    let fewer = counted(&samples(open().unwrap()), 2);
    assert!(fewer.len() < good.len() && fewer.is_subset(&good));
    fs::remove_file(&path).unwrap();
    assert_eq!(record(&target).lost.len(), 1);
    let rest = counted(&samples(open().unwrap()), 2);
    let first = index.shards[0].record_count;
    assert_eq!(rest, (first..6000).collect());
    let error = open().unwrap().records().elements(0, 1, &mut Scratch::default()).unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
}

#[test]
fn bounds_that_cannot_be_read_are_named_by_the_document_of_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 1600, 500, 80_000);
    let index = TokenStream::open(&target, Access::Read).unwrap().index().clone();
    let first = index.shards[0].document_count;
    let path = shard(&target, 1);
    // Behind the tokens of the shard.
    damage(&path, 4096 + 2 * index.shards[1].token_count + 3);
    let text = |stream: &TokenStream| {
        stream.document(first, &mut Scratch::default()).unwrap_err().to_string()
    };
    let stream = TokenStream::open(&target, Access::Read).unwrap();
    let name = format!("reading the bounds of document {first}");
    assert!(text(&stream).contains(&name), "{}", text(&stream));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    let name = format!("cannot read the bounds of document {first} at offset");
    assert!(text(&stream).starts_with(&name), "{}", text(&stream));
    assert!(text(&stream).contains("tokens-00001"), "{}", text(&stream));
}
