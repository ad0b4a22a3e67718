//! Stands in for the MPI backend in builds without the feature `mpi`: asking for it is an error
//! that says what to build.

use std::sync::Arc;
use std::time::Instant;

use super::gpu::Gpu;
use super::host::core::Core;
use super::lane::Lane;
use crate::error::{Error, Result};

/// Every rank gives its bytes and gets everybody's, by rank.
type Gather<'a> = dyn FnMut(&[u8]) -> Result<Vec<Vec<u8>>> + 'a;

/// There is none.
pub(crate) fn open(
    _: &Arc<Core>,
    _: bool,
    _: &mut Gather<'_>,
    _: Instant,
) -> Result<(Arc<Lane>, Option<Arc<Gpu>>)> {
    let what = "this program was built without it: install an MPI library with its headers and \
                libclang (Debian: libopenmpi-dev, libclang-dev), and build with `--features mpi`";
    Err(Error::NoBackend { backend: "mpi", what: what.to_owned() })
}
