//! Every kind of order and tail: the same for all ranks, threads and places of resuming, and nothing lost or doubled.

use std::num::NonZeroUsize;
use std::sync::Arc;

use phalanx_data::batches::{Rows, Scratch};
use phalanx_data::loader::Buckets;
use phalanx_data::order::Sample;
use phalanx_data::samples::{FromFn, Mixture};
use phalanx_data::{
    from_fn, Batch, Column, DType, Error, Loader, LoaderOptions, LoaderState, MicroBatch, Order,
    Samples, Tail,
};
use proptest::prelude::*;

/// Samples that hold their own number.
fn numbers(count: u64, name: &str) -> Arc<dyn Samples> {
    let columns = vec![Column::new("id", DType::I64, [])];
    Arc::new(from_fn(count, columns, name, |sample, seed, row| {
        row.column::<i64>(0)?.fill(sample.id.cast_signed() ^ seed.cast_signed());
        Ok(())
    }))
}

/// Samples whose length is a function of their number, padded with −1.
#[derive(Debug)]
struct Ragged {
    count: u64,
    columns: Vec<Column>,
}

impl Ragged {
    fn samples(count: u64) -> Arc<dyn Samples> {
        Self::up_to(count, 60)
    }

    fn up_to(count: u64, longest: usize) -> Arc<dyn Samples> {
        Arc::new(Ragged { count, columns: vec![Column::padded("id", DType::I64, [longest])] })
    }
}

fn len_of(id: u64) -> usize {
    usize::try_from(id * 7919 % 59).expect("small") + 1
}

