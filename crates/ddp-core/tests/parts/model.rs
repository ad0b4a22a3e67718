//! The mesh and the model that the tests share. It is in f64: what differs between meshes is a few units in the last place.

use std::collections::BTreeMap;
use std::ops::Range;

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::{autograd, Cut, Ddp, DdpOptions, ModelPart, Sync, Zero};
use tch::{nn, Device, Kind, Tensor};

/// Sizes of the model: words, width, and width inside of a block (of each of its two halves).
pub(crate) const WORDS: i64 = 11;
pub(crate) const WIDTH: i64 = 6;
pub(crate) const INNER: i64 = 9;
/// Samples of a step, over all ranks.
pub(crate) const BATCH: i64 = 12;

/// Ranks along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mesh {
    pub(crate) pp: usize,
    pub(crate) dp: usize,
    pub(crate) tp: usize,
}

pub(crate) const ALONE: Mesh = Mesh { pp: 1, dp: 1, tp: 1 };

impl Mesh {
    pub(crate) fn world_size(self) -> usize {
        self.pp * self.dp * self.tp
    }
}

pub(crate) fn mesh(pp: usize, dp: usize, tp: usize) -> Mesh {
    Mesh { pp, dp, tp }
}

/// Runs `rank` on every rank of a mesh; parameters of ZeRO-3 are gathered where ranks share no memory.
pub(crate) fn on_mesh<T: Send + 'static>(
    mesh: Mesh,
    zero: Zero,
    rank: impl Fn(Rank) -> T + Send + std::marker::Sync + 'static,
) -> Vec<T> {
    let link = if zero == Zero::Three { HostLink::Tcp } else { HostLink::Auto };
    run_ranks_with(mesh.world_size(), link, GroupOptions::default(), move |world| {
        rank(Rank::new(world, mesh))
    })
}

/// A rank's place and groups.
pub(crate) struct Rank {
    pub(crate) mesh: Mesh,
    pub(crate) at: Mesh,
    pub(crate) world: Group,
    pub(crate) data: Group,
    pub(crate) model: Group,
    tensor: TensorGroup,
    stages: TensorGroup,
}

impl Rank {
    fn new(mut world: Group, mesh: Mesh) -> Self {
        let rank = world.rank();
        let (pp, dp, tp) = (rank / (mesh.dp * mesh.tp), rank / mesh.tp % mesh.dp, rank % mesh.tp);
        let mut split =
            |color: usize| world.split(Some(u32::try_from(color).unwrap()), 0).unwrap().unwrap();
        let data = split(pp * mesh.tp + tp);
        let model = split(dp);
        let tensor = TensorGroup::new(split(pp * mesh.dp + dp));
        let stages = TensorGroup::new(split(dp * mesh.tp + tp));
        Self { mesh, at: Mesh { pp, dp, tp }, world, data, model, tensor, stages }
    }

    pub(crate) fn is_last(&self) -> bool {
        self.at.pp + 1 == self.mesh.pp
    }

    /// Of `len` indices those of this rank: uneven where they must be.
    fn share(&self, len: i64) -> Range<i64> {
        let (tp, parts) = (self.at.tp as i64, self.mesh.tp as i64);
        len * tp / parts..len * (tp + 1) / parts
    }
}

/// Values that depend on the name and the place in the whole alone.
fn values(name: &str, shape: &[i64]) -> Tensor {
    let salt = f64::from(crc(name) % 97);
    let len: i64 = shape.iter().product();
    let at = Tensor::arange(len, (Kind::Double, Device::Cpu));
    (((at * 0.73 + salt) * 1.3).sin() * 0.4).reshape(shape)
}

fn crc(name: &str) -> u32 {
    name.bytes().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)))
}

/// This rank's part of the model.
pub(crate) struct Part {
    pub(crate) vs: nn::VarStore,
    pub(crate) cuts: BTreeMap<String, Cut>,
    embedding: Tensor,
    blocks: Vec<Block>,
}

struct Block {
    norm: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    bias: Tensor,
}

