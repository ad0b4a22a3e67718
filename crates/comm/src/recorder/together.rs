//! Errors that every rank has at once, at the same place, while the group is well: gradients that are not finite, parameters that are
//! not the same. Nobody is lost, so where the launcher keeps ranks all of them can begin again in the processes that they have.

use std::sync::{Mutex, PoisonError};

static TOLD: Mutex<Option<String>> = Mutex::new(None);

/// Says that this rank's training has met an error that every other rank has met as well.
pub fn tell_shared_error(text: &str) {
    *TOLD.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
}

/// The error that was [told](tell_shared_error) last, if none was asked for since.
#[must_use]
pub fn take_shared_error() -> Option<String> {
    TOLD.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Records an error that is every rank's as this rank's failure, for the launcher to read.
pub fn fail_together(text: &str) {
    if let Some(ring) = super::ring() {
        ring.fail(text, super::WORLD, None);
    }
}
