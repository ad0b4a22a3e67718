//! The settings of a [`Ddp`](crate::Ddp): a small value, the same on every rank.

use tch::Kind;

use crate::store::plan;
use crate::{Error, Result};

/// What of the training state is sharded over the ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: every rank reduces all gradients and updates all parameters.
    #[default]
    Off,
    /// Optimizer state (ZeRO-1): a rank reduces and updates its segment of every bucket, then the
    /// parameters are gathered. Only [`Optimizer`](crate::Optimizer) can step on gradients that are
    /// sharded, so `grad()` of the parameters is undefined after an exchange.
    One,
    /// Gradients, too (ZeRO-2): a gradient lives where libtorch made it until its bucket is exchanged, and of the bucket only
    /// the rank's segment is kept. While gradients [accumulate](Sync::Accumulate) on a rank they are whole, unless
    /// [`DdpOptions::shard_accumulation`] is on.
    Two,
    /// Parameters, too (ZeRO-3): a rank has its segment of every bucket. On one machine whose ranks share memory all segments lie side by
    /// side in one memory that every rank sees; else a bucket is gathered when an operation touches one of its
    /// parameters, and let go when others were needed since.
    Three,
}

/// What becomes of the model's buffers (running statistics) after each exchanged backward.
///
/// Weights that were frozen when the model was wrapped are no buffers: they are compared and sent once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Buffers {
    /// Rank 0's replace everybody's. While ranks have [joined](crate::Ddp::join), those of the first rank that
    /// still trains.
    #[default]
    RankZero,
    /// Floating-point buffers become the mean over the ranks, the others rank 0's. A rank that has run out of batches
    /// ([`Ddp::join`](crate::Ddp::join)) takes part with those that it had last.
    Mean,
    /// Each rank keeps its own.
    Own,
}

/// What to do with gradients that are not finite.
///
/// Every rank looks at its own gradients as they come, before they are added to anybody's, and all ranks
/// learn of all. On a GPU the flags are read at the end of backward, which waits for the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// [`Error::NonFinite`], the same on every rank, with the rank and the parameter. The group stays good.
    #[default]
    Error,
    /// The step is left out on every rank, and a warning names the rank and the parameter: gradients become
    /// undefined, which plain tch optimizers leave alone, and [`Optimizer::step`](crate::Optimizer::step)
    /// says that it skipped.
    SkipStep,
    /// A warning with the rank and the parameter; the gradients are used as they are.
    Warn,
    /// Nobody looks.
    Ignore,
}

/// What to do with sparse gradients, those of embeddings made with `sparse: true`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SparseGradients {
    /// [`Error::SparseGradient`], which names the parameter.
    #[default]
    Refuse,
    /// They are made dense and exchanged like the others.
    Densify,
}