impl Samples for Ragged {
    fn sample_count(&self) -> u64 {
        self.count
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> phalanx_data::fingerprint::Fingerprint {
        phalanx_data::fingerprint::Fingerprint(self.count)
    }

    fn sample_len(&self, id: u64, _: &mut Scratch) -> phalanx_data::Result<usize> {
        Ok(len_of(id))
    }

    fn fill(&self, _: u64, rows: &mut Rows<'_>, _: &mut Scratch) -> phalanx_data::Result<()> {
        let len = rows.longest();
        for at in 0..rows.len() {
            let id = rows.sample(at).0.id;
            let row = &mut rows.column::<i64>(0)?[at * len..(at + 1) * len];
            row.fill(-1);
            row[..len_of(id)].fill(id.cast_signed());
        }
        Ok(())
    }
}

type Row = (Sample, Vec<i64>);

fn rows(batch: &Batch) -> Vec<Row> {
    let values = batch.get::<i64>("id").unwrap();
    let row = |at: usize| {
        let len = values.len() / batch.rows();
        let row = values[at * len..(at + 1) * len].iter().copied();
        (batch.samples()[at], row.filter(|&value| value != -1).collect())
    };
    (0..batch.rows()).filter(|&at| batch.valid()[at]).map(row).collect()
}

/// The rows that count of `steps` steps from `state` on, of all ranks.
fn run(
    samples: &Arc<dyn Samples>,
    options: &LoaderOptions,
    state: Option<&LoaderState>,
    steps: usize,
) -> (Vec<Vec<Row>>, LoaderState) {
    let start = |rank| {
        let options = LoaderOptions { rank, ..options.clone() };
        match state {
            Some(state) => Loader::resume(Arc::clone(samples), options, state).unwrap(),
            None => Loader::new(Arc::clone(samples), options).unwrap(),
        }
    };
    let mut loaders: Vec<Loader> = (0..options.world_size).map(start).collect();
    let mut batches = Vec::new();
    for _ in 0..steps {
        let mut batch = Vec::new();
        let (mut weight, mut valid) = (0.0, None);
        for loader in &mut loaders {
            let step = loader.next_step().unwrap();
            assert!(step.micro_batches.iter().all(|micro| micro.rows() > 0), "every rank has work");
            let counted: usize = step.micro_batches.iter().map(Batch::valid_count).sum();
            assert_eq!(counted, step.valid);
            assert_eq!(*valid.get_or_insert(step.global_valid), step.global_valid);
            weight += step.weight();
            batch.extend(step.micro_batches.iter().flat_map(rows));
        }
        assert_eq!(Some(batch.len()), valid);
        #[expect(clippy::cast_precision_loss, reason = "few ranks")]
        let world = loaders.len() as f64;
        // A product and a quotient for each weight, their sum, its quotient; each rounds once.
        let tolerance = (world + 2.0) * f64::EPSILON;
        assert!((weight / world - 1.0).abs() < tolerance, "the weights' mean is 1: {weight}");
        batches.push(batch);
    }
    let states: Vec<LoaderState> = loaders.iter().map(Loader::state).collect();
    assert!(states.iter().all(|state| *state == states[0]), "ranks disagree on their place");
    (batches, states[0].clone())
}

/// For world sizes 1, 2, 3, 4, 6, 8 and 1, 2, 4 threads: stop at random places, and go on with another world size.
fn the_same_for_all(samples: &Arc<dyn Samples>, options: &LoaderOptions, steps: usize) {
    let options = LoaderOptions { threads: 0, ..options.clone() };
    let (expected, _) = run(samples, &options, None, steps);
    let worlds = [1, 2, 3, 4, 6, 8];
    let mut random = 7_usize;
    for (number, &world_size) in worlds.iter().enumerate() {
        for threads in [1, 2, 4] {
            let micro_batch = match threads {
                1 => MicroBatch::Whole,
                2 => MicroBatch::Size(NonZeroUsize::new(2).unwrap()),
                _ => MicroBatch::Count(NonZeroUsize::new(3).unwrap()),
            };
            let ranks = LoaderOptions { world_size, threads, micro_batch, ..options.clone() };
            let (all, _) = run(samples, &ranks, None, steps);
            assert!(all == expected, "{world_size} ranks, {threads} threads: {ranks:?}");
            for _ in 0..20 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let stop = (random >> 33) % (steps - 1) + 1;
                let one = LoaderOptions { rank: 0, world_size: 1, threads: 0, ..options.clone() };
                let (_, state) = run(samples, &one, None, stop);
                let json = serde_json::to_string(&state).unwrap();
                assert!(json.len() <= 100, "{} bytes: {json}", json.len());
                let state = serde_json::from_str(&json).unwrap();
                let other = worlds[(number + stop) % worlds.len()];
                let other = LoaderOptions { world_size: other, ..ranks.clone() };
                let (after, _) = run(samples, &other, Some(&state), (steps - stop).min(5));
                let upto = (stop + 5).min(steps);
                assert!(after == expected[stop..upto], "resumed after {stop} steps: {other:?}");
            }
        }
    }
}

/// Each id of `0..count` once in every epoch of the steps.
fn exactly_once(batches: &[Vec<Row>], count: u64) {
    let all: Vec<&Row> = batches.iter().flatten().collect();
    for (epoch, rows) in all.chunks_exact(usize::try_from(count).unwrap()).enumerate() {
        let mut ids: Vec<u64> = rows.iter().map(|(sample, _)| sample.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..count), "epoch {epoch}");
        assert!(rows.iter().all(|(sample, _)| sample.epoch == epoch as u64));
    }
}

#[test]
fn orders_and_tails() {
    let count = 203;
    for order in [Order::Shuffled, Order::Sequential, Order::Blocks { block: 16, window: 3 }] {
        for tail in [Tail::Drop, Tail::Wrap, Tail::Pad, Tail::Exact] {
            let options =
                LoaderOptions { order, tail, seed: 3, global_batch: 24, ..Default::default() };
            let samples = numbers(count, "a");
            the_same_for_all(&samples, &options, 20);
            if tail != Tail::Drop {
                exactly_once(&run(&samples, &options, None, 20).0, count);
            }
        }
    }
}

