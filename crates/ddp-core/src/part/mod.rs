//! A model of which this rank has a part: [`ModelPart`] says which, and what must be known of the other parts.
//!
//! A [`Ddp`] is over the ranks that have the same parameters. Where a model is cut over others (tensor parallelism) or its layers are
//! on others (pipeline parallelism), four things reach beyond that group: the norm that gradients are clipped to, whether a step is
//! made at all, checkpoints, and files of weights. All ranks of a model tell each other once what they have (`table`, pure), and from
//! then on each knows what counts on it: a tensor that several ranks have (norms on all `tp` ranks, an embedding of two
//! stages) counts on the first. `boxes` (pure) says where a part lies in its whole; `sums` adds up norms; `step` is what ranks agree on
//! before a step.
//!
//! Source: Megatron-LM's `clip_grads.py` counts parameters that are neither shared nor copies on other `tp` ranks; here what counts follows from
//! names and boxes.

mod boxes;
mod step;
mod sums;
mod table;

use std::collections::BTreeMap;

use phalanx_comm::Group;
use serde::{Deserialize, Serialize};

pub(crate) use boxes::{boxes, shape, Both};
pub(crate) use step::Refusal;
pub(crate) use table::{Entry, Slice, Table};

use crate::checkpoint::held::dtype_of;
use crate::reduce::{self, fingerprint, Reducer};
use crate::store::model::Named;
use crate::store::{agree, Store};
use crate::{Cut, Ddp, Error, Result};
use table::Told;

/// What a [`Ddp`] must know where its model is a part of a larger one: see [`Ddp::set_part`].
#[derive(Debug)]
pub struct ModelPart<'a> {
    /// The ranks that have one copy of the model together: of a mesh, those that differ in `pp` and `tp` alone. Stages in the order
    /// of the layers.
    pub model: &'a mut Group,
    /// All ranks of the job.
    pub world: &'a mut Group,
    /// The variables and buffers of this rank that are parts of larger tensors, by name.
    pub cuts: BTreeMap<String, Cut>,
}

/// The part that this rank has, and who has the others.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) model: Group,
    pub(crate) world: Group,
    pub(crate) table: Table,
    cuts: BTreeMap<String, Cut>,
    /// By rank of the model's group, and of the `Ddp`'s: the rank in the world.
    pub(crate) model_ranks: Vec<usize>,
    pub(crate) data_ranks: Vec<usize>,
}

/// What a rank tells the world.
#[derive(Debug, Serialize, Deserialize)]
struct Announced {
    /// Its rank in the `Ddp`'s group and in the model's, and their sizes.
    data: (usize, usize),
    model: (usize, usize),
    /// The ranks in the world of the `Ddp`'s group.
    data_ranks: Vec<usize>,
    settings: String,
    /// A hash of the model's tensors, or why there is none.
    parts: Result<u32, String>,
}

