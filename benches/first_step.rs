//! How long a user waits for the first step: from the start of the command to the line that reports it.
//!
//! ```text
//! cargo build --release --example bert_large && cargo bench --bench first_step
//! ```
//!
//! Runs `bert_large --config configs/bert_tiny.json --nnodes 4 --steps 1` five times (the text is prepared
//! by a first, untimed run) and prints the median.

#![expect(clippy::print_stdout, reason = "a program talks to its user")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};

const RUNS: usize = 5;

fn main() -> Result<()> {
    let bench = std::env::current_exe()?;
    let profile = bench.parent().and_then(Path::parent).context("target/release/deps/<bench>")?;
    let program = profile.join("examples/bert_large");
    ensure!(program.exists(), "first: cargo build --release --example bert_large");
    run(&program)?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        times.push(run(&program)?);
    }
    times.sort();
    println!(
        "first step of bert_tiny on 4 ranks done after {:.2} s (median of {RUNS}; fastest {:.2} s, slowest {:.2} s)",
        times[RUNS / 2].as_secs_f64(),
        times[0].as_secs_f64(),
        times[RUNS - 1].as_secs_f64()
    );
    Ok(())
}

fn run(program: &Path) -> Result<Duration> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let output = std::env::temp_dir().join(format!("phalanx-first-step-{}", std::process::id()));
    let mut command = Command::new(program);
    command.args([
        "--config",
        "configs/bert_tiny.json",
        "--nnodes",
        "4",
        "--steps",
        "1",
        "--output",
    ]);
    command.arg(&output).current_dir(root).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let mut done = None;
    for line in BufReader::new(child.stdout.take().context("its output")?).lines() {
        if line?.contains("step    1/1  loss") {
            done = done.or(Some(start.elapsed()));
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{}: {status}", program.display());
    std::fs::remove_dir_all(&output)?;
    done.context("no line reports the first step")
}
