//! Custom autograd functions: what crosses to libtorch and back, and who hears of what goes wrong.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::autograd::{self, Function};
use phalanx_ddp_core::{Ddp, Error, Result, Sync, Zero};
use support::{options, panic_text, values, Model};
use tch::{Device, Kind, Tensor};

fn variable(values: &[f32]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

/// Counts how often it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new() -> (Self, impl Fn() -> usize) {
        let count = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&count);
        (Self(count), move || seen.load(Ordering::SeqCst))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Twice the input, with a `state` for its backward.
fn doubled<S: Send + 'static>(x: &Tensor, state: S) -> Tensor {
    let outputs = autograd::function(
        "doubled",
        &[x],
        |_, inputs| Ok((vec![inputs[0].f_mul_scalar(2.0)?], state)),
        |_, gradients| {
            gradients
                .iter()
                .map(|g| Ok(g.as_ref().map(|g| g.f_mul_scalar(2.0)).transpose()?))
                .collect()
        },
    );
    outputs.unwrap().remove(0)
}

/// The text of a backward that fails.
fn failure(loss: &Tensor) -> String {
    loss.f_backward().unwrap_err().to_string()
}

#[test]
fn gradients_are_those_of_the_closure() {
    let (x, y) = (variable(&[1.0, 2.0]), variable(&[3.0, 5.0]));
    let product = autograd::function(
        "product",
        &[&x, &y],
        |saving, inputs| {
            inputs.iter().for_each(|input| saving.save(input));
            Ok((vec![inputs[0].f_mul(inputs[1])?], 10.0))
        },
        |backward, gradients| {
            assert_eq!(backward.needs_input_grad, [true, true]);
            let gradient = gradients[0].as_ref().unwrap().f_mul_scalar(*backward.state)?;
            let [x, y] = [0, 1].map(|at| gradient.f_mul(&backward.saved[1 - at]));
            Ok(vec![Some(x?), Some(y?)])
        },
    );
    let product = product.unwrap().remove(0);
    assert_eq!(values(&product), [3.0, 10.0]);
    (&product * &product).sum(Kind::Float).backward();
    assert_eq!(values(&x.grad()), [180.0, 1000.0]);
    assert_eq!(values(&y.grad()), [60.0, 400.0]);
}

#[test]
fn what_is_not_wanted_is_said() {
    let (x, frozen) = (variable(&[1.0]), Tensor::from_slice(&[1.0_f32]));
    let index = Tensor::from_slice(&[0_i64]);
    let needs = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&needs);
    let outputs = autograd::function(
        "picked",
        &[&frozen, &x, &index],
        |_, inputs| {
            Ok((vec![inputs[1].f_index_select(0, inputs[2])?, inputs[2].f_detach_copy()?], ()))
        },
        move |backward, gradients| {
            told.lock().unwrap().clone_from(&backward.needs_input_grad);
            Ok(vec![None, gradients[0].as_ref().map(Tensor::shallow_clone), None])
        },
    );
    let outputs = outputs.unwrap();
    assert!(outputs[0].requires_grad() && !outputs[1].requires_grad(), "integers have no gradient");
    outputs[0].sum(Kind::Float).backward();
    assert_eq!(*needs.lock().unwrap(), [false, true, false]);
    assert_eq!(values(&x.grad()), [1.0]);
    assert!(!frozen.grad().defined());
}

#[test]
fn nothing_is_recorded_without_need() {
    for (recording, requires_grad) in [(false, true), (true, false)] {
        let (state, dropped) = Counted::new();
        let x = Tensor::from_slice(&[1.0_f32]).set_requires_grad(requires_grad);
        let y = match recording {
            true => doubled(&x, state),
            false => tch::no_grad(|| doubled(&x, state)),
        };
        assert_eq!((dropped(), y.requires_grad()), (1, false));
        assert_eq!(values(&y), [2.0]);
    }
}

#[test]
fn the_backward_is_dropped_once_and_with_its_graph() {
    // Never run.
    let (state, dropped) = Counted::new();
    let x = variable(&[1.0]);
    let y = doubled(&x, state);
    assert_eq!(dropped(), 0);
    drop(y);
    assert_eq!(dropped(), 1);
    // Run: the graph is freed behind it, although its outputs live.
    let (state, dropped) = Counted::new();
    let y = doubled(&x, state);
    y.backward();
    assert_eq!(dropped(), 1);
    assert!(failure(&y).contains("backward through the graph a second time"), "{}", failure(&y));
    // Kept.
    let (state, dropped) = Counted::new();
    let y = doubled(&x, state);
    for _ in 0..2 {
        let gradients = Tensor::run_backward(&[&y], &[&x], true, false);
        assert_eq!(values(&gradients[0]), [2.0]);
    }
    assert_eq!(dropped(), 0);
    drop(y);
    assert_eq!(dropped(), 1);
}

