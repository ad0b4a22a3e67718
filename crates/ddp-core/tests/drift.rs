//! Programs that would let the ranks drift apart, each by another mistake: every rank is told, or the mistake does no
//! harm.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::{
    Ddp, DdpOptions, Error, NonFinite, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, panic_text, values, wrapped, Model};
use tch::nn::OptimizerConfig as _;
use tch::{nn, Device, Kind, Tensor};

/// Samples of this rank in a step.
fn share(rank: usize, step: i64) -> std::ops::Range<i64> {
    let start = step * 8 + rank as i64 * 4;
    start..start + 4
}

#[test]
fn a_step_inside_no_sync_is_found_out_in_the_next_exchange() {
    let errors = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = nn::Sgd::default().build(&model.vs, 0.125).unwrap();
        let rank = group.rank();
        let loss = model.whole_loss_sum(share(rank, 0));
        ddp.no_sync(|| optimizer.backward_step(&loss)).unwrap();
        let loss = model.whole_loss_sum(share(rank, 1));
        panic_text(|| optimizer.backward_step(&loss))
    });
    assert!(errors.iter().all(|e| e.contains("is not the same on every rank")), "{errors:?}");
}

#[test]
fn accumulating_after_the_exchange_is_no_way_to_step() {
    run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let rule = Sgd::default();
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        let rank = group.rank();
        model.loss_sum(share(rank, 0)).backward();
        ddp.no_sync(|| model.loss_sum(share(rank, 1)).backward()).unwrap();
        let error = optimizer.step(None).unwrap_err();
        assert!(matches!(error, Error::SteppedOnLocalGradients { .. }), "{error}");
    });
}

#[test]
fn freezing_between_micro_batches_is_named() {
    let errors = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        ddp.no_sync(|| model.loss_sum(0..2).backward()).unwrap();
        let frozen = model.vs.variables().remove("two.bias").unwrap();
        let _same = frozen.set_requires_grad(false);
        panic_text(|| model.loss_sum(0..2).backward())
    });
    assert!(
        errors.iter().all(|e| e.contains("two.bias was frozen while it held gradients")),
        "{errors:?}"
    );
}

#[test]
fn optimizers_that_differ_are_refused() {
    let errors = run_ranks(2, |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let rule = Sgd { lr: 0.125 * (1.0 + group.rank() as f64), ..Sgd::default() };
        Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|e| e.contains("differ in their optimizers")), "{errors:?}");
    assert_eq!(errors[0], errors[1]);
}

#[test]
fn a_rank_that_left_out_a_step_or_has_another_learning_rate_is_found_out() {
    for lr_differs in [false, true] {
        let errors = run_ranks(2, move |mut group| {
            let (model, ddp) = wrapped(&mut group, options(Zero::Off));
            let rule = Sgd::default();
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            let rank = group.rank();
            ddp.backward(&model.loss_sum(share(rank, 0)), 4.0, Sync::Reduce).unwrap();
            if lr_differs {
                optimizer.set_lr(0.1 * (1.0 + rank as f64)).unwrap();
            }
            if lr_differs || rank == 0 {
                let _step = optimizer.step(None).unwrap();
            } else {
                ddp.release_gradients().unwrap();
            }
            ddp.backward(&model.loss_sum(share(rank, 1)), 4.0, Sync::Reduce)
                .unwrap_err()
                .to_string()
        });
        let expected = if lr_differs { "lr 0.2" } else { "rank 1: 0 steps" };
        assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
        assert_eq!(errors[0], errors[1]);
    }
}

/// The last layer begins to train: its gradient is the first of that backward.
#[test]
fn a_head_that_was_frozen_when_wrapped_trains_from_its_first_gradient_on() {
    let all = run_ranks(2, |mut group| {
        let model = Model::new(0);
        let head = model.vs.variables().remove("three.bias").unwrap();
        let _same = head.set_requires_grad(false);
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let _same = head.set_requires_grad(true);
        let range = share(group.rank(), 0);
        ddp.backward(&model.whole_loss_sum(range), 4.0, Sync::Reduce).unwrap();
        values(&head.grad())
    });
    let model = Model::new(0);
    (model.whole_loss_sum(0..8) / 8.0).backward();
    let right = values(&model.vs.variables()["three.bias"].grad());
    assert_eq!(all, [right.clone(), right]);
}

