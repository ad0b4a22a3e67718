//! Damaged prepared folders: an error with a place, never a panic, a signal or wrong tokens.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use phalanx_data::batches::Scratch;
use phalanx_data::damage::{record_damage, verify};
use phalanx_data::format::{TokenIndex, TokenStream, TokenWriter, Tokens};
use phalanx_data::progress::Silent;
use phalanx_data::{Access, Error, LoaderOptions, MaskedText, Masking, Samples};
use proptest::prelude::*;

use crate::support::{open, write_tokens, SPECIAL};

const LEN: usize = 34;

fn shard(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("tokens-{number:05}.safetensors"))
}

fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("open the shard");
    file.write_all_at(bytes, offset).expect("damage the shard");
}

/// Reads all samples; gives the first error and the sample it came at.
fn first_error(folder: &Path, access: Access) -> Option<(u64, Error)> {
    let samples = MaskedText::open(folder, LEN, Masking::default(), access);
    let samples = match samples {
        Ok(samples) => samples,
        Err(error) => return Some((0, error)),
    };
    let (mut row, mut scratch) = ([0; LEN], Scratch::default());
    (0..samples.sample_count())
        .find_map(|id| samples.read_unmasked(id, &mut row, &mut scratch).err().map(|e| (id, e)))
}

#[test]
fn a_flipped_bit_is_an_error_that_names_shard_block_and_sample() {
    for access in [Access::Read, Access::Map] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("tokens");
        // One shard of about 3 MiB, so that it has several blocks.
        write_tokens(&target, 15_000, 500, 1 << 30);
        assert!(first_error(&target, access).is_none());
        let path = shard(&target, 0);
        let at = 2_300_000;
        let byte = fs::read(&path).unwrap()[at];
        overwrite(&path, at as u64, &[byte ^ 1]);
        match first_error(&target, access) {
            Some((id, Error::Damaged { path: named, block: 2, offset, reading, .. })) => {
                assert_eq!(named, path);
                assert_eq!(offset, 2 << 20);
                assert_eq!(reading, format!("sample {id}"));
                // The first sample that touches the block: its last token lies behind the block's beginning.
                let end = 4096 + (id + 1) * (LEN as u64 - 2) * 2;
                assert!(
                    ((2 << 20) + 1..=(2 << 20) + 64).contains(&end),
                    "sample {id} ends at {end}"
                );
            }
            other => panic!("{other:?}"),
        }
        let stream = TokenStream::open(&target, access).unwrap();
        assert!(matches!(stream.verify(), Err(Error::Damaged { block: 2, .. })));
    }
}

#[test]
fn damaged_checksums_are_told_apart_from_damaged_tokens() {
    for access in [Access::Read, Access::Map] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("tokens");
        write_tokens(&target, 15_000, 500, 1 << 30);
        let path = shard(&target, 0);
        let len = fs::metadata(&path).unwrap().len();
        let byte = *fs::read(&path).unwrap().last().unwrap();
        overwrite(&path, len - 1, &[byte ^ 1]);
        match first_error(&target, access) {
            Some((0, Error::Damaged { path: named, offset, reading, .. })) => {
                assert_eq!(named, path);
                assert_eq!(offset, len - len.div_ceil(1 << 20) * 4);
                assert_eq!(reading, "the checksums of other blocks");
            }
            other => panic!("{other:?}"),
        }
        let found =
            phalanx_data::damage::verify(&target, None, &phalanx_data::progress::Silent).unwrap();
        assert_eq!(found.damage.len(), 1, "{:?}", found.damage);
    }
}

#[test]
fn a_damaged_block_reaches_the_trainer_through_the_loader() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 50, 500, 1 << 30);
    overwrite(&shard(&target, 0), 5000, &[0xFF, 0xFF]);
    let options = LoaderOptions { global_batch: 8, threads: 2, ..Default::default() };
    let mut loader = phalanx_data::Loader::new(open(&target, LEN), options).unwrap();
    let error = loader.next_step().unwrap_err().to_string();
    assert!(error.contains("tokens-00000.safetensors is damaged at offset 0"), "{error}");
    assert!(error.contains("reading sample"), "{error}");
}

#[test]
fn a_shard_that_is_cut_off_is_an_error_when_it_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 50, 500, 1 << 30);
    let path = shard(&target, 0);
    let whole = fs::metadata(&path).unwrap().len();
    for len in [0, 1, 7, 8, 100, 4095, 4096, 5000, whole - 1, whole + 1] {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        for access in [Access::Read, Access::Map] {
            match first_error(&target, access) {
                Some((0, Error::WrongSize { expected, actual, .. })) => {
                    assert_eq!((expected, actual), (whole, len));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_shard_that_is_cut_off_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 15_000, 500, 1 << 30);
    let samples = open(&target, LEN);
    let (mut row, mut scratch) = ([0; LEN], Scratch::default());
    let last = samples.sample_count() - 1;
    samples.read_unmasked(last, &mut row, &mut scratch).unwrap();
    OpenOptions::new().write(true).open(shard(&target, 0)).unwrap().set_len(1 << 20).unwrap();
    // In a block that was verified, and in one that was not.
    for id in [last, last / 2] {
        let error = samples.read_unmasked(id, &mut row, &mut scratch).unwrap_err();
        assert!(matches!(error.root(), Error::WrongSize { actual: 1_048_576, .. }), "{error}");
        // Sample, place and shard, whatever went wrong.
        let place = 4096 + id * (LEN as u64 - 2) * 2;
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("cannot read sample {id} at offset {place} of ")),
            "{text}"
        );
        assert!(text.contains("tokens-00000.safetensors"), "{text}");
    }
}

