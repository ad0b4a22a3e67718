//! The fault lab: a trainer is broken as machines break it, and goes on to the same bits.
//!
//! What is injected is waited for, never slept for; the moment of a kill is drawn from a seed (`PHALANX_KILLS_SEED`), and CI has few of
//! them: `PHALANX_KILLS=200 cargo test --test faults kills` has as many as one likes.

#[path = "../support/mod.rs"]
mod support;

mod elastic;
mod full;
mod kills;
mod machine;
mod memory;
mod mesh;
mod over_mpi;
mod soak;
mod staying;
mod stops;
mod world;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use support::{example, Owned};

/// More than any run here takes on two busy cores.
const DEADLINE: Duration = Duration::from_secs(240);

/// The tiny model on four ranks, one thread each.
const FOUR: [&str; 6] = ["--config", "configs/bert_tiny.json", "--nnodes", "4", "--threads", "1"];

/// `bert_large` with `args`, its metrics and output in `folder`.
fn trainer(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(example("bert_large"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// As [`trainer`], running.
fn start(folder: &Path, args: &[&str]) -> Owned {
    Owned::start(&mut trainer(folder, args))
}

/// As [`start`], to its good end.
fn finish(folder: &Path, args: &[&str]) -> Output {
    let output = start(folder, args).finish(DEADLINE);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}\n{text}", output.status);
    output
}

/// The bytes of the final weights.
fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("out/model.safetensors")).expect("final weights")
}

/// The loss of each step, as text: to the last bit.
fn losses(folder: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).expect("metrics");
    let lines = text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line"));
    let step = |line: serde_json::Value| Some((line["step"].as_u64()?, line["loss"].to_string()));
    lines.filter_map(step).collect()
}

fn wait_until(what: &str, is_there: impl FnMut() -> bool) {
    support::wait_until(what, DEADLINE, is_there);
}

/// How many steps the metrics have.
fn steps_done(folder: &Path) -> usize {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    text.matches("\"step\":").count()
}
