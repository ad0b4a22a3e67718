//! Whether the ranks that compute the same samples have read the same ones.
//!
//! All stages, parts of matrices and parts of sequences of one data-parallel index read the samples by themselves, and a rank that has other data (an old copy on one
//! machine, another seed) would train on activations of one text and labels of another. Eight bytes of each rank show it.

use anyhow::{bail, Result};
use phalanx_comm::{recorder, Group};
use phalanx_model_parallel::{Axes, Mesh};
use tch::{Device, Kind};

use super::data::Tensors;

/// Ranks that an error names.
const NAMED_MAX: usize = 8;

/// When ranks compare: in the first step that they make together, and every so many steps.
#[derive(Debug)]
pub(crate) struct Compared {
    interval: u64,
    was: bool,
}

impl Compared {
    /// An interval of 0 is never.
    pub(crate) fn every(interval: u64) -> Self {
        Compared { interval, was: false }
    }

    /// Before the samples of a step are computed with: an error on every rank, where some have read others than the rest of their data-parallel index.
    /// Collective over the world.
    pub(crate) fn at(
        &mut self,
        step: u64,
        samples: &[&Tensors],
        (mesh, world): (&Mesh, &mut Group),
    ) -> Result<()> {
        let is_alone = mesh.group_size(Axes::DP) == mesh.world_size();
        let is_due = self.interval > 0 && (!self.was || step.is_multiple_of(self.interval));
        if is_alone || !is_due {
            return Ok(());
        }
        self.was = true;
        let mine = fingerprint(samples)?;
        let all = world.tagged("samples of the step").all_gather_bytes(&mine.to_le_bytes())?;
        let others = others(mesh, &all)?;
        if others.is_empty() {
            return Ok(());
        }
        let more = match others.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        let named = others[..others.len().min(NAMED_MAX)].join("; ");
        let error = format!(
            "step {step}: {named}{more}: ranks of one data-parallel index compute the same samples; give all machines the same data, \
             --seed, and section data of the configuration"
        );
        recorder::tell_shared_error(&error);
        bail!(error)
    }
}

/// The ranks that differ from the first one of their data-parallel index, in words. Pure.
fn others(mesh: &Mesh, all: &[Vec<u8>]) -> Result<Vec<String>> {
    let mut firsts: Vec<Option<usize>> = vec![None; mesh.group_size(Axes::DP)];
    let mut others = Vec::new();
    for (rank, fingerprint) in all.iter().enumerate() {
        let first = *firsts[mesh.place(rank, Axes::DP)?.key].get_or_insert(rank);
        if *fingerprint != all[first] {
            let (it, that) = (mesh.named(rank)?, mesh.named(first)?);
            others.push(format!("{it} has read other samples than {that}"));
        }
    }
    Ok(others)
}

/// A number of ids, labels, and how they are cut into micro-batches.
///
/// Source: FNV-1a (Fowler, Noll, Vo), a value at a time.
fn fingerprint(samples: &[&Tensors]) -> Result<u64> {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |value: i64| {
        sum = (sum ^ value.cast_unsigned()).wrapping_mul(0x0100_0000_01b3);
    };
    for Tensors { ids, labels, .. } in samples {
        for tensor in [ids, labels] {
            tensor.size().into_iter().for_each(&mut add);
            let values = tensor.f_flatten(0, -1)?.f_to_kind(Kind::Int64)?;
            let values: Vec<i64> = Vec::try_from(values.f_to_device(Device::Cpu)?)?;
            values.into_iter().for_each(&mut add);
        }
    }
    Ok(sum)
}
