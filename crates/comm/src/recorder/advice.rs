//! What an error says of records that were not kept.

use crate::error::Error;

impl Error {
    /// What a program that ends over this error may add to it: how to have the last operations of all ranks, where the group has
    /// failed and this process's record ends with it. Under our launcher records are kept always, and under others where
    /// `PHALANX_FLIGHT_RECORDER` says so: then there is nothing to add.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        let group_failed = matches!(
            self,
            Self::OutOfStep { .. }
                | Self::PeerGone { .. }
                | Self::NotResponding { .. }
                | Self::PeerLeft { .. }
                | Self::ConnectionLost { .. }
                | Self::DataDamaged { .. }
                | Self::Timeout { .. }
                | Self::Stalled { .. }
                | Self::Backend { .. }
                | Self::Aborted { .. }
                | Self::PeerFailed { .. }
        );
        let help = "no record of the ranks' operations was kept: with PHALANX_FLIGHT_RECORDER=FOLDER, a folder that all \
                    ranks can write to, `phalanx flight FOLDER` shows after the next failure what each was in";
        (group_failed && !super::is_kept()).then_some(help)
    }
}
