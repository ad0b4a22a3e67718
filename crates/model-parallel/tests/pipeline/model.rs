//! A small model of layers that are all alike in shape, in parts or whole, and how it trains.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Once;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::optim::{AdamW, Optimizer, ParameterGroups};
use phalanx_ddp_core::{recompute, Ddp, DdpOptions, Sync, Zero};
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::{linear, Builder, Init};
use phalanx_model_parallel::pipeline::partition::partition_into_chunks;
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::Pipeline;
use phalanx_model_parallel::{Axes, Mesh, Result, Shape};
use tch::{nn, Device, Kind, Tensor};

pub(crate) const LAYERS: usize = 8;
const WIDTH: i64 = 8;
const BATCH: i64 = 3;
const STEPS: usize = 3;

/// What a run comes to on a rank: losses by step and micro-batch, and the weights that it has.
pub(crate) type Trained = (Vec<Vec<f64>>, BTreeMap<String, Vec<u32>>);

/// How the model trains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) dp: usize,
    pub(crate) micro_batches: usize,
    pub(crate) zero: Zero,
    pub(crate) recomputes: bool,
}

impl Setting {
    pub(crate) fn of(micro_batches: usize) -> Self {
        Self { dp: 1, micro_batches, zero: Zero::Off, recomputes: false }
    }
}

/// The first calls choose kernels: before ranks make them side by side.
pub(crate) fn compute_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tch::set_num_threads(1);
        let x = Tensor::ones([BATCH, WIDTH], (Kind::Float, Device::Cpu));
        let weight =
            Tensor::ones([WIDTH, WIDTH], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        linear(&x, &weight, None).unwrap().tanh().square().sum(Kind::Float).backward();
    });
}

/// Numbers between −1 and 1 that depend on what they are for alone.
pub(crate) fn values(what: &str, numbers: &[usize], shape: &[i64]) -> Tensor {
    let key = numbers
        .iter()
        .fold(Key::of_seed(3).named(what), |key, number| key.numbered(*number as u64));
    let count = shape.iter().product::<i64>().unsigned_abs();
    let values: Vec<f64> = (0..count).map(|place| 2.0 * key.uniform(place) - 1.0).collect();
    Tensor::from_slice(&values).to_kind(Kind::Float).view(shape)
}

/// One layer: x + tanh(norm(x) · weightᵀ + bias).
#[derive(Debug)]
pub(crate) struct Layer {
    norm: [Tensor; 2],
    product: [Tensor; 2],
}

impl Layer {
    fn new(builder: &Builder<'_>) -> Self {
        let whole = |name, shape: &[i64], init| builder.whole(name, shape, init).unwrap();
        let of_norm =
            |name, value| (builder / "norm").whole(name, &[WIDTH], Init::Constant(value)).unwrap();
        let norm = [of_norm("weight", 1.0), of_norm("bias", 0.0)];
        let product = [
            whole("weight", &[WIDTH, WIDTH], Init::Normal { std: 0.4 }),
            whole("bias", &[WIDTH], Init::Normal { std: 0.1 }),
        ];
        Self { norm, product }
    }

    fn again(&self) -> Self {
        let clone = |pair: &[Tensor; 2]| [pair[0].shallow_clone(), pair[1].shallow_clone()];
        Self { norm: clone(&self.norm), product: clone(&self.product) }
    }

    fn run(&self, x: &Tensor) -> phalanx_ddp_core::Result<Tensor> {
        let [gain, bias] = &self.norm;
        let normed = x.f_layer_norm([WIDTH], Some(gain), Some(bias), 1e-5, false)?;
        Ok(x.f_add(&linear(&normed, &self.product[0], Some(&self.product[1]))?.f_tanh()?)?)
    }

    fn forward(&self, x: &Tensor, recomputes: bool) -> Result<Tensor> {
        if !recomputes {
            return Ok(self.run(x)?);
        }
        let layer = self.again();
        Ok(recompute::checkpointed_one(x, move |x| layer.run(x))?)
    }
}

/// Some layers of the model, the ones of a chunk.
#[derive(Debug)]
pub(crate) struct Part {
    layers: Vec<Layer>,
    is_last: bool,
}

impl Part {
    pub(crate) fn new(builder: &Builder<'_>, range: Range<usize>) -> Self {
        let is_last = range.end == LAYERS;
        let layers = range.map(|layer| Layer::new(&(builder / format!("layer{layer}")))).collect();
        Self { layers, is_last }
    }

    /// `place` says which samples: data-parallel rank, step and micro-batch.
    pub(crate) fn forward(
        &self,
        place: &[usize],
        input: Option<Tensor>,
        recomputes: bool,
    ) -> Result<Tensor> {
        let mut x = input.unwrap_or_else(|| values("samples", place, &[BATCH, WIDTH]));
        for layer in &self.layers {
            x = layer.forward(&x, recomputes)?;
        }
        if !self.is_last {
            return Ok(x);
        }
        let error = x.f_sub(&values("targets", place, &[BATCH, WIDTH]))?;
        Ok(error.f_square()?.f_sum(Kind::Float)?)
    }
}

/// Weights of micro-batches that are not all the same.
pub(crate) fn weights(count: usize, dp_rank: usize) -> Vec<f64> {
    (0..count).map(|micro_batch| (BATCH + (micro_batch + dp_rank) as i64 % 2) as f64).collect()
}

