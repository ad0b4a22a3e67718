//! What random programs (`programs`) have found, each as the smallest program that shows it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::{Ddp, DdpOptions, Error, Optimizer, ParameterGroups, Result, Sgd, Sync};
use tch::nn::OptimizerConfig as _;
use tch::{nn, Device, Kind, Tensor};

/// Two parameters of three elements, all zero, each in a bucket of its own.
struct Pair {
    vs: nn::VarStore,
    a: Tensor,
    b: Tensor,
}

fn pair() -> Pair {
    let vs = nn::VarStore::new(Device::Cpu);
    let (a, b) = (vs.root().zeros("a", &[3]), vs.root().zeros("b", &[3]));
    Pair { vs, a, b }
}

fn options() -> DdpOptions {
    DdpOptions { bucket_bytes: vec![1], ..DdpOptions::default() }
}

fn unused() -> DdpOptions {
    DdpOptions { find_unused_parameters: true, ..options() }
}

fn static_graph() -> DdpOptions {
    DdpOptions { static_graph: true, ..options() }
}

/// A loss under which every element's gradient is `gradient`.
fn loss(parameter: &Tensor, gradient: f64) -> Tensor {
    parameter.sum(Kind::Float) * gradient
}

fn first(tensor: &Tensor) -> f64 {
    tensor.double_value(&[0])
}

fn rank_of(group: &Group) -> f64 {
    f64::from(u32::try_from(group.rank()).unwrap())
}

#[test]
fn the_first_gradient_of_a_parameter_that_was_frozen_is_kept() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        drop(b.set_requires_grad(false));
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        drop(b.set_requires_grad(true));
        // What comes last in the forward has the first gradient.
        ddp.no_sync(|| (loss(&a, 1.0) + loss(&b, 2.0)).backward()).unwrap();
        (loss(&a, 1.0) + loss(&b, 2.0)).backward();
        first(&b.grad())
    });
    assert_eq!(all, [4.0, 4.0]);
}

#[test]
fn plain_and_weighed_losses_that_accumulate_are_an_error() {
    run_ranks(1, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        ddp.no_sync(|| (loss(&a, 1.0) + loss(&b, 1.0)).backward()).unwrap();
        let both = loss(&a, 1.0) + loss(&b, 1.0);
        let refused = ddp.backward(&both, 1.0, Sync::Accumulate);
        assert!(matches!(refused, Err(Error::MixedWeights)), "{refused:?}");
    });
}

#[test]
fn what_a_static_graph_leaves_out_accumulates_on_one_rank_for_all() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, static_graph()).unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            if group.rank() == 1 {
                ddp.no_sync(|| loss(&b, 2.0).backward()).unwrap();
            }
            loss(&a, 1.0).backward();
            seen.push(if b.grad().defined() { first(&b.grad()) } else { f64::NAN });
            ddp.release_gradients().unwrap();
        }
        seen
    });
    // Nothing of the step before is left in the mean.
    assert_eq!(all, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]);
}

#[test]
fn a_gradient_more_than_a_static_graph_has_is_an_error_on_every_rank() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, static_graph()).unwrap();
        loss(&b, 1.0).backward();
        ddp.release_gradients().unwrap();
        let more = if group.rank() == 1 { loss(&a, 1.0) + loss(&b, 1.0) } else { loss(&b, 1.0) };
        more.f_backward().unwrap_err().to_string()
    });
    for error in all {
        assert!(error.contains("a got 1 gradients in this backward and 0 in the first"), "{error}");
    }
}

#[test]
fn a_static_graph_takes_up_what_was_frozen_when_it_was_counted() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let _ddp = Ddp::new(&vs, &mut group, static_graph()).unwrap();
        drop(a.set_requires_grad(false));
        (loss(&a, 1.0) + loss(&b, 1.0)).backward();
        drop(a.set_requires_grad(true));
        (loss(&a, 1.0 + rank_of(&group)) + loss(&b, 1.0)).backward();
        first(&a.grad())
    });
    assert_eq!(all, [1.5, 1.5]);
}

