//! Communication hooks: each against an oracle in f64, on one to four ranks, in buckets of uneven sizes; the same bits on every rank; nothing that
//! error feedback keeps is lost.

#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers"
)]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod conservation;
mod means;
mod semantics;
mod stated;

use phalanx_comm::Group;
use phalanx_ddp_core::hooks::{
    Cast, ErrorFeedback, Int8Blocks, Noop, Plain, PowerSgd, PowerSgdOptions, TopK,
};
use phalanx_ddp_core::{Ddp, DdpOptions, Result, Zero};
use tch::{Device, Kind, Tensor};

/// Half the distance from 1 to the next number of a kind.
const U32: f64 = f32::EPSILON as f64 / 2.0;
const UBF16: f64 = 1.0 / 256.0;
const UF16: f64 = 1.0 / 2048.0;

/// A hook by name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    Plain,
    Bf16,
    Fp16,
    Int8,
    TopK(f64),
    PowerSgd(usize),
    Noop,
    Fed(&'static Which),
    PowerSgdInBf16,
}

use Which::{Bf16, Fed, Fp16, Int8, PowerSgdInBf16};

/// Every hook that comes to the same on all ranks.
const ALL: [Which; 12] = [
    Which::Plain,
    Bf16,
    Fp16,
    Int8,
    Which::TopK(0.1),
    Which::PowerSgd(2),
    Fed(&Bf16),
    Fed(&Fp16),
    Fed(&Int8),
    Fed(&Which::TopK(0.1)),
    Fed(&Which::PowerSgd(2)),
    PowerSgdInBf16,
];

fn power_sgd(rank: usize) -> PowerSgd {
    PowerSgd::new(PowerSgdOptions { rank, start_step: 0, ..Default::default() })
}

impl Which {
    fn set(self, ddp: &Ddp) -> Result<()> {
        let int8 = Int8Blocks { block: 64 };
        match self {
            Self::Plain => ddp.set_hook(Plain),
            Self::Bf16 => ddp.set_hook(Cast::bf16()),
            Self::Fp16 => ddp.set_hook(Cast::fp16()),
            Self::Int8 => ddp.set_hook(int8),
            Self::TopK(fraction) => ddp.set_hook(TopK { fraction }),
            Self::PowerSgd(rank) => ddp.set_hook(power_sgd(rank)),
            Self::Noop => ddp.set_hook(Noop),
            Self::PowerSgdInBf16 => {
                let inner = Cast::around(Kind::BFloat16, power_sgd(2));
                ddp.set_hook(ErrorFeedback::around(inner))
            }
            Self::Fed(Self::Bf16) => ddp.set_hook(ErrorFeedback::around(Cast::bf16())),
            Self::Fed(Self::Fp16) => ddp.set_hook(ErrorFeedback::around(Cast::fp16())),
            Self::Fed(Self::Int8) => ddp.set_hook(ErrorFeedback::around(int8)),
            Self::Fed(&Self::TopK(fraction)) => {
                ddp.set_hook(ErrorFeedback::around(TopK { fraction }))
            }
            Self::Fed(&Self::PowerSgd(rank)) => {
                ddp.set_hook(ErrorFeedback::around(power_sgd(rank)))
            }
            Self::Fed(other) => unreachable!("{other:?} has no losses"),
        }
    }
}

/// Parameters by name and shape: matrices, vectors, and one matrix in another order of memory; the last ones are ready first.
const SHAPES: [(&str, &[i64]); 7] = [
    ("one", &[40, 30]),
    ("bias", &[70]),
    ("kernel", &[16, 6, 3, 3]),
    ("two", &[9, 200]),
    ("tiny", &[2, 3]),
    ("three", &[64, 33]),
    ("last", &[5]),
];

const CAPS: [usize; 3] = [6000, 500, 9000];

fn options(zero: Zero) -> DdpOptions {
    DdpOptions { bucket_bytes: CAPS.to_vec(), zero, ..DdpOptions::default() }
}

/// The parameters above, and a loss whose gradients are what a test wants.
struct Model {
    named: Vec<(String, Tensor)>,
}

impl Model {
    fn new() -> Self {
        let named = SHAPES.map(|(name, shape)| {
            let tensor = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
            // The kernel lies channels last.
            let tensor = match shape.len() {
                4 => tensor.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]),
                _ => tensor,
            };
            (name.to_owned(), tensor.set_requires_grad(true))
        });
        Self { named: named.into() }
    }

    fn wrap(&self, group: &mut Group, options: DdpOptions) -> Ddp {
        let named = self.named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        Ddp::from_tensors(named.collect(), vec![], group, options).unwrap()
    }

    /// A sum whose gradients are `wanted`, which become ready from the last parameter to the first.
    fn loss(&self, wanted: &[Tensor]) -> Tensor {
        self.named.iter().zip(wanted).map(|((_, tensor), g)| (tensor * g).sum(Kind::Float)).sum()
    }

    /// As [`loss`](Self::loss), ready from the first parameter to the last.
    fn loss_from_the_end(&self, wanted: &[Tensor]) -> Tensor {
        let terms = self.named.iter().zip(wanted).rev();
        terms.map(|((_, tensor), g)| (tensor * g).sum(Kind::Float)).sum()
    }

    fn gradients(&self) -> Vec<Vec<f32>> {
        self.named.iter().map(|(_, tensor)| values(&tensor.grad())).collect()
    }
}

/// In the order of the dimensions.
fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().contiguous();
    let mut out = vec![0.0; tensor.numel()];
    tensor.copy_data(&mut out, tensor.numel());
    out
}

/// The gradients that a rank has in a step: of very different sizes, and of several signs.
fn gradients(rank: usize, step: usize) -> Vec<Tensor> {
    let of = |(index, (_, shape)): (usize, &(&str, &[i64]))| {
        let len: i64 = shape.iter().product();
        let at = Tensor::arange(len, (Kind::Double, Device::Cpu));
        let seed = (rank * 31 + step * 7 + index * 131) as f64;
        let noise: Tensor = ((&at + seed * 17.3) * 12.9898).sin();
        let size: Tensor = ((&at + seed) * 0.0137).sin().exp();
        (noise * size * 0.02 * (index as f64 + 1.0)).to_kind(Kind::Float).reshape(*shape)
    };
    SHAPES.iter().enumerate().map(of).collect()
}

/// Largest magnitude.
fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |a, b| b.abs().max(a))
}
