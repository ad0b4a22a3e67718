//! What the parts of the model take on this machine: the times by which [`Stages::Measured`](super::stages::Stages) cuts.
//!
//! Rank 0 runs an embedding, a block and a head of the size of its own part, each alone and without the ranks of `tp` and `cp`, and tells the others, so that all cut
//! alike. Of several passes the fastest counts: the others were held up.

use std::time::{Duration, Instant};

use anyhow::Result;
use phalanx_comm::Group;
use phalanx_ddp_core::amp;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::expert::ExpertParallel;
use phalanx_model_parallel::layer::{Builder, Pass};
use phalanx_model_parallel::tensor::TensorParallel;
use phalanx_model_parallel::Mesh;
use tch::{nn, Device, Kind, Tensor};

use super::batching::Batching;
use super::config::{Config, FloatKind, Model, Precision};
use super::context::Context;
use super::model::{Gpt, Layers, Together};
use super::stages::Costs;

/// Passes that are measured, and those before that find memory and code cold.
const MEASURED: usize = 5;
const WARMING_UP: usize = 2;

impl Costs {
    /// In seconds, as rank 0 measures them. Collective over the world.
    pub(crate) fn measured(
        config: &Config,
        mesh: &Mesh,
        batching: Batching,
        world: &mut Group,
    ) -> Result<Costs> {
        let mut times = [0.0; 3];
        if world.rank() == 0 {
            let device = world.device().map_or(Device::Cpu, Device::Cuda);
            times = Alone { config, mesh, batching, device }.times().inspect_err(|error| {
                world.abort(&format!("rank 0 could not measure layers for --stages: {error:#}"));
            })?;
        }
        world.tagged("times of layers").broadcast(&mut times[..], 0)?.wait()?;
        let [embedding, block, head] = times;
        Ok(Costs { embedding, block, head })
    }
}

/// A rank's part of the model, as if it were all of it.
struct Alone<'a> {
    config: &'a Config,
    mesh: &'a Mesh,
    batching: Batching,
    device: Device,
}

impl Alone<'_> {
    /// Of the embedding, a block and the head.
    fn times(&self) -> Result<[f64; 3]> {
        let group = TensorGroup::new(Group::single(phalanx_comm::GroupOptions::default())?);
        let experts = self.config.model.experts().map(|_| ExpertParallel::alone()).transpose()?;
        let context = Context::new(group);
        let together = Together { tp: TensorParallel::alone()?, context, experts };
        let nothing = Layers { blocks: 0..0, embeds: false, ends: false };
        let parts = [
            Layers { embeds: true, ..nothing.clone() },
            Layers { blocks: 0..1, ..nothing.clone() },
            Layers { ends: true, ..nothing },
        ];
        let mut times = [0.0; 3];
        for (time, layers) in times.iter_mut().zip(parts) {
            *time = self.time(layers, &together)?.as_secs_f64();
        }
        Ok(times)
    }

    /// Forward and backward of a micro-batch.
    fn time(&self, layers: Layers, together: &Together) -> Result<Duration> {
        let Self { config, device, .. } = *self;
        let model = self.model();
        let (embeds, ends) = (layers.embeds, layers.ends);
        let mut vs = nn::VarStore::new(device);
        let network = Gpt::new(&Builder::new(vs.root(), 0), &model, &[layers], together)?
            .recomputing(config.train.recompute);
        match config.ddp.parameter_kind.map(FloatKind::kind) {
            Some(Kind::BFloat16) => vs.bfloat16(),
            Some(Kind::Half) => vs.half(),
            _ => {}
        }
        let (samples, length) = self.samples()?;
        let count = samples * length;
        let words = Tensor::f_arange(count, (Kind::Int64, device))?;
        // Any words, most of them different.
        let words = words.f_mul_scalar(7919)?.f_remainder(model.vocab_size)?;
        let words = words.f_view([samples, length])?;
        let kind = config.ddp.parameter_kind.map_or(Kind::Float, FloatKind::kind);
        let shape = [samples, length, model.hidden_size];
        let input = Tensor::f_ones(shape, (kind, device))?.f_set_requires_grad(true)?;
        let forward = || -> Result<Tensor> {
            let input = (!embeds).then(|| input.shallow_clone());
            let output = network.hidden(0, (&words, input), (&Pass::training(1, 0), 1.0))?;
            Ok(match ends {
                true => network.loss(0, &output, &words)?,
                false => output.f_sum(Kind::Float)?,
            })
        };
        let mut least = Duration::MAX;
        for number in 0..WARMING_UP + MEASURED {
            let start = Instant::now();
            let output = match config.train.precision {
                Precision::Bf16 => amp::autocast(device, Kind::BFloat16, forward)??,
                Precision::Fp32 => forward()?,
            };
            output.f_backward()?;
            if let Device::Cuda(index) = device {
                tch::Cuda::synchronize(i64::try_from(index)?);
            }
            if number >= WARMING_UP {
                least = least.min(start.elapsed());
            }
        }
        Ok(least)
    }

    /// With this rank's share of heads, columns and words.
    fn model(&self) -> Model {
        let tp = i64::try_from(self.mesh.shape().tp).unwrap_or(1).max(1);
        let model = &self.config.model;
        let mut mine = model.clone();
        mine.vocab_size = (model.vocab_size + tp - 1) / tp;
        mine.num_attention_heads = model.num_attention_heads / tp;
        mine.num_key_value_heads = Some((model.kv_heads() / tp).max(1));
        mine.head_dim = Some(model.head_dim());
        mine.intermediate_size = Some(model.inner() / tp);
        mine
    }

    /// How many, and tokens of each that are this rank's.
    fn samples(&self) -> Result<(i64, i64)> {
        let longest = usize::try_from(self.config.model.max_position_embeddings)?;
        let length = self.config.data.sequence_length.min(longest) / self.mesh.shape().cp;
        Ok((i64::try_from(self.batching.micro_batch)?, i64::try_from(length.max(1))?))
    }
}
