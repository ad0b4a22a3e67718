//! Weights of files into a wrapped model: each rank reads the ranges that it holds.
//!
//! The ranks agree twice: before anything is changed, on whether all of them can read the same files and these fit; and at the end, on whether
//! all could read to the end. Between the two nobody waits for anybody, so a rank that fails leaves no other in a collective.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::Path;

use phalanx_checkpoint::{Spec, Tensors, Weights};
use phalanx_comm::Group;
use serde::{Deserialize, Serialize};

use super::content;
use super::held::{to_fill, to_fill_unrounded, Held};
use super::weights::{misfit, of_file};
use crate::reduce::{self, Reducer};
use crate::store::flat::Flat;
use crate::store::{agree, Store};
use crate::{Ddp, Error, Result};

/// What a tensor of the model may be called in files.
type Names = dyn Fn(&str) -> Vec<String>;

/// How [`Ddp::load_weights`](crate::Ddp::load_weights) finds tensors: by their own names, if nothing else is said.
#[derive(Default)]
pub struct LoadOptions {
    names: Option<Box<Names>>,
}

impl LoadOptions {
    /// `names` says what a tensor of the model may be called in the files: the first that they have is taken. One tensor of the files may
    /// fill several of the model. The same on every rank.
    ///
    /// # Example
    /// ```
    /// use phalanx_ddp_core::checkpoint::LoadOptions;
    /// // Files of today, and those with the names of the first BERT.
    /// let old = |name: &str| name.replace("LayerNorm.weight", "LayerNorm.gamma");
    /// let options = LoadOptions::with_names(move |name| vec![name.to_owned(), old(name)]);
    /// ```
    #[must_use]
    pub fn with_names(names: impl Fn(&str) -> Vec<String> + 'static) -> Self {
        Self { names: Some(Box::new(names)) }
    }

    fn names_of(&self, name: &str) -> Vec<String> {
        self.names.as_ref().map_or_else(|| vec![name.to_owned()], |names| names(name))
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions").field("renames", &self.names.is_some()).finish()
    }
}

impl Ddp {
    /// Fills variables and buffers from weights as others exchange them: a safetensors file, the index of several, or a folder with either.
    /// The counterpart of [`save_weights`](Ddp::save_weights), in every stage and however the model was built, before an
    /// [`Optimizer`](crate::Optimizer) is there or between two steps: its masters follow, and ranks that train by themselves start from there. Averages of weights stay. Gives the names in the files that nothing was taken from.
    /// Collective; every rank must see the files. Of [a part](Ddp::set_part) the files have the whole model, and it is collective over the world.
    ///
    /// A rank reads the ranges that it holds under ZeRO (its segments of the parameters, which stages 1 and 2 then gather), and all of what
    /// every rank has by itself. Numbers are converted to the variables' kinds as libtorch's `copy_` does. It takes 8 MiB, and with
    /// [`parameter_kind`](crate::DdpOptions::parameter_kind) until the next step four bytes for each element that the rank reads: what masters are to be.
    ///
    /// # Errors
    /// The same on every rank: [`Error::WeightsMismatch`] with every tensor that is missing or has another shape, [`Error::Io`] and
    /// [`Error::Safetensors`] for files that a rank cannot read, [`Error::RanksDiffer`] where ranks see other files; nothing was changed then. A file
    /// that can no longer be read half-way is [`Error::Io`] as well, and leaves a model that is partly the old one. Errors of the group.
    ///
    /// # Example
    /// ```
    /// use phalanx_comm::{Group, GroupOptions};
    /// use phalanx_ddp_core::checkpoint::{LoadOptions, WeightsOptions};
    /// use phalanx_ddp_core::{Ddp, DdpOptions, Zero};
    /// use tch::{nn, Device};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// let mut group = Group::single(GroupOptions::default())?;
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let _net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
    /// let ddp = Ddp::new(&vs, &mut group, DdpOptions { zero: Zero::Three, ..Default::default() })?;
    /// ddp.save_weights(&path, &WeightsOptions::default())?;
    /// assert!(ddp.load_weights(&path, &LoadOptions::default())?.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub fn load_weights(&self, path: &Path, options: &LoadOptions) -> Result<Vec<String>> {
        load(&mut *reduce::lock(self.shared())?, path, options)
    }
}

