//! What the training tests share: a small model with several buckets, and data that depends on nothing but
//! the sample's index.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::{Ddp, DdpOptions, Zero};
use tch::{nn, nn::Module, Device, Kind, Tensor};

/// Ranks that share memory, and ranks that do not.
pub(crate) const LINKS: [HostLink; 2] = [HostLink::Auto, HostLink::Tcp];

/// Ranks as threads, joined by `link`.
pub(crate) fn run_over<T: Send + 'static>(
    world_size: usize,
    link: HostLink,
    rank: impl Fn(Group) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let options = GroupOptions { timeout: Duration::from_secs(30), ..GroupOptions::default() };
    run_ranks_with(world_size, link, options, rank)
}

/// Every stage of ZeRO.
pub(crate) const STAGES: [Zero; 4] = [Zero::Off, Zero::One, Zero::Two, Zero::Three];

/// Small caps: the model below has at least three buckets of uneven sizes.
pub(crate) fn options(zero: Zero) -> DdpOptions {
    DdpOptions { bucket_bytes: vec![256, 400, 9000], zero, ..DdpOptions::default() }
}

/// A model of uneven layers; `seed` decides its values, whatever else draws random numbers.
pub(crate) struct Model {
    pub(crate) vs: nn::VarStore,
    net: nn::Sequential,
}

impl Model {
    pub(crate) fn new(seed: i64) -> Self {
        Self::built(nn::VarStore::new(Device::Cpu), seed, |_| {})
    }

    /// As [`Model::new`]; `built` is called after each layer.
    pub(crate) fn built(vs: nn::VarStore, seed: i64, mut built: impl FnMut(&str)) -> Self {
        /// The names, sorted.
        const NAMES: [&str; 8] = [
            "norm.bias",
            "norm.weight",
            "one.bias",
            "one.weight",
            "three.bias",
            "three.weight",
            "two.bias",
            "two.weight",
        ];
        let root = vs.root();
        let mut fill = |layer: &str| {
            for (name, mut variable) in vs.variables() {
                if let Some(index) = NAMES.iter().position(|n| *n == name && n.starts_with(layer)) {
                    let values = pattern(&variable.size(), seed + index as i64) * 0.3;
                    tch::no_grad(|| variable.copy_(&values));
                }
            }
            built(layer);
        };
        let linear =
            |name: &str, from, to| nn::linear(&root / name, from, to, nn::LinearConfig::default());
        let one = linear("one", 7, 131);
        fill("one");
        let two = linear("two", 131, 33);
        fill("two");
        let norm = nn::layer_norm(&root / "norm", vec![33], nn::LayerNormConfig::default());
        fill("norm");
        let three = linear("three", 33, 1);
        fill("three");
        let net = nn::seq()
            .add(one)
            .add_fn(Tensor::tanh)
            .add(two)
            .add_fn(Tensor::tanh)
            .add(norm)
            .add(three);
        Self { vs, net }
    }

    pub(crate) fn sorted(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> = self.vs.variables().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Sum of squared errors over samples `range`.
    pub(crate) fn loss_sum(&self, range: std::ops::Range<i64>) -> Tensor {
        let (x, y) = samples(range);
        // A model in half precision takes such.
        let kind = self.vs.variables().values().next().map_or(Kind::Float, Tensor::kind);
        (self.net.forward(&x.to_kind(kind)) - y).square().sum(Kind::Float)
    }

    /// A loss whose gradients are known exactly: [`whole_gradients`] summed over samples `range`.
    ///
    /// The network's own loss takes part, times zero, so that gradients become ready in the order of its graph.
    pub(crate) fn whole_loss_sum(&self, range: std::ops::Range<i64>) -> Tensor {
        let sums = whole_gradients(self, range.clone());
        let products = self.sorted().into_iter().zip(sums);
        let exact = products.map(|((_, v), c)| (v * c).sum(Kind::Float)).sum::<Tensor>();
        self.loss_sum(range) * 0.0 + exact
    }

    /// All parameters, as bits.
    pub(crate) fn bits(&self) -> Vec<u32> {
        let flat: Vec<Tensor> =
            self.sorted().into_iter().map(|(_, v)| v.detach().reshape([-1])).collect();
        values(&Tensor::cat(&flat, 0).to_kind(Kind::Float)).into_iter().map(f32::to_bits).collect()
    }

    pub(crate) fn values(&self) -> Vec<f32> {
        self.bits().into_iter().map(f32::from_bits).collect()
    }
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().contiguous();
    let mut out = vec![0.0; tensor.numel()];
    tensor.copy_data(&mut out, tensor.numel());
    out
}

/// Values in (−1, 1) that look random and are not.
pub(crate) fn pattern(shape: &[i64], seed: i64) -> Tensor {
    let len: i64 = shape.iter().product();
    let at = Tensor::arange(len, (Kind::Double, Device::Cpu)) + seed as f64 * 17.3;
    (at * 12.9898).sin().to_kind(Kind::Float).reshape(shape)
}

/// Inputs [n, 7] and targets [n, 1] of samples `range`.
pub(crate) fn samples(range: std::ops::Range<i64>) -> (Tensor, Tensor) {
    let rows: Vec<Tensor> = range.map(|sample| pattern(&[7], 1000 + sample)).collect();
    let x = Tensor::stack(&rows, 0);
    let y = x.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sin();
    (x, y)
}

/// A wrapped model; every rank starts from other values, rank 0's count.
pub(crate) fn wrapped(group: &mut Group, options: DdpOptions) -> (Model, Ddp) {
    let model = Model::new(group.rank() as i64 * 1000);
    let ddp = Ddp::new(&model.vs, group, options).expect("ranks agree");
    (model, ddp)
}

/// Half the distance from 1 to the next `f32`: what one operation may be off by, relative to its result.
pub(crate) const ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;

/// The largest gradient of a single sample in [`whole_gradients`].
pub(crate) const WHOLE_MAX: f64 = 8.0;

/// A gradient for each parameter, in the order of their names, summed over samples `range`: whole numbers of at most
/// [`WHOLE_MAX`] a sample. They are exact in any type, and so are their sums and those of their products, in any order:
/// no processor can differ about them.
pub(crate) fn whole_gradients(model: &Model, range: std::ops::Range<i64>) -> Vec<Tensor> {
    let of = |(index, (_, variable)): (usize, (String, Tensor))| {
        let at = Tensor::arange(variable.numel() as i64, (Kind::Int64, Device::Cpu));
        let of_sample = |sample: i64| {
            let mixed = &at * &at * 3 + &at * (7 * sample) + (5 * sample * sample + index as i64);
            mixed.remainder(17) - 8
        };
        let sum = range.clone().map(of_sample).sum::<Tensor>();
        sum.to_kind(Kind::Float).reshape(variable.size())
    };
    model.sorted().into_iter().enumerate().map(of).collect()
}

/// No element differs by more than `bound`.
pub(crate) fn assert_within(left: &[f32], right: &[f32], bound: f64) {
    assert_eq!(left.len(), right.len());
    for (at, (&l, &r)) in left.iter().zip(right).enumerate() {
        let off = (f64::from(l) - f64::from(r)).abs();
        assert!(off <= bound, "element {at}: {l} and {r}, off by {off:.1e} of {bound:.1e}");
    }
}

/// The text with which a closure of plain tch panics.
pub(crate) fn panic_text<T>(body: impl FnOnce() -> T) -> String {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(_) => String::from("no panic"),
        Err(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_default(),
    }
}

/// What a closure of plain tch gives, or the text with which it panics.
pub(crate) fn caught<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    })
}
