//! Dropout by position.

use phalanx_model_parallel::layer::{random::Key, Pass, Tokens};
use phalanx_model_parallel::tensor::{Dropout, Place};
use tch::{Device, Kind, Tensor};

use crate::support::same;

fn ones(shape: [i64; 3]) -> Tensor {
    Tensor::ones(shape, (Kind::Float, Device::Cpu))
}

#[test]
fn a_part_of_batch_tokens_or_columns_is_dropped_as_in_the_whole() {
    let dropout = Dropout::new(0.4, Key::of_seed(3)).unwrap();
    let pass = Pass { train: true, step: 2, first_sample: 10, tokens: Tokens::from(4) };
    let place = Place { first_token: 1, first_column: 2 };
    let whole = dropout.forward(&ones([5, 6, 7]), &pass, place).unwrap();
    let moved = Pass { first_sample: 12, tokens: Tokens::from(5), ..pass };
    let place = Place { first_token: 2, first_column: 5 };
    let part = dropout.forward(&ones([2, 3, 4]), &moved, place).unwrap();
    same("part", &part, &whole.narrow(0, 2, 2).narrow(1, 2, 3).narrow(2, 3, 4));
}

/// Of a rank that has two runs of tokens, and cuts them once more.
#[test]
fn runs_of_tokens_are_dropped_as_in_the_whole() {
    let dropout = Dropout::new(0.4, Key::of_seed(3)).unwrap();
    let pass = Pass::training(2, 1);
    let whole = dropout.forward(&ones([2, 12, 5]), &pass, Place::default()).unwrap();
    let runs = Pass { tokens: Tokens::of(&[2..5, 8..11]).unwrap(), ..pass };
    let place = Place { first_token: 1, first_column: 0 };
    let part = dropout.forward(&ones([2, 4, 5]), &runs, place).unwrap();
    same("runs", &part, &Tensor::cat(&[whole.narrow(1, 3, 2), whole.narrow(1, 8, 2)], 1));
    let place = Place { first_token: 3, first_column: 0 };
    let message = dropout.forward(&ones([2, 4, 5]), &runs, place).unwrap_err().to_string();
    assert!(message.contains("7 tokens"), "{message}");
}

#[test]
fn another_step_layer_or_token_is_dropped_otherwise_and_evaluation_not_at_all() {
    let drop = |seed, pass: Pass| {
        let dropout = Dropout::new(0.4, Key::of_seed(seed)).unwrap();
        dropout.forward(&ones([2, 4, 8]), &pass, Place::default()).unwrap()
    };
    let first = drop(1, Pass::training(0, 0));
    for other in [drop(2, Pass::training(0, 0)), drop(1, Pass::training(1, 0))] {
        assert!(!first.equal(&other));
    }
    let tokens: Vec<Tensor> = first.view([8, 8]).unbind(0);
    assert!((1..8).all(|token| !tokens[token].equal(&tokens[0])));
    same("evaluation", &drop(1, Pass::evaluation()), &ones([2, 4, 8]));
}

#[test]
fn the_gradient_is_of_what_was_kept() {
    let dropout = Dropout::new(0.5, Key::of_seed(1)).unwrap();
    let x = ones([2, 3, 4]).set_requires_grad(true);
    let output = dropout.forward(&x, &Pass::training(7, 1), Place::default()).unwrap();
    output.sum(Kind::Float).backward();
    same("gradient", &x.grad(), &output.detach()); // of ones: the factors
}

#[test]
fn a_probability_outside_of_its_range_is_an_error() {
    for p in [-0.1, 1.0, f64::NAN] {
        assert!(Dropout::new(p, Key::of_seed(1)).is_err(), "{p}");
    }
}