/// Settings of [`Ddp`](crate::Ddp). The same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other"
)]
pub struct DdpOptions {
    /// Bytes after which the i-th bucket of a kind closes; the last cap holds for all that follow. Default 1 MiB,
    /// then 25 MiB: a small first bucket starts the exchange early.
    pub bucket_bytes: Vec<usize>,
    /// What is sharded.
    pub zero: Zero,
    /// Among how many ranks what is sharded is cut: each so many consecutive ranks have everything once (hybrid sharding), which is to be a
    /// divisor of the world size. With the ranks of a node parameters are gathered inside it alone, for
    /// the memory of a copy on each node. Gradients are averaged over all ranks, to the same bits. `None`: all ranks.
    pub shard_ranks: Option<usize>,
    /// Which parameters are exchanged, and under ZeRO-3 gathered, together, by their names: `"encoder.layer.*"` makes a bucket of
    /// each layer, `*` being one part of the name, and `"head"` one of everything under it. The first that fits holds. The
    /// parameters of no unit are put together up to [`bucket_bytes`](Self::bucket_bytes).
    pub units: Vec<String>,
    /// Units whose parameters, once gathered under ZeRO-3, stay until the optimizer steps, by patterns of their names as in
    /// [`units`](Self::units): less is gathered, for the memory of each.
    pub stay_gathered: Vec<String>,
    /// What becomes of buffers.
    pub buffers: Buffers,
    /// Whether a backward may leave parameters without a gradient. The graph is walked when a backward
    /// begins, and ranks tell each other what they used: a parameter that no rank used keeps its gradient
    /// untouched. Off, such a backward is an error that names the parameters. Under [`Zero::Three`] ranks may then run different operations,
    /// and meet before each bucket and step to gather what any of them needs.
    pub find_unused_parameters: bool,
    /// The model uses the same parameters equally often in every exchanged backward. The first one, which
    /// sends nothing before its end, counts; later ones wait for as many gradients of each parameter.
    /// This is what parameters need that get several gradients in one backward (from backwards inside of it), and it
    /// finds unused ones without a walk.
    pub static_graph: bool,
    /// In which kind gradients add up and travel. `None`: f32 for f16 and bf16 parameters, else the
    /// parameter's own.
    pub gradient_kind: Option<Kind>,
    /// In which kind f32 parameters are kept, computed with and gathered, f16 or bf16: they become it when they are wrapped, frozen ones too, and
    /// the [`Optimizer`](crate::Optimizer)'s f32 masters begin from what they were: kept until its first step, four bytes an element that the rank updates. `None`: each in its own.
    pub parameter_kind: Option<Kind>,
    /// Whether an [`Optimizer`](crate::Optimizer) keeps its state in the host's memory, with an f32 copy of what it updates, and
    /// makes its steps there (ZeRO-Offload): for models on a GPU that does not hold them otherwise. The same bits on the CPU.
    pub offload_optimizer: bool,
    /// Whether gradients that accumulate are exchanged with each micro-batch, and add up in each rank's segments, in f32 at least: no rank
    /// has more of them between micro-batches. For [`Zero::Two`] and [`Zero::Three`], without a hook and without
    /// [`Ddp::join`](crate::Ddp::join). Every rank then has as many micro-batches to a step, and each costs the exchange of one step. Sums go first over ranks and then
    /// over micro-batches, so the bits are not those of gradients that accumulate on a rank; they are the same ones in both stages, with `shard_ranks`, and whether memory
    /// is shared. What has accumulated is given up by [`Ddp::release_gradients`](crate::Ddp::release_gradients) alone.
    pub shard_accumulation: bool,
    /// What to do with sparse gradients.
    pub sparse_gradients: SparseGradients,
    /// What to do with gradients that are not finite.
    pub non_finite: NonFinite,
    /// After how many exchanges the ranks compare fingerprints of their parameters; 0 is never. Before that they do in
    /// exchanges 1, 2, 4, 8 …, where most mistakes show.
    pub fingerprint_interval: u64,
    /// The order in which gradients become ready, as [`Ddp::ready_order`](crate::Ddp::ready_order) of an
    /// earlier run tells it. `None`: the reverse of registration at first, and the order that rank 0 saw in
    /// the first exchanged backward from then on, where that makes buckets start earlier.
    pub ready_order: Option<Vec<String>>,
    /// Whether this process keeps memory that it has freed, for the next step, instead of giving it back to the
    /// system: for models on the CPU, with glibc. It concerns the whole process.
    pub keep_memory: bool,
    /// Off: gradients are not exchanged, so that the cost of the exchange can be measured. The ranks'
    /// models drift apart.
    pub exchange: bool,
}

impl Default for DdpOptions {
    fn default() -> Self {
        Self {
            bucket_bytes: vec![plan::FIRST_BUCKET_BYTES_MAX, plan::BUCKET_BYTES_MAX],
            zero: Zero::Off,
            shard_ranks: None,
            units: Vec::new(),
            stay_gathered: Vec::new(),
            buffers: Buffers::RankZero,
            find_unused_parameters: false,
            static_graph: false,
            gradient_kind: None,
            parameter_kind: None,
            offload_optimizer: false,
            shard_accumulation: false,
            sparse_gradients: SparseGradients::Refuse,
            non_finite: NonFinite::Error,
            fingerprint_interval: 100,
            ready_order: None,
            keep_memory: true,
            exchange: true,
        }
    }
}

