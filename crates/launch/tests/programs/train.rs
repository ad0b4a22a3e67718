//! A rank that trains in attempts: it tells its steps, and fails in the first attempts.

use std::process::ExitCode;
use std::time::Duration;

use phalanx_comm::environment::World;
use phalanx_comm::{Group, GroupOptions, Max, Sum};
use phalanx_launch::{committing, each_generation, heed_signals, progress, should_stop};
use rustix::process::{getpid, kill_process, Signal};

use super::{pause, Act, Args, Fault};

/// Steps of an attempt; it fails at the last one.
const STEPS: u64 = 4;

/// Trains. A rank that loses another ends with 69, as programs should.
pub(super) fn train(args: &Args, world: &World) -> ExitCode {
    let attempt = world.restart_count;
    println!("attempt {attempt} rank {} pid {}", world.rank, std::process::id());
    if args.act == Act::Commit {
        heed_signals().expect("handlers");
    }
    let is_committing = args.act == Act::Commit && world.rank == 0;
    let commit = is_committing.then(committing);
    let mut group = Group::from_environment(GroupOptions::default()).expect("the ranks meet");
    let first = u64::from(attempt) * args.further;
    for step in first..first + STEPS {
        progress(step);
        let mut loss = [1.0_f32];
        if group.all_reduce(&mut loss[..], Sum).and_then(phalanx_comm::Work::wait).is_err() {
            return lost_a_peer(args, is_committing);
        }
        if step + 1 == first + STEPS && attempt < args.failing && world.rank == args.rank {
            return fail(args);
        }
    }
    // The others must not have ended well before the chosen one fails.
    if group.barrier().and_then(phalanx_comm::Work::wait).is_err() {
        return lost_a_peer(args, is_committing);
    }
    drop(commit);
    println!("done in attempt {attempt}");
    ExitCode::SUCCESS
}

/// As [`train`], in one generation after the other.
pub(super) fn stay(args: &Args) -> ExitCode {
    let outcome = each_generation(|| {
        let world = World::from_env().expect("a place");
        let code = train(args, &world);
        if code == ExitCode::SUCCESS {
            Ok(code)
        } else {
            Err(code)
        }
    });
    if outcome.is_err() {
        println!("pid {} ends with an error", std::process::id());
    }
    outcome.unwrap_or_else(|code| code)
}

/// Trains until the launcher asks for the end; the ranks agree on the step after which that is.
pub(super) fn endless(world: &World) -> ExitCode {
    let (attempt, size) = (world.restart_count, world.world_size);
    println!("attempt {attempt} of {size} rank {} pid {}", world.rank, std::process::id());
    let mut group = Group::from_environment(GroupOptions::default()).expect("the ranks meet");
    for step in 0.. {
        progress(step);
        let mut stops = [i64::from(should_stop())];
        if group.all_reduce(&mut stops[..], Max).and_then(phalanx_comm::Work::wait).is_err() {
            return ExitCode::from(69);
        }
        if step == 0 {
            println!("training in attempt {attempt}");
        }
        if stops[0] > 0 {
            println!("stopped in attempt {attempt}");
            return ExitCode::SUCCESS;
        }
        pause(Duration::from_millis(2));
    }
    ExitCode::FAILURE
}

fn fail(args: &Args) -> ExitCode {
    if args.fault == Some(Fault::Kill) {
        kill_process(getpid(), Signal::KILL).expect("own process");
    }
    ExitCode::from(args.code)
}

fn lost_a_peer(args: &Args, is_committing: bool) -> ExitCode {
    if matches!(args.act, Act::Train | Act::Stay) {
        return ExitCode::from(69);
    }
    while !should_stop() {
        pause(Duration::from_millis(1));
    }
    if is_committing {
        // Longer than ranks get that have nothing to save.
        pause(Duration::from_millis(400));
        println!("committed");
        return ExitCode::from(69);
    }
    super::wait();
    ExitCode::FAILURE
}
