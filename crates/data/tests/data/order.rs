//! One global order, whatever the ranks, threads and places of resuming.

use std::num::NonZeroUsize;
use std::sync::Arc;

use phalanx_data::order::Sample;
use phalanx_data::{Loader, LoaderOptions, LoaderState, MicroBatch, Order, Samples, Tail};

use crate::support::{content, open, write_tokens, Scripted};

type Rows = (Vec<Sample>, Vec<i64>, Vec<i64>);

fn joined(steps: impl IntoIterator<Item = Rows>) -> Rows {
    let mut all = Rows::default();
    for (samples, ids, labels) in steps {
        all.0.extend(samples);
        all.1.extend(ids);
        all.2.extend(labels);
    }
    all
}

/// The global batches of `steps` steps from `state` on, put together from the slices of all ranks.
fn run(
    samples: &Arc<dyn Samples>,
    options: &LoaderOptions,
    state: Option<&LoaderState>,
    steps: usize,
) -> (Vec<Rows>, LoaderState) {
    let mut loaders: Vec<Loader> = (0..options.world_size)
        .map(|rank| {
            let options = LoaderOptions { rank, ..options.clone() };
            match state {
                Some(state) => Loader::resume(Arc::clone(samples), options, state).unwrap(),
                None => Loader::new(Arc::clone(samples), options).unwrap(),
            }
        })
        .collect();
    let mut batches = Vec::new();
    for _ in 0..steps {
        let slices = loaders.iter_mut().flat_map(|loader| {
            let step = loader.next_step().unwrap();
            step.micro_batches.iter().map(content).collect::<Vec<_>>()
        });
        batches.push(joined(slices));
    }
    let states: Vec<LoaderState> = loaders.iter().map(Loader::state).collect();
    assert!(states.iter().all(|state| *state == states[0]), "ranks disagree on their place");
    (batches, states[0].clone())
}

#[test]
fn batches_are_bit_equal_for_all_ranks_threads_and_places_of_resuming() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    write_tokens(&target, 40, 500, 2000);
    let samples: Arc<dyn Samples> = open(&target, 34);
    let steps = 26;
    for tail in [Tail::Drop, Tail::Wrap] {
        let options =
            LoaderOptions { seed: 11, global_batch: 12, tail, threads: 0, ..Default::default() };
        let (expected, _) = run(&samples, &options, None, steps);
        assert!(expected.iter().any(|batch| batch.0[0].epoch == 2), "three epochs are covered");
        for world_size in [1, 2, 3, 4, 5] {
            for threads in [1, 2, 4] {
                let micro_batch = match threads {
                    1 => MicroBatch::Whole,
                    2 => MicroBatch::Size(NonZeroUsize::new(2).unwrap()),
                    _ => MicroBatch::Count(NonZeroUsize::new(3).unwrap()),
                };
                let options = LoaderOptions { world_size, threads, micro_batch, ..options.clone() };
                // Stop and go on with other ranks at several places.
                let stop = (world_size * 5 + threads * 3) % (steps - 1) + 1;
                let (before, state) = run(&samples, &options, None, stop);
                assert_eq!(
                    before,
                    expected[..stop],
                    "{tail:?}, {world_size} ranks, {threads} threads"
                );
                let json = serde_json::to_string(&state).unwrap();
                assert!(json.len() <= 100, "{} bytes: {json}", json.len());
                let state = serde_json::from_str(&json).unwrap();
                let options = LoaderOptions { world_size: world_size % 4 + 1, ..options };
                let (after, _) = run(&samples, &options, Some(&state), steps - stop);
                assert_eq!(after, expected[stop..], "{tail:?}, resumed after {stop} steps");
            }
        }
    }
}

#[test]
fn four_then_three_then_four_ranks_see_every_sample_exactly_once_an_epoch() {
    let samples: Arc<dyn Samples> = Arc::new(Scripted::new(1003, 2, |_| Ok(())));
    let options =
        LoaderOptions { seed: 5, global_batch: 10, tail: Tail::Wrap, ..Default::default() };
    let (mut seen, mut state) = (Vec::new(), None);
    for (world_size, steps) in [(4, 33), (3, 48), (4, 120)] {
        let options = LoaderOptions { world_size, ..options.clone() };
        let (batches, after) = run(&samples, &options, state.as_ref(), steps);
        seen.extend(batches.into_iter().flat_map(|batch| batch.0));
        state = Some(after);
    }
    assert_eq!(seen.len(), 2010);
    for (epoch, samples) in seen.chunks_exact(1003).enumerate() {
        let mut ids: Vec<u64> = samples.iter().map(|sample| sample.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..1003).collect::<Vec<_>>(), "epoch {epoch}");
        assert!(samples.iter().all(|sample| sample.epoch == epoch as u64));
    }
}

#[test]
fn a_rank_computes_its_contiguous_slice_of_the_order() {
    let samples: Arc<dyn Samples> = Arc::new(Scripted::new(50, 1, |_| Ok(())));
    let slices = |order| {
        [0, 1, 2].map(|rank| {
            let options =
                LoaderOptions { order, global_batch: 8, rank, world_size: 3, ..Default::default() };
            let mut loader = Loader::new(Arc::clone(&samples), options).unwrap();
            let _first = loader.next_step().unwrap();
            let second = loader.next_step().unwrap();
            assert_eq!(second.start.next_global_sample, 8);
            second.micro_batches[0].input_ids().to_vec()
        })
    };
    assert_eq!(slices(Order::Sequential), [vec![8, 9, 10], vec![11, 12, 13], vec![14, 15]]);
    let permutation = phalanx_data::order::permutation::Permutation::new(50, 0, 0);
    let expected: Vec<i64> = (8..16).map(|i| permutation.at(i).cast_signed()).collect();
    assert_eq!(slices(Order::Shuffled).concat(), expected);
}

#[test]
fn a_place_in_other_data_or_another_order_is_refused() {
    let samples = |count| Arc::new(Scripted::new(count, 1, |_| Ok(())));
    let options = LoaderOptions { seed: 3, global_batch: 4, ..Default::default() };
    let state = Loader::new(samples(50), options.clone()).unwrap().state();
    let refused = |count, options, state: &LoaderState| {
        Loader::resume(samples(count), options, state).unwrap_err().to_string()
    };
    let error = refused(51, options.clone(), &state);
    assert!(error.contains("its data is 0000000000000032") && error.contains("0000000000000033"));
    let error = refused(50, LoaderOptions { seed: 4, ..options.clone() }, &state);
    assert!(error.contains("its seed is 3, this run has 4"), "{error}");
    let sequential = LoaderOptions { order: Order::Sequential, ..options.clone() };
    assert!(refused(50, sequential, &state).contains("its order is shuffled"));
    let newer = LoaderState { version: 2, ..state.clone() };
    assert!(refused(50, options.clone(), &newer).contains("order's version is 2, this run has 1"));
    // Nonsense in a saved place starts an epoch, but does not panic.
    let far = LoaderState { epoch: u64::MAX, next_global_sample: u64::MAX, ..state };
    let mut loader = Loader::resume(samples(50), options, &far).unwrap();
    assert_eq!(loader.next_step().unwrap().start.next_global_sample, 0);
}
