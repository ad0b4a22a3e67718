//! A job on two to three nodes, launchers that meet on loopback: from the death of a node (its launcher is killed, and with
//! it its ranks) to the first step of all ranks that are left, and from the start of a launcher that comes back to the
//! first step of all three.
//!
//! ```text
//! cargo bench -p phalanx-launch --bench nodes -- [--rounds 10]
//! ```

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use phalanx_comm::environment::World;
use phalanx_comm::{Group, GroupOptions, Max, Work};
use phalanx_launch::{should_stop, LaunchOptions, Prefix};

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rank"] => rank(),
        ["launcher", node, port] => launcher(node.parse()?, port.parse()?),
        _ => compare(&args),
    }
}

/// Steps until it is asked to stop; says in which attempt its first step was.
fn rank() -> Result<ExitCode> {
    let attempt = World::from_env()?.restart_count;
    let mut group = Group::from_environment(GroupOptions::default())?;
    for step in 0_u64.. {
        let mut stops = [i64::from(should_stop())];
        if group.all_reduce(&mut stops[..], Max).and_then(Work::wait).is_err() {
            return Ok(ExitCode::from(69));
        }
        if step == 0 {
            let mut out = std::io::stdout().lock();
            out.write_all(format!("trains {attempt}\n").as_bytes())?;
            out.flush()?;
        }
        if stops[0] > 0 {
            break;
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    Ok(ExitCode::SUCCESS)
}

fn launcher(node: usize, port: u16) -> Result<ExitCode> {
    let options = LaunchOptions {
        nnodes_min: Some(2),
        nnodes: 3,
        node_rank: Some(node),
        master_addr: Some("127.0.0.1".to_owned()),
        master_port: Some(port),
        prefix: Prefix::Off,
        ..LaunchOptions::default()
    };
    let args = [OsString::from("rank")];
    Ok(phalanx_launch::run(&options, &std::env::current_exe()?, &args)?.exit_code())
}

/// A launcher and what its rank says; gone when it is dropped, and its rank with it.
struct Node {
    child: Child,
    said: Receiver<String>,
}

impl Node {
    fn start(node: usize, port: u16) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["launcher", &node.to_string(), &port.to_string()]);
        command.env("PHALANX_JOB_TOKEN", "5a".repeat(32)).env_remove("RANK");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let output = child.stdout.take().context("a pipe")?;
        let (sender, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                drop(sender.send(line));
            }
        });
        Ok(Self { child, said })
    }

    fn await_attempt(&self, attempt: u32) -> Result<()> {
        let wanted = format!("trains {attempt}");
        while self.said.recv_timeout(LIMIT).context(wanted.clone())? != wanted {}
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn compare(args: &[String]) -> Result<ExitCode> {
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let is_test = !args.iter().any(|arg| arg == "--bench");
    let rounds = args.iter().position(|arg| arg == "--rounds").and_then(|at| args.get(at + 1));
    let rounds = rounds.map_or(Ok(if is_test { 1 } else { 10 }), |text| text.parse())?;
    let (mut losses, mut returns) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let port = phalanx_comm::testing::free_port();
        let (first, second) = (Node::start(0, port)?, Node::start(1, port)?);
        let third = Node::start(2, port)?;
        [&first, &second, &third].into_iter().try_for_each(|node| node.await_attempt(0))?;
        let lost = Instant::now();
        drop(third);
        [&first, &second].into_iter().try_for_each(|node| node.await_attempt(1))?;
        losses.push(lost.elapsed());
        let back = Instant::now();
        let again = Node::start(2, port)?;
        [&first, &second, &again].into_iter().try_for_each(|node| node.await_attempt(2))?;
        returns.push(back.elapsed());
    }
    for (name, mut times) in [("a node is lost", losses), ("a node comes back", returns)] {
        times.sort();
        let (p50, max) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{name:<18} → all train again: p50 {p50:.3?}, max {max:.3?} of {rounds}");
    }
    Ok(ExitCode::SUCCESS)
}
