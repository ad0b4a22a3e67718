//! Gradients that are exchanged with each micro-batch and add up in the ranks' segments.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use phalanx_comm::environment::HostLink;
use phalanx_comm::Group;
use phalanx_ddp_core::hooks::Plain;
use phalanx_ddp_core::{
    Ddp, DdpOptions, Error, NonFinite, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, run_over as run, values, wrapped, Model, LINKS, ROUNDOFF, STAGES};
use tch::{Device, Kind, Tensor};

fn sharded(zero: Zero) -> DdpOptions {
    DdpOptions { shard_accumulation: true, ..options(zero) }
}

fn sgd(ddp: &Ddp) -> Optimizer {
    let rule = Sgd { lr: 1.0, ..Sgd::default() };
    Optimizer::new(ddp, rule, ParameterGroups::default()).unwrap()
}

/// What a loss is of.
type Loss = fn(&Model, std::ops::Range<i64>) -> Tensor;

/// Steps of three micro-batches of two samples on each rank.
fn train(mut group: Group, options: DdpOptions, (loss, steps): (Loss, i64)) -> Vec<f32> {
    let segments = options.shard_accumulation;
    let (model, ddp) = wrapped(&mut group, options);
    let mut optimizer = sgd(&ddp);
    for step in 0..steps {
        for part in 0..3 {
            let start = ((step * 3 + part) * group.world_size() as i64 + group.rank() as i64) * 2;
            let sync = if part == 2 { Sync::Reduce } else { Sync::Accumulate };
            ddp.backward(&loss(&model, start..start + 2), 2.0, sync).unwrap();
            let is_there = model.sorted().iter().any(|(_, variable)| variable.grad().defined());
            assert!(!segments || !is_there, "a gradient is whole");
        }
        assert!(!optimizer.step(None).unwrap().skipped);
    }
    model.values()
}

/// Stages, and among how many of four ranks they cut.
const CUTS: [(Zero, Option<usize>); 6] = [
    (Zero::Two, None),
    (Zero::Two, None),
    (Zero::Three, None),
    (Zero::Two, Some(2)),
    (Zero::Three, Some(2)),
    (Zero::Three, Some(1)),
];

#[test]
fn the_bits_are_the_same_ones_however_gradients_are_cut() {
    for world_size in [1, 2, 3, 4] {
        for (gradients, parameters) in
            [(None, None), (Some(Kind::BFloat16), None), (None, Some(Kind::BFloat16))]
        {
            let mut all = Vec::new();
            for link in LINKS {
                for (zero, ranks) in CUTS {
                    let options = DdpOptions {
                        gradient_kind: gradients,
                        parameter_kind: parameters,
                        shard_ranks: ranks.filter(|_| world_size == 4),
                        ..sharded(zero)
                    };
                    let of_ranks = run(world_size, link, move |group| {
                        train(group, options.clone(), (Model::loss_sum, 2))
                    });
                    all.extend(of_ranks);
                }
            }
            assert!(all.iter().all(|values| *values == all[0]), "{world_size} ranks");
        }
    }
}

#[test]
fn sums_that_are_exact_and_those_of_one_rank_are_those_of_any_order() {
    for link in LINKS {
        for zero in [Zero::Two, Zero::Three] {
            for (world_size, loss) in [
                (1, Model::loss_sum as Loss),
                (2, Model::whole_loss_sum),
                (3, Model::whole_loss_sum),
            ] {
                let of = |options: DdpOptions| {
                    run(world_size, link, move |group| train(group, options.clone(), (loss, 2)))
                };
                assert!(of(sharded(zero)) == of(options(zero)), "{zero:?}, {world_size} ranks");
            }
        }
    }
}

