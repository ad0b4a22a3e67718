//! Megatron's files: read as they are published, refused when a number is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{MegatronTokens, SpecialTokens, Tokens};
use phalanx_data::samples::{Documents, Objective, PaddedText};
use phalanx_data::{Access, CausalText, Error, Loader, LoaderOptions, Order, Tail, IGNORED};
use proptest::prelude::*;

/// A pair of files, byte by byte as the format is published.
struct Files {
    magic: Vec<u8>,
    version: u64,
    code: u8,
    lengths: Vec<i32>,
    offsets: Vec<i64>,
    documents: Vec<i64>,
    modes: bool,
    bin: Vec<u8>,
}

impl Files {
    /// Five sequences of u16 in three documents, of which the second is empty.
    fn small() -> Self {
        let tokens: Vec<u16> = (0..20).map(|at| at * 7 % 50).collect();
        Files {
            magic: b"MMIDIDX\0\0".to_vec(),
            version: 1,
            code: 8,
            lengths: vec![3, 0, 7, 6, 4],
            offsets: vec![0, 6, 6, 20, 32],
            documents: vec![0, 3, 3, 5],
            modes: false,
            bin: tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
        }
    }

    fn idx(&self) -> Vec<u8> {
        let mut bytes = self.magic.clone();
        bytes.extend(self.version.to_le_bytes());
        bytes.push(self.code);
        bytes.extend((self.lengths.len() as u64).to_le_bytes());
        bytes.extend((self.documents.len() as u64).to_le_bytes());
        bytes.extend(self.lengths.iter().flat_map(|length| length.to_le_bytes()));
        bytes.extend(self.offsets.iter().flat_map(|offset| offset.to_le_bytes()));
        bytes.extend(self.documents.iter().flat_map(|document| document.to_le_bytes()));
        if self.modes {
            bytes.extend(vec![0; self.lengths.len()]);
        }
        bytes
    }

    fn write(&self, folder: &Path) -> PathBuf {
        fs::write(folder.join("my.corpus.idx"), self.idx()).expect("write the index");
        fs::write(folder.join("my.corpus.bin"), &self.bin).expect("write the tokens");
        folder.join("my.corpus")
    }
}

fn all(tokens: &MegatronTokens) -> phalanx_data::Result<Vec<i64>> {
    let mut out = vec![0; usize::try_from(tokens.token_count()).expect("few")];
    tokens.read(0, &mut out, &mut Scratch::default(), &"all").map(|()| out)
}

fn refused(files: &Files) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let prefix = files.write(folder.path());
    match MegatronTokens::open(&prefix, 50, Access::Read) {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn tokens_and_documents_are_read() {
    for access in [Access::Read, Access::Map] {
        for modes in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let prefix = Files { modes, ..Files::small() }.write(folder.path());
            let tokens = MegatronTokens::open(&prefix, 50, access).unwrap();
            assert_eq!((tokens.token_count(), tokens.sequence_count()), (20, 5));
            assert_eq!(tokens.document_count(), 3);
            let expected: Vec<i64> = (0..20).map(|at| at * 7 % 50).collect();
            assert_eq!(all(&tokens).unwrap(), expected);
            let mut scratch = Scratch::default();
            let mut some = [0; 9];
            tokens.read(8, &mut some, &mut scratch, &"some").unwrap();
            assert_eq!(some, expected[8..17]);
            let documents = [0, 1, 2].map(|number| tokens.document(number, &mut scratch).unwrap());
            assert_eq!(documents, [0..10, 10..10, 10..20]);
            assert!(matches!(tokens.document(3, &mut scratch), Err(Error::NoSuchSample { .. })));
            let beyond = tokens.read(12, &mut some, &mut scratch, &"some");
            assert!(matches!(beyond, Err(Error::NoSuchSample { .. })));
        }
    }
}

