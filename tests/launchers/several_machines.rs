//! torchrun on two machines: network namespaces, an agent in each, which meet by torchrun's own c10d store.

use std::process::Command;

use super::namespaces::{namespaces, ADDRESSES};
use super::support::Owned;
use super::{finished, losses, torchrun_file, training};

/// Nobody else is in these namespaces.
const PORT: u16 = 29_400;

#[test]
fn torchrun_on_two_machines_gives_the_losses_of_our_launcher() {
    let Some(torchrun) = torchrun_file() else { return };
    let Some(machines) = namespaces() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let token = format!("{:064x}", std::process::id());
    let agent = |machine: usize| {
        let mut command: Command = machines.command(machine, &torchrun);
        command.args(["--no-python", "--nnodes", "2", "--nproc-per-node", "2"]);
        command.args(["--rdzv-backend", "c10d", "--rdzv-id", "two-machines"]);
        command.args(["--rdzv-endpoint", &format!("{}:{PORT}", ADDRESSES[0])]);
        // Both have this machine's name: which of them has the store's address cannot be seen from it.
        command.args(["--rdzv-conf", ["is_host=true", "is_host=false"][machine]]);
        command.args(["--local-addr", ADDRESSES[machine]]);
        command.env("PHALANX_JOB_TOKEN", &token);
        training(&mut command, folder.path(), &[]);
        Owned::start(&mut command)
    };
    let (first, second) = (agent(0), agent(1));
    // Both end at the same time: each reads its own pipes.
    let other = std::thread::spawn(|| finished(second));
    finished(first);
    other.join().expect("the second machine's ranks end well");
    let ours = losses(None, &["--nnodes", "2", "--nproc-per-node", "2"]);
    assert_eq!(super::written_losses(&folder.path().join("metrics.jsonl"), "host"), ours);
}
