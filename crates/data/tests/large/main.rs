//! Memory of a data set of 10^9 samples. The files have holes: a terabyte takes some megabytes of disk.

#[path = "../support/counting.rs"]
mod counting;
mod holes;

use std::sync::Arc;

use phalanx_data::format::TokenStream;
use phalanx_data::{Access, Loader, LoaderOptions, MaskedText, Masking, Samples};

/// One test: what others allocate would be counted as well.
#[test]
fn a_billion_samples_take_less_than_a_mebibyte() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let shards = holes::write(&target).unwrap();
    for access in [Access::Map, Access::Read] {
        let before = counting::live_bytes();
        let stream = Arc::new(TokenStream::open(&target, access).unwrap());
        let samples = MaskedText::new(stream, holes::SEQUENCE_LEN, Masking::default()).unwrap();
        assert!(samples.sample_count() >= holes::SAMPLES);
        let opened = counting::live_bytes() - before;
        println!("{} samples, {shards} shards, {access:?}: {opened} bytes", samples.sample_count());
        assert!(opened < 1 << 20, "{access:?}: {opened} bytes");
        // An order of 10^9 samples takes no memory either, and a place in it is found at once.
        let samples: Arc<dyn Samples> = Arc::new(samples);
        let options = LoaderOptions { global_batch: 8, threads: 0, ..Default::default() };
        let mut loader = Loader::new(samples, options).unwrap();
        let step = loader.next_step().unwrap();
        let with_a_batch = counting::live_bytes() - before;
        // A batch of 8 × 512 × 2 × 8 bytes, and a block that is verified, where it is read.
        assert!(with_a_batch < (1 << 20) + (3 << 20) / 2, "{access:?}: {with_a_batch} bytes");
        drop(step);
    }
}
