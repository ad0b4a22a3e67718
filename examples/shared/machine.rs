//! How much memory this machine has free, and how much a process has taken.
//!
//! An estimate of what a run takes is compared with what this machine, or the control group that the process lives in, has free; better a
//! message before the start than a kill by the kernel in step 1.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Too little memory: the need, what is free, and what would fit.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TooLittleMemory(String);

/// What one rank needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Estimate {
    /// Weights.
    pub(crate) parameters: u64,
    /// Gradients, in the type in which they travel.
    pub(crate) gradients: u64,
    /// What the rule keeps: both moments of Adam, for one; masters; the rank's part of it when sharded.
    pub(crate) optimizer: u64,
    /// What backward needs from forward, the bf16 weights of autocast included.
    pub(crate) activations: u64,
    /// The library, the heap's slack, staging memory of the group.
    pub(crate) runtime: u64,
}

impl Estimate {
    /// All of it.
    pub(crate) fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.runtime
    }
}

/// What the system lets us take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Free {
    /// Bytes that can be taken without pushing anything out.
    pub(crate) bytes: u64,
    /// The control group that sets the limit; none when it is the machine.
    pub(crate) control_group: Option<PathBuf>,
}

/// The least of the machine's available memory and what each enclosing control group (version 1 or
/// 2) leaves. `root` is `/` but in tests. None where the system does not say.
pub(crate) fn free(root: &Path) -> Option<Free> {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = field(&meminfo, "MemAvailable:")?;
    let mut least = Free { bytes: kib * 1024, control_group: None };
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let path = path.trim_start_matches('/');
        let files = if controllers.is_empty() {
            Files::V2
        } else if controllers.split(',').any(|name| name == "memory") {
            Files::V1
        } else {
            continue;
        };
        let mount = root.join(files.mount());
        // A limit of any enclosing group counts; inside a container the path may not be visible,
        // its root is.
        for folder in mount.join(path).ancestors().take_while(|folder| folder.starts_with(&mount)) {
            if let Some(bytes) = files.left(folder).filter(|bytes| *bytes < least.bytes) {
                least = Free { bytes, control_group: Some(folder.into()) };
            }
        }
    }
    Some(least)
}

/// The files of the two versions of control groups.
#[derive(Clone, Copy)]
enum Files {
    V1,
    V2,
}

impl Files {
    fn mount(self) -> &'static str {
        match self {
            Files::V1 => "sys/fs/cgroup/memory",
            Files::V2 => "sys/fs/cgroup",
        }
    }

    /// Limit − use + what the kernel gives back by itself (cached file pages).
    fn left(self, folder: &Path) -> Option<u64> {
        let (limit, usage, cached) = match self {
            Files::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            Files::V2 => ("memory.max", "memory.current", "inactive_file"),
        };
        let number = |name: &str| -> Option<u64> {
            std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
        };
        // "max" is no number: no limit.
        let limit = number(limit)?;
        let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let used = number(usage)?.saturating_sub(field(&stat, cached).unwrap_or(0));
        Some(limit.saturating_sub(used))
    }
}

/// The number behind a name at the start of a line.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(key, _)| *key == name)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
}

/// Compares the need of `local_ranks` ranks with what is free; `smaller` are configurations to
/// propose.
pub(crate) fn check(
    estimate: Estimate,
    local_ranks: usize,
    free: &Free,
    smaller: &[(&str, Estimate)],
) -> Result<(), TooLittleMemory> {
    let ranks = local_ranks as u64;
    let need = estimate.total() * ranks;
    if need <= free.bytes {
        return Ok(());
    }
    let place = match &free.control_group {
        Some(path) => format!("the control group {} leaves", path.display()),
        None => "this machine has".into(),
    };
    let mut message = format!(
        "too little memory: {local_ranks} {} of {} need about {} (each {} weights, {} gradients, \
         {} optimizer state, {} activations, {} runtime), {place} {} free",
        if ranks == 1 { "rank" } else { "ranks" },
        gib(estimate.total()),
        gib(need),
        gib(estimate.parameters),
        gib(estimate.gradients),
        gib(estimate.optimizer),
        gib(estimate.activations),
        gib(estimate.runtime),
        gib(free.bytes),
    );
    let mut fitting =
        smaller.iter().filter(|(_, other)| other.total() < estimate.total()).peekable();
    if fitting.peek().is_some() {
        message.push_str("; smaller configurations:");
    }
    for (name, other) in fitting {
        let other_need = other.total() * ranks;
        let verdict = if other_need <= free.bytes { "fits" } else { "does not fit either" };
        let _infallible = write!(message, " --config {name} ({}, {verdict})", gib(other_need));
    }
    message.push_str("; or fewer ranks, a smaller --micro-batch, --zero 3, --recompute");
    Err(TooLittleMemory(message))
}

/// Bytes in GiB with two digits.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Whether the processor multiplies bf16 by itself; without, libtorch converts and is slower than
/// in fp32. Unknown counts as yes.
pub(crate) fn has_bf16_products() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let features = text.lines().find(|l| l.starts_with("flags") || l.starts_with("Features"));
    let able = ["avx512_bf16", "amx_bf16", "bf16"];
    features.is_none_or(|line| line.split_whitespace().any(|word| able.contains(&word)))
}

/// What a process took, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Usage {
    /// Most that was resident at once (`VmHWM`): memory shared with other ranks counts in full.
    pub(crate) resident_peak_bytes: u64,
    /// The same with shared memory divided among those who share it: the sum over the ranks counts
    /// it once.
    pub(crate) proportional_peak_bytes: u64,
}

impl Usage {
    /// Of this process. The kernel keeps no peak of the proportional size: what sharing saves at
    /// this moment is taken off the resident peak.
    pub(crate) fn of_this_process() -> Usage {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        let bytes = |text: &str, name: &str| field(text, name).unwrap_or(0) * 1024;
        let peak = bytes(&status, "VmHWM:");
        let saved = bytes(&rollup, "Rss:").saturating_sub(bytes(&rollup, "Pss:"));
        Usage { resident_peak_bytes: peak, proportional_peak_bytes: peak.saturating_sub(saved) }
    }
}
