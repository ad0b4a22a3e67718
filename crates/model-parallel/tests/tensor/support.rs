//! Values, bounds and what ranks bring back.

use std::collections::BTreeMap;

use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Cut;
use phalanx_model_parallel::layer::{Builder, Cuts, Init};
use phalanx_model_parallel::tensor::TensorParallel;
use tch::{nn, Device, Kind, Tensor};

/// Tensors by name.
pub(crate) type Named = BTreeMap<String, Tensor>;

/// Normally distributed values that depend on the name.
pub(crate) fn values(name: &str, shape: &[i64]) -> Tensor {
    let vs = nn::VarStore::new(Device::Cpu);
    let builder = Builder::new(vs.root(), 17);
    let values = builder.whole(&name.replace('.', "_"), shape, Init::Normal { std: 0.3 }).unwrap();
    values.detach().to_kind(Kind::Double)
}

/// The part of a whole tensor that a rank has.
pub(crate) fn part(whole: &Tensor, cut: Option<&Cut>) -> Tensor {
    let Some(cut) = cut else { return whole.shallow_clone() };
    assert_eq!(whole.size(), cut.shape());
    let dim = i64::try_from(cut.dim()).unwrap();
    let ranges = cut.ranges().iter();
    let parts: Vec<Tensor> =
        ranges.map(|range| whole.narrow(dim, range.start, range.end - range.start)).collect();
    Tensor::cat(&parts, dim)
}

/// Shapes of whole variables.
pub(crate) fn whole_shape(name: &str, variable: &Tensor, cuts: &Cuts) -> Vec<i64> {
    cuts.get(name).map_or_else(|| variable.size(), |cut| cut.shape().to_vec())
}

/// Makes all variables f64, and other than at the beginning: biases are not 0.
pub(crate) fn change(vs: &mut nn::VarStore, cuts: &Cuts) {
    vs.double();
    for (name, mut variable) in vs.variables() {
        let whole = values(&name, &whole_shape(&name, &variable, cuts));
        tch::no_grad(|| variable.copy_(&part(&whole, cuts.get(&name))));
    }
}

/// Equal but for the order of sums. No sum here has more than 100 terms, and none is further than 50 operations from the input; a norm or a
/// softmax makes an error larger by ten at most: 100 · 50 · 10 · 2⁻⁵³ of the largest element.
pub(crate) fn close(what: &str, actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.size(), expected.size(), "{what}");
    let bound = 100.0 * 50.0 * 10.0 * 2_f64.powi(-53) * expected.abs().max().double_value(&[]);
    let apart = (actual - expected).abs().max().double_value(&[]);
    assert!(apart <= bound, "{what}: {apart:e} apart, at most {bound:e}");
}

/// The same bits.
pub(crate) fn same(what: &str, left: &Tensor, right: &Tensor) {
    assert!(left.equal(right), "{what}: {} apart", (left - right).abs().max());
}

/// What a rank has of tensor parallelism.
pub(crate) fn parallel(group: Group, sequence: bool) -> TensorParallel {
    TensorParallel { group: TensorGroup::new(group), sequence }
}

/// Gradients of variables by name.
pub(crate) fn gradients(vs: &nn::VarStore) -> Named {
    vs.variables().into_iter().map(|(name, variable)| (name, variable.grad())).collect()
}

/// The libraries under libtorch choose their kernels in their first call: before ranks make it side by side.
pub(crate) fn compute_once() {
    tch::set_num_threads(1);
    let of = |shape: &[i64]| Tensor::ones(shape, (Kind::Double, Device::Cpu));
    let weight = of(&[16, 16]).set_requires_grad(true);
    of(&[4, 16]).matmul(&weight).tanh().square().sum(Kind::Double).backward();
}
