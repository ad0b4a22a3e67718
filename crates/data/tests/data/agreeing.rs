//! What ranks must have alike, epochs that must divide, and going on with other data.

use std::sync::Arc;

use phalanx_data::loader::Agreement;
use phalanx_data::samples::map;
use phalanx_data::{from_fn, Column, DType, Error, Loader, LoaderOptions, Order, Samples, Tail};

fn numbers(count: u64, version: &str) -> Arc<dyn Samples> {
    let columns = vec![Column::new("id", DType::I64, [])];
    Arc::new(from_fn(count, columns, version, |sample, _, row| {
        row.column::<i64>(0)?.fill(sample.id.cast_signed());
        Ok(())
    }))
}

fn agreement(samples: &Arc<dyn Samples>, options: LoaderOptions) -> Agreement {
    Loader::new(Arc::clone(samples), options).unwrap().agreement()
}

#[test]
fn ranks_of_one_run_agree_and_each_difference_is_named() {
    let samples = numbers(100, "a");
    let own = |rank| LoaderOptions { rank, world_size: 3, seed: 7, ..Default::default() };
    let with = |last: Agreement| {
        let all = [agreement(&samples, own(0)), agreement(&samples, own(1)), last];
        Agreement::compare(&all)
    };
    // What a rank may have for itself.
    let threads = LoaderOptions { threads: 3, queue_batches: 2, ..own(2) };
    with(agreement(&samples, threads)).unwrap();
    let blocks = Order::Blocks { block: 8, window: 4 };
    let cases = [
        (LoaderOptions { seed: 8, ..own(2) }, "seed: ranks 0, 1 have 7, rank 2 has 8"),
        (
            LoaderOptions { order: blocks, ..own(2) },
            "order: ranks 0, 1 have shuffled, rank 2 has b8x4",
        ),
        (LoaderOptions { tail: Tail::Pad, ..own(2) }, "tail: ranks 0, 1 have drop, rank 2 has pad"),
        (
            LoaderOptions { epochs: Some(2), ..own(2) },
            "epochs: ranks 0, 1 have endless, rank 2 has 2",
        ),
        (
            LoaderOptions { global_batch: 16, ..own(2) },
            "global batch: ranks 0, 1 have 32, rank 2 has 16",
        ),
        (LoaderOptions { world_size: 4, ..own(2) }, "world size: ranks 0, 1 have 3, rank 2 has 4"),
        (own(1), "the loader of rank 2 was made for rank 1"),
    ];
    for (options, expected) in cases {
        let error = with(agreement(&samples, options)).unwrap_err();
        assert!(matches!(error, Error::RanksDisagree { .. }));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let other = with(agreement(&numbers(101, "a"), own(2))).unwrap_err().to_string();
    assert!(
        other.contains("data: ranks 0, 1 have") && other.contains("100, rank 2 has 101"),
        "{other}"
    );
    let mut ahead = Loader::new(Arc::clone(&samples), own(2)).unwrap();
    drop(ahead.next_step().unwrap());
    let error = with(ahead.agreement()).unwrap_err().to_string();
    assert!(
        error.contains("position") && error.contains("rank 2 has epoch 0, sample 32"),
        "{error}"
    );
}

#[test]
fn an_epoch_that_does_not_divide_is_refused_with_its_numbers() {
    let options = LoaderOptions { tail: Tail::Refuse, global_batch: 32, ..Default::default() };
    let error = Loader::new(numbers(100, "a"), options.clone()).unwrap_err().to_string();
    for part in ["100 samples are 3 global batches of 32", "4 samples more", "take 96 samples"] {
        assert!(error.contains(part), "{error}");
    }
    let samples = numbers(96, "a");
    let mut loader = Loader::new(Arc::clone(&samples), options.clone()).unwrap();
    let mut ids: Vec<u64> = Vec::new();
    for _ in 0..3 {
        let step = loader.next_step().unwrap();
        ids.extend(step.micro_batches[0].samples().iter().map(|sample| sample.id));
    }
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..96));
    assert_eq!(loader.next_step().unwrap().start.epoch, 1);
    // A place that another global batch has left.
    let state = loader.state();
    let other = LoaderOptions { global_batch: 48, ..options };
    let error = Loader::resume(samples, other, &state).unwrap_err().to_string();
    assert!(error.contains("32 samples of the epoch are done"), "{error}");
}

#[test]
fn other_data_is_gone_on_with_only_if_that_is_asked_for() {
    let options = LoaderOptions { seed: 3, ..Default::default() };
    let mut loader = Loader::new(numbers(100, "a"), options.clone()).unwrap();
    drop((loader.next_step().unwrap(), loader.next_step().unwrap()));
    let state = loader.state();
    let error = Loader::resume(numbers(200, "b"), options.clone(), &state).unwrap_err().to_string();
    assert!(error.contains("its data is") && error.contains("allow_dataset_change"), "{error}");
    let allowed = LoaderOptions { allow_dataset_change: true, ..options.clone() };
    let other = numbers(200, "b");
    let mut resumed = Loader::resume(Arc::clone(&other), allowed.clone(), &state).unwrap();
    assert_eq!(resumed.next_step().unwrap().start, state.position());
    assert_eq!(resumed.state().fingerprint, other.fingerprint(), "it is saved as the new data");
    // Less data than was seen: the next epoch begins.
    let resumed = Loader::resume(numbers(40, "c"), allowed.clone(), &state).unwrap();
    assert_eq!((resumed.state().epoch, resumed.state().next_global_sample), (1, 0));
    let seed = LoaderOptions { seed: 4, ..allowed };
    assert!(matches!(Loader::resume(other, seed, &state), Err(Error::StateMismatch { .. })));
}

#[test]
fn a_closure_changes_rows_after_they_are_filled() {
    let inner = numbers(64, "a");
    let doubled = |version| {
        map(Arc::clone(&inner), version, |sample, seed, row| {
            let id = sample.id.cast_signed();
            let value = row.column::<i64>(0)?;
            assert_eq!(value, [id], "filled before");
            value[0] = 2 * id + seed.cast_signed();
            Ok(())
        })
    };
    assert_ne!(doubled("v1").fingerprint(), doubled("v2").fingerprint());
    assert_ne!(doubled("v1").fingerprint(), inner.fingerprint());
    let options = LoaderOptions { seed: 5, ..Default::default() };
    let mut loader = Loader::new(Arc::new(doubled("v1")), options).unwrap();
    let step = loader.next_step().unwrap();
    let batch = &step.micro_batches[0];
    let expected: Vec<i64> =
        batch.samples().iter().map(|sample| 2 * sample.id.cast_signed() + 5).collect();
    assert_eq!(batch.get::<i64>("id").unwrap(), expected);
}
