//! GPUs of this machine, counted without asking a driver; and what NCCL needs when ranks share one.

use std::path::Path;

use phalanx_rendezvous::environment::LauncherEnvironment;

use crate::error::LaunchError;

/// How many GPUs ranks that are started here would see; no driver is asked, nothing is loaded.
///
/// # Errors
///
/// [`LaunchError::Environment`] when the environment holds something ill-formed.
pub fn gpu_count() -> Result<usize, LaunchError> {
    Ok(count(LauncherEnvironment::from_env()?.visible_gpus.as_deref()))
}

/// How many GPUs the ranks will see: those of the machine, as far as `CUDA_VISIBLE_DEVICES` shows them.
pub(crate) fn count(visible: Option<&str>) -> usize {
    let installed = entries(Path::new("/proc/driver/nvidia/gpus"), |_name| true)
        .max(entries(Path::new("/dev"), is_device));
    shown(installed, visible)
}

fn entries(folder: &Path, counts: impl Fn(&str) -> bool) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(&counts)).count()
}

/// `nvidia0`, not `nvidiactl`. Pure.
fn is_device(name: &str) -> bool {
    name.strip_prefix("nvidia")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The driver shows the devices listed, up to the first that does not exist. Pure.
fn shown(installed: usize, visible: Option<&str>) -> usize {
    let Some(visible) = visible else { return installed };
    let exists = |name: &&str| match name.trim().parse::<usize>() {
        Ok(index) => index < installed,
        Err(_) => !name.trim().is_empty(), // a UUID
    };
    visible.split(',').take_while(exists).count().min(installed)
}

/// What lets several ranks of emulated nodes share a GPU over NCCL: each is a machine of its own for it, and
/// they talk over loopback. For correctness only: they take turns on the GPU. Pure.
pub(crate) fn sharing(rank: usize) -> Vec<(&'static str, String)> {
    let fixed = [
        ("NCCL_P2P_DISABLE", "1"),
        ("NCCL_SHM_DISABLE", "1"),
        ("NCCL_NET", "Socket"),
        ("NCCL_SOCKET_IFNAME", "lo"),
        ("NCCL_IB_DISABLE", "1"),
        ("NCCL_NVLS_ENABLE", "0"),
        ("NCCL_CUMEM_ENABLE", "0"),
        ("NCCL_MAX_NCHANNELS", "2"),
    ];
    let mut variables = vec![("NCCL_HOSTID", format!("rank{rank}"))];
    variables.extend(fixed.map(|(name, value)| (name, value.to_owned())));
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_from_other_files() {
        let names = ["nvidia0", "nvidia12", "nvidia", "nvidiactl", "nvidia-uvm", "null"];
        assert_eq!(names.map(is_device), [true, true, false, false, false, false]);
    }

    #[test]
    fn what_is_not_shown_does_not_count() {
        assert_eq!(shown(8, None), 8);
        assert_eq!(shown(8, Some("0,1")), 2);
        assert_eq!(shown(8, Some("")), 0);
        assert_eq!(shown(2, Some("0,5,1")), 1, "the list ends at the first that does not exist");
        assert_eq!(shown(2, Some("GPU-aaaa")), 1);
        assert_eq!(shown(0, Some("0")), 0);
    }

    #[test]
    fn sharing_ranks_are_machines_of_their_own() {
        let host = |rank| sharing(rank).into_iter().find(|(name, _)| *name == "NCCL_HOSTID");
        assert_ne!(host(0), host(1));
    }
}
