//! Training with several ranks is training with one: parity, bits, errors.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::time::{Duration, Instant};

use phalanx_comm::testing::run_ranks;
use phalanx_comm::{Group, Work};
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{
    Adam, AdamW, Ddp, Error, Lamb, Optimizer, ParameterGroup, ParameterGroups, Sgd, Sync, Zero,
};
use support::{assert_close, options, wrapped, Model};
use tch::nn::OptimizerConfig as _;
use tch::{nn, Device, Kind, Tensor};

const WORLD_SIZES: [usize; 4] = [1, 2, 3, 4];

fn adamw() -> AdamW {
    AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() }
}

/// Makes a rule.
type Make = fn() -> Box<dyn Rule>;

/// Every rule, with everything on that it has.
const RULES: [Make; 4] = [
    || Box::new(adamw()),
    || Box::new(Adam { lr: 0.01, weight_decay: 0.1, ..Adam::default() }),
    || Box::new(Sgd { lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.1, dampening: 0.0 }),
    || Box::new(Lamb { lr: 0.02, weight_decay: 0.1, ..Lamb::default() }),
];

fn groups() -> ParameterGroups {
    ParameterGroups::default()
        .with(ParameterGroup::matching(["*bias", "norm*"]).weight_decay(0.0))
        .with(ParameterGroup::matching(["two.*"]).lr(0.004))
}

/// Trains 5 steps on batches of 12 samples, cut over the ranks and into micro-batches.
fn train(mut group: Group, zero: Zero, rule: Make, accumulate: i64) -> (Vec<u32>, Vec<f64>) {
    let (model, ddp) = wrapped(&mut group, options(zero));
    let mut optimizer = Optimizer::new(&ddp, rule(), groups()).unwrap();
    let (rank, world_size) = (group.rank() as i64, group.world_size() as i64);
    let micro = 12 / (world_size * accumulate);
    let mut norms = Vec::new();
    for step in 0..5 {
        for part in 0..accumulate {
            let start = step * 12 + (rank * accumulate + part) * micro;
            let sync = if part + 1 == accumulate { Sync::Reduce } else { Sync::Accumulate };
            let loss = model.loss_sum(start..start + micro);
            ddp.backward(&loss, micro as f64, sync).unwrap();
        }
        norms.push(optimizer.step(Some(0.5)).unwrap().gradient_norm);
    }
    (model.bits(), norms)
}

#[test]
fn plain_tch_training_matches_one_rank_with_the_whole_batch() {
    let plain = |mut group: Group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer =
            nn::Sgd { momentum: 0.9, ..Default::default() }.build(&model.vs, 0.05).unwrap();
        let micro = 12 / group.world_size() as i64;
        for step in 0..6 {
            let start = step * 12 + group.rank() as i64 * micro;
            let loss = model.loss_sum(start..start + micro) / micro as f64;
            optimizer.backward_step(&loss);
            assert!(ddp.statistics().unwrap().bucket_count >= 3);
        }
        model.values()
    };
    let alone = run_ranks(1, plain).remove(0);
    for world_size in [2, 3, 4] {
        let all = run_ranks(world_size, plain);
        assert!(all.iter().all(|values| *values == all[0]), "ranks differ");
        assert_close(&all[0], &alone, 1e-5);
    }
}

#[test]
fn ranks_and_micro_batches_give_the_same_bits() {
    for rule in RULES {
        for zero in [Zero::Off, Zero::One] {
            for parts in [2, 3, 4] {
                let ranks = run_ranks(parts, move |group| train(group, zero, rule, 1));
                let alone =
                    run_ranks(1, move |group| train(group, zero, rule, parts as i64)).remove(0);
                for (rank, outcome) in ranks.iter().enumerate() {
                    assert!(
                        *outcome == alone,
                        "{:?} {zero:?}: rank {rank} of {parts} differs",
                        rule()
                    );
                }
            }
        }
    }
}

#[test]
fn sharding_the_optimizer_changes_no_bit() {
    for rule in RULES {
        for world_size in WORLD_SIZES {
            let off = run_ranks(world_size, move |group| train(group, Zero::Off, rule, 1));
            let one = run_ranks(world_size, move |group| train(group, Zero::One, rule, 1));
            assert!(off == one, "{:?} on {world_size} ranks", rule());
        }
    }
}

#[test]
fn adamw_and_clipping_are_those_of_libtorch() {
    let ours = run_ranks(1, |group| train(group, Zero::Off, RULES[0], 1)).remove(0).0;
    let model = Model::new(0);
    let mut optimizer = nn::AdamW { wd: 0.1, ..Default::default() }.build(&model.vs, 0.01).unwrap();
    for step in 0..5 {
        let loss = model.loss_sum(step * 12..step * 12 + 12) / 12.0;
        optimizer.zero_grad();
        loss.backward();
        optimizer.clip_grad_norm(0.5);
        optimizer.step();
    }
    // Biases and the normalisation decay there and not here: 5 steps × lr × wd of their value.
    let ours: Vec<f32> = ours.into_iter().map(f32::from_bits).collect();
    assert_close(&ours, &model.values(), 5.0 * 0.01 * 0.1 * 1.1);
    let all_decay = run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = Optimizer::new(&ddp, adamw(), ParameterGroups::default()).unwrap();
        for step in 0..5 {
            let loss = model.loss_sum(step * 12..step * 12 + 12);
            ddp.backward(&loss, 12.0, Sync::Reduce).unwrap();
            optimizer.step(Some(0.5)).unwrap();
        }
        model.values()
    });
    assert_close(&all_decay[0], &model.values(), 2e-6);
}

