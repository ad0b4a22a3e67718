//! Signals that ask a training to save and end: SIGTERM and SIGINT (a launcher's, a person's), SIGUSR1 (Slurm's, before the
//! time is up). A handler keeps the number, and the next step boundary finds it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::{flag, SigId};

use crate::{Error, Result};

/// What a process has been asked; handlers live as long as this.
#[derive(Debug)]
pub(super) struct Signals {
    asked: Arc<AtomicUsize>,
    handlers: Vec<SigId>,
}

impl Signals {
    /// From now on these signals do not end the process; a second SIGINT does.
    pub(super) fn heed() -> Result<Self> {
        let asked = Arc::new(AtomicUsize::new(0));
        let mut signals = Self { asked: Arc::clone(&asked), handlers: Vec::new() };
        let is_second = Arc::new(AtomicBool::new(false));
        let no_handler = |source| Error::System { doing: "register a signal handler", source };
        // In this order: the first SIGINT finds the flag down and puts it up.
        let shutdown =
            flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, Arc::clone(&is_second));
        signals.handlers.push(shutdown.map_err(no_handler)?);
        signals.handlers.push(flag::register(SIGINT, is_second).map_err(no_handler)?);
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            let number = usize::try_from(signal).unwrap_or(0);
            let handler = flag::register_usize(signal, Arc::clone(&asked), number);
            signals.handlers.push(handler.map_err(no_handler)?);
        }
        Ok(signals)
    }

    /// The last signal that came, 0 for none.
    pub(super) fn asked(&self) -> i64 {
        i64::try_from(self.asked.load(Ordering::Relaxed)).unwrap_or(0)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}
