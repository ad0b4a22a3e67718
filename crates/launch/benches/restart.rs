//! From the death of a rank to the moment when all ranks of the next attempt have built their group again: our launcher
//! beside `torchrun --max-restarts`, by turns, with the same executable as rank.
//!
//! ```text
//! cargo bench -p phalanx-launch --bench restart -- [--ranks 4] [--restarts 10] [--rounds 3] [--torchrun PATH]
//! cargo bench -p phalanx-launch --bench restart -- --nodes 2 [--ranks 2] …
//! ```
//!
//! A rank writes the machine's monotonic clock before it kills itself (signal 9), and when its group stands; the time is
//! from the death to the last of the latter. Without torchrun only ours is measured; so it is with several nodes (launchers
//! that meet on loopback, with `--ranks` each), whose attempts torchrun's ranks cannot tell apart.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{bail, Context as _, Result};
use phalanx_comm::environment::World;
use phalanx_comm::{Group, GroupOptions, Sum, Work};
use phalanx_launch::{LaunchOptions, Prefix};
use rustix::process::{getpid, kill_process, Signal};
use rustix::time::{clock_gettime, ClockId};

/// Where `scripts/setup.sh --test-extras` puts it.
const TORCHRUN: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../third_party/torch-python/bin/torchrun");

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("rank") => rank(number(&args, "--restarts", 0)?),
        Some("launcher") => launcher(&args),
        _ => compare(&args),
    }
}

/// The number after `flag`, or `default`.
fn number(args: &[String], flag: &str, default: u32) -> Result<u32> {
    match args.iter().position(|arg| arg == flag) {
        None => Ok(default),
        Some(at) => {
            let value = args.get(at + 1).with_context(|| format!("{flag} needs a number"))?;
            value.parse().with_context(|| format!("{flag} {value} is no number"))
        }
    }
}

fn clock_us() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// Builds the group, says so, and rank 1 dies, in all attempts but the last.
fn rank(restarts: u32) -> Result<ExitCode> {
    let world = World::from_env()?;
    let (attempt, number) = (world.restart_count, world.rank);
    let mut group = Group::from_environment(GroupOptions::default())?;
    say(&format!("met {attempt} {}", clock_us()))?;
    let mut sum = [1.0_f32; 1000];
    group.all_reduce(&mut sum[..], Sum).and_then(Work::wait)?;
    if attempt < restarts && number == 1 {
        say(&format!("died {attempt} {}", clock_us()))?;
        kill_process(getpid(), Signal::KILL)?;
    }
    // Who loses the dead rank ends by itself, as a trainer does.
    let ended_well = group.barrier().and_then(Work::wait).is_ok();
    Ok(ExitCode::from(if ended_well { 0 } else { 69 }))
}

/// One write a line: lines of ranks do not mix.
fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    Ok(out.flush()?)
}

fn launcher(args: &[String]) -> Result<ExitCode> {
    let restarts = number(args, "--restarts", 0)?;
    let ranks = usize::try_from(number(args, "--ranks", 0)?)?;
    let options = LaunchOptions {
        nproc_per_node: ranks,
        max_restarts: restarts,
        prefix: Prefix::Off,
        ..LaunchOptions::default()
    };
    let nodes = usize::try_from(number(args, "--nodes", 1)?)?;
    let options = if nodes == 1 {
        options
    } else {
        LaunchOptions {
            nnodes: nodes,
            node_rank: Some(usize::try_from(number(args, "--node", 0)?)?),
            master_addr: Some("127.0.0.1".to_owned()),
            master_port: Some(u16::try_from(number(args, "--port", 0)?)?),
            ..options
        }
    };
    let of_rank = ["rank", "--restarts", &restarts.to_string()].map(OsString::from);
    Ok(phalanx_launch::run(&options, &std::env::current_exe()?, &of_rank)?.exit_code())
}

