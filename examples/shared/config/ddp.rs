//! Section `ddp`: how the ranks work together, and the [`DdpOptions`] that come of it.

use phalanx_ddp_core::{self as core, DdpOptions, Zero};
use serde::{Deserialize, Serialize};
use tch::Kind;

use super::Hook;

/// Which library moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Backend {
    /// NCCL when every rank has a GPU, else the host backend.
    Auto,
    /// On the CPU: shared memory inside a machine, TCP between machines.
    Host,
    /// On GPUs.
    Nccl,
    /// On the CPU, with the site's MPI library: under `mpirun`, built with `--features mpi`.
    Mpi,
}

/// What becomes of the model's buffers after each exchange. BERT has none; a model of yours in its place may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Buffers {
    /// Rank 0's replace everybody's.
    RankZero,
    /// They become the mean over the ranks.
    Mean,
    /// Each rank keeps its own.
    Own,
}

/// What to do with gradients that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum NonFinite {
    /// End, and say on which rank and of which parameter.
    Error,
    /// Leave the step out on every rank.
    SkipStep,
    /// Say so, and use them as they are.
    Warn,
    /// Do not look.
    Ignore,
}

/// A type of gradients, or of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FloatKind {
    /// 32-bit floats.
    Fp32,
    /// bfloat16: half the bytes.
    Bf16,
    /// 16-bit floats: half the bytes; small gradients vanish, for losses are not scaled here.
    Fp16,
}

impl FloatKind {
    pub(crate) fn kind(self) -> Kind {
        match self {
            FloatKind::Fp32 => Kind::Float,
            FloatKind::Bf16 => Kind::BFloat16,
            FloatKind::Fp16 => Kind::Half,
        }
    }

    /// Bytes of a number.
    pub(crate) fn bytes(self) -> u64 {
        if self == FloatKind::Fp32 {
            4
        } else {
            2
        }
    }
}

/// How the ranks work together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other, but that not both may be on"
)]
pub(crate) struct Ddp {
    /// Of what each rank holds a part: 0: nothing; 1: optimizer state; 2: gradients, too; 3: parameters, too.
    pub(crate) zero: u8,
    /// Layers that are exchanged, and with stage 3 gathered, as a whole: `"bert.encoder.layer.*"`.
    pub(crate) units: Vec<String>,
    /// Of those, the ones that stay from their first use to the end of the step once they are gathered.
    pub(crate) stay_gathered: Vec<String>,
    /// Among how many ranks what is sharded is cut: a divisor of their number; null is all.
    pub(crate) shard_ranks: Option<usize>,
    /// In which type parameters are kept, gathered and computed with: `bf16` or `fp16`, with fp32 masters; null is fp32.
    pub(crate) parameter_kind: Option<FloatKind>,
    /// Whether the optimizer's state, and a copy of what it updates, is in the host's memory.
    pub(crate) offload_optimizer: bool,
    /// Whether gradients are exchanged with each micro-batch, and add up in the ranks' segments: for stages 2 and 3.
    pub(crate) shard_accumulation: bool,
    /// Gradients reduced together, in MiB.
    pub(crate) bucket_mib: f64,
    /// The bucket that backward fills first, in MiB.
    pub(crate) first_bucket_mib: f64,
    /// `auto`, `host`, `nccl` or `mpi`.
    pub(crate) backend: Backend,
    /// Whether a backward may leave parameters without a gradient.
    pub(crate) find_unused_parameters: bool,
    /// Whether every backward uses the same parameters equally often: the first one counts.
    pub(crate) static_graph: bool,
    /// `rank_zero`, `mean` or `own`.
    pub(crate) buffers: Buffers,
    /// `error`, `skip_step`, `warn` or `ignore`.
    pub(crate) non_finite: NonFinite,
    /// In which type gradients add up and travel: `fp32`, `bf16`, `fp16`; null is the parameters' own, fp32.
    pub(crate) gradient_kind: Option<FloatKind>,
    /// How gradients travel: `none`, `noop`, `bf16`, `fp16`, `int8`, `topk:SHARE` or `powersgd:RANK[:PLAIN_STEPS]`.
    pub(crate) hook: Hook,
    /// After how many exchanges ranks compare their parameters; 0 is never.
    pub(crate) fingerprint_interval: u64,
    /// How long a collective may wait for ranks that live and do not call, in seconds. Dead ones are found at once.
    pub(crate) timeout_s: u64,
    /// How long a rank may say nothing before it counts as dead, in seconds: one that stands still is found after that time, and a
    /// machine that stalls for longer ends the run.
    pub(crate) dead_after_s: f64,
}

impl Default for Ddp {
    fn default() -> Self {
        // The bucket sizes are PyTorch's.
        Ddp {
            zero: 0,
            units: Vec::new(),
            stay_gathered: Vec::new(),
            shard_ranks: None,
            parameter_kind: None,
            offload_optimizer: false,
            shard_accumulation: false,
            bucket_mib: 25.0,
            first_bucket_mib: 1.0,
            backend: Backend::Auto,
            find_unused_parameters: false,
            static_graph: false,
            buffers: Buffers::RankZero,
            non_finite: NonFinite::Error,
            gradient_kind: None,
            hook: Hook::None,
            fingerprint_interval: 100,
            timeout_s: 1800,
            dead_after_s: 5.0,
        }
    }
}

impl Ddp {
    /// As the library takes them.
    pub(crate) fn options(&self) -> DdpOptions {
        DdpOptions {
            bucket_bytes: vec![bytes(self.first_bucket_mib), bytes(self.bucket_mib)],
            zero: match self.zero {
                0 => Zero::Off,
                1 => Zero::One,
                2 => Zero::Two,
                _ => Zero::Three,
            },
            units: self.units.clone(),
            stay_gathered: self.stay_gathered.clone(),
            shard_ranks: self.shard_ranks,
            parameter_kind: self
                .parameter_kind
                .filter(|&kind| kind != FloatKind::Fp32)
                .map(FloatKind::kind),
            offload_optimizer: self.offload_optimizer,
            shard_accumulation: self.shard_accumulation,
            buffers: match self.buffers {
                Buffers::RankZero => core::Buffers::RankZero,
                Buffers::Mean => core::Buffers::Mean,
                Buffers::Own => core::Buffers::Own,
            },
            find_unused_parameters: self.find_unused_parameters,
            static_graph: self.static_graph,
            gradient_kind: self.gradient_kind.map(FloatKind::kind),
            non_finite: match self.non_finite {
                NonFinite::Error => core::NonFinite::Error,
                NonFinite::SkipStep => core::NonFinite::SkipStep,
                NonFinite::Warn => core::NonFinite::Warn,
                NonFinite::Ignore => core::NonFinite::Ignore,
            },
            fingerprint_interval: self.fingerprint_interval,
            ..DdpOptions::default()
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked when the configuration was: above 0 and at most 65536 MiB"
)]
fn bytes(mib: f64) -> usize {
    (mib * f64::from(1 << 20)) as usize
}
