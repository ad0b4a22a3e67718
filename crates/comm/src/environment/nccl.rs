//! What the NCCL backend reads of the environment. NCCL itself reads its own variables.

/// The file of libnccl (`PHALANX_NCCL_LIBRARY`), where the loader should not look for it.
pub(crate) fn nccl_library() -> Option<String> {
    read("PHALANX_NCCL_LIBRARY")
}

/// `NCCL_HOSTID`: the machine's name as far as NCCL is concerned.
pub(crate) fn nccl_host_id() -> Option<String> {
    read("NCCL_HOSTID")
}

fn read(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether `PHALANX_REQUIRE` names what a test needs: then it fails instead of skipping itself.
#[cfg(test)]
pub(crate) fn is_required(what: &str) -> bool {
    read("PHALANX_REQUIRE").unwrap_or_default().split(',').any(|name| name == what)
}
