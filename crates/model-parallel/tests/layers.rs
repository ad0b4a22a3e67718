//! What layers are made of: products whose gradients have the bits of libtorch's own, now or later.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use phalanx_model_parallel::layer::Builder;
use phalanx_model_parallel::layer::{linear, random::Key, Deferred, Init};
use tch::{nn, Device, Kind, Tensor};

fn values(shape: &[i64], seed: u64) -> Tensor {
    let vs = nn::VarStore::new(Device::Cpu);
    let builder = Builder::new(vs.root(), seed);
    builder.whole("x", shape, Init::Normal { std: 1.0 }).unwrap().detach()
}

fn trained(shape: &[i64], seed: u64) -> Tensor {
    values(shape, seed).set_requires_grad(true)
}

fn same(what: &str, left: &Tensor, right: &Tensor) {
    assert!(left.equal(right), "{what}: at most {} apart", (left - right).abs().max());
}

#[test]
fn a_product_has_the_bits_of_libtorch_whenever_its_gradient_comes() {
    for (shape, has_bias) in [(vec![6, 5], true), (vec![2, 7, 5], true), (vec![3, 2, 4, 5], false)]
    {
        let leaves = || (trained(&shape, 1), trained(&[9, 5], 2), trained(&[9], 3));
        let outer = values(&[&shape[..shape.len() - 1], &[9]].concat(), 4);
        let (x, weight, bias) = leaves();
        let expected = x.linear(&weight, has_bias.then_some(&bias));
        (&expected * &outer).sum(Kind::Float).backward();
        for is_deferred in [false, true] {
            let (own_x, own_weight, own_bias) = leaves();
            let deferred = Deferred::new();
            let forward = || linear(&own_x, &own_weight, has_bias.then_some(&own_bias)).unwrap();
            let output = if is_deferred { deferred.during(forward) } else { forward() };
            same("output", &output, &expected);
            (&output * &outer).sum(Kind::Float).backward();
            same("gradient of x", &own_x.grad(), &x.grad());
            let left = deferred.take();
            assert_eq!(left.is_empty(), !is_deferred);
            let (of_weight, of_bias) = if is_deferred {
                assert!(!own_weight.grad().defined());
                let mut left = left.compute().unwrap();
                let of_bias = has_bias.then(|| left.pop().unwrap().1);
                (left.pop().unwrap().1, of_bias)
            } else {
                (own_weight.grad(), has_bias.then(|| own_bias.grad()))
            };
            same("gradient of the weight", &of_weight, &weight.grad());
            if let Some(of_bias) = of_bias {
                same("gradient of the bias", &of_bias, &bias.grad());
            }
        }
    }
}

#[test]
fn a_frozen_weight_gets_no_gradient_later_either() {
    let (x, weight) = (trained(&[4, 3], 1), values(&[2, 3], 2));
    let deferred = Deferred::new();
    let output = deferred.during(|| linear(&x, &weight, None).unwrap());
    output.sum(Kind::Float).backward();
    assert!(deferred.take().compute().unwrap().is_empty());
    assert!(x.grad().defined());
}

#[test]
fn layers_of_other_names_and_seeds_begin_otherwise() {
    let keys = [Key::of_seed(1), Key::of_seed(2)];
    assert_ne!(keys[0].named("a").uniform(0).to_bits(), keys[1].named("a").uniform(0).to_bits());
    assert!(!values(&[4], 1).equal(&values(&[4], 2)));
}
