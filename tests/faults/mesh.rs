//! A rank of a mesh is killed, on each axis: it is named with its place, and everything ends.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::support::{children_of, example, Owned};
use super::{steps_done, wait_until, DEADLINE};

/// Four ranks on two axes of two each.
fn start(folder: &Path, axes: [&str; 2]) -> Owned {
    let mut command = Command::new(example("gpt"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["--nnodes", "4", "--threads", "1", "--steps", "100000", "--micro-batches", "2"]);
    for axis in axes {
        command.args([&format!("--{axis}"), "2"]);
    }
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Owned::start(&mut command)
}

fn rank_of(process: &str) -> Option<usize> {
    let environment = fs::read(format!("/proc/{process}/environ")).ok()?;
    let mut variables = environment.split(|byte| *byte == 0);
    let rank = variables.find_map(|variable| variable.strip_prefix(b"RANK="))?;
    std::str::from_utf8(rank).ok()?.parse().ok()
}

#[test]
fn a_rank_that_is_killed_is_named_with_its_coordinates_on_every_axis() {
    for (axes, victim, named) in [
        (["pp", "dp"], 3, "rank 3 (pp 1, dp_shard 1)"),
        (["dp", "tp"], 2, "rank 2 (dp_shard 1, tp 0)"),
        (["cp", "tp"], 1, "rank 1 (cp 0, tp 1)"),
        (["pp", "cp"], 0, "rank 0 (pp 0, cp 0)"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut run = start(folder.path(), axes);
        wait_until("three steps", || {
            steps_done(folder.path()) >= 3 || run.0.try_wait().expect("our own child").is_some()
        });
        let ranks: Vec<String> = children_of(run.0.id());
        let process = ranks.iter().find(|process| rank_of(process) == Some(victim));
        let process = process.unwrap_or_else(|| panic!("{axes:?}: no rank {victim} in {ranks:?}"));
        let kill = Command::new("kill").args(["-KILL", process]).status();
        assert!(kill.expect("kill").success(), "{axes:?}");
        let output = run.finish(DEADLINE);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(70), "{axes:?}: {text}");
        let is_report = |line: &&str| line.contains("PHX0701") && line.contains("signal 9");
        let report = text.lines().find(is_report).unwrap_or_else(|| panic!("{axes:?}: {text}"));
        assert!(report.contains(named), "{axes:?}: {report}");
        for rank in &ranks {
            assert!(rank_of(rank).is_none(), "{axes:?}: process {rank} of a rank lives on");
        }
    }
}
