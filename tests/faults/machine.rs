//! Machines that lack something: shared memory (F37), file descriptors, places to write to (F36).

use std::process::{Output, Stdio};

use super::support::{apart, example, Owned};
use super::DEADLINE;

/// The trainer on four ranks in a mount namespace of its own, after `script`, which has a folder in `$0`; none where there are no such namespaces.
fn after(script: &str, more: &[&str]) -> Option<Output> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = apart()?;
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg(format!("{script} && exec \"$@\"")).arg(folder.path()).arg(example("bert_large"));
    command.args(super::FOUR).args(["--steps", "2", "--micro-batch", "2"]).args(more);
    command.arg("--output").arg(folder.path().join("out"));
    Some(Owned::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).finish(DEADLINE))
}

#[test]
fn ranks_share_memory_where_the_systems_own_has_no_room() {
    let script = "mount -t tmpfs -o size=64k,noexec tmpfs /dev/shm";
    let Some(output) = after(script, &[]) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// What is wrong is said by the launcher, and no rank is left that has begun.
fn refused(script: &str, more: &[&str], code: i32, parts: &[&str]) {
    let Some(output) = after(script, more) else { return };
    let (out, said) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}{said}");
    assert!(parts.iter().all(|part| said.contains(part)), "{parts:?}: {said}");
    assert!(!out.contains("ranks  "), "no rank has begun: {out}");
}

#[test]
fn what_a_machine_lacks_is_said_before_ranks_begin() {
    refused("ulimit -n 40", &[], 64, &["Too many open files", "ulimit -n"]);
    let read_only = "mount -t tmpfs -o ro tmpfs \"$0\"";
    refused(read_only, &[], 74, &["Read-only file system", "rank 0 "]);
    refused("true", &["--log-dir", "/proc/logs"], 74, &["/proc/logs"]);
}
