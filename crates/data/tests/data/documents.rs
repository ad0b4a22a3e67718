//! The documents of a prepared folder.

use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenStream, TokenWriter, Tokens};
use phalanx_data::{Access, DType, Error};

use crate::support::{write_tokens, SPECIAL};

/// `[SEP]`
const SEP: i64 = 3;

#[test]
fn documents_are_where_they_were_written_in_all_shards() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 200, 500, 10_000);
    for access in [Access::Read, Access::Map] {
        let stream = TokenStream::open(&target, access).unwrap();
        assert!(stream.index().shards.len() > 2);
        assert_eq!(stream.document_count(), 200);
        let (mut at, mut scratch) = (0, Scratch::default());
        for document in 0..200 {
            let range = stream.document(document, &mut scratch).unwrap();
            assert_eq!(range, at..at + 91 + document % 21);
            let mut tokens = vec![0; usize::try_from(range.end - range.start).unwrap()];
            stream.read(range.start, &mut tokens, &mut scratch, &"a document").unwrap();
            let ends = tokens.iter().filter(|&&token| token == SEP).count();
            assert_eq!((ends, tokens.last()), (1, Some(&SEP)));
            at = range.end;
        }
        assert_eq!(at, stream.token_count());
        let error = stream.document(200, &mut scratch).unwrap_err();
        assert!(matches!(error, Error::NoSuchSample { sample: 200, samples: 200 }), "{error}");
    }
}

#[test]
fn the_place_of_a_document_counts_eight_bytes_of_its_shard() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let mut writer = TokenWriter::create(&target, b"{}", 500, SPECIAL, 1200).unwrap();
    for _ in 0..250 {
        writer.tokens(&[7, 3]).unwrap();
        writer.end_document().unwrap();
    }
    let index = writer.finish(0).unwrap();
    assert_eq!(index.dtype, DType::U16);
    let documents: Vec<u64> = index.shards.iter().map(|shard| shard.document_count).collect();
    assert_eq!(documents, [100, 100, 50], "12 bytes each");
}