#[test]
fn freezing_a_parameter_that_holds_gradients_of_this_rank_is_an_error() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        let both = || loss(&a, 1.0) + loss(&b, 1.0);
        ddp.no_sync(|| both().backward()).unwrap();
        drop(a.set_requires_grad(false));
        both().f_backward().unwrap_err().to_string()
    });
    for error in all {
        assert!(error.contains("a was frozen while it held gradients"), "{error}");
    }
}

#[test]
fn a_rank_that_has_joined_adds_nothing_of_its_last_step() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, unused()).unwrap();
        let mut optimizer =
            nn::Sgd { momentum: 0.5, ..nn::Sgd::default() }.build(&vs, 1.0).unwrap();
        let join = ddp.join().unwrap();
        optimizer.backward_step(&(loss(&a, 1.0) + loss(&b, 1.0)));
        if group.rank() == 0 {
            optimizer.backward_step(&loss(&a, 2.0));
        }
        let followed = join.finish(|| {
            optimizer.step();
            Ok(())
        });
        followed.unwrap();
        (first(&a), first(&b))
    });
    // b has no gradient in the second step, so that its momentum rests as well.
    assert_eq!(all, [(-3.5, -1.0), (-3.5, -1.0)]);
}

#[test]
fn a_step_on_local_gradients_that_are_zeroed_then_is_found_in_the_next_exchange() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let rank = rank_of(&group);
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        let mut optimizer = nn::Sgd::default().build(&vs, 1.0).unwrap();
        let both = || loss(&a, 1.0 + rank) + loss(&b, 1.0);
        ddp.no_sync(|| optimizer.backward_step(&both())).unwrap();
        optimizer.zero_grad();
        both().f_backward().unwrap_err().to_string()
    });
    for error in all {
        assert!(error.contains("a is not the same on every rank"), "{error}");
    }
}

#[test]
fn a_step_of_tch_on_local_gradients_is_found_in_the_next_backward() {
    run_ranks(1, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        let mut optimizer = nn::Sgd::default().build(&vs, 1.0).unwrap();
        let both = || loss(&a, 1.0) + loss(&b, 1.0);
        ddp.no_sync(|| optimizer.backward_step(&both())).unwrap();
        let error = ddp.no_sync(|| both().f_backward()).unwrap().unwrap_err().to_string();
        assert!(error.contains("a was changed between accumulating gradients"), "{error}");
    });
}

#[test]
fn a_gradient_that_was_kept_while_its_parameter_was_frozen_takes_part_in_an_exchange() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        let both = || loss(&a, 2.0) + loss(&b, 2.0);
        both().backward();
        drop(a.set_requires_grad(false));
        both().backward();
        drop(a.set_requires_grad(true));
        match group.rank() {
            0 => both().backward(),
            _ => ddp.exchange().unwrap(),
        }
        (first(&a.grad()), first(&b.grad()))
    });
    assert_eq!(all, [(3.0, 5.0), (3.0, 5.0)]);
}

#[test]
fn a_step_uses_the_gradients_of_all_exchanges_before_it() {
    let all = run_ranks(2, |mut group| -> Result<(f64, f64)> {
        let Pair { vs, a, b } = pair();
        let ddp = Ddp::new(&vs, &mut group, unused())?;
        let sgd = Sgd { lr: 1.0, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, sgd, ParameterGroups::default())?;
        (loss(&a, 1.0) + loss(&b, 1.0)).f_backward()?;
        loss(&a, 1.0).f_backward()?;
        _ = optimizer.step(None)?;
        Ok((first(&a), first(&b)))
    });
    for values in all {
        assert_eq!(values.unwrap(), (-2.0, -1.0));
    }
}

#[test]
fn buffers_are_rank_zeros_also_where_it_only_exchanges() {
    let all = run_ranks(2, |mut group| {
        let Pair { vs, a, b } = pair();
        let rank = rank_of(&group);
        let buffer = vs.root().zeros_no_train("mean", &[1]);
        let ddp = Ddp::new(&vs, &mut group, options()).unwrap();
        drop(tch::no_grad(|| buffer.shallow_clone().fill_(5.0 + rank)));
        match group.rank() {
            0 => ddp.exchange_weighted().unwrap(),
            _ => ddp.backward(&(loss(&a, 1.0) + loss(&b, 1.0)), 1.0, Sync::Reduce).unwrap(),
        }
        first(&buffer)
    });
    assert_eq!(all, [5.0, 5.0]);
}