#[test]
fn gradients_zeroed_in_place_are_released() {
    let all = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let zero = || model.vs.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
        let range = || share(group.rank(), 0);
        ddp.backward(&model.whole_loss_sum(range()), 4.0, Sync::Accumulate).unwrap();
        zero();
        for _ in 0..2 {
            ddp.backward(&model.whole_loss_sum(range()), 4.0, Sync::Reduce).unwrap();
            zero();
        }
        ddp.backward(&model.whole_loss_sum(range()), 4.0, Sync::Reduce).unwrap();
        values(&model.vs.variables()["three.bias"].grad())
    });
    let model = Model::new(0);
    (model.whole_loss_sum(0..8) / 8.0).backward();
    let right = values(&model.vs.variables()["three.bias"].grad());
    assert_eq!(all, [right.clone(), right]);
}

/// One rank puts averaged weights in, evaluates, and puts its own back.
#[test]
fn weights_that_are_taken_out_and_put_back_leave_masters_alone() {
    let all = run_ranks(2, |mut group| {
        let mut weight =
            Tensor::ones([3000], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options(Zero::Off)).unwrap();
        let rule = Sgd { lr: 1.0 / 8192.0, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        for _ in 0..64 {
            weight.sum(Kind::Float).backward();
            let _step = optimizer.step(None).unwrap();
            if group.rank() == 0 {
                let own = weight.detach().copy();
                let _filled = tch::no_grad(|| weight.fill_(7.0));
                tch::no_grad(|| weight.copy_(&own));
            }
        }
        values(&weight.to_kind(Kind::Float))[11]
    });
    assert_eq!(all, [1.0 - 64.0 / 8192.0; 2]);
}

#[test]
fn steps_are_numbered_while_ranks_join_too() {
    let all = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer =
            Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
        let join = ddp.join().unwrap();
        for step in 0..1 + group.rank() as i64 {
            ddp.at_step(step.unsigned_abs()).unwrap();
            let loss = model.loss_sum(share(group.rank(), step));
            ddp.backward(&loss, 4.0, Sync::Reduce).unwrap();
            let _step = optimizer.step(None).unwrap();
        }
        join.finish(|| optimizer.step(None).map(drop)).unwrap();
        model.bits()
    });
    assert!(all[0] == all[1]);
}

#[test]
fn one_model_that_is_not_finite_does_not_end_another() {
    let all = run_ranks(2, |mut group| {
        let (left, right) = (Model::new(0), Model::new(5));
        let options = DdpOptions { non_finite: NonFinite::Error, ..options(Zero::Off) };
        let _first = Ddp::new(&left.vs, &mut group, options.clone()).unwrap();
        let _second = Ddp::new(&right.vs, &mut group, options).unwrap();
        let range = share(group.rank(), 0);
        let loss =
            |factor: f64| left.loss_sum(range.clone()) * factor + right.loss_sum(range.clone());
        let text = panic_text(|| loss(f64::NAN).backward());
        assert!(text.contains("are not finite"), "{text}");
        for model in [&left, &right] {
            model.vs.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
        }
        panic_text(|| loss(1.0).backward())
    });
    assert_eq!(all, ["no panic", "no panic"]);
}

#[test]
fn parameters_without_elements_are_no_trouble() {
    run_ranks(2, |mut group| {
        let make = |len| Tensor::ones([len], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (none, some) = (make(0), make(9));
        let named = [("none", &none), ("some", &some)];
        let parameters = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let ddp =
            Ddp::from_tensors(parameters.into(), vec![], &mut group, options(Zero::Off)).unwrap();
        for _ in 0..2 {
            let loss = none.sum(Kind::Float) + some.sum(Kind::Float);
            ddp.backward(&loss, 1.0, Sync::Reduce).unwrap();
            ddp.release_gradients().unwrap();
        }
    });
}