impl Ddp {
    /// Says that this model is a part of a larger one, of which other ranks have the other parts: tensor and pipeline parallelism.
    /// After [`Ddp::new`], which is over the ranks that have the same part, and before an [`Optimizer`](crate::Optimizer) or
    /// [`Checkpointer`](crate::checkpoint::Checkpointer) is made. Collective over the world.
    ///
    /// Names are those of the whole model. What several ranks of a model have under one name (a norm on all `tp` ranks, an
    /// embedding of two stages) is one tensor; it must be the same on all of them, and counts once. From here on
    ///
    /// * the norm in [`Optimizer::step`](crate::Optimizer::step) is that of the whole model, with the same bits on all ranks, and trust ratios
    ///   are those of whole parameters;
    /// * a step is made on all ranks of the model or on none, and [`NonFinite::Error`](crate::NonFinite::Error) is told by the step, on all
    ///   of them, instead of by the backward (other stages may still wait for what this one sends after its backward);
    /// * checkpoints and files of weights have the whole model, with whole tensors, and can be read on every mesh.
    ///
    /// Gradients are divided by the sum of weights over the `Ddp`'s own group: all ranks of a model give the same weight. The program adds up
    /// the gradients of what ranks compute parts of (`tensor::shared`) and of tied parameters.
    ///
    /// # Errors
    /// The same on every rank: [`Error::PartsMismatch`] where the parts do not make one model; [`Error::PartsDiffer`] where a tensor that several
    /// ranks have is not the same. [`Error::BadSetting`] with local training, with an optimizer that is there already, and for a second part; errors of
    /// the groups.
    ///
    /// # Example
    /// ```
    /// use std::collections::BTreeMap;
    ///
    /// use phalanx_comm::{Group, GroupOptions};
    /// use phalanx_ddp_core::{Ddp, DdpOptions, ModelPart};
    /// use tch::{nn, Device};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // Of a mesh: DP_CP for the Ddp, MODEL for the part.
    /// let mut world = Group::single(GroupOptions::default())?;
    /// let mut data = world.split(Some(0), 0)?.ok_or("no group")?;
    /// let mut model = world.split(Some(0), 0)?.ok_or("no group")?;
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let _net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
    /// let ddp = Ddp::new(&vs, &mut data, DdpOptions::default())?;
    /// ddp.set_part(ModelPart { model: &mut model, world: &mut world, cuts: BTreeMap::new() })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_part(&self, part: ModelPart<'_>) -> Result<()> {
        let mut reducer = reduce::lock(self.shared())?;
        let part = Part::new(&mut reducer, part)?;
        reducer.store.part = Some(part);
        reducer.compare_parts()
    }

    /// Compares what several ranks of the model have (see [`Ddp::set_part`]), as happens by itself in the optimizer's step every
    /// [`fingerprint_interval`](crate::DdpOptions::fingerprint_interval) steps; without a part nothing. Parameters that a rank has only its
    /// segments of (ZeRO-3 where ranks share no memory) are not compared. Collective over the model's ranks.
    ///
    /// # Errors
    /// [`Error::PartsDiffer`], the same on every rank of its model; errors of the group.
    pub fn compare_parts(&self) -> Result<()> {
        reduce::lock(self.shared())?.compare_parts()
    }
}

impl Part {
    fn new(reducer: &mut Reducer, given: ModelPart<'_>) -> Result<Self> {
        let ModelPart { model, world, cuts } = given;
        let (mut model, mut world) = (model.duplicate()?, world.duplicate()?);
        let parts = serde_json::to_vec(&tell(reducer, &cuts)).unwrap_or_default();
        let options = &reducer.options;
        let settings = format!(
            "non_finite {:?}, fingerprint_interval {}, buffers {:?}",
            options.non_finite, options.fingerprint_interval, options.buffers
        );
        let store = &mut reducer.store;
        let model_ranks = ranks_of(&mut model, world.rank())?;
        let data_ranks = ranks_of(&mut store.group, world.rank())?;
        let told = model.tagged("parts of the model").all_gather_bytes(&parts)?;
        let table = read(&told, &model_ranks).and_then(|all| Table::new(&all, &model_ranks));
        let hash = |all: &Table| crc32c::crc32c(all.lines().as_bytes());
        let mine = serde_json::to_vec(&Announced {
            data: (store.group.rank(), store.group.world_size()),
            model: (model.rank(), model.world_size()),
            data_ranks: data_ranks.clone(),
            settings,
            parts: table.as_ref().map(hash).map_err(Clone::clone),
        });
        let places =
            world.tagged("places in the mesh").all_gather_bytes(&mine.unwrap_or_default())?;
        let places = places.iter().map(|place| serde_json::from_slice(place));
        let places: Vec<Announced> = places.collect::<Result<_, _>>().map_err(Error::closure)?;
        check(&places)?;
        let cuts = cuts.into_iter().filter(|(_, cut)| Slice::of(cut).is_some()).collect();
        let table = table.unwrap_or_default();
        Ok(Self { model, world, table, cuts, model_ranks, data_ranks })
    }

    /// How this rank's tensor of the model lies in its whole, if it is a part of one.
    pub(crate) fn cut(&self, name: &str) -> Option<&Cut> {
        self.cuts.get(name)
    }

    /// Whether this rank's tensor counts: whether it is the first that has it.
    pub(crate) fn counts(&self, name: &str) -> bool {
        self.table.counts(name, self.model.rank())
    }

    /// Ends its groups: the ranks of other parts get an error with this reason.
    pub(crate) fn abort(&mut self, reason: &str) {
        self.model.abort(reason);
        self.world.abort(reason);
    }

    /// An error on all ranks of the model if one has something to object. Collective.
    pub(crate) fn objected(&mut self, what: &str, mine: &str) -> Result<Option<String>> {
        let all = self.model.tagged(what).all_gather_bytes(mine.as_bytes())?;
        let first = all.iter().find(|text| !text.is_empty());
        Ok(first.map(|text| String::from_utf8_lossy(text).into_owned()))
    }