#[test]
fn uneven_weights_give_the_mean_over_all_samples() {
    let cuts = [0, 5, 6, 12];
    let gradients = run_ranks(3, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let rank = group.rank();
        let loss = model.loss_sum(cuts[rank]..cuts[rank + 1]);
        ddp.backward(&loss, (cuts[rank + 1] - cuts[rank]) as f64, Sync::Reduce).unwrap();
        gradients(&model)
    });
    let alone = Model::new(0);
    (alone.loss_sum(0..12) / 12.0).backward();
    for of_rank in &gradients {
        assert_close(of_rank, &self::gradients(&alone), 1e-5);
    }
}

fn gradients(model: &Model) -> Vec<f32> {
    let flat: Vec<Tensor> =
        model.sorted().into_iter().map(|(_, v)| v.grad().reshape([-1])).collect();
    support::values(&Tensor::cat(&flat, 0))
}

#[test]
fn no_sync_accumulates_and_the_next_backward_exchanges_the_sum() {
    let gradients = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let start = group.rank() as i64 * 6;
        ddp.no_sync(|| (model.loss_sum(start..start + 3) / 6.0).backward()).unwrap();
        (model.loss_sum(start + 3..start + 6) / 6.0).backward();
        self::gradients(&model)
    });
    let model = Model::new(0);
    (model.loss_sum(0..12) / 12.0).backward();
    assert_close(&gradients[0], &self::gradients(&model), 1e-5);
    assert!(gradients[0] == gradients[1], "ranks differ");
}

#[test]
fn every_rank_starts_from_rank_zeros_values() {
    let all = run_ranks(3, |mut group| wrapped(&mut group, options(Zero::One)).0.bits());
    let rank_zero = Model::new(0).bits();
    assert!(all.iter().all(|bits| *bits == rank_zero));
}

#[test]
fn models_that_differ_are_refused_with_the_same_words_everywhere() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let width = if group.rank() == 1 { 5 } else { 4 };
        let _layer = nn::linear(vs.root() / "fc", width, 2, nn::LinearConfig::default());
        match Ddp::new(&vs, &mut group, options(Zero::Off)) {
            Err(error @ Error::ModelMismatch { .. }) => error.to_string(),
            other => panic!("expected a mismatch, got {other:?}"),
        }
    });
    assert!(errors[0].contains("ranks 0, 2: parameter fc.weight [2, 4] Float"), "{}", errors[0]);
    assert!(errors[0].contains("rank 1: parameter fc.weight [2, 5] Float"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]));
}

/// Builds what a rank trains.
type Build = fn(nn::Path<'_>, usize);

fn layer(path: nn::Path<'_>, bias: bool) {
    let _layer = nn::linear(path, 4, 2, nn::LinearConfig { bias, ..nn::LinearConfig::default() });
}

/// What differs on rank 1, how ranks build it, and what the error must say.
const DIFFERING: [(&str, Build, [&str; 2]); 7] = [
    (
        "one parameter more",
        |root, rank| {
            layer(&root / "fc", true);
            if rank == 1 {
                layer(&root / "more", false);
            }
        },
        ["rank 1: parameter more.weight [2, 4] Float", "ranks 0, 2: nothing"],
    ),
    (
        "one parameter fewer",
        |root, rank| layer(&root / "fc", rank != 1),
        ["ranks 0, 2: parameter fc.bias [2] Float", "rank 1: nothing"],
    ),
    (
        "another type",
        |mut root, rank| {
            layer(&root / "fc", false);
            root.set_kind(if rank == 1 { Kind::Double } else { Kind::Float });
        },
        [
            "rank 1: parameter fc.weight [2, 4] Double",
            "ranks 0, 2: parameter fc.weight [2, 4] Float",
        ],
    ),
    (
        "another name",
        |root, rank| layer(&root / if rank == 1 { "fb" } else { "fc" }, false),
        ["rank 1: parameter fb.weight [2, 4]", "ranks 0, 2: parameter fc.weight [2, 4]"],
    ),
    (
        "another order",
        |root, rank| {
            let names = if rank == 1 { ["b", "a"] } else { ["a", "b"] };
            for name in names {
                layer(&root / name, false);
            }
        },
        ["ranks 0, 2: parameter a.weight", "rank 1: parameter b.weight"],
    ),
    (
        "frozen on one rank",
        |root, rank| {
            layer(&root / "fc", false);
            let frozen = root.zeros("scale", &[3]);
            let _scale = frozen.set_requires_grad(rank != 1);
        },
        ["ranks 0, 2: parameter scale [3] Float", "rank 1: frozen scale [3] Float"],
    ),
    (
        "nothing to train on one rank",
        |root, rank| {
            if rank != 1 {
                layer(&root / "fc", false);
            }
        },
        ["ranks 0, 2: parameter fc.weight [2, 4] Float", "rank 1: nothing"],
    ),
];

/// Rank 1 of three builds something else; every rank must say so at once, in the same words, which name the parameter
/// and what each rank has.
#[test]
fn whatever_differs_of_a_model_is_named_alike_on_every_rank_within_a_second() {
    for (what, build, parts) in DIFFERING {
        let ended = run_ranks(3, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            build(vs.root(), group.rank());
            group.barrier().and_then(Work::wait).unwrap();
            let start = Instant::now();
            let error = match Ddp::new(&vs, &mut group, options(Zero::Off)) {
                Err(error @ Error::ModelMismatch { .. }) => error.to_string(),
                other => panic!("{what}: expected a mismatch, got {other:?}"),
            };
            (error, start.elapsed())
        });
        for (error, after) in &ended {
            assert_eq!(*error, ended[0].0, "{what}");
            assert!(*after < Duration::from_secs(1), "{what}: {after:?}");
            for part in parts {
                assert!(error.contains(part), "{what}: no {part:?} in {error}");
            }
        }
    }
}

