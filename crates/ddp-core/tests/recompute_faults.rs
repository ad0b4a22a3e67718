//! What goes wrong in and around a recomputation is said, to the rank and to those that wait for it.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::recompute::{self, checkpointed_one};
use phalanx_ddp_core::{Ddp, Error, Result, Sync, Zero};
use support::{options, pattern, values, Model};
use tch::{Kind, Tensor};

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// The text of the backward of a closure that computes `first` in its forward and `second` when it runs again.
fn differing(
    first: fn(&Tensor) -> Result<Tensor>,
    second: fn(&Tensor) -> Result<Tensor>,
) -> String {
    let x = pattern(&[4, 4], 1).set_requires_grad(true);
    let again = AtomicBool::new(false);
    let closure = move |x: &Tensor| match again.swap(true, Ordering::SeqCst) {
        false => first(x),
        true => second(x),
    };
    let y = checkpointed_one(&x, closure).unwrap();
    let text = y.sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(!recompute::is_recomputing());
    // The thread is good for another one.
    checkpointed_one(&x, |x| Ok(x.f_exp()?)).unwrap().sum(Kind::Float).backward();
    text
}

#[test]
fn what_goes_wrong_in_a_recomputation_is_said() {
    let exp = |x: &Tensor| Ok(x.f_exp()?);
    let text = differing(exp, |_| Err(Error::closure("the disk is full")));
    assert!(text.contains("the disk is full"), "{text}");
    let text = differing(exp, |_| panic!("index {} is out of range", 7));
    assert!(
        text.contains("checkpointed closure: panic while it ran again: index 7 is out of range"),
        "{text}"
    );
    let text = differing(exp, |x| Ok(x.f_narrow(0, 0, 3)?.f_exp()?));
    assert!(
        text.contains("saved tensor 0 was Float of shape [4, 4] on Cpu in the forward and is Float of shape [3, 4] on Cpu"),
        "{text}"
    );
    let text = differing(exp, |x| Ok(x.f_exp()?.f_sin()?));
    assert!(text.contains("saved 1 tensors for backward and its recomputation 2"), "{text}");
    let text = differing(|x| Ok(x.f_exp()?.f_sin()?), |x| Ok(x.f_exp()?));
    assert!(text.contains("saved 2 tensors for backward and its recomputation 1"), "{text}");
}

#[test]
fn changes_in_place_are_found() {
    // Of an input, by the closure.
    let x = pattern(&[4], 1).set_requires_grad(true);
    let y = &x * 1.0;
    let error = checkpointed_one(&y, |y| Ok(y.shallow_clone().f_exp_()?)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "checkpointed closure: it changed input 0 in place; work on a copy of it"
    );
    // Of an input, by somebody else.
    let mut y = &x * 1.0;
    let z = checkpointed_one(&y, |y| Ok(y.f_exp()?)).unwrap();
    let _changed = y.g_add_scalar_(1.0);
    let text = z.sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(text.contains("modified by an inplace operation"), "{text}");
    // Of what was saved.
    let z = checkpointed_one(&x, |x| {
        let mut middle = x.f_exp()?;
        let end = middle.f_sin()?;
        let _changed = middle.f_add_scalar_(1.0)?;
        Ok(end)
    });
    let text = z.unwrap().sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(text.contains("it changes a tensor of shape [4] in place after"), "{text}");
    // Of an output, which is fine: what was saved of it is computed again.
    let mut z = checkpointed_one(&x, |x| Ok(x.f_exp()?)).unwrap();
    let _changed = z.g_add_scalar_(1.0);
    z.sum(Kind::Float).backward();
    assert_eq!(bits(&x.grad()), bits(&x.detach().exp()));
}

#[test]
fn a_backward_inside_of_a_closure_is_refused() {
    let x = pattern(&[4], 1).set_requires_grad(true);
    let error = checkpointed_one(&x, |x| {
        let y = x.f_exp()?.f_sum(Kind::Float)?;
        Ok(Tensor::f_run_backward(&[&y], &[x], true, true)?.remove(0))
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("a backward over its own operations began before it ended"), "{text}");
}

#[test]
fn the_other_ranks_hear_of_an_error_in_a_recomputation() {
    for panics in [false, true] {
        let errors = run_ranks(3, move |mut group| {
            let model = Model::new(0);
            let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
            let rank = group.rank();
            let loss = model.loss_sum(0..2);
            let loss = checkpointed_one(&loss, move |loss| {
                match (rank == 1 && recompute::is_recomputing(), panics) {
                    (true, true) => panic!("out of luck"),
                    (true, false) => Err(Error::closure("out of luck")),
                    _ => Ok(loss.f_square()?),
                }
            });
            ddp.backward(&loss.unwrap(), 5.0, Sync::Reduce).unwrap_err()
        });
        let typed = match panics {
            true => matches!(errors[1], Error::Recompute { .. }),
            false => matches!(errors[1], Error::Closure(_)),
        };
        assert!(typed && errors[1].to_string().contains("out of luck"), "{}", errors[1]);
        for error in [&errors[0], &errors[2]] {
            let text = error.to_string();
            assert!(
                text.contains("rank 1 aborted the group") && text.contains("out of luck"),
                "{text}"
            );
        }
    }
}