/// By element: the mean gradient of a step of [`train`] in f64, and how far one may be off that adds up f32.
fn bounded(model: &Model, world_size: i64) -> Vec<(f64, f64)> {
    let terms = 3 * world_size;
    let mut sums = vec![(0.0, 0.0); model.values().len()];
    for part in 0..terms {
        model.loss_sum(part * 2..part * 2 + 2).backward();
        let gradients = model.sorted().into_iter().map(|(_, v)| v.grad().reshape([-1]));
        let gradient = values(&Tensor::cat(&gradients.collect::<Vec<_>>(), 0));
        for ((sum, size), term) in sums.iter_mut().zip(gradient) {
            *sum += f64::from(term);
            *size += f64::from(term).abs();
        }
        model.sorted().iter_mut().for_each(|(_, variable)| variable.zero_grad());
    }
    let weight = (2 * terms) as f64;
    // As many additions as terms, the factor's own rounding, and that of the product, each relative to no more than all terms.
    let off = |size: f64| (terms as f64 + 2.0) * ROUNDOFF * size * 1.01;
    sums.into_iter().map(|(sum, size)| (sum / weight, off(size) / weight)).collect()
}

#[test]
fn sums_are_within_the_bound_of_so_many_additions() {
    for world_size in [2, 3, 4] {
        let model = Model::new(0);
        let before = model.values();
        let bounded = bounded(&model, world_size as i64);
        for zero in [Zero::Two, Zero::Three] {
            let all = run(world_size, HostLink::Tcp, move |group| {
                train(group, sharded(zero), (Model::loss_sum, 1))
            });
            for (at, (mean, bound)) in bounded.iter().enumerate() {
                let (is, was) = (f64::from(all[0][at]), f64::from(before[at]));
                // And the rounding of the step itself.
                let bound = bound + ROUNDOFF * (was.abs() + mean.abs()) * 1.01;
                assert!((was - mean - is).abs() <= bound, "{at}: {is}, {} ± {bound:e}", was - mean);
            }
        }
    }
}