impl Part {
    pub(crate) fn new(rank: &Rank, kind: Kind) -> Self {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let mut cuts = BTreeMap::new();
        let mut make = |name: String, shape: &[i64], cut: Option<(usize, Vec<Range<i64>>)>| {
            let mut all = values(&name, shape);
            if let Some((dim, ranges)) = cut {
                let of = |range: &Range<i64>| {
                    all.narrow(dim as i64, range.start, range.end - range.start)
                };
                let parts: Vec<Tensor> = ranges.iter().map(of).collect();
                all = Tensor::cat(&parts, dim as i64);
                cuts.insert(name.clone(), Cut::new(shape, dim, ranges));
            }
            vs.root().var_copy(&name, &all)
        };
        let embedding = make("embedding".to_owned(), &[WORDS, WIDTH], None);
        let own = rank.share(INNER);
        let halves = vec![own.clone(), own.start + INNER..own.end + INNER];
        let layers = match rank.mesh.pp {
            1 => 0..2,
            _ => rank.at.pp..rank.at.pp + 1,
        };
        let block = |layer: usize| {
            let name = |of: &str| format!("layer{layer}-{of}");
            Block {
                norm: make(name("norm"), &[WIDTH], None),
                up: make(name("up"), &[2 * INNER, WIDTH], Some((0, halves.clone()))),
                up_bias: make(name("up_bias"), &[2 * INNER], Some((0, halves.clone()))),
                down: make(name("down"), &[WIDTH, INNER], Some((1, vec![own.clone()]))),
                bias: make(name("bias"), &[WIDTH], None),
            }
        };
        let blocks = layers.map(block).collect();
        vs.set_kind(kind);
        Self { vs, cuts, embedding, blocks }
    }

    pub(crate) fn sorted(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> = self.vs.variables().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    pub(crate) fn variable(&self, name: &str) -> Tensor {
        self.vs.variables().remove(name).unwrap()
    }
}

/// A part with its `Ddp`.
pub(crate) fn wrapped(rank: &mut Rank, options: DdpOptions, kind: Kind) -> (Part, Ddp) {
    let part = Part::new(rank, kind);
    wrapped_as_it_is(part, rank, options)
}

/// As [`wrapped`], with matrices that do not train.
pub(crate) fn wrapped_frozen(rank: &mut Rank, options: DdpOptions) -> (Part, Ddp) {
    let part = Part::new(rank, Kind::Float);
    for (_, variable) in part.vs.variables().into_iter().filter(|(name, _)| name.contains("up")) {
        let _same = variable.set_requires_grad(false);
    }
    wrapped_as_it_is(part, rank, options)
}

fn wrapped_as_it_is(part: Part, rank: &mut Rank, options: DdpOptions) -> (Part, Ddp) {
    let ddp = Ddp::new(&part.vs, &mut rank.data, options).unwrap();
    let cuts = part.cuts.clone();
    let given = ModelPart { model: &mut rank.model, world: &mut rank.world, cuts };
    ddp.set_part(given).unwrap();
    (part, ddp)
}

/// Small caps: several buckets of uneven sizes.
pub(crate) fn options(zero: Zero) -> DdpOptions {
    DdpOptions {
        bucket_bytes: vec![256, 900],
        zero,
        fingerprint_interval: 2,
        ..DdpOptions::default()
    }
}

/// Where a part enters what `tp` ranks compute by themselves: gradients add up.
fn entered(x: &Tensor, tensor: &TensorGroup) -> Tensor {
    let group = tensor.clone();
    let outputs = autograd::function(
        "entered",
        &[x],
        |_, inputs| Ok((vec![inputs[0].f_view_as(inputs[0])?], ())),
        move |_, gradients| {
            let gradient = gradients[0].as_ref().unwrap();
            Ok(vec![Some(group.all_reduce(gradient, "entered")?)])
        },
    );
    outputs.unwrap().remove(0)
}

/// Where what `tp` ranks have computed by themselves adds up.
fn left(x: &Tensor, tensor: &TensorGroup) -> Tensor {
    let group = tensor.clone();
    let outputs = autograd::function(
        "left",
        &[x],
        |_, inputs| Ok((vec![group.all_reduce(inputs[0], "left")?], ())),
        |_, gradients| Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone)]),
    );
    outputs.unwrap().remove(0)
}

impl Block {
    /// `[samples, WIDTH]` to the same.
    fn forward(&self, x: &Tensor, tensor: &TensorGroup) -> Tensor {
        let inner = entered(&(x * &self.norm), tensor).matmul(&self.up.tr()) + &self.up_bias;
        let halves = inner.chunk(2, 1);
        let outer = (halves[0].tanh() * &halves[1]).matmul(&self.down.tr());
        x + left(&outer, tensor) + &self.bias
    }
}

