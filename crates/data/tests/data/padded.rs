//! Documents as samples, padded to the longest of a batch.

use std::sync::Arc;

use phalanx_data::{
    Access, Loader, LoaderOptions, Masking, Objective, PaddedText, Scratch, Tail, TokenStream,
    Tokens, IGNORED,
};

use crate::support::write_tokens;

const LEN_MAX: usize = 100;

/// Every row of an epoch: its document, its ids, labels and mask.
type Row = (u64, [Vec<i64>; 3]);

fn epoch(stream: &Arc<TokenStream>, objective: Objective, bucketing: u64) -> (Vec<Row>, usize) {
    let samples = PaddedText::new(Arc::<TokenStream>::clone(stream), LEN_MAX, objective).unwrap();
    let options = LoaderOptions {
        tail: Tail::Exact,
        epochs: Some(1),
        global_batch: 8,
        bucketing,
        ..Default::default()
    };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    let (mut rows, mut padded) = (Vec::new(), 0);
    for step in loader.steps() {
        for batch in &step.unwrap().micro_batches {
            let columns = ["input_ids", "labels", "attention_mask"];
            let columns = columns.map(|name| batch.get::<i64>(name).unwrap());
            let len = batch.sequence_len();
            assert_eq!(batch.column_shape(0), batch.shape());
            let of_row = |at: usize| columns.map(|all| all[at * len..(at + 1) * len].to_vec());
            let longest = columns[2].chunks(len).map(|mask| mask.iter().sum::<i64>()).max();
            assert_eq!(
                longest,
                Some(i64::try_from(len).unwrap()),
                "no longer than its longest row"
            );
            padded += columns[2].iter().filter(|&&token| token == 0).count();
            rows.extend((0..batch.rows()).map(|at| (batch.samples()[at].id, of_row(at))));
        }
    }
    (rows, padded)
}

fn stream() -> (tempfile::TempDir, Arc<TokenStream>) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 61, 500, 2000);
    let stream = Arc::new(TokenStream::open(&target, Access::Read).unwrap());
    (folder, stream)
}

#[test]
fn each_document_is_a_row() {
    let (_folder, stream) = stream();
    let (rows, _) = epoch(&stream, Objective::Causal, 0);
    let mut seen: Vec<u64> = rows.iter().map(|(document, _)| *document).collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..61), "every document once");
    let mut scratch = Scratch::default();
    let mut cut = 0;
    for (document, [ids, labels, mask]) in rows {
        let range = Tokens::document(&*stream, document, &mut scratch).unwrap();
        let mut expected = vec![0; usize::try_from(range.end - range.start).unwrap()];
        stream.read(range.start, &mut expected, &mut scratch, &"a document").unwrap();
        cut += usize::from(expected.len() > LEN_MAX);
        expected.truncate(LEN_MAX);
        let len = expected.len();
        assert_eq!(ids[..len], expected);
        assert!(ids[len..].iter().all(|&id| id == 0) && mask[len..].iter().all(|&bit| bit == 0));
        assert!(mask[..len].iter().all(|&bit| bit == 1));
        assert_eq!(labels[..len - 1], expected[1..]);
        assert!(labels[len - 1..].iter().all(|&label| label == IGNORED));
    }
    assert!(cut > 0 && cut < 61, "some are cut: {cut}");
}

#[test]
fn masks_are_the_same_however_batches_are_put_together() {
    let (_folder, stream) = stream();
    let objective = Objective::Masked(Masking::default());
    let by_document = |bucketing| {
        let (mut rows, padded) = epoch(&stream, objective, bucketing);
        rows.sort();
        let unpadded = |(document, columns): Row| {
            let len = usize::try_from(columns[2].iter().sum::<i64>()).unwrap();
            (document, columns.map(|column| column[..len].to_vec()))
        };
        (rows.into_iter().map(unpadded).collect::<Vec<Row>>(), padded)
    };
    let ((plain, much), (bucketed, little)) = (by_document(0), by_document(7));
    assert_eq!(plain, bucketed);
    assert!(little * 3 < much, "{little} and {much} positions are padding");
    assert!(plain.iter().all(|(_, [_, labels, _])| labels.iter().any(|&label| label != IGNORED)));
}
