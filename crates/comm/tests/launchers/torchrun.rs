//! Ranks that torchrun starts, and starts again.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use phalanx_comm::environment::{StoreHost, World};
use phalanx_comm::{Group, GroupOptions, Sum};

use super::support::{torch, Owned};

/// The life of a rank: a sum with the others; in the first attempt rank 1 then fails.
pub(crate) fn rank() {
    let world = World::from_env().expect("torchrun's environment");
    let options =
        GroupOptions { connect_timeout: Duration::from_secs(120), ..GroupOptions::default() };
    let mut group = Group::from_environment(options).expect("a group");
    let mut ranks = [i64::try_from(world.rank).expect("small")];
    group.all_reduce(&mut ranks[..], Sum).expect("started").wait().expect("summed");
    let attempt = std::env::var("TORCHELASTIC_RESTART_COUNT").expect("torchrun's");
    let by_agent = world.store_host == StoreHost::Agent;
    // One write a line: lines of ranks do not mix.
    println!(
        "{}",
        format_args!("attempt {attempt} rank {} sum {} agent {by_agent}", world.rank, ranks[0])
    );
    println!(
        "{}",
        format_args!(
            "rank {} is local {} of {}",
            world.rank, world.local_rank, world.local_world_size
        )
    );
    if attempt == "0" && world.rank == 1 && std::env::var_os("PHALANX_TEST_FAIL").is_some() {
        std::process::exit(7);
    }
    // The others must not have ended well before rank 1 fails.
    if group.barrier().is_err() {
        std::process::exit(8);
    }
}

fn torchrun(bin: &Path, options: &[&str], variables: &[(&str, &str)]) -> String {
    let program = std::env::current_exe().expect("this test's own path");
    let mut command = Command::new(bin.join("torchrun"));
    command.arg("--no-python").args(options).arg(program);
    command.args(["--exact", "rank_process", "--ignored", "--nocapture", "--test-threads", "1"]);
    command.envs(variables.iter().copied()).env("RUST_BACKTRACE", "0");
    let (status, text) = Owned::start(&mut command).finish(Duration::from_secs(180));
    assert!(status.success(), "{status}\n{text}");
    text
}

#[track_caller]
fn assert_attempt(text: &str, attempt: usize, by_agent: bool) {
    for rank in 0..3 {
        let line = format!("attempt {attempt} rank {rank} sum 3 agent {by_agent}");
        assert!(text.contains(&line), "does not say {line:?}:\n{text}");
    }
}

const C10D: &[&str] = &["--standalone", "--nproc-per-node", "3"];

#[test]
fn static_rendezvous_and_its_restart() {
    let Some(bin) = torch() else { return };
    let port = phalanx_comm::testing::free_port().to_string();
    let options = ["--nproc-per-node", "3", "--max-restarts", "1", "--master-port", &port];
    let text = torchrun(&bin, &options, &[("PHALANX_TEST_FAIL", "1")]);
    assert_attempt(&text, 0, true);
    assert_attempt(&text, 1, true);
}

#[test]
fn c10d_rendezvous_and_its_restart() {
    let Some(bin) = torch() else { return };
    let options = [C10D, &["--max-restarts", "1"]].concat();
    let text = torchrun(&bin, &options, &[("PHALANX_TEST_FAIL", "1")]);
    assert_attempt(&text, 0, true);
    assert_attempt(&text, 1, true);
}

#[test]
fn c10d_rendezvous_and_its_restart_without_the_agents_store() {
    let Some(bin) = torch() else { return };
    let options = [C10D, &["--max-restarts", "1"]].concat();
    let off = [("PHALANX_TEST_FAIL", "1"), ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")];
    let text = torchrun(&bin, &options, &off);
    assert_attempt(&text, 0, false);
    assert_attempt(&text, 1, false);
}

/// Every rank is told that it is the first of its node; which rank shares memory with which must not hang on that.
#[test]
fn virtual_local_ranks_are_all_0() {
    let Some(bin) = torch() else { return };
    let text = torchrun(&bin, &[C10D, &["--virtual-local-rank"]].concat(), &[]);
    assert_attempt(&text, 0, true);
    for rank in 0..3 {
        let line = format!("rank {rank} is local 0 of 3");
        assert!(text.contains(&line), "does not say {line:?}:\n{text}");
    }
}

#[test]
fn rank_0_can_be_told_a_port_of_its_own() {
    let Some(bin) = torch() else { return };
    let port = phalanx_comm::testing::free_port().to_string();
    let text = torchrun(&bin, C10D, &[("PHALANX_STORE_PORT", &port)]);
    assert_attempt(&text, 0, false);
}
