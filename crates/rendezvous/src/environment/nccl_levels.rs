//! The values that NCCL's settings may have, as enums with NCCL's own names; for any other value
//! the error lists them.

/// How much NCCL writes (`NCCL_DEBUG`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "UPPERCASE"))]
pub enum NcclDebug {
    /// `VERSION`: its version, when it starts.
    Version,
    /// `WARN`: an explanation when a call fails.
    Warn,
    /// `INFO`: what it chose, and why.
    Info,
    /// `TRACE`: every call; for a libnccl that was built for it.
    Trace,
}

impl NcclDebug {
    /// The word that NCCL knows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Version => "VERSION",
            Self::Warn => "WARN",
            Self::Info => "INFO",
            Self::Trace => "TRACE",
        }
    }
}

/// How far apart two GPUs may be to talk directly (`NCCL_P2P_LEVEL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "UPPERCASE"))]
pub enum NcclP2pLevel {
    /// `LOC`: never.
    Loc,
    /// `NVL`: connected through `NVLink`.
    Nvl,
    /// `PIX`: on one PCI switch.
    Pix,
    /// `PXB`: over several PCI switches.
    Pxb,
    /// `PHB`: on one NUMA node, through the processor.
    Phb,
    /// `SYS`: across NUMA nodes.
    Sys,
}

impl NcclP2pLevel {
    /// The word that NCCL knows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loc => "LOC",
            Self::Nvl => "NVL",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Sys => "SYS",
        }
    }
}

/// How far a GPU may be from the network card that reads its memory (`NCCL_NET_GDR_LEVEL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "UPPERCASE"))]
pub enum NcclGdrLevel {
    /// `LOC`: never.
    Loc,
    /// `PIX`: on one PCI switch.
    Pix,
    /// `PXB`: over several PCI switches.
    Pxb,
    /// `PHB`: on one NUMA node, through the processor.
    Phb,
    /// `SYS`: across NUMA nodes.
    Sys,
}

impl NcclGdrLevel {
    /// The word that NCCL knows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loc => "LOC",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Sys => "SYS",
        }
    }
}
