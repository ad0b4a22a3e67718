//! The models and samples of `scripts/parity_fixtures.py`, bit for bit: k / 1024 with k from a hash of a name and an
//! index.

use std::collections::BTreeMap;

use tch::nn::{self, Module as _, ModuleT as _};
use tch::{Device, Kind, Tensor};

/// Samples of a batch.
pub(crate) const ROWS: usize = 4;
const INPUTS: usize = 5;
const OUTPUTS: usize = 3;

/// Which model: the classes of the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Four layers.
    Mlp,
    /// Beside them one layer that is used on even steps, one on odd steps, one on rank 1, one never.
    Branches,
    /// A layer that is used twice, one whose weight is the first one's, one never used.
    Tied,
    /// With a batch normalisation.
    Normed,
    /// With an embedding of sparse gradients.
    Embedded,
    /// The weights of the first times given numbers: see [`Network::products`].
    Products,
}

/// A model.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) vs: nn::VarStore,
    shape: Shape,
    layers: BTreeMap<&'static str, nn::Linear>,
    norm: Option<nn::BatchNorm>,
    embedding: Option<Tensor>,
}

impl Network {
    /// With the script's values on rank 0, and others elsewhere: rank 0's count.
    pub(crate) fn new(shape: Shape, rank: usize) -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let root = vs.root();
        let sizes: &[(&str, usize, usize)] = match shape {
            Shape::Mlp | Shape::Normed | Shape::Embedded | Shape::Products => {
                &[("a", INPUTS, 13), ("b", 13, 17), ("c", 17, 7), ("d", 7, OUTPUTS)]
            }
            Shape::Branches => &[
                ("a", INPUTS, 13),
                ("b", 13, 17),
                ("c", 17, 7),
                ("d", 7, OUTPUTS),
                ("even", INPUTS, OUTPUTS),
                ("never", INPUTS, OUTPUTS),
                ("odd", INPUTS, OUTPUTS),
                ("one", INPUTS, OUTPUTS),
            ],
            Shape::Tied => {
                &[("a", INPUTS, 13), ("t", 13, 13), ("d", 13, OUTPUTS), ("never", INPUTS, OUTPUTS)]
            }
        };
        let layer = |&(name, inputs, outputs): &(&'static str, usize, usize)| {
            (name, nn::linear(&root / name, len(inputs), len(outputs), nn::LinearConfig::default()))
        };
        let layers = sizes.iter().map(layer).collect();
        let norm = (shape == Shape::Normed)
            .then(|| nn::batch_norm1d(&root / "norm", 17, nn::BatchNormConfig::default()));
        let embedding = (shape == Shape::Embedded)
            .then(|| (&root / "e").var("weight", &[11, len(INPUTS)], nn::Init::Const(0.0)));
        for (name, mut tensor) in vs.variables() {
            let count = tensor.numel();
            let values = exact((0..count).map(|index| weight(&name, index)), &tensor.size());
            let one = name == "norm.weight" || name == "norm.running_var";
            let values = values + f64::from(u8::from(one)) + rank as f64;
            tch::no_grad(|| tensor.copy_(&values));
        }
        Self { vs, shape, layers, norm, embedding }
    }

    /// Sum of squared errors over `rows` samples of a rank's micro-batch `part` of a step.
    pub(crate) fn loss_sum(&self, step: usize, rank: usize, part: usize, rows: usize) -> Tensor {
        let (_, y) = samples(step * 64 + rank * 16 + part * ROWS, rows);
        (self.output(step, rank, part, rows) - y).square().sum(Kind::Float)
    }

    /// What the model says of those samples.
    pub(crate) fn output(&self, step: usize, rank: usize, part: usize, rows: usize) -> Tensor {
        let (x, _) = samples(step * 64 + rank * 16 + part * ROWS, rows);
        let through = |name: &str, of: &Tensor| self.layers[name].forward(of);
        match self.shape {
            Shape::Mlp | Shape::Products => self.mlp(&x),
            Shape::Branches => {
                let turn = if step.is_multiple_of(2) { "even" } else { "odd" };
                let mut y = self.mlp(&x) + through(turn, &x).tanh();
                if rank == 1 {
                    y += through("one", &x).tanh();
                }
                y
            }
            Shape::Tied => {
                let y = through("t", &through("a", &x).tanh()).tanh();
                let y = through("t", &y).tanh();
                let again = y.matmul(&self.layers["a"].ws).narrow(1, 0, len(OUTPUTS));
                through("d", &y) + again.tanh()
            }
            Shape::Normed => {
                let norm = self.norm.as_ref().expect("made with the model");
                let y = norm.forward_t(&through("b", &through("a", &x).tanh()), true);
                through("d", &through("c", &y.tanh()).tanh())
            }
            Shape::Embedded => {
                let at: Vec<i64> =
                    (0..ROWS).map(|row| len((step * 3 + rank * 2 + row * row) % 11)).collect();
                let weight = self.embedding.as_ref().expect("made with the model");
                let at = Tensor::from_slice(&at);
                self.mlp(&(x + Tensor::embedding(weight, &at, -1, false, true)))
            }
        }
    }

    /// Each weight times its gradient, which is 3 (k + 1/2048) / 64 with k from 16 to 31.
    pub(crate) fn products(&self, step: usize, rank: usize) -> Tensor {
        // From the last layer to the first, so that gradients become ready as elsewhere.
        let mut variables: Vec<(String, Tensor)> = self.vs.variables().into_iter().collect();
        variables.sort_by(|left, right| left.0.cmp(&right.0));
        let product = |(name, tensor): (String, Tensor)| {
            let of = format!("{name} {step} {rank}");
            let value =
                |index| (f64::from(16 + number(&of, index) % 16) + 1.0 / 2048.0) * 3.0 / 64.0;
            let values: Vec<f64> = (0..tensor.numel()).map(value).collect();
            let gradient = Tensor::from_slice(&values).to_kind(Kind::Float).reshape(tensor.size());
            (tensor * gradient).sum(Kind::Float)
        };
        variables.into_iter().map(product).sum()
    }

    fn mlp(&self, x: &Tensor) -> Tensor {
        let y = ["a", "b", "c"]
            .iter()
            .fold(x.shallow_clone(), |x, name| self.layers[name].forward(&x).tanh());
        self.layers["d"].forward(&y)
    }

    /// All variables.
    pub(crate) fn tensors(&self) -> BTreeMap<String, Vec<f32>> {
        let values = |tensor: &Tensor| {
            let mut values = vec![0.0; tensor.numel()];
            tensor.detach().contiguous().copy_data(&mut values, tensor.numel());
            values
        };
        self.vs.variables().iter().map(|(name, tensor)| (name.clone(), values(tensor))).collect()
    }
}