#[test]
fn batches_of_similar_length() {
    let samples = Ragged::samples(203);
    for tail in [Tail::Drop, Tail::Pad, Tail::Exact] {
        let options =
            LoaderOptions { tail, seed: 3, global_batch: 24, bucketing: 4, ..Default::default() };
        the_same_for_all(&samples, &options, 20);
        let (batches, _) = run(&samples, &options, None, 18);
        for row in batches.iter().flatten() {
            assert_eq!(row.1, vec![row.0.id.cast_signed(); len_of(row.0.id)]);
        }
        if tail != Tail::Drop {
            exactly_once(&batches, 203);
        }
    }
    let padding = |bucketing| {
        let options = LoaderOptions { global_batch: 24, bucketing, ..Default::default() };
        let mut loader = Loader::new(Arc::clone(&samples), options).unwrap();
        let steps: Vec<_> = (0..8).map(|_| loader.next_step().unwrap()).collect();
        let padded = steps.iter().flat_map(|step| step.micro_batches[0].get::<i64>("id").unwrap());
        padded.filter(|&&value| value == -1).count()
    };
    assert!(padding(8) * 4 < padding(0), "{} and {}", padding(8), padding(0));
}

#[test]
fn similar_length_needs_whole_batches_and_an_end() {
    let samples = Ragged::samples(203);
    let options = LoaderOptions { bucketing: 4, tail: Tail::Pad, ..Default::default() };
    let wraps = LoaderOptions { tail: Tail::Wrap, ..options.clone() };
    assert!(matches!(Loader::new(Arc::clone(&samples), wraps), Err(Error::InvalidOption { .. })));
    let mut loader = Loader::new(Arc::clone(&samples), options.clone()).unwrap();
    drop(loader.next_step().unwrap());
    let other = LoaderOptions { global_batch: 20, ..options.clone() };
    let resume = |options: LoaderOptions, state: &LoaderState| {
        Loader::resume(Arc::clone(&samples), options, state).unwrap_err().to_string()
    };
    let error = resume(other, &loader.state());
    assert!(error.contains("batches of similar length is 4x32, this run has 4x20"), "{error}");
    let plain = LoaderOptions { bucketing: 0, ..options.clone() };
    assert!(resume(plain, &loader.state()).contains("is 4x32, this run has none"));
    let inside = LoaderState { next_global_sample: 33, ..loader.state() };
    let error = resume(options, &inside);
    assert!(error.contains("the global batch of the run that saved it"), "{error}");
}

#[test]
fn padded_rows_of_a_mixture_are_as_long_as_those_of_any_part() {
    // Samples 0 to 2 are 1, 14 and 27 long.
    let parts =
        [(Ragged::up_to(3, 27), 1.0), (Ragged::up_to(100, 60), 1.0), (Ragged::up_to(50, 59), 1.0)];
    let mixture: Arc<dyn Samples> = Arc::new(Mixture::new(parts.to_vec()).unwrap());
    assert_eq!(mixture.columns(), [Column::padded("id", DType::I64, [60])]);
    let options = LoaderOptions { tail: Tail::Wrap, global_batch: 12, ..Default::default() };
    let (batches, _) = run(&mixture, &options, None, 40);
    for (sample, values) in batches.iter().flatten() {
        let own = [0, 3, 103]
            .into_iter()
            .rfind(|&first| first <= sample.id)
            .map(|first| sample.id - first)
            .unwrap();
        assert_eq!(*values, vec![own.cast_signed(); len_of(own)]);
    }
    let several = |shape: [usize; 2]| -> Arc<dyn Samples> {
        let columns = vec![Column::padded("id", DType::I64, shape)];
        Arc::new(from_fn(3, columns, "a", |_, _, _| Ok(())))
    };
    let error = Mixture::new(vec![(several([5, 2]), 1.0), (several([5, 3]), 1.0)]).unwrap_err();
    assert!(error.to_string().contains("part 1"), "{error}");
    assert!(Mixture::new(vec![(several([5, 2]), 1.0), (several([7, 2]), 1.0)]).is_ok());
}