#[test]
fn an_output_can_be_saved_without_keeping_itself_alive() {
    let (state, dropped) = Counted::new();
    let x = variable(&[0.0, 1.0]);
    let make = |state: Option<Counted>| {
        let outputs = autograd::function(
            "exp",
            &[&x],
            |saving, inputs| {
                let output = inputs[0].f_exp()?;
                saving.save(&output);
                Ok((vec![output], state))
            },
            |backward, gradients| {
                let gradient = gradients[0].as_ref().map(|g| g.f_mul(&backward.saved[0]));
                Ok(vec![gradient.transpose()?])
            },
        );
        outputs.unwrap().remove(0)
    };
    drop(make(Some(state)));
    assert_eq!(dropped(), 1);
    let y = make(None);
    y.sum(Kind::Float).backward();
    assert_eq!(values(&x.grad()), values(&y));
}

#[test]
fn gradients_that_are_not_there_are_none() {
    let x = variable(&[1.0, 2.0]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    let outputs = autograd::function(
        "split",
        &[&x],
        |_, inputs| Ok((vec![inputs[0].f_mul_scalar(2.0)?, inputs[0].f_mul_scalar(3.0)?], ())),
        move |_, gradients| {
            *told.lock().unwrap() = gradients.iter().map(Option::is_some).collect();
            Ok(vec![None])
        },
    );
    outputs.unwrap()[1].sum(Kind::Float).backward();
    assert_eq!(*seen.lock().unwrap(), [false, true]);
    assert!(!x.grad().defined());
}

/// As in tensor parallelism: nothing in the forward, something in the backward.
#[test]
fn an_output_may_be_an_input() {
    let x = variable(&[1.0, 2.0]);
    let through = |x: &Tensor| {
        let outputs = autograd::function(
            "through",
            &[x, x],
            |saving, inputs| {
                saving.save(inputs[0]);
                Ok((vec![inputs[0].shallow_clone(), inputs[0].shallow_clone()], ()))
            },
            |backward, gradients| {
                assert_eq!(backward.saved.len(), 1);
                let tenfold =
                    |g: &Option<Tensor>| g.as_ref().map(|g| g.f_mul_scalar(10.0)).transpose();
                Ok(vec![tenfold(&gradients[0])?, tenfold(&gradients[1])?])
            },
        );
        outputs.unwrap()
    };
    let outputs = through(&x);
    (&outputs[0] + &outputs[1] * 2.0).sum(Kind::Float).backward();
    assert_eq!(values(&x.grad()), [30.0, 30.0]);
    assert!(x.requires_grad() && x.is_leaf());
    // The input is itself computed.
    let outputs = through(&(&x * 2.0));
    outputs[0].sum(Kind::Float).backward();
    assert_eq!(values(&x.grad()), [50.0, 50.0]);
}

#[test]
fn changes_in_place_are_found() {
    let x = variable(&[1.0, 2.0]);
    let mut middle = &x * 1.0;
    let square = |input: &Tensor| {
        autograd::function(
            "square",
            &[input],
            |saving, inputs| {
                saving.save(inputs[0]);
                Ok((vec![inputs[0].f_square()?], ()))
            },
            |_, gradients| Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone)]),
        )
    };
    let y = square(&middle).unwrap().remove(0);
    let _changed = middle.g_add_scalar_(1.0);
    let text = failure(&y.sum(Kind::Float));
    assert!(text.contains("modified by an inplace operation"), "{text}");
    let error = autograd::function(
        "hasty",
        &[&x.detach()],
        |_, inputs| Ok((vec![inputs[0].shallow_clone().f_mul_scalar_(2.0)?], ())),
        |_, _| Ok(vec![None]),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "hasty: its forward changed input 0 in place; work on a copy of it"
    );
}