#[test]
fn every_type_of_integer_is_read() {
    type Encode = fn(i64) -> Vec<u8>;
    let types: [(u8, usize, Encode); 6] = [
        (1, 1, |token| token.to_le_bytes()[..1].to_vec()),
        (2, 1, |token| token.to_le_bytes()[..1].to_vec()),
        (3, 2, |token| token.to_le_bytes()[..2].to_vec()),
        (4, 4, |token| token.to_le_bytes()[..4].to_vec()),
        (5, 8, |token| token.to_le_bytes().to_vec()),
        (8, 2, |token| token.to_le_bytes()[..2].to_vec()),
    ];
    for (code, size, encode) in types {
        let small = Files::small();
        let offsets = small.offsets.iter().map(|offset| offset / 2 * size.cast_signed() as i64);
        let files = Files {
            code,
            offsets: offsets.collect(),
            bin: (0..20).flat_map(|at| encode(at * 7 % 50)).collect(),
            ..small
        };
        let folder = tempfile::tempdir().unwrap();
        let prefix = files.write(folder.path());
        let tokens = MegatronTokens::open(&prefix, 50, Access::Read).unwrap();
        assert_eq!(all(&tokens).unwrap(), (0..20).map(|at| at * 7 % 50).collect::<Vec<i64>>());
    }
}

#[test]
fn sequences_with_something_between_them_are_read() {
    let mut files = Files::small();
    // Four bytes of nothing before the third sequence, two before the last.
    files.bin.splice(6..6, [0xFF; 4]);
    files.bin.splice(36..36, [0xFF; 2]);
    files.offsets = vec![0, 6, 10, 24, 38];
    let folder = tempfile::tempdir().unwrap();
    let prefix = files.write(folder.path());
    let tokens = MegatronTokens::open(&prefix, 50, Access::Read).unwrap();
    assert_eq!(all(&tokens).unwrap(), (0..20).map(|at| at * 7 % 50).collect::<Vec<i64>>());
    assert_eq!(tokens.document(2, &mut Scratch::default()).unwrap(), 10..20);
}

#[test]
fn wrong_numbers_are_named() {
    let small = Files::small;
    let cases = [
        (
            Files { magic: b"MMIDIDX\0\x01".to_vec(), ..small() },
            "does not begin as a Megatron index",
        ),
        (Files { version: 2, ..small() }, "version 2 is not 1"),
        (Files { code: 6, ..small() }, "real numbers"),
        (Files { code: 9, ..small() }, "type code 9"),
        (Files { lengths: vec![3, 0, 7, 6], ..small() }, "do not fit its"),
        (Files { lengths: vec![3, 0, -7, 6, 4], ..small() }, "sequence 2 has -7 tokens"),
        (Files { lengths: vec![3, 0, 7, 6, 5], ..small() }, "sequence 4, 5 tokens at 32"),
        (Files { lengths: vec![3, 0, 7, 7, 4], ..small() }, "which ends at 34"),
        (Files { offsets: vec![0, 6, 6, 20, -2], ..small() }, "tokens at -2"),
        (Files { offsets: vec![0, 6, 6, 20, i64::MAX], ..small() }, "sequence 4"),
        (Files { offsets: vec![0, 6, 7, 21, 33], ..small() }, "sequence 2"),
        (Files { documents: vec![0, 3, 2, 5], ..small() }, "document 2 begins at sequence 2"),
        (Files { documents: vec![1, 3, 3, 5], ..small() }, "document 0 begins at sequence 1"),
        (Files { documents: vec![0, 3, 3, 6], ..small() }, "document 3 begins at sequence 6"),
        (Files { documents: vec![0, 3, 3, 4], ..small() }, "end at sequence 4 of 5"),
        (Files { bin: Vec::new(), ..small() }, "inside the 0 bytes"),
    ];
    for (files, reason) in cases {
        let error = refused(&files);
        assert!(error.contains(reason), "expected `{reason}`: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let prefix = small().write(folder.path());
    let tokens = MegatronTokens::open(&prefix, 45, Access::Read).unwrap();
    let error = all(&tokens).unwrap_err();
    assert!(matches!(error, Error::BadValue { value: 49, position: 7, .. }), "{error}");
    // Counts that would be terabytes.
    let mut idx = small().idx();
    idx[18..26].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(folder.path().join("my.corpus.idx"), idx).unwrap();
    let error = MegatronTokens::open(&prefix, 50, Access::Read).unwrap_err().to_string();
    assert!(error.contains("do not fit"), "{error}");
    fs::remove_file(folder.path().join("my.corpus.bin")).unwrap();
    let error = MegatronTokens::open(&prefix, 50, Access::Read).unwrap_err().to_string();
    assert!(error.starts_with("cannot open") && error.contains("my.corpus.bin"), "{error}");
}

#[test]
fn samples_are_cut_out_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = Files::small().write(folder.path());
    let tokens = MegatronTokens::open(&prefix, 50, Access::Map).unwrap();
    let special = SpecialTokens { eos: Some(14), ..Default::default() };
    let tokens = Arc::new(tokens.with_special(special).unwrap());
    let samples = CausalText::new(tokens, 6, Documents::Apart).unwrap();
    let options = LoaderOptions { order: Order::Sequential, global_batch: 3, ..Default::default() };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    let step = loader.next_step().unwrap();
    let batch = &step.micro_batches[0];
    assert_eq!(batch.input_ids()[..6], [0, 7, 14, 21, 28, 35]);
    assert_eq!(batch.labels()[..6], [7, 14, IGNORED, 28, 35, 42]);
    assert_eq!(batch.get::<i64>("document_ids").unwrap()[..6], [0, 0, 0, 1, 1, 1]);
    let tokens = MegatronTokens::open(&prefix, 50, Access::Map).unwrap();
    let special = SpecialTokens { eos: Some(50), ..Default::default() };
    assert!(matches!(tokens.with_special(special), Err(Error::InvalidOption { .. })));
}

#[test]
fn what_is_said_of_special_tokens_is_part_of_the_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = Files::small().write(folder.path());
    let open = || MegatronTokens::open(&prefix, 50, Access::Read).unwrap();
    let files = open().fingerprint();
    let with = |eos| open().with_special(SpecialTokens { eos, ..Default::default() }).unwrap();
    assert_eq!(with(None).fingerprint(), files);
    assert_ne!(with(Some(14)).fingerprint(), files);
    assert_ne!(with(Some(14)).fingerprint(), with(Some(21)).fingerprint());
    let again = with(Some(14)).with_special(SpecialTokens::default()).unwrap();
    assert_eq!(again.fingerprint(), files);
}