/// Fills all variables and buffers; gives the names of the tensors that were not needed. Collective.
fn load(reducer: &mut Reducer, path: &Path, options: &LoadOptions) -> Result<Vec<String>> {
    reducer.store.meet()?;
    let keeps_unrounded = reducer.options.parameter_kind.is_some();
    let prepared = Prepared::new(&mut reducer.store, (path, options), keeps_unrounded);
    // When this returns every rank has come here: nobody reads parameters any more that ranks share.
    let prepared = agreed(reducer.store.everyone(), (path, prepared), Prepared::described)?;
    let filled = agreed(reducer.store.everyone(), (path, prepared.fill()), |()| String::new());
    // Also after an error: what was read is where parameters are kept, and must not be another on another rank.
    let left = prepared.left(&mut reducer.store)?;
    reducer.store.keep_unrounded(prepared.unrounded);
    filled.and(reducer.store.renew())?;
    reducer.start_anew()?;
    Ok(left)
}

/// Files that fit, and what is filled from them.
struct Prepared {
    weights: Weights,
    /// With the name in the files.
    tensors: Vec<(Held, String)>,
    /// By storage: this rank's segment of parameters in half precision, as the files have them, for an optimizer's masters.
    unrounded: Vec<Option<Flat>>,
}

impl Prepared {
    /// Changes nothing.
    fn new(
        store: &mut Store,
        (path, options): (&Path, &LoadOptions),
        keeps_unrounded: bool,
    ) -> Result<Self> {
        let weights = Weights::open(path).map_err(|error| of_file("reading", error))?;
        let (mut names, mut misfits) = (Vec::new(), Vec::new());
        for named in store.model.variables.iter().chain(&store.model.buffers) {
            let mut candidates = options.names_of(&named.name);
            let found = candidates.iter().position(|name| weights.spec(name).is_some());
            let said = if candidates == [named.name.as_str()] {
                named.name.clone()
            } else {
                format!("{} (in the file {})", named.name, candidates.join(" or "))
            };
            let found = found.map(|at| candidates.swap_remove(at));
            let cut = store.cut(&named.name);
            let shape = cut.map_or_else(|| named.tensor.size(), |cut| cut.shape().to_vec());
            let line = misfit(&weights, (&said, &shape), found.as_deref());
            misfits.extend(line.map(|line| (named.name.as_str(), line)));
            names.push(found.unwrap_or_default());
        }
        if !misfits.is_empty() {
            misfits.sort();
            let report = misfits.into_iter().map(|(_, line)| line).collect();
            return Err(Error::WeightsMismatch { path: path.to_owned(), report });
        }
        // Else what the program wrote to parameters that are gathered would go home after they were loaded, over them.
        store.heed_written()?;
        let unrounded = if keeps_unrounded { store.new_unrounded()? } else { Vec::new() };
        let beside = match unrounded.is_empty() {
            true => Vec::new(),
            false => to_fill_unrounded(store, &unrounded)?,
        };
        let beside = beside.into_iter().map(|(variable, held)| (held, names[variable].clone()));
        let beside: Vec<_> = beside.collect();
        let tensors = to_fill(store)?.into_iter().zip(names).chain(beside).collect();
        Ok(Self { weights, tensors, unrounded })
    }

    /// The tensors of the files, in few words: what ranks compare.
    fn described(&self) -> String {
        let names = self.weights.names();
        let sum = names.iter().fold(0, |sum, name| {
            let Some(Spec { dtype, shape }) = self.weights.spec(name) else { return sum };
            crc32c::crc32c_append(sum, format!("{name} {dtype} {shape:?}\n").as_bytes())
        });
        let count = names.len();
        format!("{count} tensors, checksum {sum:08x} of their names, types and shapes")
    }

    fn fill(&self) -> Result<()> {
        let mut tensors = self.tensors.iter();
        tensors.try_for_each(|(held, name)| content::fill_converted(held, &self.weights, name))
    }

    /// The tensors of the files that were not needed, on any rank of the model. Collective where it is in parts.
    fn left(&self, store: &mut Store) -> Result<Vec<String>> {
        let taken: BTreeSet<&str> = self.tensors.iter().map(|(_, name)| name.as_str()).collect();
        let mut taken: BTreeSet<String> = taken.into_iter().map(ToOwned::to_owned).collect();
        if let Some(part) = &mut store.part {
            let mine = serde_json::to_vec(&taken).unwrap_or_default();
            for of_rank in part.model.tagged("weights that were taken").all_gather_bytes(&mine)? {
                taken.extend(serde_json::from_slice::<Vec<String>>(&of_rank).unwrap_or_default());
            }
        }
        let names = self.weights.names().into_iter();
        Ok(names.filter(|name| !taken.contains(*name)).map(ToOwned::to_owned).collect())
    }
}

