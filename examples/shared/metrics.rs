//! What is measured: one record a step, a summary at the end, as JSON lines and for the report.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::machine::Usage;

/// One optimizer step, as rank 0 saw it. Times are of rank 0, counts and loss of all ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepRecord {
    /// From 1.
    pub(crate) step: u64,
    /// Mean over all masked tokens of the global batch; null where it is not finite.
    pub(crate) loss: f64,
    /// Learning rate of this step.
    pub(crate) lr: f64,
    /// Global norm before clipping; null where it is not finite.
    pub(crate) grad_norm: f64,
    /// 1 where the step was left out because gradients were not finite, else 0.
    pub(crate) skipped: u8,
    /// Tokens of the global batch, padding left out.
    pub(crate) tokens: u64,
    /// Samples of the global batch that were left out because they are damaged.
    pub(crate) left_out: usize,
    /// The whole step.
    pub(crate) step_ms: f64,
    /// Waiting for the loader.
    pub(crate) data_wait_ms: f64,
    /// The same, of each rank.
    pub(crate) data_wait_ms_by_rank: Vec<f64>,
    /// Forward of all micro-batches.
    pub(crate) forward_ms: f64,
    /// Backward of all micro-batches, without the next.
    pub(crate) backward_ms: f64,
    /// Waiting for gradients after the last of our own was ready.
    pub(crate) exposed_comm_ms: f64,
    /// Waiting for other stages of a pipeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pipeline_idle_ms: Option<f64>,
    /// Bytes that a rank has to send for the gradients at least; what sharded weights take to be gathered is not in it.
    #[serde(default)]
    pub(crate) bytes_sent: u64,
    /// Clipping, update, and the gathering of weights when they are sharded.
    pub(crate) optimizer_ms: f64,
    /// Tokens of the global batch ÷ step time.
    pub(crate) tokens_per_s: f64,
}

/// The last line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) steps: u64,
    pub(crate) parameters: u64,
    pub(crate) world_size: usize,
    /// The axes over which the model is cut, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mesh: Option<String>,
    /// Of a pipeline, the blocks of each stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stage_blocks: Option<Vec<usize>>,
    /// Ranks that read different samples.
    #[serde(default)]
    pub(crate) readers: usize,
    pub(crate) node_count: usize,
    pub(crate) backend: String,
    pub(crate) threads: usize,
    pub(crate) global_batch: usize,
    pub(crate) micro_batch: usize,
    pub(crate) accumulate: usize,
    pub(crate) precision: super::config::Precision,
    pub(crate) zero: u8,
    /// How gradients travelled.
    pub(crate) hook: super::config::Hook,
    /// Steps that were left out because gradients were not finite.
    pub(crate) skipped: u64,
    /// Ranks that the others waited for over the last exchanges, a text each.
    pub(crate) stragglers: Vec<String>,
    /// By rank.
    pub(crate) peak_memory: Vec<Usage>,
    /// What the trainer expected of each rank, where it counts by rank.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) estimated_bytes: Vec<u64>,
    /// Sum over the ranks, shared pages once.
    pub(crate) peak_memory_sum_bytes: u64,
    pub(crate) versions: Versions,
}

/// Who computed this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Versions {
    pub(crate) phalanx: String,
    pub(crate) tch: String,
    pub(crate) libtorch: String,
}

impl Versions {
    /// Of this program; tch 0.24 is built for exactly this libtorch.
    pub(crate) fn new() -> Versions {
        Versions {
            phalanx: env!("CARGO_PKG_VERSION").into(),
            tch: "0.24.0".into(),
            libtorch: "2.11.0".into(),
        }
    }
}

/// Milliseconds with fractions.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The JSON-lines file.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsFile {
    /// Creates the file and its folder: a wrong path is found before the first step.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(|| {
                format!("cannot make the folder {} for --metrics", folder.display())
            })?;
        }
        let file = File::create(path)
            .with_context(|| format!("cannot create the metrics file {}", path.display()))?;
        Ok(MetricsFile { path: path.into(), file: BufWriter::new(file) })
    }

    /// As [`MetricsFile::create`] for a run that may go on where an earlier one has ended: what is there stays.
    pub(crate) fn reopen(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Self::create(path);
        }
        let file = File::options().append(true).open(path);
        let file =
            file.with_context(|| format!("cannot open the metrics file {}", path.display()))?;
        Ok(MetricsFile { path: path.into(), file: BufWriter::new(file) })
    }

    /// Keeps the steps up to `step`, which are given back, and drops what an earlier run has done beyond it.
    pub(crate) fn go_on(&mut self, step: u64) -> Result<Vec<StepRecord>> {
        let explain = || format!("cannot go on with the metrics file {}", self.path.display());
        let text = std::fs::read_to_string(&self.path).with_context(explain)?;
        let (mut kept, mut lines) = (Vec::new(), String::new());
        for line in text.lines() {
            // Lines of another kind, and one that was cut off, are no steps.
            let record = serde_json::from_str::<StepRecord>(line).ok();
            if let Some(record) = record.filter(|record| record.step <= step) {
                kept.push(record);
                lines += &format!("{line}\n");
            }
        }
        std::fs::write(&self.path, lines).with_context(explain)?;
        Ok(kept)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// One line, on disk when this returns as far as the process is concerned: a run that is killed
    /// keeps its steps.
    pub(crate) fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value)?;
        writeln!(self.file, "{line}")
            .and_then(|()| self.file.flush())
            .with_context(|| format!("cannot write to the metrics file {}", self.path.display()))
    }
}
