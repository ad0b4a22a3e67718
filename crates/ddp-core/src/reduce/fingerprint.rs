//! Are the parameters still the same on every rank? A hash of each, compared now and then.
//!
//! CRC-32C on the CPU, at the speed of memory; on a GPU the sum of the bits of all elements, which needs one
//! number a parameter from there.

use std::collections::BTreeMap;

use phalanx_comm::Group;
use tch::{Device, Kind, Tensor};

use crate::store::flat;
use crate::store::model::Named;
use crate::store::Store;
use crate::{Error, Result};

/// One number for each variable, frozen or not.
pub(crate) fn of_parameters(store: &Store) -> Result<Vec<u32>> {
    if store.device().is_cuda() {
        let whole = |(variable, named)| whole_here(store, variable, named);
        let tensors: Vec<_> = store.model.variables.iter().enumerate().map(whole).collect();
        return sums_of_bits(&tensors, store.device());
    }
    let hash = |(variable, named): (usize, &Named)| {
        if store.is_cut(variable) {
            return Ok(0); // there is one of it
        }
        Ok(crc32c::crc32c(flat::dense_bytes(&named.name, &named.tensor)?))
    };
    store.model.variables.iter().enumerate().map(hash).collect()
}

/// A variable, if this rank has more of it than its segments.
fn whole_here<'a>(store: &Store, variable: usize, named: &'a Named) -> Option<&'a Tensor> {
    (!store.is_cut(variable)).then_some(&named.tensor)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the lower half of a sum of bits"
)]
fn sums_of_bits(tensors: &[Option<&Tensor>], device: Device) -> Result<Vec<u32>> {
    let mut sums = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(tensor) = tensor else {
            sums.push(Tensor::f_zeros([] as [i64; 0], (Kind::Int64, device))?);
            continue;
        };
        let values = tensor.f_detach()?.f_contiguous()?;
        let bits = match values.kind() {
            Kind::Double => values.f_view_dtype(Kind::Int64)?,
            Kind::Half | Kind::BFloat16 => values.f_view_dtype(Kind::Int16)?,
            _ => values.f_view_dtype(Kind::Int)?,
        };
        sums.push(bits.f_sum(Kind::Int64)?);
    }
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    let sums: Vec<i64> = Vec::try_from(&Tensor::f_stack(&sums, 0)?.f_to_device(Device::Cpu)?)?;
    Ok(sums.into_iter().map(|sum| (sum ^ (sum >> 32)) as u32).collect())
}

/// A number for each variable that other ranks of the model have as well, whole on this rank.
pub(crate) fn of_shared(store: &Store) -> Result<BTreeMap<String, u32>> {
    let Some(part) = &store.part else { return Ok(BTreeMap::new()) };
    let rank = part.model.rank();
    let is_shared = |(variable, named): &(usize, &Named)| {
        let entry = part.table.tensors.get(&named.name);
        let pieces = entry.map_or(&[][..], |entry| &entry.pieces);
        let shared =
            pieces.iter().any(|piece| piece.ranks.len() > 1 && piece.ranks.contains(&rank));
        shared && !store.is_cut(*variable)
    };
    let shared: Vec<&Named> = store
        .model
        .variables
        .iter()
        .enumerate()
        .filter(is_shared)
        .map(|(_, named)| named)
        .collect();
    let hashes = match store.device().is_cuda() {
        true => sums_of_bits(
            &shared.iter().map(|named| Some(&named.tensor)).collect::<Vec<_>>(),
            store.device(),
        )?,
        false => {
            let hash =
                |named: &&Named| Ok(crc32c::crc32c(flat::dense_bytes(&named.name, &named.tensor)?));
            shared.iter().map(hash).collect::<Result<Vec<_>>>()?
        }
    };
    Ok(shared.into_iter().map(|named| named.name.clone()).zip(hashes).collect())
}

/// One number for all.
pub(crate) fn combined(hashes: &[u32]) -> u32 {
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
    crc32c::crc32c(&bytes)
}

/// Compares each parameter over the ranks. Collective.
///
/// # Errors
/// [`Error::ParametersDiffer`], the same on every rank.
pub(crate) fn compare(store: &mut Store, hashes: &[u32]) -> Result<()> {
    let mine: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
    let all = gather(&mut store.group, &mine)?;
    match first_difference(&all) {
        None => Ok(()),
        Some((parameter, ranks)) => Err(Error::ParametersDiffer {
            name: store.model.variables[parameter].name.clone(),
            ranks: ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn gather(group: &mut Group, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    Ok(group.tagged("fingerprints of parameters").all_gather_bytes(mine)?)
}

/// The first parameter that is not the same everywhere, and the ranks that differ from most others there (from
/// rank 0 where there is no majority). Pure.
fn first_difference(all: &[Vec<u8>]) -> Option<(usize, Vec<usize>)> {
    let parameters = all.iter().map(Vec::len).max().unwrap_or(0) / 4;
    let of = |rank: usize, parameter: usize| all[rank].get(parameter * 4..parameter * 4 + 4);
    let differs =
        |&parameter: &usize| (1..all.len()).any(|rank| of(rank, parameter) != of(0, parameter));
    let parameter = (0..parameters).find(differs)?;
    let votes = |rank: usize| {
        (0..all.len()).filter(|&other| of(other, parameter) == of(rank, parameter)).count()
    };
    // The first rank with the most votes.
    let mut right = 0;
    for rank in 1..all.len() {
        if votes(rank) > votes(right) {
            right = rank;
        }
    }
    let odd = (0..all.len()).filter(|&rank| of(rank, parameter) != of(right, parameter)).collect();
    Some((parameter, odd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_odd_rank_is_named_at_the_first_parameter_that_differs() {
        let same = vec![1_u8; 12];
        let mut odd = same.clone();
        odd[9] = 7;
        assert_eq!(first_difference(&[same.clone(), same.clone()]), None);
        assert_eq!(
            first_difference(&[odd.clone(), same.clone(), same.clone()]),
            Some((2, vec![0]))
        );
        assert_eq!(first_difference(&[same.clone(), odd.clone()]), Some((2, vec![1])));
        odd[0] = 3;
        assert_eq!(first_difference(&[same.clone(), odd, same]), Some((0, vec![1])));
    }
}