/// What a rank tells the others.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    /// It can go on with these files.
    Fine(String),
    /// With the files, or the one of them that it is.
    Misfit(String, String),
    IllFormed(String, String),
    Unreadable(String, String),
}

impl Said {
    fn of<T>((given, outcome): (&Path, &Result<T>), describe: impl Fn(&T) -> String) -> Self {
        let shown = |path: &Path| path.to_string_lossy().into_owned();
        match outcome {
            Ok(fine) => Self::Fine(describe(fine)),
            Err(Error::WeightsMismatch { path, report }) => {
                Self::Misfit(shown(path), report.clone())
            }
            Err(Error::Safetensors { path, message }) => {
                Self::IllFormed(shown(path), message.clone())
            }
            Err(Error::Io { path, source, .. }) => {
                Self::Unreadable(shown(path), source.to_string())
            }
            Err(other) => Self::Unreadable(shown(given), other.to_string()),
        }
    }

    fn fine(self) -> Option<String> {
        match self {
            Self::Fine(text) => Some(text),
            _ => None,
        }
    }

    /// The error of all ranks, if it is one.
    fn error(&self, rank: usize) -> Option<Error> {
        Some(match self {
            Self::Fine(_) => return None,
            Self::Misfit(file, report) => {
                let report = format!("{report}  (as rank {rank} sees the file)\n");
                Error::WeightsMismatch { path: file.into(), report }
            }
            Self::IllFormed(file, message) => Error::Safetensors {
                path: file.into(),
                message: format!("{message} (rank {rank})"),
            },
            Self::Unreadable(file, text) => {
                let source = io::Error::other(format!("{text} (rank {rank})"));
                Error::Io { doing: "reading", path: file.into(), source }
            }
        })
    }
}

/// The rank's outcome if all ranks have the same; else the first error, the same on all of them. Collective.
fn agreed<T>(
    group: &mut Group,
    (path, outcome): (&Path, Result<T>),
    describe: impl Fn(&T) -> String,
) -> Result<T> {
    let mine = serde_json::to_vec(&Said::of((path, &outcome), describe)).unwrap_or_default();
    let all = group.tagged("weights that are loaded").all_gather_bytes(&mine)?;
    if all.iter().all(|said| *said == mine) {
        return outcome;
    }
    let mut fine = Vec::with_capacity(all.len());
    for (rank, bytes) in all.iter().enumerate() {
        let said: Said = serde_json::from_slice(bytes)
            .unwrap_or_else(|error| Said::Unreadable(String::new(), error.to_string()));
        if let Some(error) = said.error(rank) {
            return Err(error);
        }
        fine.extend(said.fine().map(|text| vec![text]));
    }
    agree::compared("the weights that they load", &fine)?;
    outcome
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use phalanx_comm::environment::HostLink;
    use phalanx_comm::testing::run_ranks_with;
    use phalanx_comm::GroupOptions;
    use tch::{nn, Device};

    use super::*;
    use crate::checkpoint::WeightsOptions;
    use crate::{DdpOptions, Zero};

    /// How often the elements of a parameter are read on three ranks together, under this stage.
    fn times_read(zero: Zero, link: HostLink) -> Vec<u32> {
        const LEN: usize = 9000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let options = GroupOptions { timeout: Duration::from_secs(30), ..GroupOptions::default() };
        let ranges = run_ranks_with(3, link, options, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let _zeros = vs.root().zeros("before", &[70]);
            let _long = vs.root().zeros("long", &[9, 1000]);
            let sharded = DdpOptions { zero, ..DdpOptions::default() };
            let ddp = Ddp::new(&vs, &mut group, sharded).unwrap();
            ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
            let mut reducer = reduce::lock(ddp.shared()).unwrap();
            let load = LoadOptions::default();
            let prepared = Prepared::new(&mut reducer.store, (&path, &load), false);
            let mut tensors = prepared.unwrap().tensors.into_iter();
            let (long, _) = tensors.find(|(held, _)| held.name == "long").unwrap();
            long.parts.into_iter().map(|part| part.range).collect::<Vec<_>>()
        });
        let mut times = vec![0; LEN];
        for at in ranges.into_iter().flatten().flatten() {
            times[usize::try_from(at).unwrap()] += 1;
        }
        times
    }

    #[test]
    fn sharded_parameters_are_read_once_by_all_ranks_together() {
        for link in [HostLink::Auto, HostLink::Tcp] {
            for zero in [Zero::One, Zero::Two, Zero::Three] {
                assert!(times_read(zero, link).iter().all(|&times| times == 1), "{zero:?}");
            }
            assert!(times_read(Zero::Off, link).iter().all(|&times| times == 3));
        }
    }
}
