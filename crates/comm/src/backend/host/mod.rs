//! The host backend: shared memory between ranks of one machine, TCP between machines.
//!
//! | file | what |
//! |---|---|
//! | `reduction` | reductions, in place or staged, in rank order |
//! | `transfer` | collectives that only move data |

mod reduction;
mod transfer;

use std::sync::Arc;

use super::Transport;
use crate::call::CallMemory;
use crate::error::Result;
use crate::fingerprint::Op;
use crate::lane::Lane;
use crate::order::core::Core;
use crate::order::executor::CallRun;

/// All calls are moved in their order.
#[derive(Debug)]
pub(super) struct HostTransport;

impl Transport for HostTransport {
    fn lane(&self, _on_device: bool) -> Option<&Arc<Lane>> {
        None
    }

    fn close(&self, core: &Core) {
        core.close();
    }
}

/// Moves the data of a call that all ranks have made.
pub(super) fn carry(run: &mut CallRun<'_>, memory: &mut CallMemory) -> Result<()> {
    match run.call.op() {
        Op::AllReduce | Op::Reduce | Op::ReduceScatter => reduction::run(run, memory),
        Op::Barrier | Op::Allocate | Op::Split | Op::Send | Op::Receive => Ok(()),
        _ => transfer::run(run, memory),
    }
}
