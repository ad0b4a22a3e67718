//! Stands in for the MPI backend in builds without the feature `mpi`: asking for it is an error
//! that says what to build.

use std::sync::Arc;
use std::time::Instant;

use super::{unavailable, Connected, Gather};
use crate::error::Result;
use crate::order::core::Core;

/// There is none.
pub(super) fn open(_: &Arc<Core>, _: bool, _: &mut Gather<'_>, _: Instant) -> Result<Connected> {
    Err(unavailable(
        "mpi",
        "this program was built without it: install an MPI library with its headers and \
         libclang (Debian: libopenmpi-dev, libclang-dev), and build with `--features mpi`",
    ))
}
