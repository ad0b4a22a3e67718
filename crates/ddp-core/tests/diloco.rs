//! Local training with an outer optimizer: against an oracle in f64, the same bits on every rank, saved and resumed.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::path::Path;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions};
use phalanx_ddp_core::diloco::{DiLoCo, DiLoCoOptions, OuterSgd};
use phalanx_ddp_core::hooks::{Cast, ErrorFeedback, Int8Blocks, Noop};
use phalanx_ddp_core::{
    AdamW, Buffers, Ddp, DdpOptions, NonFinite, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{assert_within, options, wrapped, Model, ROUNDOFF, WHOLE_MAX};
use tch::{nn, nn::ModuleT as _, nn::OptimizerConfig as _, Device, Kind, Tensor};

const PLAIN_MEAN: OuterSgd = OuterSgd { lr: 1.0, momentum: 0.0, nesterov: false };

fn every(sync_every: u64, outer: OuterSgd) -> DiLoCoOptions {
    DiLoCoOptions { outer, sync_every, plain_steps: 0 }
}

fn sgd(ddp: &Ddp, lr: f64) -> Optimizer {
    Optimizer::new(ddp, Sgd { lr, ..Sgd::default() }, ParameterGroups::default()).unwrap()
}

/// The samples of a rank in a step: two, three, … so that weights differ.
fn samples(rank: usize, step: usize) -> std::ops::Range<i64> {
    let start = (step * 16 + rank * 5) as i64;
    start..start + 2 + rank as i64
}

/// By rank: parameters after `steps` steps of SGD on known gradients.
fn train(world_size: usize, steps: usize, options_of: DiLoCoOptions) -> Vec<Vec<f32>> {
    run_ranks(world_size, move |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = sgd(&ddp, 0.25);
        let mut outer = DiLoCo::new(&ddp, options_of).unwrap();
        for step in 0..steps {
            let samples = samples(rank, step);
            let count = (samples.end - samples.start) as f64;
            ddp.backward(&model.whole_loss_sum(samples), count, Sync::Reduce).unwrap();
            let _step = inner.step(None).unwrap();
            outer.step().unwrap();
        }
        assert!(ddp.statistics().unwrap().bucket_count == 0, "nothing was exchanged");
        model.values()
    })
}

/// The same in f64.
fn oracle(world_size: usize, steps: usize, options: DiLoCoOptions) -> Vec<f64> {
    let DiLoCoOptions { outer, sync_every, .. } = options;
    let model = Model::new(0);
    let mut start: Vec<f64> = model.values().into_iter().map(f64::from).collect();
    let mut momentum = vec![0.0; start.len()];
    let mut ranks = vec![start.clone(); world_size];
    for step in 0..steps {
        for (rank, own) in ranks.iter_mut().enumerate() {
            let samples = samples(rank, step);
            let count = (samples.end - samples.start) as f64;
            let sums = support::whole_gradients(&model, samples);
            let sums = sums.iter().flat_map(support::values);
            own.iter_mut().zip(sums).for_each(|(p, g)| *p -= 0.25 * f64::from(g) / count);
        }
        if !(step as u64 + 1).is_multiple_of(sync_every) {
            continue;
        }
        for at in 0..start.len() {
            let mean = ranks.iter().map(|own| own[at]).sum::<f64>() / world_size as f64;
            let change = start[at] - mean;
            momentum[at] = outer.momentum * momentum[at] + change;
            let along = match outer.nesterov {
                true => change + outer.momentum * momentum[at],
                false => momentum[at],
            };
            start[at] -= outer.lr * along;
        }
        ranks.fill(start.clone());
    }
    start
}

#[test]
fn the_outer_optimizer_steps_on_the_mean_of_the_ranks_changes() {
    let outers = [
        PLAIN_MEAN,
        OuterSgd { lr: 0.5, momentum: 0.0, nesterov: false },
        OuterSgd { lr: 0.7, momentum: 0.9, nesterov: true },
        OuterSgd { lr: 0.5, momentum: 0.5, nesterov: false },
    ];
    for world_size in 1..=4 {
        for outer in outers {
            for sync_every in [1, 3] {
                let (steps, options) = (6, every(sync_every, outer));
                let ranks = train(world_size, steps, options);
                for values in &ranks {
                    assert!(*values == ranks[0], "{world_size} ranks, {options:?}");
                }
                #[expect(clippy::cast_possible_truncation, reason = "rounded for the comparison")]
                let right: Vec<f32> =
                    oracle(world_size, steps, options).into_iter().map(|v| v as f32).collect();
                // Steps of at most 2 in each of 6 inner steps, enlarged by the momentum's sum of 1/(1 − 0.9) · 0.7 · 1.9 at most: no value is above. Each
                // step makes a few roundings of values of that size, which momentum sums up in the same way.
                let growth = 0.7 * 1.9 / (1.0 - 0.9);
                let size = 1.0 + steps as f64 * 0.25 * WHOLE_MAX * growth;
                let bound =
                    (steps as f64 * (8.0 + world_size as f64) * growth + 1.0) * ROUNDOFF * size;
                assert_within(&ranks[0], &right, bound);
            }
        }
    }
}

