//! A program that starts its own ranks, and does in them what the tests ask for.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    reason = "a program that talks to its test"
)]

mod train;

use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use phalanx_comm::environment::World;
use phalanx_comm::rendezvous::{connect, join};
use phalanx_comm::{Group, GroupOptions, Sum};
use phalanx_launch::{launch_or_join, Joined, LaunchArgs};
use rustix::process::{getpid, kill_process, Signal};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    launch: LaunchArgs,
    /// What the chosen rank does; the others wait to be ended.
    #[arg(long, value_enum)]
    act: Act,
    /// The rank that does it.
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// The exit code of `--act exit`.
    #[arg(long, default_value_t = 1)]
    code: u8,
    /// What goes wrong in `--act group`.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// The group whose collective the fault meets in `--act group`.
    #[arg(long, value_enum, default_value_t = Of::World)]
    of: Of,
    /// The fault comes when the collective has started, not before.
    #[arg(long)]
    inside: bool,
    /// How many attempts of `--act train` fail.
    #[arg(long, default_value_t = 1)]
    failing: u32,
    /// How many steps each attempt of `--act train` comes further than the one before.
    #[arg(long, default_value_t = 0)]
    further: u64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Of {
    World,
    /// A group of the same ranks, as `Ddp` makes one.
    Duplicate,
    /// All ranks but the first: each has another number there.
    Part,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Act {
    /// Every rank says what its environment is.
    Environment,
    /// Every rank joins the others through the store.
    Join,
    /// Every rank writes to both streams.
    Talk,
    /// Every rank waits.
    Wait,
    /// Every rank waits, and so does a child of it.
    Children,
    /// Every rank waits and ignores requests to end.
    Stubborn,
    Kill,
    /// The chosen rank takes memory until something ends it.
    Eat,
    Panic,
    Exit,
    /// The chosen rank dies, and the others notice and end with "a peer is gone".
    Cascade,
    /// Every rank runs collectives; the chosen one does what `--fault` says in the middle of them.
    Group,
    /// Every rank ends well when asked to.
    Polite,
    /// Every rank trains; in the first attempts the chosen one fails at its fourth step: killed, or with `--code`.
    Train,
    /// As `train`, and who loses a peer stays for the next generation.
    Stay,
    /// As `train`, and the survivors ignore requests to end; rank 0 has begun to commit a checkpoint.
    Commit,
    /// Every rank trains until it is asked to stop at a boundary.
    Endless,
    /// Rank 0 shows a progress bar while the others talk.
    Bar,
}

/// What goes wrong in the middle of collectives.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Fault {
    Kill,
    Abort,
    Segv,
    Panic,
    /// Leaves without a word.
    Exit,
    /// Ends its part in good order.
    Leave,
    Error,
    /// Is stopped (by itself, so that the test needs no pid).
    Stop,
    /// The same, but something lets it go on after three seconds.
    Pause,
    /// Calls another collective than the others.
    Other,
    /// Goes on without a collective.
    Idle,
}

