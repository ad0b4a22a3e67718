//! Where snapshots in memory are kept.

use std::path::PathBuf;

/// What `PHALANX_SNAPSHOT_MEMORY` names, `/proc/811/fd/7:3`: the launcher's memory, and this rank's place in it.
pub fn snapshot_memory() -> Option<(PathBuf, usize)> {
    parse(&super::process_variable("PHALANX_SNAPSHOT_MEMORY")?)
}

fn parse(value: &str) -> Option<(PathBuf, usize)> {
    let (path, place) = value.rsplit_once(':')?;
    Some((PathBuf::from(path), place.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_a_place_are_read_and_nothing_else() {
        assert_eq!(parse("/proc/811/fd/7:3"), Some((PathBuf::from("/proc/811/fd/7"), 3)));
        for wrong in ["", "/proc/811/fd/7", "/proc/811/fd/7:", "/proc/811/fd/7:x"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