#[test]
fn gradients_of_half_precision_add_up_in_single() {
    for zero in [Zero::Two, Zero::Three] {
        let all = run(2, HostLink::Auto, move |mut group| {
            let weight = Tensor::zeros([3000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let named = vec![("weight".to_owned(), weight.shallow_clone())];
            let options = DdpOptions { gradient_kind: Some(Kind::BFloat16), ..sharded(zero) };
            let ddp = Ddp::from_tensors(named, Vec::new(), &mut group, options).unwrap();
            let mut optimizer = sgd(&ddp);
            let before = ddp.memory().unwrap().gradients;
            // 256 + 1 is 256 in bf16.
            for micro_batch in 0..300 {
                let sync = if micro_batch == 299 { Sync::Reduce } else { Sync::Accumulate };
                ddp.backward(&weight.sum(Kind::Float), 1.0, sync).unwrap();
            }
            assert_eq!(ddp.memory().unwrap().gradients, before * 3, "two bytes, and four");
            optimizer.step(None).unwrap();
            values(&weight)
        });
        assert!(all.iter().flatten().all(|&value| value.to_bits() == (-1.0_f32).to_bits()));
    }
}

#[test]
fn gradients_of_parameters_in_half_precision_add_up_in_single_on_each_rank_as_well() {
    for zero in STAGES {
        let all = run(2, HostLink::Auto, move |mut group| {
            let weight = Tensor::zeros([3000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let named = vec![("weight".to_owned(), weight.shallow_clone())];
            let options = DdpOptions { parameter_kind: Some(Kind::BFloat16), ..options(zero) };
            let ddp = Ddp::from_tensors(named, Vec::new(), &mut group, options).unwrap();
            let mut optimizer = sgd(&ddp);
            for micro_batch in 0..300 {
                let sync = if micro_batch == 299 { Sync::Reduce } else { Sync::Accumulate };
                ddp.backward(&weight.sum(Kind::Float), 1.0, sync).unwrap();
            }
            optimizer.step(None).unwrap();
            values(&weight.to_kind(Kind::Float))
        });
        let is_one = |&value: &f32| value.to_bits() == (-1.0_f32).to_bits();
        assert!(all.iter().flatten().all(is_one), "{zero:?}");
    }
}

#[test]
fn a_micro_batch_may_leave_out_parameters_and_one_given_up_is_gone() {
    for link in LINKS {
        let of = |options: DdpOptions| {
            run(3, link, move |mut group| {
                let (model, ddp) = wrapped(&mut group, options.clone());
                let mut optimizer = sgd(&ddp);
                let start = group.rank() as i64 * 2;
                ddp.backward(&model.whole_loss_sum(start..start + 2), 5.0, Sync::Accumulate)
                    .unwrap();
                ddp.release_gradients().unwrap();
                let bias = model.vs.variables().remove("two.bias").unwrap();
                let loss = (&bias * 2.0).sum(Kind::Float);
                ddp.backward(&loss, 2.0, Sync::Accumulate).unwrap();
                ddp.backward(&model.whole_loss_sum(start..start + 2), 2.0, Sync::Reduce).unwrap();
                optimizer.step(None).unwrap();
                model.values()
            })
        };
        for zero in [Zero::Two, Zero::Three] {
            assert!(of(sharded(zero)) == of(options(zero)), "{link:?}, {zero:?}");
        }
    }
}

#[test]
fn what_is_not_finite_in_a_micro_batch_is_told_with_the_step() {
    let errors = run(2, HostLink::Auto, |mut group| {
        let (model, ddp) = wrapped(&mut group, sharded(Zero::Two));
        let mut optimizer = sgd(&ddp);
        let bad = if group.rank() == 1 { f64::NAN } else { 1.0 };
        ddp.backward(&(model.loss_sum(0..2) * bad), 2.0, Sync::Accumulate).unwrap();
        let error = ddp.backward(&model.loss_sum(2..4), 2.0, Sync::Reduce).unwrap_err();
        // The next step begins anew.
        ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Accumulate).unwrap();
        ddp.backward(&model.loss_sum(2..4), 2.0, Sync::Reduce).unwrap();
        optimizer.step(None).unwrap();
        assert!(model.values().iter().all(|value| value.is_finite()));
        error
    });
    for error in errors {
        assert!(matches!(error, Error::NonFinite { rank: 1, .. }), "{error}");
    }
    let skipped = run(2, HostLink::Auto, |mut group| {
        let options = DdpOptions { non_finite: NonFinite::SkipStep, ..sharded(Zero::Three) };
        let (model, ddp) = wrapped(&mut group, options);
        let mut optimizer = sgd(&ddp);
        let bad = if group.rank() == 0 { f64::INFINITY } else { 1.0 };
        ddp.backward(&(model.loss_sum(0..2) * bad), 2.0, Sync::Accumulate).unwrap();
        ddp.backward(&model.loss_sum(2..4), 2.0, Sync::Reduce).unwrap();
        optimizer.step(None).unwrap().skipped
    });
    assert_eq!(skipped, [true, true]);
}

#[test]
fn a_step_before_the_last_micro_batch_is_an_error() {
    let errors = run(2, HostLink::Auto, |mut group| {
        let (model, ddp) = wrapped(&mut group, sharded(Zero::Two));
        let mut optimizer = sgd(&ddp);
        ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Accumulate).unwrap();
        optimizer.step(None).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, Error::NoGradients), "{error}");
    }
}

#[test]
fn where_it_cannot_be_it_is_refused() {
    let refused = run(2, HostLink::Auto, |mut group| {
        let model = Model::new(0);
        let one = Ddp::new(&model.vs, &mut group, sharded(Zero::One)).unwrap_err();
        let (_model, ddp) = wrapped(&mut group, sharded(Zero::Two));
        [one, ddp.join().unwrap_err(), ddp.set_hook(Plain).unwrap_err()]
    });
    for error in refused.into_iter().flatten() {
        assert!(
            matches!(error, Error::BadSetting { setting: "shard_accumulation", .. }),
            "{error}"
        );
    }
}
