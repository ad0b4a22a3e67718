//! Hooks beside what else an exchange can be: accumulation, sharding, joining, unused parameters, errors.

use std::sync::{Arc, Mutex};

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::hooks::{Int8Blocks, PowerSgd, PowerSgdOptions, TopK};
use phalanx_ddp_core::{DdpOptions, Optimizer, ParameterGroups, Sgd, Sync, Zero};
use tch::Tensor;

use super::{gradients, options, values, Fed, Int8, Model, Which, ALL};

/// Parameters after some steps.
fn train(world_size: usize, which: Which, zero: Zero) -> Vec<Vec<Vec<f32>>> {
    run_ranks(world_size, move |mut group| {
        let (rank, model) = (group.rank(), Model::new());
        let ddp = model.wrap(&mut group, options(zero));
        which.set(&ddp).unwrap();
        let rule = Sgd { lr: 0.1, momentum: 0.5, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        for step in 0..4 {
            // Two micro-batches.
            for (part, sync) in [(0, Sync::Accumulate), (1, Sync::Reduce)] {
                let loss = model.loss(&gradients(rank, 2 * step + part));
                ddp.backward(&loss, 1.0 + rank as f64, sync).unwrap();
            }
            let _step = optimizer.step(Some(5.0)).unwrap();
        }
        model.named.iter().map(|(_, tensor)| values(tensor)).collect()
    })
}

#[test]
fn sharded_training_has_the_bits_of_replicated_training() {
    for world_size in [2, 3] {
        for which in ALL {
            let whole = train(world_size, which, Zero::Off);
            assert!(whole.iter().all(|of_rank| *of_rank == whole[0]), "{which:?}");
            assert!(train(world_size, which, Zero::One) == whole, "{which:?} on {world_size}");
        }
    }
}

#[test]
fn sharded_training_sends_half_where_segments_suffice() {
    for (which, share) in [(Which::Plain, 2), (Which::Bf16, 2), (Int8, 2), (Which::TopK(0.1), 1)] {
        let sent = |zero| {
            let all = run_ranks(2, move |mut group| {
                let (rank, model) = (group.rank(), Model::new());
                let ddp = model.wrap(&mut group, options(zero));
                which.set(&ddp).unwrap();
                let mut optimizer =
                    Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
                for step in 0..2 {
                    model.loss(&gradients(rank, step)).backward();
                    let _step = optimizer.step(None).unwrap();
                }
                ddp.statistics().unwrap().bytes_sent
            });
            all[0]
        };
        assert_eq!(sent(Zero::One) * share, sent(Zero::Off), "{which:?}");
    }
}

#[test]
fn a_rank_that_has_joined_takes_part_with_nothing_but_what_it_keeps() {
    for which in ALL {
        let all = run_ranks(2, move |mut group| {
            let (rank, model) = (group.rank(), Model::new());
            let ddp = model.wrap(&mut group, options(Zero::Off));
            which.set(&ddp).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Sgd { lr: 0.1, ..Sgd::default() }, ParameterGroups::default())
                    .unwrap();
            let join = ddp.join().unwrap();
            // Rank 1 has two steps more.
            for step in 0..2 + 2 * rank {
                model.loss(&gradients(rank, step)).backward();
                let _step = optimizer.step(None).unwrap();
            }
            join.finish(|| optimizer.step(None).map(drop)).unwrap();
            model.named.iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>()
        });
        assert!(all[0] == all[1], "{which:?}");
        assert!(all[0].iter().flatten().all(|value| value.is_finite()), "{which:?}");
    }
}

#[test]
fn parameters_that_no_rank_used_stay_untouched() {
    for which in ALL {
        let all = run_ranks(2, move |mut group| {
            let (rank, model) = (group.rank(), Model::new());
            let found = DdpOptions { find_unused_parameters: true, ..options(Zero::Off) };
            let ddp = model.wrap(&mut group, found);
            which.set(&ddp).unwrap();
            for step in 0..3 {
                ddp.release_gradients().unwrap();
                let wanted = gradients(rank, step);
                // Not the last, and "two" on rank 0 alone.
                let uses = |index: usize| index != 6 && (index != 3 || rank == 0);
                let terms = model.named.iter().zip(&wanted).enumerate();
                let terms = terms.filter(|(index, _)| uses(*index));
                let loss: Tensor =
                    terms.map(|(_, ((_, p), g))| (p * g).sum(tch::Kind::Float)).sum();
                loss.backward();
            }
            let has: Vec<bool> = model.named.iter().map(|(_, p)| p.grad().defined()).collect();
            (has, values(&model.named[3].1.grad()))
        });
        assert_eq!(all[0].0, [true, true, true, true, true, true, false], "{which:?}");
        assert!(all[0] == all[1], "{which:?}");
    }
}

#[test]
fn hooks_that_differ_are_the_same_error_on_every_rank() {
    let errors = run_ranks(3, |mut group| {
        let model = Model::new();
        let rank = group.rank();
        let ddp = model.wrap(&mut group, options(Zero::Off));
        let which = if rank == 1 { Which::TopK(0.25) } else { Which::TopK(0.5) };
        which.set(&ddp).unwrap_err().to_string()
    });
    assert!(errors[0].contains("their communication hooks"), "{}", errors[0]);
    assert!(errors[0].contains("ranks 0, 2: topk of 0.5"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let errors = run_ranks(1, |mut group| {
        let model = Model::new();
        let ddp = model.wrap(&mut group, options(Zero::Off));
        let power = |options| PowerSgd::new(options);
        [
            ddp.set_hook(TopK { fraction: 0.0 }).unwrap_err().to_string(),
            ddp.set_hook(Int8Blocks { block: 100 }).unwrap_err().to_string(),
            ddp.set_hook(power(PowerSgdOptions { rank: 0, ..Default::default() }))
                .unwrap_err()
                .to_string(),
        ]
    });
    let expected =
        ["fraction of TopK is 0,", "block of Int8Blocks is 100,", "rank of PowerSgd is 0,"];
    for (error, expected) in errors[0].iter().zip(expected) {
        assert!(error.starts_with(expected), "{error}");
    }
}

/// Nobody compares what must differ.
#[test]
fn with_noop_the_ranks_drift_and_nobody_complains() {
    let all = run_ranks(2, |mut group| {
        let (rank, model) = (group.rank(), Model::new());
        let ddp = model.wrap(&mut group, options(Zero::Off));
        Which::Noop.set(&ddp).unwrap();
        let mut optimizer =
            Optimizer::new(&ddp, Sgd { lr: 0.1, ..Sgd::default() }, ParameterGroups::default())
                .unwrap();
        for step in 0..5 {
            let loss = model.loss(&gradients(rank, step));
            ddp.backward(&loss, 3.0, Sync::Reduce).unwrap();
            let _step = optimizer.step(None).unwrap();
        }
        model.named.iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>()
    });
    assert!(all[0] != all[1]);
}

/// What is logged while `body` runs on this thread and those it starts for ranks.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{value:?}");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn noop_says_in_the_log_that_ranks_drift() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    run_ranks(2, move |mut group| {
        let _guard = tracing::subscriber::set_default(log.clone());
        let model = Model::new();
        let ddp = model.wrap(&mut group, options(Zero::Off));
        Fed(&Int8).set(&ddp).unwrap();
        Which::Noop.set(&ddp).unwrap();
    });
    let lines = lines.lock().unwrap();
    let told: Vec<_> = lines.iter().filter(|line| line.contains("drift apart")).collect();
    assert_eq!(told.len(), 1, "{lines:?}");
}