#[test]
fn a_missing_shard_and_shards_of_other_data_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    write_tokens(&one, 200, 500, 10_000);
    write_tokens(&other, 200, 400, 10_000);
    fs::copy(shard(&other, 1), shard(&one, 1)).unwrap();
    let (_, error) = first_error(&one, Access::Read).unwrap();
    assert!(matches!(error, Error::Damaged { .. }), "same size, other tokens: {error}");
    fs::remove_file(shard(&one, 1)).unwrap();
    let (_, error) = first_error(&one, Access::Read).unwrap();
    assert!(error.to_string().starts_with("cannot open"), "{error}");
}

#[test]
fn an_index_that_contradicts_itself_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 50, 500, 1 << 30);
    let path = target.join("index.json");
    let good = fs::read_to_string(&path).unwrap();
    let cases = [
        ("phalanx-tokens", "other-tokens", "format other-tokens version 2"),
        ("\"version\": 2", "\"version\": 9", "version 9"),
        ("\"dtype\": \"U16\"", "\"dtype\": \"U32\"", "does not fit a vocabulary"),
        ("\"mask\": 4", "\"mask\": 4000", "outside the vocabulary"),
        ("\"block_bytes\": 1048576", "\"block_bytes\": 0", "blocks of 0 bytes"),
        ("tokens-00000", "../tokens-00000", "not a plain file name"),
        ("\"document_count\": 50", "\"document_count\": 51", "fingerprint"),
        ("\"vocab_size\": 500", "\"vocab_size\": 501", "fingerprint"),
        ("\"shards\"", "\"shreds\"", "not an index"),
        ("{", "", "not an index"),
    ];
    for (from, to, reason) in cases {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replace(from, to)).unwrap();
        let error = TokenIndex::read(&target).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("prepare the data again"), "{error}");
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_when_written() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let special = crate::support::SPECIAL;
    let mut writer =
        phalanx_data::format::TokenWriter::create(&target, b"{}", 100, special, 1 << 20).unwrap();
    let error = writer.tokens(&[7, 100, 8]).unwrap_err();
    assert!(matches!(error, Error::BadValue { position: 1, value: 100, .. }), "{error}");
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left of it");
}

#[test]
fn large_vocabularies_are_kept_in_32_bits() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 30, 100_000, 4000);
    assert_eq!(TokenIndex::read(&target).unwrap().dtype, phalanx_data::DType::U32);
    let stream = TokenStream::open(&target, Access::Read).unwrap();
    let mut tokens = vec![0; 200];
    stream.read(0, &mut tokens, &mut Scratch::default(), &"the beginning").unwrap();
    let expected: Vec<i64> = (0..90).map(|at| 5 + (at * at * 31) % 99_995).collect();
    assert_eq!(tokens[..90], expected);
    assert_eq!(tokens[90], 3);
    assert!(stream.verify().is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever bytes are written over a shard: an error, or the same tokens as before.
    #[test]
    fn no_damage_to_a_shard_goes_unnoticed(
        offset in 0_u64..20_000, bytes in proptest::collection::vec(any::<u8>(), 1..64)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("tokens");
        write_tokens(&target, 50, 500, 1 << 30);
        let path = shard(&target, 0);
        let before = fs::read(&path).unwrap();
        overwrite(&path, offset.min(before.len() as u64 - 64), &bytes);
        let changed = fs::read(&path).unwrap() != before;
        prop_assert_eq!(first_error(&target, Access::Read).is_some(), changed);
    }
}

#[test]
fn a_tokenizer_that_cannot_be_read_is_reported_and_does_not_keep_damage_from_being_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let mut writer =
        TokenWriter::create(&target, b"{\"version\": 1}", 500, SPECIAL, 1 << 30).unwrap();
    writer.tokens(&[5; 40_000]).unwrap();
    writer.end_document().unwrap();
    writer.finish(0).unwrap();
    let tokenizer = target.join("tokenizer.json");
    fs::remove_file(&tokenizer).unwrap();
    fs::create_dir(&tokenizer).unwrap();
    overwrite(&shard(&target, 0), 5000, &[0xFF]);
    let found = verify(&target, None, &Silent).unwrap();
    let [damaged, unread] = &found.damage[..] else { panic!("{:?}", found.damage) };
    assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");
    let told = unread.to_string();
    assert!(told.contains("cannot compare the tokenizer") && told.contains("tokenizer.json"));
    record_damage(&target, &found).unwrap();
    fs::remove_dir(&tokenizer).unwrap();
    assert_eq!(TokenStream::open(&target, Access::Read).unwrap().damaged().len(), 1);
}
