//! Pure: which file systems lie behind a network. Pages of a map of such a file may be gone at any
//! time, and waiting for one cannot be interrupted.
//! Source: Linux, include/uapi/linux/magic.h and fs/; statfs(2); the headers of the others.

/// By the number that `statfs` gives.
const NETWORK: &[(u32, &str)] = &[
    (0x0000_564C, "NCP"),
    (0x0000_517B, "SMB"),
    (0x0000_6969, "NFS"),
    (0x00C3_6400, "CephFS"),
    (0x0102_1997, "9P"),
    (0x0116_1970, "GFS2"),
    (0x0131_11A8, "IBRIX"),
    (0x0BD0_0BD0, "Lustre"),
    (0x1983_0326, "BeeGFS"),
    (0x2003_0528, "OrangeFS"),
    (0x4750_4653, "GPFS"),
    (0x5346_414F, "AFS"),
    // FUSE: sshfs, GlusterFS, s3fs, and virtiofs, which calls itself so.
    (0x6573_5546, "FUSE"),
    (0x6163_6673, "ACFS"),
    (0x6B41_4653, "kAFS"),
    (0x7375_7245, "Coda"),
    (0x7461_636F, "OCFS2"),
    (0x786F_4256, "VirtualBox's shared folders"),
    (0xAAD7_AAEA, "PanFS"),
    (0xBACB_ACBC, "VMware's shared folders"),
    (0xBEEF_DEAD, "StorNext"),
    (0xFE53_4D42, "SMB2"),
    (0xFF53_4D42, "CIFS"),
];

/// The name of a network's file system. `None`: it lies on this machine, as far as is known.
pub(super) fn network_name(magic: u32) -> Option<&'static str> {
    NETWORK.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_of_this_machine_are_mapped_and_others_read() {
        let local = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630, 0x2FC1_2FC1];
        for magic in local {
            assert_eq!(network_name(magic), None, "ext4, XFS, Btrfs, tmpfs, overlay, ZFS");
        }
        assert_eq!(network_name(0x6969), Some("NFS"));
        assert_eq!(network_name(0x0BD0_0BD0), Some("Lustre"));
        let mut numbers: Vec<u32> = NETWORK.iter().map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), NETWORK.len());
    }
}
