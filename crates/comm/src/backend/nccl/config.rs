//! A communicator's settings, in the layout that each version of NCCL expects.

use std::ffi::c_int;
use std::mem::offset_of;

use cudarc::nccl::sys::ncclConfig_t;

use crate::dtype::DType;

/// The version whose configuration this is.
const NEWEST: i32 = 23_000;

/// `ncclConfig_t` with everything undefined (`NCCL_CONFIG_INITIALIZER`), but not blocking, and no
/// longer than the library knows it. Later libraries take it for that of [`NEWEST`]: what they have added since lies where
/// this one has padding.
pub(super) fn config(version: i32) -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    const MAGIC: u32 = 0xcafe_beef;
    let version = version.min(NEWEST);
    let size = match version {
        NEWEST.. => size_of::<ncclConfig_t>(),
        22_900.. => offset_of!(ncclConfig_t, maxP2pPeers),
        22_800.. => offset_of!(ncclConfig_t, graphUsageMode),
        22_700.. => offset_of!(ncclConfig_t, nChannelsPerNetPeer),
        22_600.. => offset_of!(ncclConfig_t, commName),
        _ => offset_of!(ncclConfig_t, trafficClass),
    };
    ncclConfig_t {
        size: size.next_multiple_of(align_of::<ncclConfig_t>()),
        magic: MAGIC,
        version: u32::try_from(version).unwrap_or(0),
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

/// `ncclDataType_t` of an element type.
pub(super) const fn code_of(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I32 => 2,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}