#[test]
fn ranks_differ_between_averagings_and_are_alike_after_them() {
    let all = run_ranks(3, |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        // tch's own optimizer, and plain backwards.
        let mut inner = nn::Adam::default().build(&model.vs, 0.01).unwrap();
        let mut outer = DiLoCo::new(&ddp, every(4, OuterSgd::default())).unwrap();
        let mut seen = Vec::new();
        for step in 0..8 {
            inner.backward_step(&model.loss_sum(samples(rank, step)));
            let averaged = outer.step().unwrap();
            seen.push((averaged, model.bits()));
        }
        assert_eq!(outer.averaged_count().unwrap(), 2);
        ddp.compare_parameters().unwrap();
        // Afterwards plain training is possible again.
        drop(outer);
        inner.backward_step(&model.loss_sum(samples(rank, 8)));
        assert_eq!(ddp.statistics().unwrap().exchange_count, 1);
        seen
    });
    for step in 0..8 {
        let averaged = all[0][step].0;
        assert_eq!(averaged, step == 3 || step == 7);
        for of_rank in &all[1..] {
            assert_eq!(of_rank[step].1 == all[0][step].1, averaged, "step {step}");
        }
    }
}

#[test]
fn changes_travel_through_any_hook_and_ranks_stay_alike() {
    let train = |which: usize| {
        let all = run_ranks(3, move |mut group| {
            let rank = group.rank();
            let (model, ddp) = wrapped(&mut group, options(Zero::Off));
            let mut inner = sgd(&ddp, 0.01);
            let options = every(2, OuterSgd::default());
            let mut outer = match which {
                0 => DiLoCo::new(&ddp, options),
                1 => DiLoCo::with_hook(&ddp, options, Cast::bf16()),
                _ => {
                    let fed = ErrorFeedback::around(Int8Blocks::default());
                    DiLoCo::with_hook(&ddp, options, fed)
                }
            };
            let outer = outer.as_mut().unwrap();
            for step in 0..8 {
                let samples = samples(rank, step);
                let count = (samples.end - samples.start) as f64;
                ddp.backward(&model.loss_sum(samples), count, Sync::Reduce).unwrap();
                let _step = inner.step(None).unwrap();
                outer.step().unwrap();
            }
            (model.bits(), outer.bytes_sent().unwrap())
        });
        assert!(all.iter().all(|of_rank| *of_rank == all[0]));
        all[0].clone()
    };
    let (plain, bytes) = train(0);
    for (which, share) in [(1, 0.5), (2, (1.0 + 4.0 / 256.0) / 4.0)] {
        let (bits, sent) = train(which);
        assert!(bits != plain);
        assert!((sent as f64 - bytes as f64 * share).abs() <= 16.0, "{sent} of {bytes}");
    }
}

#[test]
fn the_first_steps_may_be_plain() {
    let all = run_ranks(2, |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = sgd(&ddp, 0.05);
        let options = DiLoCoOptions { plain_steps: 3, ..every(2, PLAIN_MEAN) };
        let mut outer = DiLoCo::new(&ddp, options).unwrap();
        let mut seen = Vec::new();
        for step in 0..7 {
            let loss = model.loss_sum(samples(rank, step));
            ddp.backward(&loss, 2.0, Sync::Reduce).unwrap();
            let _step = inner.step(None).unwrap();
            let averaged = outer.step().unwrap();
            seen.push((averaged, model.bits()));
        }
        assert_eq!(ddp.statistics().unwrap().exchange_count, 3);
        seen
    });
    let alike: Vec<bool> = (0..7).map(|step| all[0][step].1 == all[1][step].1).collect();
    assert_eq!(alike, [true, true, true, false, true, false, true]);
    let averaged: Vec<bool> = all[0].iter().map(|(averaged, _)| *averaged).collect();
    assert_eq!(averaged, [false, false, false, false, true, false, true]);
}