#[test]
fn mixtures_hold_their_weights_at_every_place() {
    let parts = [(numbers(50, "a"), 0.7), (numbers(80, "b"), 0.2), (numbers(33, "c"), 0.1)];
    let samples: Arc<dyn Samples> = Arc::new(Mixture::new(parts.to_vec()).unwrap());
    let options =
        LoaderOptions { tail: Tail::Wrap, seed: 3, global_batch: 24, ..Default::default() };
    the_same_for_all(&samples, &options, 40);
    let (batches, _) = run(&samples, &options, None, 200);
    let (mut drawn, mut seen) = ([0_u64; 3], [Vec::new(), Vec::new(), Vec::new()]);
    for (place, (sample, values)) in (1..).zip(batches.iter().flatten()) {
        let (part, own) = match sample.id {
            id @ 0..50 => (0, id),
            id @ 50..130 => (1, id - 50),
            id => (2, id - 130),
        };
        assert_eq!(
            values,
            &[own.cast_signed() ^ 3],
            "filled by its own part, with its number there"
        );
        drawn[part] += 1;
        for (count, weight) in drawn.iter().zip([7, 2, 1]) {
            assert!((count * 10).abs_diff(place * weight) < 10, "{drawn:?} at {place}");
        }
        seen[part].push((sample.epoch, own));
    }
    for (seen, count) in seen.iter().zip([50, 80, 33]) {
        for (round, once) in seen.chunks_exact(count).enumerate() {
            let mut ids: Vec<u64> = once.iter().map(|&(_, id)| id).collect();
            assert!(once.iter().all(|&(epoch, _)| epoch == round as u64));
            ids.sort_unstable();
            assert!(ids.into_iter().eq(0..count as u64), "every sample of a part once a round");
        }
    }
    let drop = LoaderOptions { tail: Tail::Drop, ..options };
    assert!(matches!(Loader::new(samples, drop), Err(Error::InvalidOption { .. })));
    let other: Arc<dyn Samples> = Ragged::samples(10);
    let inner: Arc<dyn Samples> =
        Arc::new(Mixture::new(vec![(numbers(3, "a"), 9.0), (numbers(4, "a"), 1.0)]).unwrap());
    let error = Mixture::new(vec![(inner, 1.0), (numbers(3, "a"), 1.0)]).unwrap_err().to_string();
    assert!(error.contains("a mixture itself"), "{error}");
    let error = Mixture::new(vec![(numbers(3, "a"), 1.0), (other, 1.0)]).unwrap_err().to_string();
    assert!(error.contains("part 1") && error.contains("columns differ"), "{error}");
}

#[test]
fn evaluation_sees_each_sample_once_and_ends() {
    for (count, world_size) in [(203, 3), (24, 4), (25, 8), (3, 8), (1, 1)] {
        let samples = numbers(count, "a");
        let mut seen = Vec::new();
        let mut steps = Vec::new();
        for rank in 0..world_size {
            let options = LoaderOptions::evaluation(24, rank, world_size);
            let mut loader = Loader::new(Arc::clone(&samples), options).unwrap();
            let all: Vec<_> = loader.steps().map(Result::unwrap).collect();
            steps.push(all.len());
            seen.extend(all.iter().flat_map(|step| step.micro_batches.iter().flat_map(rows)));
            assert!(loader.is_at_end());
            assert!(matches!(loader.next_step(), Err(Error::EndOfData { epochs: 1 })));
        }
        let mut ids: Vec<u64> = seen.iter().map(|(sample, _)| sample.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..count), "{count} samples on {world_size} ranks");
        assert!(steps.iter().all(|&own| own == steps[0]), "all ranks take part in all steps");
    }
}

#[test]
fn through_four_three_and_four_ranks_every_sample_comes_once() {
    for tail in [Tail::Wrap, Tail::Pad, Tail::Exact] {
        let samples = numbers(1003, "a");
        let options =
            LoaderOptions { seed: 5, global_batch: 12, tail, bucketing: 0, ..Default::default() };
        let (mut seen, mut state) = (Vec::new(), None);
        for (world_size, steps) in [(4, 33), (3, 48), (4, 120)] {
            let options = LoaderOptions { world_size, ..options.clone() };
            let (batches, after) = run(&samples, &options, state.as_ref(), steps);
            seen.extend(batches);
            state = Some(after);
        }
        exactly_once(&seen, 1003);
    }
}

