//! Nodes that come and go (F35): two launchers as of two machines, on one.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::memory::ranks_of;
use super::support::{example, free_port, Owned};
use super::{finish, losses, steps_done, wait_until, weights, DEADLINE};

/// 12 samples a step in micro-batches of 6: two ranks make one each, a rank alone makes both, with the same bits.
const TRAINING: [&str; 12] = [
    "--config",
    "configs/bert_tiny.json",
    "--threads",
    "1",
    "--steps",
    "60",
    "--global-batch",
    "12",
    "--micro-batch",
    "6",
    "--dropout",
    "0",
];

/// The launcher of a node.
fn node(number: &str, port: u16, folder: &Path) -> Owned {
    let mut command = Command::new(example("bert_large"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(TRAINING);
    command.args(["--nnodes", "1:2", "--node-rank", number]);
    command.args(["--master-addr", "127.0.0.1", "--master-port", &port.to_string()]);
    command.args(["--save-every", "5", "--checkpoint"]).arg(folder.join("checkpoints"));
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    command.env("PHALANX_JOB_TOKEN", "5".repeat(64));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Owned::start(&mut command)
}

/// Whether the last step is one of two ranks.
fn has_two(folder: &Path) -> bool {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    let last = text.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let last: serde_json::Value = last.unwrap_or_default();
    last["data_wait_ms_by_rank"].as_array().is_some_and(|by_rank| by_rank.len() == 2)
}

#[test]
fn a_job_goes_on_without_a_node_and_takes_it_in_again_with_the_same_bits() {
    let whole = tempfile::tempdir().expect("a temporary folder");
    finish(whole.path(), &[&TRAINING[..], &["--nnodes", "2"]].concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let port = free_port();
    let first = node("0", port, folder.path());
    let second = node("1", port, folder.path());
    wait_until("twelve steps", || steps_done(folder.path()) >= 12);
    let of_first = ranks_of(first.0.id());
    assert_eq!(of_first.len(), 1);
    second.signal("-KILL");
    drop(second);
    wait_until("steps without it", || steps_done(folder.path()) >= 24);
    assert_eq!(ranks_of(first.0.id()), of_first, "it has stayed without the other node");
    let again = node("1", port, folder.path());
    wait_until("steps of both", || ranks_of(again.0.id()).len() == 1 && has_two(folder.path()));
    assert_eq!(ranks_of(first.0.id()), of_first, "it has stayed for the other node");
    let output = first.finish(DEADLINE);
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let alone = said.find(" begins: nodes 0, ").expect("it goes on without the other");
    assert!(said[alone..].contains(" begins: nodes 0,1, 2 ranks"), "{said}");
    assert!(again.finish(DEADLINE).status.success(), "{said}");
    assert_eq!(losses(folder.path()), losses(whole.path()), "{said}");
    assert!(weights(folder.path()) == weights(whole.path()), "{said}");
}