#[test]
fn ranks_with_different_numbers_of_steps_are_told_by_the_same_error() {
    let errors = run_ranks(3, |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = sgd(&ddp, 0.05);
        let mut outer = DiLoCo::new(&ddp, every(100, PLAIN_MEAN)).unwrap();
        for step in 0..if rank == 2 { 3 } else { 4 } {
            model.loss_sum(samples(rank, step)).backward();
            let _step = inner.step(None).unwrap();
            outer.step().unwrap();
        }
        outer.average().unwrap_err().to_string()
    });
    assert!(errors[0].contains("rank 2: 3 steps since the last averaging"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
}

#[test]
fn settings_that_differ_or_cannot_be_are_refused() {
    let errors = run_ranks(2, |mut group| {
        let rank = group.rank() as u64;
        let (_model, ddp) = wrapped(&mut group, options(Zero::Off));
        let differ = DiLoCo::new(&ddp, every(2 + rank, PLAIN_MEAN)).unwrap_err().to_string();
        let never = DiLoCo::new(&ddp, every(0, PLAIN_MEAN)).unwrap_err().to_string();
        let backward = OuterSgd { lr: -1.0, ..PLAIN_MEAN };
        let backward = DiLoCo::new(&ddp, every(2, backward)).unwrap_err().to_string();
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let sharded = DiLoCo::new(&ddp, every(2, PLAIN_MEAN)).unwrap_err().to_string();
        [differ, never, backward, sharded]
    });
    assert_eq!(errors[0], errors[1]);
    let parts = ["their local training", "sync_every is 0", "outer lr is -1", "zero is One"];
    for (error, part) in errors[0].iter().zip(parts) {
        assert!(error.contains(part), "{error}");
    }
}

/// A checkpoint between the inner step and that of the outer one would have one rank's model: all hear of it.
#[test]
fn a_checkpoint_between_both_steps_is_refused_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let errors = run_ranks(2, move |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = sgd(&ddp, 0.05);
        let _outer = DiLoCo::new(&ddp, every(100, PLAIN_MEAN)).unwrap();
        let quiet = CheckpointerOptions { heed_signals: false, ..Default::default() };
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet).unwrap();
        model.loss_sum(samples(rank, 0)).backward();
        let _step = inner.step(None).unwrap();
        checkpointer.save(1, Some(&mut inner), || ()).unwrap_err().to_string()
    });
    assert!(errors[0].contains("is not the same on every rank"), "{errors:?}");
    assert_eq!(errors[0], errors[1]);
}

/// What never travels leaves ranks apart, which nobody takes for a mistake.
#[test]
fn changes_that_do_not_travel_leave_ranks_apart() {
    let all = run_ranks(2, |mut group| {
        let rank = group.rank();
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = sgd(&ddp, 0.05);
        let mut outer = DiLoCo::with_hook(&ddp, every(1, PLAIN_MEAN), Noop).unwrap();
        for step in 0..2 {
            model.loss_sum(samples(rank, step)).backward();
            let _step = inner.step(None).unwrap();
            assert!(outer.step().unwrap());
        }
        model.bits()
    });
    assert_ne!(all[0], all[1]);
}

/// Rank 1's third step has gradients that are not finite.
#[test]
fn a_rank_skips_its_own_bad_step() {
    let all = run_ranks(2, |mut group| {
        let rank = group.rank();
        let non_finite = NonFinite::SkipStep;
        let options = DdpOptions { non_finite, ..options(Zero::Off) };
        let (model, ddp) = wrapped(&mut group, options);
        let mut inner = sgd(&ddp, 0.05);
        let mut outer = DiLoCo::new(&ddp, every(4, PLAIN_MEAN)).unwrap();
        let mut skipped = Vec::new();
        for step in 0..4 {
            let factor = if rank == 1 && step == 2 { f64::INFINITY } else { 1.0 };
            let loss = model.loss_sum(samples(rank, step)) * factor;
            ddp.backward(&loss, 2.0, Sync::Reduce).unwrap();
            skipped.push(inner.step(None).unwrap().skipped);
            outer.step().unwrap();
        }
        (skipped, model.values())
    });
    assert_eq!(all[0].0, [false; 4]);
    assert_eq!(all[1].0, [false, false, true, false]);
    assert!(all[0].1 == all[1].1 && all[0].1.iter().all(|value| value.is_finite()));
}

/// A frozen layer begins to train between two averagings.
#[test]
fn layers_may_be_unfrozen_on_the_way() {
    let all = run_ranks(2, |mut group| {
        let rank = group.rank();
        let model = Model::new(rank as i64 * 1000);
        let frozen = |on| {
            for (name, tensor) in model.sorted() {
                if name.starts_with("two") {
                    let _same = tensor.set_requires_grad(on);
                }
            }
        };
        frozen(false);
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let mut inner = sgd(&ddp, 0.05);
        let mut outer = DiLoCo::new(&ddp, every(3, OuterSgd::default())).unwrap();
        let mut alike = Vec::new();
        for step in 0..6 {
            if step == 1 {
                frozen(true);
            }
            model.loss_sum(samples(rank, step)).backward();
            let _step = inner.step(None).unwrap();
            if outer.step().unwrap() {
                alike.push(model.bits());
            }
        }
        alike
    });
    assert!(all[0] == all[1]);
    assert!(all[0][0] != all[0][1]);
}

