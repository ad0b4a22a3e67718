//! From text that the test writes to batches.

use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenIndex, TokenStream, Tokens};
use phalanx_data::{
    convert, progress, Access, Loader, LoaderOptions, MaskedText, Masking, Samples, IGNORED,
};

use crate::support::write_text;

fn options() -> convert::PrepareOptions {
    convert::PrepareOptions { vocab_size: 512, shard_bytes: 4096, ..Default::default() }
}

#[test]
fn text_becomes_batches_that_decode_to_the_text() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 5, 300);
    let prepared = convert::prepare(folder.path(), &options(), &progress::Silent).unwrap();
    assert!(!prepared.reused);
    assert_eq!(prepared.document_count, 5);

    let stream = TokenStream::open(&prepared.folder, Access::Read).unwrap();
    assert!(stream.index().shards.len() > 1, "several shards");
    let mut tokens = vec![0; usize::try_from(stream.token_count()).unwrap()];
    stream.read(0, &mut tokens, &mut Scratch::default(), &"all").unwrap();

    // The `tokenizers` crate, given our tokenizer.json, encodes the text to the same tokens.
    let mut tokenizer =
        tokenizers::Tokenizer::from_file(prepared.folder.join("tokenizer.json")).unwrap();
    tokenizer.set_encode_special_tokens(true);
    let mut expected = Vec::new();
    for file in 0..5 {
        let path = folder.path().join(format!("play-{file}.txt"));
        let text = std::fs::read_to_string(path).unwrap();
        let encoding = tokenizer.encode(text, false).unwrap();
        expected.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
        expected.push(prepared.special.sep.map_or(-1, i64::from));
    }
    assert_eq!(tokens, expected);

    let samples = MaskedText::open(&prepared.folder, 32, Masking::default(), Access::Map).unwrap();
    let mut row = vec![0; 32];
    let mut scratch = Scratch::default();
    for id in 0..samples.sample_count() {
        samples.read_unmasked(id, &mut row, &mut scratch).unwrap();
        let start = usize::try_from(id).unwrap() * 30;
        assert_eq!(row[0], prepared.special.cls.map_or(-1, i64::from));
        assert_eq!(row[1..31], tokens[start..start + 30]);
        assert_eq!(row[31], prepared.special.sep.map_or(-1, i64::from));
    }

    let loader_options = LoaderOptions { global_batch: 8, threads: 2, ..Default::default() };
    let mut loader = Loader::new(Arc::new(samples), loader_options).unwrap();
    for _ in 0..loader.steps_per_epoch() + 1 {
        let step = loader.next_step().unwrap();
        let batch = &step.micro_batches[0];
        assert_eq!(batch.shape(), [8, 32]);
        for (number, (ids, labels)) in
            batch.input_ids().chunks(32).zip(batch.labels().chunks(32)).enumerate()
        {
            let start = usize::try_from(batch.samples()[number].id).unwrap() * 30;
            let original = &tokens[start..start + 30];
            assert!(labels.iter().any(|&label| label != IGNORED));
            for at in 1..31 {
                let label = if labels[at] == IGNORED { ids[at] } else { labels[at] };
                assert_eq!(label, original[at - 1]);
            }
        }
    }
}

#[test]
fn prepared_data_is_found_again_and_changed_text_is_prepared_anew() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 2, 100);
    let first = convert::prepare(folder.path(), &options(), &progress::Silent).unwrap();
    let again = convert::prepare(folder.path(), &options(), &progress::Silent).unwrap();
    assert!(again.reused);
    assert_eq!(again.folder, first.folder);
    assert_eq!(again.fingerprint, first.fingerprint);

    let itself = convert::prepare(&first.folder, &options(), &progress::Silent).unwrap();
    assert_eq!(itself.folder, first.folder);

    let mut content = std::fs::read_to_string(folder.path().join("play-0.txt")).unwrap();
    content.push_str("And then another line.\n");
    std::fs::write(folder.path().join("play-0.txt"), content).unwrap();
    let changed = convert::prepare(folder.path(), &options(), &progress::Silent).unwrap();
    assert!(!changed.reused);
    assert_ne!(changed.folder, first.folder);
    assert_ne!(changed.fingerprint, first.fingerprint);

    let smaller = convert::PrepareOptions { vocab_size: 128, ..options() };
    let smaller = convert::prepare(folder.path(), &smaller, &progress::Silent).unwrap();
    assert_ne!(smaller.folder, changed.folder);
    assert!(smaller.vocab_size <= 128);
}

#[test]
fn other_folders_and_thread_counts_give_the_same_content() {
    let mut fingerprints = Vec::new();
    for threads in [1, 2, 4] {
        let folder = tempfile::tempdir().unwrap();
        write_text(folder.path(), 3, 2000);
        let threads = std::num::NonZeroUsize::new(threads);
        let options = convert::PrepareOptions { threads, ..options() };
        let prepared = convert::prepare(folder.path(), &options, &progress::Silent).unwrap();
        TokenIndex::read(&prepared.folder).unwrap();
        fingerprints.push(prepared.fingerprint);
    }
    assert_eq!(fingerprints[0], fingerprints[1]);
    assert_eq!(fingerprints[0], fingerprints[2]);
}
