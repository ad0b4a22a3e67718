//! Mixed precision: autocast (matrix products in a narrower type, on CPU and CUDA) and loss scaling.
//!
//! tch's own `autocast` is the CUDA one with libtorch's default type; this one takes device and type.

mod scaler;

use tch::{Device, Kind};

pub use scaler::LossScaler;

use crate::{shim, Error, Result};

/// `at::ScalarType` of the kinds that there are.
const HALF: i32 = 5;
const BFLOAT16: i32 = 15;

/// Restores the thread's autocast setting when it goes, also when the closure panics.
struct Restore {
    device_type: i32,
    enabled: bool,
    kind: i32,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let left = shim::autocast_nest(-1);
        let set = shim::autocast_set(self.device_type, self.enabled, self.kind);
        if let Err(error) = left.and(set) {
            tracing::error!(%error, "autocast could not be restored");
        }
    }
}

/// Runs `body` with autocast to `kind` on for `device` on this thread.
///
/// Run the forward inside and the backward outside: autograd uses each operation's own type again.
/// Weights are cast once per call and dropped at its end.
///
/// # Errors
/// [`Error::UnsupportedKind`] unless `kind` is bf16 or f16; libtorch's own errors.
///
/// # Source
/// `ATen/autocast_mode.h`.
pub fn autocast<T>(device: Device, kind: Kind, body: impl FnOnce() -> T) -> Result<T> {
    let scalar_type = match kind {
        Kind::BFloat16 => BFLOAT16,
        Kind::Half => HALF,
        _ => return Err(Error::UnsupportedKind { name: "autocast".to_owned(), kind }),
    };
    run(device, Some(scalar_type), body)
}

/// Runs `body` with autocast off for `device` on this thread: what a [custom function](crate::autograd) does in its forward, because its
/// backward runs without.
///
/// # Errors
/// libtorch's own errors.
pub fn without_autocast<T>(device: Device, body: impl FnOnce() -> T) -> Result<T> {
    run(device, None, body)
}

/// To which kind autocast is on for `device` on this thread.
///
/// # Errors
/// libtorch's own errors.
pub fn autocast_kind(device: Device) -> Result<Option<Kind>> {
    Ok(match shim::autocast_get(i32::from(device.is_cuda()))? {
        (true, HALF) => Some(Kind::Half),
        (true, _) => Some(Kind::BFloat16),
        (false, _) => None,
    })
}

fn run<T>(device: Device, to: Option<i32>, body: impl FnOnce() -> T) -> Result<T> {
    let device_type = i32::from(device.is_cuda());
    let (enabled, before) = shim::autocast_get(device_type)?;
    shim::autocast_nest(1)?;
    let restore = Restore { device_type, enabled, kind: before };
    shim::autocast_set(device_type, to.is_some(), to.unwrap_or(before))?;
    let value = body();
    drop(restore);
    Ok(value)
}
