//! What this rank holds of a training: tensors by name and shape, and the flat ranges of them that lie here.

use std::ops::Range;

use phalanx_checkpoint::{Dtype, Tensors};
use tch::{Kind, Tensor};

use crate::store::flat::{dense_strides, Flat};
use crate::store::model::Named;
use crate::store::{Home, Store};
use crate::{part, Buffers, Cut, Error, Result};

/// A tensor of the training.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// Of all of it, in elements.
    pub(crate) strides: Vec<u64>,
    pub(crate) parts: Vec<HeldPart>,
    /// How it lies in its whole, where it is a part of a larger tensor: that is what files have.
    pub(crate) cut: Option<Cut>,
}

/// Elements of a tensor in the order of its memory.
#[derive(Debug)]
pub(crate) struct HeldPart {
    pub(crate) range: Range<u64>,
    /// The memory itself: dense, as many elements.
    pub(crate) memory: Tensor,
}

impl Held {
    /// All of a tensor that is dense.
    pub(crate) fn whole(name: String, tensor: &Tensor) -> Result<Self> {
        let strides = dense_strides(&name, tensor)?;
        let mut held = Self::like(name, tensor.kind(), (&tensor.size(), &strides))?;
        let len = tensor.numel() as u64;
        // Its elements one after the other, as memory has them.
        let memory = tensor.f_detach()?.f_as_strided([unsigned(len)], [1], None)?;
        held.parts.push(HeldPart { range: 0..len, memory });
        Ok(held)
    }

    /// A tensor of which parts are still to come.
    pub(crate) fn like(
        name: String,
        kind: Kind,
        (shape, strides): (&[i64], &[i64]),
    ) -> Result<Self> {
        let dtype = dtype_of(&name, kind)?;
        let numbers = |list: &[i64]| list.iter().map(|&n| u64::try_from(n).unwrap_or(0)).collect();
        Ok(Self {
            name,
            dtype,
            shape: numbers(shape),
            strides: numbers(strides),
            parts: Vec::new(),
            cut: None,
        })
    }

    /// The shape that it has in files: the whole's.
    pub(crate) fn saved_shape(&self) -> Vec<u64> {
        self.cut.as_ref().map_or_else(|| self.shape.clone(), part::shape)
    }
}

/// Of what this rank holds of the training, where parts lie in their wholes; and what other ranks of the model have as well
/// and save goes, unless all `are_wanted`.
pub(crate) fn place(held: &mut Vec<Held>, store: &Store, are_wanted: bool) {
    let Some(part) = &store.part else { return };
    held.retain_mut(|of| {
        let Some(name) = tensor_of(&of.name) else { return true };
        let cut = part.cut(name).filter(|cut| is_shape(&cut.part_shape(), &of.shape));
        let is_saved = are_wanted || part.counts(name);
        of.cut = cut.cloned();
        is_saved
    });
}

/// The variable or buffer that something is of, by the names that `checkpoint` has.
fn tensor_of(name: &str) -> Option<&str> {
    let (kind, rest) = name.split_once('/')?;
    match kind {
        "model" | "ema" => Some(rest),
        "optimizer" => rest.split_once('/').map(|(_, of)| of),
        _ if kind.starts_with("rank-") => Some(rest),
        _ => None,
    }
}

fn is_shape(left: &[i64], right: &[u64]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(&l, &r)| u64::try_from(l) == Ok(r))
}

/// The model's tensors: variables, and buffers as the policy has them; those that are everybody's only where
/// they `count`.
pub(crate) fn of_model(store: &Store, (buffers, count): (Buffers, bool)) -> Result<Vec<Held>> {
    let rank = store.group.rank();
    let of_all = |named: &Named| Held::whole(format!("model/{}", named.name), &named.tensor);
    let own = |named: &Named| Held::whole(own_buffer(rank, &named.name), &named.tensor);
    let of_variable = |(variable, named): (usize, &Named)| match store.home(variable) {
        Some(home) if store.is_cut(variable) => {
            let held = of_segment(named, &home, None)?;
            Ok(Held { name: format!("model/{}", held.name), ..held })
        }
        _ => of_all(named),
    };
    let variables = store.model.variables.iter().enumerate().map(of_variable);
    match buffers {
        Buffers::Own => variables.chain(store.model.buffers.iter().map(own)).collect(),
        _ if count => variables.chain(store.model.buffers.iter().map(of_all)).collect(),
        _ => variables.collect(),
    }
}