    /// Ranks of a model that do different things are an error on all of them. Collective.
    pub(crate) fn alike(&mut self, what: &'static str, mine: &[String]) -> Result<()> {
        agree::alike(&mut self.model, what, what, mine)
    }
}

impl Store {
    /// Which of the parameters that `have` something count on this rank.
    pub(crate) fn counted(&self, have: &[bool]) -> Vec<bool> {
        let Some(part) = &self.part else { return have.to_vec() };
        let counts = |(named, &has): (&Named, &bool)| has && part.counts(&named.name);
        self.model.parameters().zip(have).map(counts).collect()
    }

    /// How this rank's variable or buffer lies in its whole, if it is a part of one.
    pub(crate) fn cut(&self, name: &str) -> Option<&Cut> {
        self.part.as_ref().and_then(|part| part.cut(name))
    }

    /// The ranks that a checkpoint or a file of weights is of.
    pub(crate) fn everyone(&mut self) -> &mut Group {
        match &mut self.part {
            Some(part) => &mut part.world,
            None => &mut self.group,
        }
    }

    /// This rank among [all](Self::everyone).
    pub(crate) fn rank_of_all(&self) -> usize {
        self.part.as_ref().map_or(self.group.rank(), |part| part.world.rank())
    }
}

impl Reducer {
    /// Compares what several ranks of the model have. Collective where there is a part.
    pub(crate) fn compare_parts(&mut self) -> Result<()> {
        let store = &mut self.store;
        if store.part.is_none() {
            return Ok(());
        }
        let hashes = fingerprint::of_shared(store)?;
        let Some(part) = &mut store.part else { return Ok(()) };
        let mine = serde_json::to_vec(&hashes).map_err(Error::closure)?;
        let all = part.model.tagged("what parts have alike").all_gather_bytes(&mine)?;
        let all = all.iter().map(|text| serde_json::from_slice(text));
        let all: Vec<BTreeMap<String, u32>> =
            all.collect::<Result<_, _>>().map_err(Error::closure)?;
        for (name, entry) in &part.table.tensors {
            for piece in &entry.pieces {
                let known =
                    piece.ranks.iter().filter_map(|&rank| Some((rank, *all[rank].get(name)?)));
                let known: Vec<(usize, u32)> = known.collect();
                let first = known.first().map(|(_, hash)| *hash);
                let other = known.iter().find(|(_, hash)| Some(*hash) != first);
                if let (Some((rank, _)), Some((odd, _))) = (known.first(), other) {
                    let ranks = (part.model_ranks[*rank], part.model_ranks[*odd]);
                    return Err(Error::PartsDiffer { name: name.clone(), ranks });
                }
            }
        }
        Ok(())
    }
}

/// What this rank has, or why it cannot be a part.
fn tell(reducer: &Reducer, cuts: &BTreeMap<String, Cut>) -> Result<Vec<Told>, String> {
    let store = &reducer.store;
    let all = || store.model.variables.iter().chain(&store.model.buffers);
    let refused = [
        (store.part.is_some(), "the Ddp has a part already"),
        (store.optimizer.count > 0, "call set_part before Optimizer::new"),
        (reducer.local.is_some(), "local training (DiLoCo) cannot be of a part"),
    ];
    if let Some((_, reason)) = refused.iter().find(|(is_so, _)| *is_so) {
        return Err(format!("  {reason}\n"));
    }
    if let Some(name) = cuts.keys().find(|name| !all().any(|named| named.name == **name)) {
        return Err(format!("  {name}: in `cuts`, and the model has no such variable or buffer\n"));
    }
    let one = |named: &Named| {
        let Named { name, tensor } = named;
        let (cut, size) = (cuts.get(name), tensor.size());
        if let Some(cut) = cut.filter(|cut| cut.part_shape() != size) {
            let expected = cut.part_shape();
            return Err(format!("  {name}: its shape is {size:?}, of its cut {expected:?}\n"));
        }
        Ok(Told {
            name: name.clone(),
            dtype: dtype_of(name, tensor.kind()).map_err(|error| format!("  {error}\n"))?,
            shape: cut.map_or(size, |cut| cut.shape().to_vec()),
            slice: cut.and_then(Slice::of),
        })
    };
    all().map(one).collect()
}

