//! The state machines of elastic jobs in simulated time: schedules with faults a second, and what the meeting of many
//! nodes costs the coordinator, in time and memory, and how both grow.
//!
//! ```text
//! cargo bench -p phalanx-launch --bench membership -- [--schedules 5000] [NODES …]
//! ```
//!
//! Each count of nodes runs in a process of its own, whose highest memory is shown.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};
use phalanx_launch::simulation::{simulate, Schedule};

const NODES: [usize; 6] = [2, 32, 128, 512, 1024, 2048];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let is_test = !args.iter().any(|arg| arg == "--bench");
    if let Some(nodes) = args.iter().position(|arg| arg == "--one").and_then(|at| args.get(at + 1))
    {
        return one(nodes.parse()?);
    }
    let schedules =
        args.iter().position(|arg| arg == "--schedules").and_then(|at| args.get(at + 1));
    let schedules = schedules.map_or(Ok(if is_test { 20 } else { 5000 }), |text| text.parse())?;
    with_faults(schedules);
    let asked: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let counts: &[usize] = match &asked[..] {
        _ if is_test => &NODES[..2],
        [] => &NODES,
        asked => asked,
    };
    println!("\nnodes that meet, run ten simulated seconds, and end; nothing goes wrong");
    println!("{:>6} {:>9} {:>10} {:>12} {:>10}", "nodes", "events", "time", "per event", "memory");
    for nodes in counts {
        let output = Command::new(std::env::current_exe()?)
            .args(["--one", &nodes.to_string()])
            .output()
            .context("a process for one count of nodes")?;
        if !output.status.success() {
            bail!("{nodes} nodes: {}", String::from_utf8_lossy(&output.stderr));
        }
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// Jobs of one to eight nodes with half a minute of faults.
fn with_faults(schedules: u64) {
    let (started, mut events, mut generations) = (Instant::now(), 0, 0);
    for seed in 0..schedules {
        let outcome = simulate(Schedule::with_faults(seed));
        events += outcome.events;
        generations += outcome.generations;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{schedules} schedules with faults in {seconds:.2} s: {:.0} a second; {events} events, {generations} generations, no invariant broken",
        rate(schedules, seconds)
    );
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with a few digits")]
fn rate(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds.max(1e-9)
}

fn one(nodes: usize) -> Result<()> {
    let before = memory_kib("VmRSS:")?;
    let started = Instant::now();
    let schedule = Schedule { seed: 1, nodes, nodes_min: nodes, faults_for: Duration::ZERO };
    let outcome = simulate(schedule);
    let seconds = started.elapsed().as_secs_f64();
    let grown = memory_kib("VmHWM:")?.saturating_sub(before);
    println!(
        "{nodes:>6} {:>9} {:>7.1} ms {:>9.2} µs {:>6.1} MiB",
        outcome.events,
        seconds * 1e3,
        1e6 / rate(outcome.events, seconds),
        f64::from(u32::try_from(grown)?) / 1024.0
    );
    Ok(())
}

fn memory_kib(name: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line =
        status.lines().find_map(|line| line.strip_prefix(name)).context("a line of memory")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
