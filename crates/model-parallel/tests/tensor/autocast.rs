//! Layers under autocast: products in bf16 of weights that stay in f32, forward and backward.
//!
//! A product of numbers that are each rounded to bf16 is off by two roundings, its own result by another one, and a gradient that came from such a result
//! by one more: at most 4 · 2⁻⁸ of the sum of the terms' sizes.

use phalanx_ddp_core::amp;
use phalanx_model_parallel::layer::{linear, Builder};
use phalanx_model_parallel::tensor::{cross_entropy, ColumnLinear, LinearOptions, TensorParallel};
use tch::{nn, Device, Kind, Tensor};

use crate::support::values;

const CPU: Device = Device::Cpu;

/// In f32, as models have them.
fn single(name: &str, shape: &[i64]) -> Tensor {
    values(name, shape).to_kind(Kind::Float)
}

fn near(what: &str, actual: &Tensor, (left, right): (&Tensor, &Tensor)) {
    let (left, right) = (left.to_kind(Kind::Double), right.to_kind(Kind::Double));
    let bound = left.abs().matmul(&right.abs()) * 4.0 * 2_f64.powi(-8);
    let apart = (actual.to_kind(Kind::Double) - left.matmul(&right)).abs();
    let worst = (apart - bound).max().double_value(&[]);
    assert!(worst <= 0.0, "{what}: {worst:e} more apart than roundings explain");
}

/// Runs a layer forward under autocast, and backward without; looks at its output and at both gradients.
fn check(what: &str, weight: &Tensor, layer: impl Fn(&Tensor) -> Tensor) {
    let x = single("x", &[2, 5, 12]).set_requires_grad(true);
    let outer = single("outer", &[2, 5, 24]);
    let y = amp::autocast(CPU, Kind::BFloat16, || layer(&x)).unwrap();
    assert_eq!(y.kind(), Kind::BFloat16, "{what}");
    (&y * &outer).sum(Kind::Float).backward();
    let rows = |tensor: &Tensor| tensor.detach().flatten(0, 1);
    near(what, &rows(&y), (&rows(&x), &weight.detach().tr()));
    let of_x = x.grad();
    let of_weight = weight.grad();
    assert_eq!((of_x.kind(), of_weight.kind()), (Kind::Float, Kind::Float), "{what}");
    near(what, &rows(&of_x), (&rows(&outer), &weight.detach()));
    near(what, &of_weight, (&rows(&outer).tr(), &rows(&x)));
}

#[test]
fn products_of_f32_weights_are_computed_in_bf16_forward_and_backward() {
    let weight = single("weight", &[24, 12]).set_requires_grad(true);
    check("linear", &weight, |x| linear(x, &weight, None).unwrap());
    let vs = nn::VarStore::new(CPU);
    let root = Builder::new(vs.root(), 1);
    let options = LinearOptions { bias: false, ..LinearOptions::default() };
    let alone = TensorParallel::alone().unwrap();
    let columns = ColumnLinear::new(&(&root / "up"), 12, 24, options, &alone).unwrap();
    check("columns", &vs.variables()["up.weight"], |x| columns.forward(x).unwrap());
}

/// So many words that the tokens are taken in two chunks.
#[test]
fn a_head_of_f32_is_computed_in_bf16_and_added_up_in_f32() {
    let (words, tokens, width) = (1 << 15, 1500, 4);
    let hidden = single("hidden", &[1, tokens, width]).set_requires_grad(true);
    let weight = single("weight", &[words, width]).set_requires_grad(true);
    let targets = Tensor::arange(tokens, (Kind::Int64, CPU)).view([1, tokens]);
    let alone = TensorParallel::alone().unwrap();
    let loss = || cross_entropy(&hidden, &weight, &targets, &alone).unwrap();
    let loss = amp::autocast(CPU, Kind::BFloat16, loss).unwrap();
    loss.backward();
    let double = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double);
    let (of_hidden, of_weight) = (hidden.grad(), weight.grad());
    assert_eq!((of_hidden.kind(), of_weight.kind()), (Kind::Float, Kind::Float));
    let rows = double(&hidden).view([tokens, width]);
    let sizes = rows.abs().matmul(&double(&weight).abs().tr());
    // A logit is off by this much at most, so its exponential and each gradient by twice as large a part.
    let off = sizes.max().double_value(&[]) * 4.0 * 2_f64.powi(-8);
    let softmax = rows.matmul(&double(&weight).tr()).softmax(-1, Kind::Double);
    let gradient = &softmax - targets.view([tokens]).one_hot(words).to_kind(Kind::Double);
    let part = 3.0 * off + 4.0 * 2_f64.powi(-8);
    let apart = |actual: &Tensor, (left, right): (&Tensor, &Tensor)| {
        let bound = left.abs().matmul(&right.abs()) * part;
        let worst = ((double(actual) - left.matmul(right)).abs() - bound).max();
        assert!(worst.double_value(&[]) <= 0.0, "{worst:?}");
    };
    apart(&of_hidden.view([tokens, width]), (&gradient, &double(&weight)));
    apart(&of_weight, (&gradient.tr(), &rows));
    let expected = -(softmax.gather(1, &targets.view([tokens, 1]), false)).log().sum(Kind::Double);
    let bound = 2.0 * off * tokens as f64;
    assert!((loss.double_value(&[]) - expected.double_value(&[])).abs() <= bound);
}