/// What a rank fills when weights come from elsewhere, by their own names: of parameters its segments, also where it has more or
/// sees those of others; all else whole.
pub(super) fn to_fill(store: &Store) -> Result<Vec<Held>> {
    let whole = |named: &Named| Held::whole(named.name.clone(), &named.tensor);
    let of_variable = |(variable, named): (usize, &Named)| match store.home(variable) {
        Some(home) => of_segment(named, &home, None),
        None => whole(named),
    };
    let variables = store.model.variables.iter().enumerate().map(of_variable);
    let of =
        |held: Result<Held>| held.map(|held| Held { cut: store.cut(&held.name).cloned(), ..held });
    variables.chain(store.model.buffers.iter().map(whole)).map(of).collect()
}

/// By variable: parameters that are filled beside that as they are before they are rounded, in memory as long as the rank's segment of
/// their storage, where there is such.
pub(super) fn to_fill_unrounded(
    store: &Store,
    flats: &[Option<Flat>],
) -> Result<Vec<(usize, Held)>> {
    let memory_of = |slot: usize| flats[store.plan.places[slot].storage].as_ref();
    let slots = 0..store.plan.places.len();
    let kept = slots.filter_map(|slot| memory_of(slot).map(|flat| (slot, flat)));
    let of = |(slot, flat)| {
        let variable = store.model.variable_of(slot);
        let home = store.home(variable)?;
        let held = of_segment(store.model.parameter(slot), &home, Some(flat));
        let placed = |of: Held| Held { cut: store.cut(&of.name).cloned(), ..of };
        Some(held.map(|of| (variable, placed(of))))
    };
    kept.filter_map(of).collect()
}

/// The part of a variable that is in this rank's segment: where it is kept, or `elsewhere` in memory as long as the segment.
fn of_segment(named: &Named, home: &Home<'_>, elsewhere: Option<&Flat>) -> Result<Held> {
    let Home { memory, range: place, segment } = home;
    let (shape, strides) = (named.tensor.size(), named.tensor.stride());
    let kind = elsewhere.map_or(named.tensor.kind(), Flat::kind);
    let mut held = Held::like(named.name.clone(), kind, (&shape, &strides))?;
    let (start, end) = (place.start.max(segment.start), place.end.min(segment.end));
    if start < end {
        let own = start - segment.start..end - segment.start;
        let (memory, own) = match elsewhere {
            Some(flat) => (flat, own),
            None => memory.at(&(start..end), &own),
        };
        let range = (start - place.start) as u64..(end - place.start) as u64;
        held.parts.push(HeldPart { range, memory: memory.range(&own)? });
    }
    Ok(held)
}

/// A line for each tensor of a saved model that this one has not, on any of its ranks.
pub(crate) fn lacking(held: &[Held], store: &Store, source: &dyn Tensors) -> Vec<String> {
    let is_elsewhere = |name: &str| {
        let name = name.strip_prefix("model/").unwrap_or(name);
        store.part.as_ref().is_some_and(|part| part.table.tensors.contains_key(name))
    };
    let is_held = |name: &str| held.iter().any(|of| of.name == name) || is_elsewhere(name);
    let names = source.names();
    let lost = names.iter().filter(|name| name.starts_with("model/") && !is_held(name));
    lost.map(|name| format!("  {name}: only in the checkpoint\n")).collect()
}

/// A rank that was not there when `source` was saved takes rank 0's buffers for its own.
pub(crate) fn name_new_ranks(held: &mut [Held], source: &dyn Tensors) {
    for of in held.iter_mut().filter(|of| source.spec(&of.name).is_none()) {
        let own = of.name.strip_prefix("rank-").and_then(|rest| rest.split_once('/'));
        if let Some((_, name)) = own {
            of.name = own_buffer(0, name);
        }
    }
}

/// The name of a buffer that a rank has for itself.
pub(crate) fn own_buffer(rank: usize, name: &str) -> String {
    format!("rank-{rank}/{name}")
}

fn unsigned(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

/// How a kind is written.
pub(crate) fn dtype_of(name: &str, kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::Bool,
        _ => return Err(Error::UnsupportedKind { name: name.to_owned(), kind }),
    })
}

/// What is read as which kind; `None` for what libtorch has no arithmetic for.
pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::Bool => Kind::Bool,
        _ => return None,
    })
}
