//! Where the flight recorder keeps its record.

use std::path::PathBuf;

/// What `PHALANX_FLIGHT_RECORDER` names: a file of the right size, or a folder for one.
pub fn flight_recorder() -> Option<PathBuf> {
    let place = std::env::var_os("PHALANX_FLIGHT_RECORDER")?;
    (!place.is_empty()).then(|| PathBuf::from(place))
}