#[test]
fn buffers_are_averaged_as_the_policy_has_it() {
    for (policy, alike) in [(Buffers::Mean, true), (Buffers::RankZero, true), (Buffers::Own, false)]
    {
        let all = run_ranks(2, move |mut group| {
            let rank = group.rank();
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root(), 6, nn::BatchNormConfig::default());
            let options = DdpOptions { buffers: policy, ..options(Zero::Off) };
            let ddp = Ddp::new(&vs, &mut group, options).unwrap();
            let mut outer = DiLoCo::new(&ddp, every(2, PLAIN_MEAN)).unwrap();
            let mut inner = sgd(&ddp, 0.05);
            for step in 0..2 {
                let x = support::pattern(&[8, 6], (10 * step + rank) as i64);
                norm.forward_t(&x, true).square().sum(Kind::Float).backward();
                let _step = inner.step(None).unwrap();
                outer.step().unwrap();
            }
            support::values(&norm.running_mean)
        });
        assert_eq!(all[0] == all[1], alike, "{policy:?}");
    }
}

/// Steps up to `to`, saved at the end; what the ranks come to.
fn leg(mut group: Group, folder: &Path, to: u64) -> Vec<u32> {
    let rank = group.rank();
    let (model, ddp) = wrapped(&mut group, options(Zero::Off));
    // Without state, which is each rank's own.
    let mut inner = sgd(&ddp, 0.02);
    let options = DiLoCoOptions { plain_steps: 2, ..every(2, OuterSgd::default()) };
    let fed = ErrorFeedback::around(Int8Blocks::default());
    let mut outer = DiLoCo::with_hook(&ddp, options, fed).unwrap();
    let quiet = CheckpointerOptions { heed_signals: false, ..Default::default() };
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet).unwrap();
    let done = checkpointer.resume(Some(&mut inner)).unwrap().map_or(0, |resumed| resumed.step);
    for step in done..to {
        let step = usize::try_from(step).unwrap();
        let loss = model.loss_sum(samples(rank, step));
        ddp.backward(&loss, 2.0, Sync::Reduce).unwrap();
        let _step = inner.step(None).unwrap();
        outer.step().unwrap();
    }
    checkpointer.save(to, Some(&mut inner), || ()).unwrap();
    checkpointer.finish().unwrap();
    model.bits()
}

fn run(legs: &[(usize, u64)]) -> Vec<u32> {
    let folder = tempfile::tempdir().unwrap();
    let mut last = Vec::new();
    for &(world_size, to) in legs {
        let path = folder.path().to_owned();
        let all = run_ranks(world_size, move |group| leg(group, &path, to));
        assert!(all.iter().all(|bits| *bits == all[0]), "{legs:?}");
        last.clone_from(&all[0]);
    }
    last
}

#[test]
fn a_run_that_goes_on_from_a_checkpoint_has_the_same_bits() {
    for world_size in [1, 2, 3] {
        let whole = run(&[(world_size, 8)]);
        let broken = run(&[(world_size, 1), (world_size, 4), (world_size, 8)]);
        assert!(whole == broken, "{world_size} ranks");
    }
    // A checkpoint between two averagings averages first; other worlds go on.
    run(&[(2, 5), (3, 8), (1, 10)]);
}

#[test]
fn a_model_learns_as_well_as_with_plain_training() {
    let loss = |local: bool| {
        let all = run_ranks(2, move |mut group| {
            let rank = group.rank() as i64;
            let (model, ddp) = wrapped(&mut group, options(Zero::Off));
            let rule = AdamW { lr: 0.003, ..AdamW::default() };
            let mut inner = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            let options = every(5, OuterSgd { lr: 0.7, momentum: 0.5, nesterov: true });
            let mut outer = local.then(|| DiLoCo::new(&ddp, options).unwrap());
            for step in 0..100 {
                let start = step % 5 * 32 + rank * 16;
                let loss = model.loss_sum(start..start + 16);
                ddp.backward(&loss, 16.0, Sync::Reduce).unwrap();
                let _step = inner.step(None).unwrap();
                if let Some(outer) = &mut outer {
                    outer.step().unwrap();
                }
            }
            let loss: Tensor = model.loss_sum(0..160) / 160.0;
            loss.double_value(&[])
        });
        all[0]
    };
    let (plain, local, first) = (loss(false), loss(true), Model::new(0).loss_sum(0..160));
    let first = first.double_value(&[]) / 160.0;
    // Both come most of the way.
    assert!(plain < first / 2.0 && local < first / 2.0, "{first} → {plain}, {local}");
}