impl DdpOptions {
    /// An error for what cannot be.
    pub(crate) fn check(&self, world_size: usize) -> Result<()> {
        if let Some(ranks) = self.shard_ranks.filter(|&r| r == 0 || !world_size.is_multiple_of(r)) {
            let (setting, value) = ("shard_ranks", format!("{ranks} of {world_size} ranks"));
            return Err(Error::BadSetting {
                setting,
                value,
                expected: "a divisor of the world size",
            });
        }
        if self.bucket_bytes.is_empty() || self.bucket_bytes.contains(&0) {
            let (setting, value) = ("bucket_bytes", format!("{:?}", self.bucket_bytes));
            return Err(Error::BadSetting {
                setting,
                value,
                expected: "at least one cap, all > 0",
            });
        }
        if self.find_unused_parameters && self.static_graph {
            let (setting, value) = ("find_unused_parameters", "true".to_owned());
            let expected = "false beside static_graph, which finds them in the first backward";
            return Err(Error::BadSetting { setting, value, expected });
        }
        if self.shard_accumulation && matches!(self.zero, Zero::Off | Zero::One) {
            let (setting, value) = ("shard_accumulation", format!("true beside {:?}", self.zero));
            return Err(Error::BadSetting { setting, value, expected: "Zero::Two or Zero::Three" });
        }
        if let Some(kind) = self.parameter_kind.filter(|kind| !is_half(*kind)) {
            let (setting, value) = ("parameter_kind", format!("{kind:?}"));
            return Err(Error::BadSetting { setting, value, expected: "Half or BFloat16" });
        }
        match self.gradient_kind {
            None | Some(Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) => Ok(()),
            Some(kind) => Err(Error::UnsupportedKind { name: "gradient_kind".to_owned(), kind }),
        }
    }

    /// The unit of a parameter: the part of its name that a pattern describes.
    pub(crate) fn unit_of<'a>(&self, name: &'a str) -> Option<&'a str> {
        self.units.iter().find_map(|pattern| described(pattern, name))
    }

    /// Whether a unit stays once it is gathered.
    pub(crate) fn stays_gathered(&self, unit: &str) -> bool {
        self.stay_gathered.iter().any(|pattern| described(pattern, unit) == Some(unit))
    }

    /// In which kind parameters that are of `kind` are kept.
    pub(crate) fn parameters_of(&self, kind: Kind) -> Kind {
        self.parameter_kind.filter(|_| kind == Kind::Float).unwrap_or(kind)
    }

    /// In which kind the gradients of parameters of `kind` add up and travel.
    pub(crate) fn gradients_of(&self, kind: Kind) -> Kind {
        self.gradient_kind.unwrap_or(if is_half(kind) { Kind::Float } else { kind })
    }
}

fn is_half(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16)
}

/// Whether a backward exchanges gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Not yet: gradients and weights add up on this rank, or gradients in the ranks' segments
    /// ([`DdpOptions::shard_accumulation`]).
    Accumulate,
    /// Yes: this is the last micro-batch of the step.
    Reduce,
}

/// The leading parts of `name` that `pattern` describes, part by part.
fn described<'a>(pattern: &str, name: &'a str) -> Option<&'a str> {
    let mut end = 0;
    let mut parts = name.split('.');
    for wanted in pattern.split('.') {
        let part = parts.next().filter(|part| wanted == "*" || wanted == *part)?;
        end += part.len() + 1;
    }
    name.get(..end - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_the_leading_parts_of_names() {
        let units = vec!["encoder.layer.*".to_owned(), "head".to_owned()];
        let options = DdpOptions { units, ..DdpOptions::default() };
        assert_eq!(options.unit_of("encoder.layer.3.query.weight"), Some("encoder.layer.3"));
        assert_eq!(options.unit_of("encoder.layer.13"), Some("encoder.layer.13"));
        assert_eq!(options.unit_of("head.weight"), Some("head"));
        assert_eq!(options.unit_of("header.weight"), None);
        assert_eq!(options.unit_of("encoder.layer"), None);
        assert_eq!(options.unit_of("encoder.norm.weight"), None);
    }
}
