//! Reading checkpoints: any box of a tensor from whatever pieces it lies in, every block compared with its checksum.

mod checkpoint;
mod shard;
mod verify;

pub use checkpoint::Checkpoint;
pub(crate) use shard::Shard;
pub use verify::Verified;