/// What all ranks of a model have, or the first trouble.
fn read(all: &[Vec<u8>], names: &[usize]) -> Result<Vec<Vec<Told>>, String> {
    let one = |(rank, text): (usize, &Vec<u8>)| {
        let told: Result<Vec<Told>, String> =
            serde_json::from_slice(text).unwrap_or_else(|error| Err(format!("  {error}\n")));
        told.map_err(|trouble| format!("{trouble}    (rank {})\n", names[rank]))
    };
    all.iter().enumerate().map(one).collect()
}

/// The rank in the world of each rank of a group. Collective.
fn ranks_of(group: &mut Group, mine: usize) -> Result<Vec<usize>> {
    let mut all = vec![0_i64; group.world_size()];
    let mine = i64::try_from(mine).unwrap_or(0);
    group.tagged("ranks of the world").all_gather(&[mine], &mut all[..])?.wait()?;
    Ok(all.into_iter().map(|rank| usize::try_from(rank).unwrap_or(0)).collect())
}

/// An error unless all models have the same parts, and ranks are a grid of them. Pure.
fn check(places: &[Announced]) -> Result<()> {
    let mismatch = |report: String| Err(Error::PartsMismatch { report });
    if let Some(trouble) = places.iter().find_map(|place| place.parts.as_ref().err()) {
        return mismatch(trouble.clone());
    }
    let Some(first) = places.first() else { return Ok(()) };
    let is_other =
        |place: &Announced| place.parts != first.parts || place.settings != first.settings;
    if let Some((rank, other)) = places.iter().enumerate().find(|(_, place)| is_other(place)) {
        return mismatch(match other.settings == first.settings {
            true => {
                format!("  the model of rank {rank} is cut in other parts than that of rank 0\n")
            }
            false => format!("  rank 0: {}\n  rank {rank}: {}\n", first.settings, other.settings),
        });
    }
    let mut seen = BTreeMap::new();
    for (rank, place) in places.iter().enumerate() {
        let sizes = (place.data.1, place.model.1);
        if sizes.0 * sizes.1 != places.len() {
            return mismatch(format!(
                "  rank {rank}: {} ranks have the same part and {} ranks one model, in a world of {}\n",
                sizes.0,
                sizes.1,
                places.len()
            ));
        }
        let has_another = |of: &usize| places.get(*of).map(|it| it.model.0) != Some(place.model.0);
        if let Some(other) = place.data_ranks.iter().copied().find(has_another) {
            return mismatch(format!(
                "  ranks {rank} and {other} are to have the same part, and have other places in their models\n"
            ));
        }
        if let Some(other) = seen.insert((place.data.0, place.model.0), rank) {
            return mismatch(format!(
                "  ranks {other} and {rank} are both rank {} of those with their part, and rank {} of their model\n",
                place.data.0, place.model.0
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(data: (usize, [usize; 2]), model: (usize, usize)) -> Announced {
        let (data, data_ranks) = ((data.0, 2), data.1.to_vec());
        Announced { data, model, data_ranks, settings: "s".to_owned(), parts: Ok(7) }
    }

    #[test]
    fn ranks_must_be_a_grid_of_parts_that_are_alike() {
        let text = |places: &[Announced]| check(places).unwrap_err().to_string();
        let grid = || {
            vec![
                place((0, [0, 2]), (0, 2)),
                place((0, [1, 3]), (1, 2)),
                place((1, [0, 2]), (0, 2)),
                place((1, [1, 3]), (1, 2)),
            ]
        };
        assert!(check(&grid()).is_ok());
        assert!(text(&grid()[..3]).contains("in a world of 3"));
        let crossed = [
            place((0, [0, 3]), (0, 2)),
            place((0, [1, 2]), (1, 2)),
            place((1, [1, 2]), (0, 2)),
            place((1, [0, 3]), (1, 2)),
        ];
        assert!(text(&crossed).contains("ranks 0 and 3 are to have the same part"));
        let mut twice = grid();
        twice[3].data.0 = 0;
        assert!(text(&twice).contains("ranks 1 and 3 are both"));
        let mut other = grid();
        other[2].parts = Ok(8);
        assert!(text(&other).contains("the model of rank 2"));
        other[2].parts = Err("  w: no\n".to_owned());
        assert!(text(&other).contains("w: no"));
        let mut settings = grid();
        settings[1].settings = "t".to_owned();
        assert!(text(&settings).contains("rank 1: t"));
    }
}
