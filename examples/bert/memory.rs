//! How much memory a run takes, and whether that much is there.
//!
//! The estimate counts what training BERT keeps: weights, gradients, both moments, the bf16 copies
//! of autocast, the activations that backward needs. It is compared with what this machine, or the
//! control group that the process lives in, has free; better a message before the start than a kill
//! by the kernel in step 1.
//!
//! Source of the activation count: Korthikanti et al., "Reducing Activation Recomputation in Large
//! Transformer Models" (2022), section 4, adapted to the types that autocast keeps on the CPU.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::config::{Config, FloatKind, Model, Precision, Rule};

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

/// Measured: a rank of the tiny model, libtorch's private pages included.
const RUNTIME_BYTES: u64 = 160 << 20;

/// Where matrices come together that a rule needs whole: a wave of buckets of 25 MiB.
const TOGETHER_BYTES: u64 = 96 << 20;

impl Estimate {
    /// For one rank of `world_size`.
    pub(crate) fn new(config: &Config, world_size: usize, micro_batch: usize) -> Estimate {
        let (of_all, of_embeddings) =
            (config.model.parameter_count(), config.model.embedding_count());
        let parameter_bytes = config.ddp.parameter_kind.map_or(4, FloatKind::bytes);
        let parameters = of_all * parameter_bytes;
        let gradient_bytes = config.ddp.gradient_kind.map_or(4, FloatKind::bytes);
        let has_masters = parameter_bytes < 4 || config.ddp.offload_optimizer;
        let masters = if has_masters { 4 * of_all } else { 0 };
        let states = 4 * config.optimizer.state_count(of_all, of_embeddings) + masters;
        let together = match config.optimizer.rule {
            Rule::Muon | Rule::Adafactor => (4 * of_all).min(TOGETHER_BYTES),
            _ => 0,
        };
        let ranks = config.ddp.shard_ranks.unwrap_or(world_size).max(1) as u64;
        let shards = |from_stage: u8| if config.ddp.zero < from_stage { 1 } else { ranks };
        let gradients = of_all * gradient_bytes;
        Estimate {
            parameters: parameters.div_ceil(shards(3)),
            gradients: gradients.div_ceil(shards(2))
                + exchange(config, gradient_bytes)
                + of_all * config.ddp.hook.kept_bytes(),
            optimizer: states.div_ceil(shards(1)) + together,
            activations: activations(config, micro_batch as u64),
            runtime: RUNTIME_BYTES,
        }
    }

    /// All of it.
    pub(crate) fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.runtime
    }
}

/// What gradients are exchanged in, where no rank keeps all of them: three usual buckets, and one for the word embedding.
fn exchange(config: &Config, gradient_bytes: u64) -> u64 {
    if config.ddp.zero < 2 {
        return 0;
    }
    let Model { vocab_size, hidden_size, .. } = config.model;
    let embedding = u64::try_from(vocab_size * hidden_size).unwrap_or(0) * gradient_bytes;
    // A bucket closes with the parameter that fills it.
    3 * 2 * 25 * (1 << 20) + embedding
}

fn activations(config: &Config, samples: u64) -> u64 {
    let Model {
        hidden_size,
        intermediate_size,
        num_attention_heads,
        num_hidden_layers,
        vocab_size,
        ..
    } = config.model;
    let size = |value: i64| u64::try_from(value).unwrap_or(0);
    let (hidden, inner, vocab) = (size(hidden_size), size(intermediate_size), size(vocab_size));
    // Fixed batches may be shorter than the configuration says, never longer than the model allows.
    let length =
        (config.data.sequence_length as u64).min(size(config.model.max_position_embeddings));
    let tokens = samples * length;
    let half = config.train.precision == Precision::Bf16;
    let width = if half { 2 } else { 4 };
    // Kept of each token: q, k, v, the attention's output and the casts of three inputs in the
    // compute type; the sum before and the output of both layer norms in fp32, two dropout masks in
    // bytes; the feed-forward's inside twice.
    let casts = if half { 3 } else { 0 };
    let token = hidden * ((4 + casts) * width + 4 * 4 + 2) + 2 * inner * width;
    // Probabilities, their dropout noise and the product of both.
    let attention = 3 * size(num_attention_heads) * length * width;
    // Recomputed layers keep their input in fp32, and one of them at a time everything.
    let layers = match (config.train.recompute, size(num_hidden_layers)) {
        (true, count) => tokens * (count * hidden * 4 + token + attention),
        (false, count) => count * tokens * (token + attention),
    };
    let weights = if half { 2 * config.model.parameter_count() } else { 0 };
    // One token in six is predicted; logits, their log-softmax and both gradients.
    let logits = tokens / 6 * vocab * (4 + 4 + 2 * width);
    // The embedding gets a gradient from the lookup and one from the decoder, each dense, before
    // they are added.
    layers + weights + logits + 2 * vocab * hidden * 4
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
