//! [`OverGroup`]: how ranks agree on a checkpoint.

use phalanx_checkpoint::Ranks;
use phalanx_comm::Group;

/// A process group as the ranks that save together.
pub(super) struct OverGroup<'a>(pub(super) &'a mut Group);

impl Ranks for OverGroup<'_> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn all_gather(
        &mut self,
        bytes: &[u8],
    ) -> std::result::Result<Vec<Vec<u8>>, Box<dyn std::error::Error + Send + std::marker::Sync>>
    {
        Ok(self.0.tagged("checkpoint").all_gather_bytes(bytes)?)
    }
}