#[test]
fn orders_are_written_and_read_and_checked() {
    for (order, text) in [
        (Order::Shuffled, "shuffled"),
        (Order::Sequential, "sequential"),
        (Order::Blocks { block: 65_536, window: 16 }, "b65536x16"),
    ] {
        assert_eq!(order.to_string(), text);
        assert_eq!(text.parse(), Ok(order));
    }
    assert!("b12".parse::<Order>().unwrap_err().contains("b65536x16"));
    let state = LoaderState {
        epoch: 12,
        next_global_sample: 999_999_999,
        seed: 4_294_967_295,
        order: Order::Blocks { block: 65_536, window: 16 },
        buckets: None,
        version: 1,
        fingerprint: phalanx_data::fingerprint::Fingerprint(u64::MAX),
    };
    let sorted = LoaderState {
        order: Order::Shuffled,
        buckets: Some(Buckets { batches: 16, global_batch: 1024 }),
        ..state.clone()
    };
    for state in [state, sorted] {
        let json = serde_json::to_string(&state).unwrap();
        assert!(json.len() <= 100, "{} bytes: {json}", json.len());
        assert_eq!(serde_json::from_str::<LoaderState>(&json).unwrap(), state);
    }
    for order in [Order::Blocks { block: 0, window: 1 }, Order::Blocks { block: 1, window: 0 }] {
        let options = LoaderOptions { order, ..Default::default() };
        assert!(Loader::new(numbers(100, "a"), options).is_err());
    }
}

#[test]
fn columns_are_asked_for_by_name_and_type() {
    let columns = vec![
        Column::new("image", DType::U8, [3, 2]),
        Column::new("label", DType::I32, []),
        Column::new("flag", DType::Bool, []),
    ];
    let samples: FromFn<_> = from_fn(10, columns, "v1", |sample, _, row| {
        let byte = u8::try_from(sample.id).expect("small");
        row.column::<u8>(0)?.fill(byte);
        row.column::<i32>(1)?.fill(i32::from(byte));
        row.column::<u8>(2)?.fill(byte % 2);
        Ok(())
    });
    let options = LoaderOptions { order: Order::Sequential, global_batch: 4, ..Default::default() };
    let mut loader = Loader::new(Arc::new(samples), options).unwrap();
    let step = loader.next_step().unwrap();
    let batch = &step.micro_batches[0];
    assert_eq!(batch.get::<u8>("image").unwrap().len(), 24);
    assert_eq!(batch.get::<i32>("label").unwrap(), [0, 1, 2, 3]);
    assert_eq!(batch.get::<u8>("flag").unwrap(), [0, 1, 0, 1]);
    assert_eq!(batch.column_shape(0), [4, 3, 2]);
    assert_eq!(batch.column_shape(1), [4]);
    assert_eq!(
        batch.get::<u8>("image").unwrap().as_ptr().align_offset(64),
        0,
        "aligned to 64 bytes"
    );
    for error in [batch.get::<i64>("label").unwrap_err(), batch.get::<u8>("picture").unwrap_err()] {
        assert!(error.to_string().contains("image (U8), label (I32), flag (BOOL)"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_sizes_give_each_sample_once(
        count in 1_u64..300, global_batch in 1_usize..40, world_size in 1_usize..9, exact in any::<bool>(),
        block in 1_u64..50, window in 1_u64..10, bucketing in 0_u64..5
    ) {
        prop_assume!(global_batch >= world_size);
        let options = LoaderOptions {
            order: Order::Blocks { block, window },
            tail: if exact { Tail::Exact } else { Tail::Pad },
            epochs: Some(2),
            global_batch,
            world_size,
            bucketing,
            threads: 0,
            ..Default::default()
        };
        let samples = Ragged::samples(count);
        let steps = usize::try_from(count).unwrap().div_ceil(global_batch) * 2;
        exactly_once(&run(&samples, &options, None, steps).0, count);
    }
}