#[test]
fn documents_are_not_told_apart_by_a_token_that_nobody_named() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = Files::small().write(folder.path());
    let tokens = Arc::new(MegatronTokens::open(&prefix, 50, Access::Read).unwrap());
    CausalText::new(Arc::<MegatronTokens>::clone(&tokens), 6, Documents::Joined).unwrap();
    let error = CausalText::new(tokens, 6, Documents::Apart).unwrap_err().to_string();
    assert!(error.contains("which token closes documents"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// Whatever is done to the files: an error, or as many tokens as the index says.
    #[test]
    fn a_changed_file_is_tokens_or_an_error(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(), shorten in any::<bool>(), tokens_too in any::<bool>()
    ) {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::small();
        let prefix = files.write(folder.path());
        let mut bytes = if tokens_too { files.bin.clone() } else { files.idx() };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        let name = if tokens_too { "my.corpus.bin" } else { "my.corpus.idx" };
        fs::write(folder.path().join(name), bytes).unwrap();
        if let Ok(tokens) = MegatronTokens::open(&prefix, 50, Access::Map) {
            prop_assert!(tokens.token_count() <= 40);
            let mut scratch = Scratch::default();
            for document in 0..tokens.document_count() {
                let range = tokens.document(document, &mut scratch).unwrap();
                prop_assert!(range.start <= range.end && range.end <= tokens.token_count());
            }
            drop(all(&tokens));
        }
    }
}

#[test]
fn a_token_that_cannot_be_is_named_by_its_document_and_its_place_there() {
    let small = Files::small;
    // One behind the other, and with a gap before all but the first.
    let mut apart = Files { offsets: vec![0, 8, 8, 22, 34], ..small() };
    apart.bin.splice(6..6, [0, 0]);
    for mut files in [small(), apart] {
        // The second token of the last sequence: six are before it in its document.
        let at = usize::try_from(files.offsets[4]).unwrap() + 2;
        files.bin[at] = 60;
        let folder = tempfile::tempdir().unwrap();
        let tokens = MegatronTokens::open(&files.write(folder.path()), 50, Access::Read).unwrap();
        let samples = PaddedText::new(Arc::new(tokens), 100, Objective::Causal).unwrap();
        let (tail, epochs) = (Tail::Exact, Some(1));
        let options = LoaderOptions { global_batch: 1, tail, epochs, ..LoaderOptions::default() };
        let mut loader = Loader::new(Arc::new(samples), options).unwrap();
        let error = loader.steps().find_map(Result::err).unwrap();
        let place = matches!(error, Error::BadValue { sample: 2, position: 7, value: 60, .. });
        assert!(place, "{error}");
    }
}