/// Runs a launcher to its end; the time of each restart.
fn times(mut command: Command, restarts: u32) -> Result<Vec<Duration>> {
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(name);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let errors = child.stderr.take().context("a pipe")?;
    let errors = std::thread::spawn(move || std::io::read_to_string(errors));
    let output = child.stdout.take().context("a pipe")?;
    let attempts = usize::try_from(restarts)? + 1;
    let (mut died, mut met) = (vec![0; attempts], vec![0; attempts]);
    for line in BufReader::new(output).lines() {
        let line = line?;
        let mut words = line.split(' ');
        let what = words.next();
        let numbers: Vec<i64> = words.filter_map(|word| word.parse().ok()).collect();
        let &[attempt, at] = &numbers[..] else { continue };
        let attempt = usize::try_from(attempt)?;
        match what {
            Some("met") if attempt < attempts => met[attempt] = at.max(met[attempt]),
            Some("died") if attempt < attempts => died[attempt] = at,
            _ => {}
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{command:?}: {status}\n{}", errors.join().unwrap_or_else(|_| Ok(String::new()))?);
    }
    let pairs = died.iter().zip(&met[1..]);
    Ok(pairs
        .map(|(from, to)| Duration::from_micros(u64::try_from(to - from).unwrap_or(0)))
        .collect())
}

fn ours(nodes: u32, ranks: u32, restarts: u32) -> Result<Vec<Duration>> {
    // One shell starts the launchers of all nodes, so that their ranks speak to one pipe.
    let mut command = Command::new("sh");
    let script =
        "n=$2; while [ $n -gt 1 ]; do n=$((n - 1)); \"$0\" launcher --node $n \"$@\" & done; \
                  \"$0\" launcher --node 0 \"$@\" && wait";
    command.arg("-c").arg(script).arg(std::env::current_exe()?);
    let port = phalanx_comm::testing::free_port();
    for (flag, value) in [("--nodes", nodes), ("--ranks", ranks), ("--restarts", restarts)] {
        command.args([flag, &value.to_string()]);
    }
    command.args(["--port", &port.to_string()]).env("PHALANX_JOB_TOKEN", "5a".repeat(32));
    times(command, restarts)
}

fn theirs(torchrun: &PathBuf, ranks: u32, restarts: u32) -> Result<Vec<Duration>> {
    let mut command = Command::new(torchrun);
    let port = phalanx_comm::testing::free_port().to_string();
    command.args(["--no-python", "--nproc-per-node", &ranks.to_string(), "--master-port", &port]);
    command.args(["--max-restarts", &restarts.to_string()]).arg(std::env::current_exe()?);
    command.args(["rank", "--restarts", &restarts.to_string()]);
    times(command, restarts)
}

fn compare(args: &[String]) -> Result<ExitCode> {
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let is_test = !args.iter().any(|arg| arg == "--bench");
    let ranks = number(args, "--ranks", if is_test { 2 } else { 4 })?;
    let restarts = number(args, "--restarts", if is_test { 1 } else { 10 })?;
    let rounds = number(args, "--rounds", if is_test { 1 } else { 3 })?;
    let named = args.iter().position(|arg| arg == "--torchrun").and_then(|at| args.get(at + 1));
    let torchrun = PathBuf::from(named.map_or(TORCHRUN, String::as_str));
    let nodes = number(args, "--nodes", 1)?;
    let has_torchrun = torchrun.exists() && !is_test && nodes == 1;
    let (mut phalanx, mut torch) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        phalanx.extend(ours(nodes, ranks, restarts)?);
        if has_torchrun {
            torch.extend(theirs(&torchrun, ranks, restarts)?);
        }
    }
    println!("death of a rank → all ranks ({nodes} × {ranks}) have met again");
    println!("{:<26} {:>8} {:>10} {:>10} {:>10}", "", "restarts", "min", "p50", "max");
    let ours = row("phalanx launch", phalanx);
    if has_torchrun {
        let theirs = row("torchrun --max-restarts", torch);
        println!("ours ÷ theirs: p50 {:.2}, max {:.2}", ours.0 / theirs.0, ours.1 / theirs.1);
    } else if nodes == 1 && !is_test {
        println!("{}: not there, so nothing to compare with", torchrun.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a line of the table; median and maximum in milliseconds.
fn row(name: &str, mut times: Vec<Duration>) -> (f64, f64) {
    times.sort();
    let at = |index: usize| times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    let (count, p50, max) = (times.len(), at(times.len() / 2), at(times.len().saturating_sub(1)));
    println!("{name:<26} {count:>8} {:>7.1} ms {p50:>7.1} ms {max:>7.1} ms", at(0));
    (p50, max)
}
