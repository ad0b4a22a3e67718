//! Samples that are tokens and nothing else.

use std::sync::Arc;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenStream, Tokens};
use phalanx_data::samples::RawText;
use phalanx_data::{Access, Error, Loader, LoaderOptions, Order, Samples, Tail};

use crate::support::write_tokens;

const LEN: usize = 33;

#[test]
fn raw_samples_are_the_stream_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    // Samples lie across shards.
    write_tokens(&target, 40, 500, 2000);
    for access in [Access::Read, Access::Map] {
        let stream = Arc::new(TokenStream::open(&target, access).unwrap());
        let mut tokens = vec![0; usize::try_from(stream.token_count()).unwrap()];
        stream.read(0, &mut tokens, &mut Scratch::default(), &"all").unwrap();
        let samples: Arc<dyn Samples> = Arc::new(RawText::new(stream, LEN).unwrap());
        assert_eq!(samples.sample_count(), tokens.len() as u64 / LEN as u64);
        let options = LoaderOptions {
            order: Order::Sequential,
            tail: Tail::Exact,
            epochs: Some(1),
            global_batch: 4,
            ..Default::default()
        };
        let mut loader = Loader::new(samples, options).unwrap();
        let mut rows = Vec::new();
        for step in loader.steps() {
            for batch in &step.unwrap().micro_batches {
                assert_eq!(batch.columns().len(), 1);
                rows.extend_from_slice(batch.input_ids());
            }
        }
        assert_eq!(rows, tokens[..rows.len()]);
        assert!(tokens.len() - rows.len() < LEN, "less than a sample is left");
    }
}

#[test]
fn raw_samples_of_no_length_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 1, 500, 2000);
    let refused = RawText::open(&target, 0, Access::Read).unwrap_err();
    assert!(matches!(refused, Error::InvalidOption { option: "sequence_len", .. }), "{refused}");
}