#[test]
fn models_with_nothing_to_train_are_refused_on_every_rank() {
    let ended = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        Ddp::new(&vs, &mut group, options(Zero::Off)).map(drop)
    });
    for result in ended {
        assert!(matches!(result, Err(Error::NothingToTrain)), "{result:?}");
    }
}

#[test]
fn a_parameter_without_a_gradient_is_named_in_the_same_step_on_every_rank() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let used = nn::linear(vs.root() / "used", 4, 1, nn::LinearConfig::default());
        let lonely = nn::linear(vs.root() / "lonely", 4, 1, nn::LinearConfig::default());
        let ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
        let mut y = nn::Module::forward(&used, &x);
        if group.rank() != 1 {
            y += nn::Module::forward(&lonely, &x);
        }
        let error = ddp.backward(&y.sum(Kind::Float), 2.0, Sync::Reduce).unwrap_err();
        error.to_string()
    });
    for error in &errors {
        assert!(error.contains("rank 1"), "{error}");
        assert!(error.contains("lonely.weight"), "{error}");
        assert!(!error.contains("used.weight"), "{error}");
    }
}

#[test]
fn a_backward_that_fails_half_way_is_reported_by_the_next() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let variables = model.vs.variables();
        // A graph whose first half is gone: the last layer's gradients come, then backward fails.
        let shared = variables["one.weight"].square().sum(Kind::Float);
        ddp.no_sync(|| shared.backward()).unwrap();
        let half = variables["three.weight"].sum(Kind::Float) * 2.0 + &shared;
        assert!(half.f_backward().is_err());
        let loss = model.loss_sum(0..4);
        let error = ddp.backward(&loss, 4.0, Sync::Reduce).unwrap_err();
        assert!(matches!(error, Error::BackwardAbandoned), "{error}");
        drop(ddp);
    });
}

#[test]
fn running_statistics_are_rank_zeros() {
    let all = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let norm = nn::batch_norm1d(vs.root() / "bn", 3, nn::BatchNormConfig::default());
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let x = Tensor::ones([4, 3], (Kind::Float, Device::Cpu))
            * (group.rank() as f64 + 1.0)
            * support::pattern(&[4, 1], 3);
        let y = nn::ModuleT::forward_t(&norm, &x, true);
        y.square().sum(Kind::Float).backward();
        support::values(&vs.variables()["bn.running_mean"])
    });
    assert!(all[0] == all[1], "running statistics differ: {all:?}");
    assert!(all[0].iter().any(|&mean| mean != 0.0));
}

#[test]
fn without_a_backward_there_is_no_step() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
        ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Accumulate).unwrap();
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
        ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Reduce).unwrap();
        assert!(optimizer.step(None).unwrap().gradient_norm > 0.0);
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
    });
}

#[test]
fn the_model_outlives_its_ddp() {
    run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        drop(ddp);
        drop(group);
        let loss = model.loss_sum(0..3);
        loss.backward();
        assert!(loss.double_value(&[]).is_finite());
    });
}

#[test]
fn settings_out_of_range_are_refused() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let bad = AdamW { beta2: 1.0, ..AdamW::default() };
        let error = Optimizer::new(&ddp, bad, groups()).unwrap_err().to_string();
        assert_eq!(error, "beta2 is 1, expected a number in [0, 1)");
        let refused = ddp.backward(&model.loss_sum(0..1), f64::NAN, Sync::Reduce).unwrap_err();
        assert!(refused.to_string().contains("weight is NaN"), "{refused}");
    });
}