/// Inputs and targets of samples `first`, `first` + 1, …
fn samples(first: usize, rows: usize) -> (Tensor, Tensor) {
    let values = |name: &str, width: usize, half: u32| {
        let k = |index| i64::from(number(name, index) % (2 * half + 1)) - i64::from(half);
        exact((first * width..(first + rows) * width).map(k), &[len(rows), len(width)])
    };
    (values("x", INPUTS, 1024), values("y", OUTPUTS, 512))
}

/// 32 bits that depend on a name and an index alone: FNV-1a of the name, then murmur3's finaliser.
fn number(name: &str, index: usize) -> u32 {
    let fnv = |x: u32, byte: u8| (x ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let index = u32::try_from(index).expect("few values");
    let mut x = name.bytes().fold(0x811C_9DC5, fnv).wrapping_add(index.wrapping_mul(0x9E37_79B1));
    x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
    x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
    x ^ (x >> 16)
}

/// A magnitude of 128 to 384.
fn weight(name: &str, index: usize) -> i64 {
    let n = number(name, index);
    let k = 128 + i64::from(n % 257);
    if (n >> 16) & 1 == 1 {
        -k
    } else {
        k
    }
}

fn exact(numerators: impl Iterator<Item = i64>, shape: &[i64]) -> Tensor {
    let values: Vec<f32> = numerators.map(|k| k as f32 / 1024.0).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn len(count: usize) -> i64 {
    i64::try_from(count).expect("a small number")
}
