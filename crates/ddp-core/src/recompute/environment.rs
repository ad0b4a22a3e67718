//! What a closure's result depends on besides its inputs: the default random generators, autocast and the grad mode. Taken down in the forward,
//! put in place for a recomputation, and what was there before is put back.

use tch::{Device, Tensor};

use crate::shim::autograd;
use crate::{shim, Result};

/// `at::DeviceType` of those that have autocast here: CPU and CUDA.
const AUTOCAST: [i32; 2] = [0, 1];

/// Random states and autocast settings.
#[derive(Debug)]
pub(super) struct Environment {
    random: Vec<(Device, Tensor)>,
    /// By device type: on or off, and to which type.
    autocast: [(bool, i32); 2],
    /// Whether operations are recorded.
    records: bool,
}

impl Environment {
    /// As they are for operations of this thread on `devices`.
    pub(super) fn of_this_thread(devices: &[Device]) -> Result<Self> {
        let random = devices.iter().map(|&device| Ok((device, shim::random_state(device)?)));
        let random = random.collect::<Result<_>>()?;
        let [cpu, cuda] = AUTOCAST.map(shim::autocast_get);
        Ok(Self { random, autocast: [cpu?, cuda?], records: autograd::grad_mode()? })
    }

    /// Without the generators that are as they were: nothing drew from them.
    pub(super) fn used(mut self) -> Result<Self> {
        let mut used = Vec::with_capacity(self.random.len());
        for (device, state) in self.random {
            if !state.f_equal(&shim::random_state(device)?)? {
                used.push((device, state));
            }
        }
        self.random = used;
        Ok(self)
    }

    /// Runs `body`, which does not panic, with operations recorded as they were.
    pub(super) fn recording<T>(&self, body: impl FnOnce() -> T) -> T {
        match self.records {
            true => tch::with_grad(body),
            false => tch::no_grad(body),
        }
    }

    /// Puts them in place until what is returned is dropped.
    pub(super) fn enter(&self) -> Result<Entered> {
        let devices: Vec<Device> = self.random.iter().map(|(device, _)| *device).collect();
        let before = Self::of_this_thread(&devices)?;
        // A region of its own, as the forward's was: weights that it casts are dropped at its end. Without autocast there is
        // none, for the end of a region drops those of all threads.
        let is_region = self.autocast.iter().any(|(enabled, _)| *enabled);
        if is_region {
            shim::autocast_nest(1)?;
        }
        let entered = Entered { before, is_region };
        self.set()?;
        Ok(entered)
    }

    fn set(&self) -> Result<()> {
        for (device, state) in &self.random {
            shim::set_random_state(*device, state)?;
        }
        for (device_type, (enabled, kind)) in AUTOCAST.into_iter().zip(self.autocast) {
            shim::autocast_set(device_type, enabled, kind)?;
        }
        Ok(())
    }
}

/// Puts back what was there before when it goes, also when a closure panics.
#[derive(Debug)]
pub(super) struct Entered {
    before: Environment,
    is_region: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let left = if self.is_region { shim::autocast_nest(-1) } else { Ok(()) };
        if let Err(error) = left.and(self.before.set()) {
            tracing::error!(%error, "random state and autocast could not be restored");
        }
    }
}
