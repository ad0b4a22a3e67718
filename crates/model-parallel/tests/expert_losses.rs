//! Losses of layers of experts: over tokens that several ranks have, and without a way to the end of the model.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::expert::{with_loss, ExpertOptions, Router};
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::{Builder, Init};
use tch::{nn, Device, Kind, Tensor};

const WIDTH: i64 = 6;

fn router(vs: &nn::VarStore) -> Router {
    let init = Init::Normal { std: 0.4 };
    let options = ExpertOptions { init, ..ExpertOptions::mixtral(4) };
    Router::new(&Builder::new(vs.root(), 3), WIDTH, &options).unwrap()
}

/// Rows of all ranks; exact in f32, whose numbers the weights are.
fn rows(count: i64) -> Tensor {
    let key = Key::of_seed(2).named("rows");
    let all: Vec<f64> =
        (0..(count * WIDTH).unsigned_abs()).map(|place| key.normal(place)).collect();
    Tensor::from_slice(&all).view([count, WIDTH]).to_kind(Kind::Float)
}

/// The balance of all rows, and the gradient of the router's weight.
fn alone(count: i64) -> (f64, Tensor) {
    let vs = nn::VarStore::new(Device::Cpu);
    let loss = router(&vs).route(&rows(count)).unwrap().balance_loss().unwrap();
    loss.backward();
    (loss.double_value(&[]), vs.variables()["gate.weight"].grad())
}

#[test]
fn parts_of_a_balance_over_ranks_add_up_to_that_of_one_rank() {
    let shares = [5_i64, 0, 9, 3];
    let (loss, gradient) = alone(shares.iter().sum());
    let ranks = run_ranks(shares.len(), move |group| {
        let rank = group.rank();
        let group = TensorGroup::new(group);
        let first: i64 = shares[..rank].iter().sum();
        let own = rows(shares.iter().sum()).narrow(0, first, shares[rank]);
        let vs = nn::VarStore::new(Device::Cpu);
        let part = router(&vs).route(&own).unwrap().balance_loss_over(&group).unwrap();
        part.backward();
        (part.double_value(&[]), vs.variables()["gate.weight"].grad())
    });
    // Sums over 17 tokens and 4 experts in f32; all terms of the loss are positive.
    let bound = f64::from(f32::EPSILON) * 100.0;
    let sum: f64 = ranks.iter().map(|(part, _)| part).sum();
    assert!((sum - loss).abs() <= bound * loss, "{sum} and {loss}");
    let gradients: Vec<&Tensor> = ranks.iter().map(|(_, part)| part).collect();
    let of_all = Tensor::stack(&gradients, 0).sum_dim_intlist(0_i64, false, Kind::Float);
    let off = (of_all - &gradient).abs().max().double_value(&[]);
    // A token's term is at most a row's largest number, of 17 tokens, before they cancel.
    assert!(off <= bound * 4.0, "{off:.1e} off");
}

#[test]
fn an_output_with_a_loss_has_the_gradients_of_both_and_its_own_bits() {
    let x = Tensor::from_slice(&[1.5_f32, -2.0, 0.25]).set_requires_grad(true);
    let output = x.tanh();
    let both = with_loss(&output, &(x.square().sum(Kind::Float) * 0.5)).unwrap();
    assert!(both.equal(&output));
    (&both * 2.0).sum(Kind::Float).backward();
    let of_output = x.detach().set_requires_grad(true);
    (of_output.tanh() * 2.0).sum(Kind::Float).backward();
    let expected: Tensor = of_output.grad() + x.detach();
    let off = (x.grad() - &expected).abs().max().double_value(&[]);
    // One sum, whose order is libtorch's.
    assert!(off <= f64::from(f32::EPSILON) * 4.0, "{off:.1e} off");
}

/// The loss counts though nothing else of the output is asked for.
#[test]
fn a_loss_beside_an_output_that_has_no_gradient_counts() {
    let x = Tensor::from_slice(&[3.0_f32]).set_requires_grad(true);
    let constant = Tensor::from_slice(&[1.0_f32]);
    let both = with_loss(&constant, &x.square().sum(Kind::Float)).unwrap();
    both.sum(Kind::Float).backward();
    assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [6.0]);
}