pub(crate) fn ddp(vs: &nn::VarStore, group: &mut Group, zero: Zero) -> (Ddp, Optimizer) {
    // Several buckets of uneven sizes.
    let options = DdpOptions { bucket_bytes: vec![200, 700], zero, ..DdpOptions::default() };
    let ddp = Ddp::new(vs, group, options).unwrap();
    let optimizer = Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default()).unwrap();
    (ddp, optimizer)
}

pub(crate) fn bits(vs: &nn::VarStore) -> BTreeMap<String, Vec<u32>> {
    let variables: BTreeMap<String, Tensor> = vs.variables().into_iter().collect();
    let bits = |tensor: &Tensor| {
        let values = Vec::<f32>::try_from(tensor.detach().flatten(0, -1)).unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    variables.iter().map(|(name, tensor)| (name.clone(), bits(tensor))).collect()
}

/// One process for each data-parallel rank that accumulates over the micro-batches, without any pipeline.
pub(crate) fn whole(setting: Setting) -> Vec<Trained> {
    compute_once();
    run_ranks(setting.dp, move |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let model = Part::new(&Builder::new(vs.root(), 1), 0..LAYERS);
        let rank = group.rank();
        let (ddp, mut optimizer) = ddp(&vs, &mut group, setting.zero);
        let mut all = Vec::new();
        for step in 0..STEPS {
            let mut losses = Vec::new();
            for (at, weight) in weights(setting.micro_batches, rank).into_iter().enumerate() {
                let loss = model.forward(&[rank, step, at], None, setting.recomputes).unwrap();
                let is_last = at + 1 == setting.micro_batches;
                let sync = if is_last { Sync::Reduce } else { Sync::Accumulate };
                losses.push(loss.double_value(&[]));
                ddp.backward(&loss, weight, sync).unwrap();
            }
            optimizer.step(None).unwrap();
            all.push(losses);
        }
        (all, bits(&vs))
    })
}

/// The mesh's groups of this rank: of the pipeline, and of data-parallel ranks.
pub(crate) fn groups(world: &mut Group, pp: usize, dp: usize) -> (Mesh, Group, Group) {
    let mesh = Mesh::new(Shape { pp, dp_shard: dp, ..Shape::default() }, pp * dp).unwrap();
    let mut groups = mesh.split_into(world, &[Axes::PP, Axes::DP_CP]).unwrap();
    let (pipeline, data) = (groups.take(Axes::PP).unwrap(), groups.take(Axes::DP_CP).unwrap());
    (mesh, pipeline, data)
}

/// The same in a pipeline of `pp` ranks; `together` as over NCCL.
pub(crate) fn pipelined(
    pp: usize,
    kind: ScheduleKind,
    setting: Setting,
    together: bool,
) -> Vec<Trained> {
    compute_once();
    run_ranks(pp * setting.dp, move |mut world| {
        let (mesh, group, mut data) = groups(&mut world, pp, setting.dp);
        let schedule = Schedule::new(kind, pp, setting.micro_batches).unwrap();
        let ranges = partition_into_chunks(&[1.0; LAYERS], &schedule, group.rank()).unwrap();
        let vs = nn::VarStore::new(Device::Cpu);
        let builder = Builder::new(vs.root(), 1);
        let chunks: Vec<Part> =
            ranges.into_iter().map(|range| Part::new(&builder, range)).collect();
        let dp_rank = data.rank();
        let (ddp, mut optimizer) = ddp(&vs, &mut data, setting.zero);
        let mut pipeline = Pipeline::new(TensorGroup::new(group), schedule, Device::Cpu)
            .unwrap()
            .on_mesh(&mesh, world.rank())
            .unwrap();
        if together {
            pipeline = pipeline.together().unwrap();
        }
        let mut all = Vec::new();
        for step in 0..STEPS {
            let mut stage = |chunk: usize, at: usize, input: Option<Tensor>| {
                chunks[chunk].forward(&[dp_rank, step, at], input, setting.recomputes)
            };
            let weights = weights(setting.micro_batches, dp_rank);
            let evaluated = pipeline.evaluate(&mut stage).unwrap();
            let output = pipeline.step(&mut stage, &ddp, &weights).unwrap();
            assert_eq!(evaluated, output.losses);
            assert!(output.idle <= output.elapsed);
            optimizer.step(None).unwrap();
            all.push(output.losses);
        }
        (all, bits(&vs))
    })
}

/// A pipeline against one process, bit for bit.
pub(crate) fn check(pp: usize, kind: ScheduleKind, setting: Setting, together: bool) {
    let what = format!("pp {pp}, {kind}, {setting:?}, together {together}");
    let expected = whole(setting);
    let actual = pipelined(pp, kind, setting, together);
    let mut names = 0;
    for (rank, (losses, weights)) in actual.iter().enumerate() {
        let (expected_losses, expected_weights) = &expected[rank % setting.dp];
        assert_eq!(losses, expected_losses, "{what}, rank {rank}");
        for (name, bits) in weights {
            assert_eq!(bits, &expected_weights[name], "{what}, rank {rank}, {name}");
        }
        names += weights.len();
    }
    let all: usize = expected.iter().map(|(_, weights)| weights.len()).sum();
    assert_eq!(names, all, "{what}: every stage has its layers");
}
