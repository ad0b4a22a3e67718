//! A rank's place in the mesh: which ranks it computes with, and which layers it has.

use std::ops::Range;

use anyhow::Result;
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::pipeline::schedule::Schedule;
use phalanx_model_parallel::tensor::TensorParallel;
use phalanx_model_parallel::{Axes, Axis, Error, Mesh, Nodes};

use super::batching::Batching;
use super::config::{Config, ConfigError, Experts, Model};
use super::context::Context;
use super::experts::ExpertPlace;
use super::model::{Layers, Together};

/// The groups of the mesh that a trainer needs.
const GROUPS: [Axes; 6] = [Axes::TP, Axes::PP, Axes::CP, Axes::DP, Axes::DP_CP, Axes::MODEL];

/// A rank among the others.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) mesh: Mesh,
    /// In the world.
    pub(crate) rank: usize,
    /// The ranks with which it computes a batch, of its own stage.
    pub(crate) together: Together,
    /// The stages of its pipeline.
    pub(crate) stages: TensorGroup,
    /// Those with the same parameters, and other samples or tokens.
    pub(crate) data: Group,
    /// Those with which it has one copy of the model.
    pub(crate) model: Group,
    /// Those that read different samples.
    pub(crate) readers: Group,
    /// Those of experts, in a model of experts.
    pub(crate) experts: Option<ExpertPlace>,
}

impl Place {
    /// Makes the groups. Collective over the world.
    pub(crate) fn new(config: &Config, mesh: Mesh, world: &mut Group) -> Result<Place> {
        let rank = world.rank();
        let mut groups = mesh.split_into(world, &GROUPS)?;
        let mut tensors = |axes| groups.take(axes).map(TensorGroup::new);
        let (tp, stages) = (tensors(Axes::TP)?, tensors(Axes::PP)?);
        let context = Context::new(tensors(Axes::CP)?);
        let tp = TensorParallel { group: tp, sequence: config.mesh.sequence_parallel };
        let (data, model) = (groups.take(Axes::DP_CP)?, groups.take(Axes::MODEL)?);
        let readers = groups.take(Axes::DP)?;
        let experts = match config.model.experts() {
            Some(_) => Some(ExpertPlace::new(&mesh, &tp, world)?),
            None => None,
        };
        let of_experts = experts.as_ref().map(ExpertPlace::parallel);
        let together = Together { tp, context, experts: of_experts };
        Ok(Place { mesh, rank, together, stages, data, model, readers, experts })
    }

    /// Its number among those that read different samples, and how many there are.
    pub(crate) fn reader(&self) -> (usize, usize) {
        (self.readers.rank(), self.readers.world_size())
    }

    /// Which layers this rank has: of each of its chunks, from the one nearest to the input on.
    pub(crate) fn layers(&self, config: &Config) -> Result<Vec<Layers>> {
        let stages = self.stages.world_size();
        let chunks = config.mesh.schedule()?.chunk_count();
        let cut = cut(&config.model, stages * chunks)?;
        let of_chunk = |chunk: usize| {
            let stage = chunk * stages + self.stages.rank();
            let (embeds, ends) = (stage == 0, stage + 1 == stages * chunks);
            Layers { blocks: cut[stage].clone(), embeds, ends }
        };
        Ok((0..chunks).map(of_chunk).collect())
    }

    /// What is worth saying about where the axes are. Collective over the world.
    pub(crate) fn warning(&self, world: &mut Group) -> Result<Option<String>> {
        let placement = self.mesh.placement(&Nodes::of_group(world)?)?;
        Ok(placement.warning().map(str::to_owned))
    }
}

/// How many ranks read different samples.
pub(crate) fn readers(mesh: &Mesh) -> usize {
    mesh.group_size(Axes::DP)
}

/// Blocks of each stage: as many each, or one more in the first ones.
fn cut(model: &Model, stages: usize) -> Result<Vec<Range<usize>>, ConfigError> {
    let blocks = usize::try_from(model.num_hidden_layers).unwrap_or(0);
    if blocks < stages {
        return Err(invalid(format!(
            "{stages} stages are more than model.num_hidden_layers ({blocks}): some would have no layers; lower --pp, or the \
             chunks of --schedule"
        )));
    }
    let (each, more) = (blocks / stages, blocks % stages);
    let start = |stage: usize| stage * each + stage.min(more);
    Ok((0..stages).map(|stage| start(stage)..start(stage + 1)).collect())
}

/// Everything that can be wrong with the mesh for this model and batch, before a rank meets another.
pub(crate) fn check(config: &Config, mesh: &Mesh, batching: Batching) -> Result<()> {
    let (model, shape) = (&config.model, mesh.shape());
    let tp = i64::try_from(shape.tp).unwrap_or(i64::MAX);
    divisible("num_attention_heads", model.num_attention_heads, (Axis::Tp, tp))?;
    if tp % model.kv_heads() != 0 {
        divisible("num_key_value_heads", model.kv_heads(), (Axis::Tp, tp))?;
    }
    divisible("intermediate_size", model.inner(), (Axis::Tp, tp))?;
    if model.vocab_size < tp {
        return Err(invalid(format!(
            "model.vocab_size ({}) is less than tp {tp}",
            model.vocab_size
        ))
        .into());
    }
    if let Some(Experts { count, .. }) = model.experts() {
        let ep = i64::try_from(shape.ep).unwrap_or(i64::MAX);
        divisible("num_local_experts", count, (Axis::Ep, ep))?;
    } else if shape.ep > 1 {
        return Err(invalid(format!(
            "ep {} needs a model of experts (model_type mixtral), and this one has none; leave out --ep",
            shape.ep
        ))
        .into());
    }
    let kind = config.mesh.schedule()?;
    cut(model, shape.pp * kind.chunk_count())?;
    if shape.pp == 1 && kind.chunk_count() == 1 {
        return Ok(());
    }
    Schedule::new(kind, shape.pp, batching.accumulate)?;
    let micro_batches = readers(mesh) * batching.accumulate;
    if !batching.global_batch.is_multiple_of(micro_batches) {
        return Err(invalid(format!(
            "global batch {} is not a multiple of {micro_batches}, the micro-batches of all ranks: those of a pipeline are equal; \
             change --global-batch or --micro-batches",
            batching.global_batch
        ))
        .into());
    }
    Ok(())
}

/// Whether sequences of so many tokens can be cut.
pub(crate) fn check_length(config: &Config, mesh: &Mesh, tokens: usize) -> Result<()> {
    let (shape, parts) = (mesh.shape(), config.mesh.tokens_of());
    if tokens.is_multiple_of(parts) {
        return Ok(());
    }
    let sequence = if config.mesh.sequence_parallel { shape.tp } else { 1 };
    Err(invalid(format!(
        "sequences of {tokens} tokens cannot be cut into {parts} equal parts (cp {}, of more than one rank two for each, and tp {sequence} of \
         sequence parallelism); change data.sequence_length",
        shape.cp
    ))
    .into())
}

fn divisible(what: &'static str, len: i64, (axis, ranks): (Axis, i64)) -> Result<(), Error> {
    if len % ranks == 0 {
        return Ok(());
    }
    let possible = (1..=len.min(64)).filter(|count| len % count == 0);
    Err(Error::Indivisible {
        layer: "model".to_owned(),
        what,
        len,
        axis,
        ranks: usize::try_from(ranks).unwrap_or(0),
        possible: possible.filter_map(|count| usize::try_from(count).ok()).collect(),
    })
}

fn invalid(message: String) -> ConfigError {
    ConfigError::Invalid { origin: "mesh".into(), message }
}