impl Part {
    /// This rank's sum of losses over its samples of a step (of the last stage; else 0), and the gradients of its variables, by name: as an
    /// engine would bring them to the `Ddp`.
    fn gradients(&self, rank: &Rank, step: i64) -> (f64, Vec<Tensor>) {
        let micro = BATCH / rank.mesh.dp as i64;
        let first = step * BATCH + rank.at.dp as i64 * micro;
        let ids = Tensor::arange(micro, (Kind::Int64, Device::Cpu)) + first;
        let words = (&ids * 7).remainder(WORDS);
        let next = (&ids * 5 + 3).remainder(WORDS);
        let all = self.sorted();
        let inputs: Vec<Tensor> =
            all.iter().map(|(_, variable)| variable.shallow_clone()).collect();
        let x = match rank.at.pp {
            0 => self.embedding.index_select(0, &words),
            _ => {
                let kind = self.embedding.kind();
                receive(&rank.stages, &[micro, WIDTH], kind, 0).set_requires_grad(true)
            }
        };
        let y =
            self.blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x, &rank.tensor));
        let (loss, output) = if rank.is_last() {
            let logits = y.matmul(&self.embedding.tr()).log_softmax(1, None::<Kind>);
            let loss = -logits.gather(1, &next.unsqueeze(1), false).sum(None::<Kind>);
            (loss.double_value(&[]), loss)
        } else {
            send(&rank.stages, &y, 1);
            let gradient = receive(&rank.stages, &y.size(), y.kind(), 1);
            (0.0, (y * gradient).sum(None::<Kind>))
        };
        let mut wanted: Vec<Tensor> = inputs;
        if rank.at.pp > 0 {
            wanted.push(x.shallow_clone());
        }
        let mut gradients = Tensor::run_backward(&[&output], &wanted, false, false);
        if rank.at.pp > 0 {
            send(&rank.stages, &gradients.pop().unwrap(), 0);
        }
        let tied = all.iter().position(|(name, _)| name == "embedding").unwrap();
        gradients[tied] = rank.stages.all_reduce(&gradients[tied], "embedding").unwrap();
        (loss, gradients)
    }

    /// A backward and the exchange of its gradients; gives the sum of losses.
    pub(crate) fn backward(&self, rank: &Rank, ddp: &Ddp, step: i64) -> f64 {
        self.backward_changed(rank, ddp, step, |_, _| {}).unwrap()
    }

    /// As [`backward`](Self::backward), with gradients changed by `change` before they are exchanged.
    pub(crate) fn backward_changed(
        &self,
        rank: &Rank,
        ddp: &Ddp,
        step: i64,
        change: impl Fn(&str, &mut Tensor),
    ) -> phalanx_ddp_core::Result<f64> {
        let (loss, mut gradients) = self.gradients(rank, step);
        let all = self.sorted();
        let names = all.iter().map(|(name, _)| name);
        names.zip(&mut gradients).for_each(|(name, gradient)| change(name, gradient));
        let products = all.iter().zip(&gradients).map(|((_, v), g)| (v * g).sum(None::<Kind>));
        let micro = BATCH as f64 / rank.mesh.dp as f64;
        ddp.backward(&products.sum::<Tensor>(), micro, Sync::Reduce)?;
        Ok(loss)
    }
}

fn send(group: &TensorGroup, tensor: &Tensor, to: usize) {
    group.start_send(tensor, to, "activation").unwrap().wait().unwrap();
}

fn receive(group: &TensorGroup, shape: &[i64], kind: Kind, from: usize) -> Tensor {
    group.start_receive(shape, (kind, Device::Cpu), from, "activation").unwrap().wait().unwrap()
}

/// By how much two ways of computing the same in f64 may differ after `steps` steps of SGD, for numbers of size `size`.
///
/// In a step a number comes of fewer than `TERMS` products and sums: 12 samples of 11 words by 6 columns in the loss, 2 blocks of 18 by 6
/// products forward and twice as many backward, and a norm of fewer than 600 parameters; each is rounded by at most ε of the sum of magnitudes,
/// which is below 8 times the result's size with values of 0.4. A step hands on what was there and adds lr · |Hessian| times that: less
/// than once more, with rates of 0.1 and losses that are means.
pub(crate) fn bound(size: f64, steps: i32) -> f64 {
    const TERMS: f64 = 12.0 * 11.0 * 6.0 + 3.0 * 2.0 * 18.0 * 6.0 + 600.0;
    size.abs().max(1.0) * 8.0 * TERMS * f64::EPSILON * 2_f64.powi(steps)
}
