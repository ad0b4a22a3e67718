//! The ranks' random generators: what dropout and `Tensor::randn` draw next.

use phalanx_checkpoint::{Checkpoint, Tensors};
use tch::{Device, Kind, Tensor};

use super::held::Held;
use crate::store::Store;
use crate::{shim, Error, Result};

/// The states of this rank's generators.
pub(super) fn held(store: &Store) -> Result<Vec<Held>> {
    let state =
        |device| Held::whole(name(device, store.rank_of_all()), &shim::random_state(device)?);
    devices(store).into_iter().map(state).collect()
}

/// Puts this rank's generators into the states that they had, where the checkpoint has such a rank.
pub(super) fn restore(store: &Store, checkpoint: &Checkpoint) -> Result<()> {
    for device in devices(store) {
        let name = name(device, store.rank_of_all());
        if checkpoint.spec(&name).is_none() {
            tracing::info!("{name} is not in the checkpoint: this rank was not there, and goes on with the random state that it has");
            continue;
        }
        let bytes = checkpoint.read_whole(&name)?;
        let len = i64::try_from(bytes.len())
            .map_err(|_too_long| Error::TooLarge { elements: bytes.len() })?;
        let state = Tensor::f_from_data_size(&bytes, &[len], Kind::Uint8)?;
        shim::set_random_state(device, &state)?;
    }
    Ok(())
}

fn devices(store: &Store) -> Vec<Device> {
    match store.device() {
        Device::Cpu => vec![Device::Cpu],
        gpu => vec![Device::Cpu, gpu],
    }
}

fn name(device: Device, rank: usize) -> String {
    let device = if device.is_cuda() { "gpu" } else { "cpu" };
    format!("random/{device}/rank-{rank}")
}
