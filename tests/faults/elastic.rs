//! Nodes that come and go (F35): two launchers as of two machines, on one.

use std::path::Path;
use std::process::{Command, Stdio};

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

#[test]
fn a_job_goes_on_without_a_node_and_takes_it_in_again_with_the_same_bits() {
    let whole = tempfile::tempdir().expect("a temporary folder");
    finish(whole.path(), &[&TRAINING[..], &["--nnodes", "2"]].concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let port = free_port();
    let first = node("0", port, folder.path());
    let second = node("1", port, folder.path());
    wait_until("twelve steps", || steps_done(folder.path()) >= 12);
    second.signal("-KILL");
    drop(second);
    wait_until("steps without it", || steps_done(folder.path()) >= 24);
    let again = node("1", port, folder.path());
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
