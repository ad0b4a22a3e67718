//! Whether this rank should stop at the next boundary between steps: its launcher asks for it, or a signal does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use phalanx_comm::recorder;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::error::{system, LaunchError};

static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGTERM, SIGINT and SIGUSR1 do not end this process: they make [`should_stop`] true. The program then
/// saves and ends by itself, within the launcher's `--grace` (Slurm: `--signal=USR1@60`, its `KillWait`).
///
/// # Errors
///
/// [`LaunchError::System`] when the handlers cannot be installed.
pub fn heed_signals() -> Result<(), LaunchError> {
    let asked = ASKED.get_or_init(Arc::default);
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        signal_hook::flag::register(signal, Arc::clone(asked))
            .map_err(system("register a signal handler"))?;
    }
    Ok(())
}

/// A new generation begins: what the one before was asked for is over.
pub(crate) fn forget() {
    if let Some(asked) = ASKED.get() {
        asked.store(false, Ordering::Relaxed);
    }
}

/// Whether this rank has been asked to stop at the next boundary between steps: by its launcher, because nodes come or go
/// or the user ends the job; or by a signal, after [`heed_signals`]. Two loads.
///
/// Ranks may see it at different steps: let the maximum over all ranks decide before one leaves a collective out.
#[must_use]
pub fn should_stop() -> bool {
    ASKED.get().is_some_and(|asked| asked.load(Ordering::Relaxed)) || recorder::should_stop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_of_one_generation_does_not_end_the_next() {
        heed_signals().expect("handlers");
        signal_hook::low_level::raise(SIGUSR1).expect("raised");
        assert!(should_stop());
        forget();
        assert!(!should_stop());
        signal_hook::low_level::raise(SIGUSR1).expect("raised");
        assert!(should_stop(), "the handlers are still there");
    }
}