/// Longer than any test waits.
const LONG: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let args = Args::parse();
    phalanx_launch::record_panics();
    match launch_or_join(&args.launch) {
        Ok(Joined::Worker) => work(&args),
        Ok(Joined::Finished(report)) => report.exit_code(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn pause(time: Duration) {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

fn work(args: &Args) -> ExitCode {
    let world = match World::from_env() {
        Ok(world) => world,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(64);
        }
    };
    let is_chosen = world.rank == args.rank;
    match args.act {
        Act::Environment => environment(&world),
        Act::Join => join_all(&world),
        Act::Talk => {
            for line in 0..3 {
                println!("out {line} of {}", world.rank);
                eprintln!("err {line} of {}", world.rank);
            }
        }
        Act::Wait => wait(),
        Act::Children => {
            let mut child = Command::new("sleep").arg("600").spawn().expect("sleep is everywhere");
            println!("child {}", child.id());
            wait();
            child.wait().expect("our own child");
        }
        Act::Stubborn => {
            ignore(SIGTERM);
            ignore(SIGINT);
            wait();
        }
        Act::Polite => return polite(),
        Act::Bar => bar(&world),
        Act::Kill if is_chosen => {
            eprintln!("about to die");
            kill_process(getpid(), Signal::KILL).expect("own process");
        }
        Act::Eat if is_chosen => eat(),
        Act::Panic if is_chosen => panic!("rank {} is out of paper", world.rank),
        Act::Exit if is_chosen => {
            eprintln!("cannot go on\nbecause of this");
            return ExitCode::from(args.code);
        }
        Act::Cascade => return cascade(&world, is_chosen),
        Act::Group => return group(args, is_chosen),
        Act::Train | Act::Commit => return train::train(args, &world),
        Act::Stay => return train::stay(args),
        Act::Endless => return train::endless(&world),
        Act::Kill | Act::Eat | Act::Panic | Act::Exit => wait(),
    }
    ExitCode::SUCCESS
}

fn wait() {
    println!("pid {}", std::process::id());
    pause(LONG);
}

/// More than the test allows; not so much that a machine without such limits minds.
fn eat() {
    let mut eaten = Vec::new();
    for _ in 0..1024 {
        // Not zeros, which would take nothing.
        eaten.push(vec![1_u8; 1 << 20]);
    }
    println!("ate {} MiB", std::hint::black_box(&eaten).len());
}

fn ignore(signal: i32) {
    let flag = std::sync::Arc::default();
    signal_hook::flag::register(signal, flag).expect("a signal that may be handled");
}

fn polite() -> ExitCode {
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        let flag = std::sync::Arc::clone(&asked);
        signal_hook::flag::register(signal, flag).expect("a signal that may be handled");
    }
    println!("pid {}", std::process::id());
    let deadline = Instant::now() + LONG;
    while Instant::now() < deadline {
        if asked.load(std::sync::atomic::Ordering::Acquire) {
            println!("saved");
            return ExitCode::SUCCESS;
        }
        pause(Duration::from_millis(5));
    }
    ExitCode::FAILURE
}

/// The survivors end in the same instant as the chosen rank: the launcher cannot go by the order.
fn cascade(world: &World, is_chosen: bool) -> ExitCode {
    let deadline = Instant::now() + LONG;
    let store = connect(world, deadline).expect("the launcher hosts the store");
    if is_chosen {
        store.set("dying", b"").expect("the store lives");
        std::process::abort();
    }
    store.get("dying", deadline).expect("it is set");
    eprintln!("a peer is gone");
    ExitCode::from(69)
}

/// Steps until something fails; a rank that sees an error of the group panics over it, as many programs do.
fn group(args: &Args, is_chosen: bool) -> ExitCode {
    // The limit of a collective is for a rank that stays away; nothing else is to run into it.
    let limit = if args.fault == Some(Fault::Idle) { Duration::from_secs(5) } else { LONG };
    let options = GroupOptions { timeout: limit, ..GroupOptions::default() };
    let options = match args.fault {
        // Heartbeats that are missed for three seconds, and for as long as a busy machine may add.
        Some(Fault::Pause) => {
            GroupOptions { heartbeat: Duration::from_millis(500), dead_after: LONG, ..options }
        }
        _ => options,
    };
    let fault = args.fault.filter(|_| is_chosen);
    let mut world = Group::from_environment(options).expect("the ranks meet");
    let mut part = match args.of {
        Of::World => None,
        Of::Duplicate => Some(world.duplicate().expect("a duplicate")),
        Of::Part => world.split((world.rank() > 0).then_some(0), 0).expect("a part"),
    };
    for step in 0..1000 {
        let fault = fault.filter(|_| step == 40);
        if args.of != Of::World {
            let mut loss = vec![1.0_f32; 10_000];
            // Who waits here only waits for those who wait in the part.
            let world = world.tagged("loss").within(LONG);
            world.all_reduce(&mut loss[..], Sum).expect("a start").wait().expect("a sum");
        }
        let group = match &mut part {
            Some(part) => part,
            None if args.of == Of::World => &mut world,
            None => continue,
        };
        if let Some(code) = fault.filter(|_| !args.inside).and_then(|fault| meet(fault, group)) {
            return code;
        }
        if args.inside && step == 40 && !is_chosen && group.rank() + 1 == group.world_size() {
            // Without this rank the collective cannot end before the chosen one has met its fault.
            await_failure(group);
        }
        let rank = group.rank();
        let mut values = vec![1.0_f32; 10_000];
        let work = group.tagged("bucket 3").all_reduce(&mut values[..], Sum).expect("a start");
        match fault.filter(|_| args.inside) {
            None => {}
            Some(Fault::Kill) => kill_process(getpid(), Signal::KILL).expect("own process"),
            Some(_) => panic!("rank {rank} knows no such fault inside a collective"),
        }
        work.wait().expect("a sum");
    }
    ExitCode::SUCCESS
}

/// Waits until this process has recorded that a group has failed.
fn await_failure(group: &Group) {
    let deadline = Instant::now() + LONG;
    while group.flight_record().is_none_or(|record| record.failure.is_none()) {
        assert!(Instant::now() < deadline, "nothing has failed");
        pause(Duration::from_millis(1));
    }
}

/// What goes wrong; `Some`: the rank ends with it.
fn meet(fault: Fault, group: &mut Group) -> Option<ExitCode> {
    match fault {
        Fault::Kill => kill_process(getpid(), Signal::KILL).expect("own process"),
        Fault::Stop => kill_process(getpid(), Signal::STOP).expect("own process"),
        Fault::Pause => {
            let wake = format!("sleep 3; kill -CONT {}", std::process::id());
            let mut child =
                Command::new("sh").args(["-c", &wake]).spawn().expect("sh is everywhere");
            kill_process(getpid(), Signal::STOP).expect("own process");
            child.wait().expect("our own child");
        }
        Fault::Segv => {
            // The first only takes Rust's own handler away, and may be taken by another thread.
            loop {
                kill_process(getpid(), Signal::SEGV).expect("own process");
                pause(Duration::from_millis(1));
            }
        }
        Fault::Abort => std::process::abort(),
        Fault::Panic => panic!("rank {} is out of paper", group.rank()),
        Fault::Exit => std::process::exit(0),
        Fault::Leave => return Some(ExitCode::SUCCESS),
        Fault::Error => {
            eprintln!("cannot go on");
            return Some(ExitCode::from(65));
        }
        Fault::Other => {
            let work = group.tagged("other").barrier().expect("a start");
            work.wait().expect("a barrier");
        }
        Fault::Idle => pause(LONG),
    }
    None
}

fn environment(world: &World) {
    println!(
        "rank {} of {} local {} of {} node {} of {} at {}:{} threads {} run {} by {:?} store {:?}",
        world.rank,
        world.world_size,
        world.local_rank,
        world.local_world_size,
        world.node_rank,
        world.node_count,
        world.master_addr,
        world.master_port,
        std::env::var("OMP_NUM_THREADS").unwrap_or_default(),
        world.run_id,
        world.launcher,
        world.store_host,
    );
}

fn join_all(world: &World) {
    let deadline = Instant::now() + LONG;
    let store = connect(world, deadline).expect("the launcher hosts the store");
    let mine = world.rank.to_string();
    let all = join(&*store, "test", world.rank, world.world_size, mine.as_bytes(), deadline)
        .expect("all ranks join");
    let all: Vec<_> = all.iter().map(|value| String::from_utf8_lossy(value).into_owned()).collect();
    println!("joined {}", all.join(","));
}

fn bar(world: &World) {
    use std::io::IsTerminal as _;
    if world.rank == 0 {
        assert!(std::io::stderr().is_terminal(), "no terminal, no bar");
        for step in 1..=5 {
            eprint!("\r\x1b[2Kstep {step}/5");
            if step == 3 {
                std::fs::write("drawn", "").expect("a mark");
                // The test has seen the line of the other rank.
                wait_for_file("seen");
            }
        }
        eprintln!();
    } else {
        wait_for_file("drawn");
        println!("line between");
    }
}

fn wait_for_file(name: &str) {
    let deadline = Instant::now() + LONG;
    while !std::path::Path::new(name).exists() {
        assert!(Instant::now() < deadline, "no {name}");
        pause(Duration::from_millis(5));
    }
}
