//! What the NCCL backend reads of the environment. NCCL itself reads its own variables.

/// The file of libnccl (`PHALANX_NCCL_LIBRARY`), where the loader should not look for it.
pub(crate) fn nccl_library() -> Option<String> {
    read("PHALANX_NCCL_LIBRARY")
}

/// `NCCL_HOSTID`: the machine's name as far as NCCL is concerned.
pub(crate) fn nccl_host_id() -> Option<String> {
    read("NCCL_HOSTID")
}

/// What the environment asks of NCCL that `version` (22809 is 2.28.9) would not hear of; an older one ignores it in
/// silence.
pub(crate) fn nccl_lacks(version: i32) -> Option<String> {
    const LAUNCH_ORDER: &str = "NCCL_LAUNCH_ORDER_IMPLICIT";
    lacks(version, read(LAUNCH_ORDER).as_deref()).then(|| {
        format!(
            "{LAUNCH_ORDER} (nccl.launch_order_implicit) is known from NCCL 2.26 on: install a newer one than this \
             {}.{}, or leave the setting out",
            version / 10_000,
            version / 100 % 100
        )
    })
}

/// Of the launch order.
fn lacks(version: i32, value: Option<&str>) -> bool {
    version < 22_600 && value.is_some_and(|value| value != "0")
}

fn read(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether `PHALANX_REQUIRE` names what a test needs: then it fails instead of skipping itself.
#[cfg(test)]
pub(crate) fn is_required(what: &str) -> bool {
    read("PHALANX_REQUIRE").unwrap_or_default().split(',').any(|name| name == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launch_order_needs_nccl_2_26() {
        assert!(lacks(22_503, Some("1")));
        assert!(!lacks(22_602, Some("1")));
        assert!(!lacks(22_503, Some("0")) && !lacks(21_805, None));
    }
}
