//! PyTorch's `DataLoader` and numpy on the same tokens.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde::Deserialize;

/// One figure of the script.
#[derive(Debug, Deserialize)]
pub(crate) struct Peer {
    pub(crate) what: String,
    pub(crate) how: String,
    pub(crate) workers: u32,
    /// Sequences a second.
    pub(crate) rate: f64,
    /// The same of processor time; only without workers.
    pub(crate) busy_rate: Option<f64>,
    first_ms: f64,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Peer { what, how, workers, rate, busy_rate, first_ms } = self;
        write!(f, "{what:<6} {how:<12} {workers} workers {rate:>10.0} sequences/s")?;
        if let Some(busy) = busy_rate {
            write!(f, ", {busy:>10.0} on a processor")?;
        }
        write!(f, ", first batch {first_ms:.1} ms")
    }
}

/// Measures all of them.
pub(crate) fn measure(flat: &Path, seconds: f64) -> anyhow::Result<Vec<Peer>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("PHALANX_PYTHON").map(PathBuf::from).unwrap_or_else(|| {
        let own = root.join("third_party/torch-python/bin/python");
        if own.exists() {
            own
        } else {
            PathBuf::from("python3")
        }
    });
    let script = root.join("scripts/bench_dataloader.py");
    let output = Command::new(&python)
        .arg(script)
        .arg(flat)
        .arg((seconds * 2.0).to_string())
        .output()
        .with_context(|| format!("{} cannot be started", python.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default().to_owned();
        anyhow::bail!(
            "{}: {last} (PHALANX_PYTHON names one with torch and numpy)",
            python.display()
        );
    }
    let lines = String::from_utf8(output.stdout)?;
    lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}