#[test]
fn errors_and_panics_come_back_with_their_text() {
    let x = variable(&[1.0, 2.0]);
    let failing = |how: fn() -> Result<Vec<Option<Tensor>>>| {
        let forward =
            |_: &mut autograd::Saving, inputs: &[&Tensor]| Ok((vec![inputs[0].f_exp()?], ()));
        let outputs = autograd::function("failing", &[&x], forward, move |_, _| how());
        failure(&outputs.unwrap()[0].sum(Kind::Float))
    };
    let text = failing(|| Err(Error::closure("the disk is full")));
    assert!(text.contains("the disk is full"), "{text}");
    let text = failing(|| panic!("index {} is out of range", 7));
    assert!(text.contains("failing: panic in its backward: index 7 is out of range"), "{text}");
    let text = failing(|| Ok(vec![]));
    assert!(text.contains("failing: its backward returned 0 gradients for 1 inputs"), "{text}");
    let text = failing(|| Ok(vec![Some(Tensor::from_slice(&[1.0_f32, 2.0, 3.0]))]));
    assert!(text.contains("failing returned an invalid gradient at index 0"), "{text}");
    // A text that is longer than the boundary's buffer is cut.
    let text = failing(|| Err(Error::closure("é".repeat(3000))));
    assert!(text.contains("ééé"), "{text}");

    let forward = |how: fn() -> Result<(Vec<Tensor>, ())>| {
        autograd::function("early", &[&x], |_, _| how(), |_, _| Ok(vec![None]))
    };
    let error = forward(|| Err(Error::NoGradients)).unwrap_err();
    assert!(matches!(error, Error::NoGradients), "its own type: {error}");
    assert_eq!(panic_text(|| forward(|| panic!("no good"))), "no good");
    assert!((&x * 2.0).requires_grad(), "the grad mode is what it was");
}

#[test]
fn a_backward_of_a_backward_is_refused_or_right() {
    let x = variable(&[2.0]);
    let cube = |function: &Function<'_>| {
        let outputs = function.apply(
            &[&x],
            |saving, inputs| {
                saving.save(inputs[0]);
                Ok((vec![inputs[0].f_pow_tensor_scalar(3)?], ()))
            },
            |backward, gradients| {
                let slope = backward.saved[0].f_square()?.f_mul_scalar(3.0)?;
                Ok(vec![gradients[0].as_ref().map(|g| g.f_mul(&slope)).transpose()?])
            },
        );
        outputs.unwrap().remove(0)
    };
    let error = Tensor::f_run_backward(&[&cube(&Function::new("cube"))], &[&x], true, true);
    let text = error.unwrap_err().to_string();
    assert!(text.contains("cube: its backward cannot be differentiated (create_graph)"), "{text}");
    let y = cube(&Function::new("cube").twice_differentiable());
    let first = Tensor::run_backward(&[&y], &[&x], true, true).remove(0);
    let second = Tensor::run_backward(&[&first], &[&x], false, false).remove(0);
    assert_eq!((values(&first), values(&second)), (vec![12.0], vec![12.0]));
}

/// As on a GPU, whose backward runs on a thread of its own.
#[test]
fn a_backward_may_run_on_another_thread() {
    let x = variable(&[1.0]);
    let (state, dropped) = Counted::new();
    let y = doubled(&x, state);
    std::thread::spawn(move || y.backward()).join().unwrap();
    assert_eq!((dropped(), values(&x.grad())), (1, vec![2.0]));
}

#[test]
fn a_graph_may_be_deep() {
    let x = variable(&[1.0]);
    let (state, dropped) = Counted::new();
    let mut y = doubled(&x, state);
    for _ in 0..20_000 {
        y = doubled(&(y * 0.5), ());
    }
    drop(y);
    assert_eq!(dropped(), 1);
}

#[test]
fn the_other_ranks_hear_of_an_error_in_a_backward() {
    let errors = run_ranks(3, |mut group| {
        let model = Model::new(0);
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let rank = group.rank();
        let loss = model.loss_sum(0..2);
        let loss = autograd::function(
            "last",
            &[&loss],
            |_, inputs| Ok((vec![inputs[0].shallow_clone()], ())),
            move |_, gradients| match rank {
                1 => Err(Error::closure("out of luck")),
                _ => Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone)]),
            },
        );
        let loss = loss.unwrap().remove(0);
        let outcome =
            match catch_unwind(AssertUnwindSafe(|| ddp.backward(&loss, 2.0, Sync::Reduce))) {
                Ok(outcome) => outcome.unwrap_err(),
                Err(_) => panic!("Ddp::backward panicked"),
            };
        (matches!(outcome, Error::Closure(_)), outcome.to_string())
    });
    assert_eq!(errors[1], (true, "out of luck".to_owned()));
    for (_, text) in [&errors[0], &errors[2]] {
        assert!(text.contains("rank 1 aborted the group: out of luck"), "{text}");
    }
}

/// A failure in a backward that has nothing to do with the model leaves the model's group alone.
#[test]
fn a_backward_beside_the_model_may_fail() {
    let ends = run_ranks(2, |mut group| {
        let model = Model::new(0);
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let outputs = autograd::function(
            "beside",
            &[&x],
            |_, inputs| Ok((vec![inputs[0].f_exp()?], ())),
            |_, _| Err(Error::closure("nobody minds")),
        );
        assert!(failure(&outputs.unwrap()[0].sum(Kind::Float)).contains("nobody minds"));
        ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Reduce).map_err(|error| error.to_string())
    });
    assert_eq!(ends, [Ok(()), Ok(())]);
}
