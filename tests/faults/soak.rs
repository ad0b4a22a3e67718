//! A run that is broken again and again (F38): ranks that are killed (F1) or stand still (F3), a disk that is full (F13), a gradient that is
//! no number (F25).
//!
//! Each fault is drawn from a seed. Here there is one of each kind, at steps where the ranks wait for it. By hand
//! `PHALANX_SOAK=600 cargo test --release --test faults soak -- --nocapture` breaks a run of so many seconds about every ten, and
//! prints goodput: the time of the same steps without faults ÷ the time with them; and, for machines whose speed changes from one
//! run to the next, the time of its own steps, each counted once, ÷ its time.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::kills::{number, Draws};
use super::memory::{ranks_of, signal};
use super::support::{apart, example, Owned};
use super::{losses, weights, FOUR};

/// No fault, and no step, takes as long; the run as a whole may.
const DEADLINE: Duration = Duration::from_secs(240);
/// Where one of each kind is injected, and the end.
const HOLDS: [u64; 4] = [10, 20, 30, 40];
const STEPS: u64 = 50;
/// How often a run of minutes is saved, and how soon a silent rank is dead: snapshots cost little, a lost step as much as a step.
const LONG_RUN: [&str; 6] = ["--memory-every", "20", "--save-every", "200", "--dead-after", "1"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    DiskFull,
    NotANumber,
}

const ALL: [Fault; 4] = [Fault::Kill, Fault::Stop, Fault::DiskFull, Fault::NotANumber];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "F1 a rank is killed",
            Self::Stop => "F3 a rank stands still",
            Self::DiskFull => "F13 the disk is full",
            Self::NotANumber => "F25 a gradient is no number",
        }
    }
}

/// A run whose checkpoints lie on a disk of its own, which is small.
struct Soaked {
    run: Owned,
    folder: PathBuf,
}

impl Soaked {
    fn start(mut command: Command, folder: &Path, steps: u64, settings: &[&str]) -> Self {
        for name in ["disk", "lab"] {
            fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        // The disk is seen by this process and what it starts alone.
        let script = "mount -t tmpfs -o size=96m tmpfs \"$0\" && exec \"$@\"";
        command.arg(script).arg(folder.join("disk")).arg(example("fault_lab"));
        command.arg("--lab").arg(folder.join("lab"));
        command.args(training(folder, steps)).arg("--checkpoint").arg(folder.join("disk"));
        command.args(["--max-restarts", "100000"]).args(settings);
        let said = File::create(folder.join("said")).expect("a file");
        command.stderr(said.try_clone().expect("a descriptor")).stdout(said);
        Self { run: begin(&mut command), folder: folder.to_owned() }
    }

    /// The disk, seen from here.
    fn disk(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.run.0.id()));
        root.join(self.folder.join("disk").strip_prefix("/").expect("an absolute path"))
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.join("said")).unwrap_or_default()
    }

    /// How often it has said so.
    fn count(&self, text: &str) -> usize {
        self.said().matches(text).count()
    }

    /// Waits, in steps too short to matter.
    fn wait(&mut self, what: &str, mut is_there: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !is_there(self) {
            let ended = self.run.0.try_wait().expect("our own child");
            let late = Instant::now() > end;
            assert!(ended.is_none() && !late, "never: {what}; {ended:?}\n{}", self.said());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Breaks it, and waits until it is found and has been got over. `release` lets ranks go on that wait for it.
    fn inject(&mut self, fault: Fault, draws: &mut Draws, release: impl Fn()) {
        let restarts = self.count("phalanx: restart ");
        let launcher = self.run.0.id();
        let rank = usize::try_from(draws.below(4)).expect("small");
        match fault {
            Fault::Kill | Fault::Stop => {
                self.wait("four ranks", |_| ranks_of(launcher).len() == 4);
                release();
                let how = if fault == Fault::Kill { "-KILL" } else { "-STOP" };
                signal(how, ranks_of(launcher)[rank]);
            }
            Fault::NotANumber => {
                fs::write(self.folder.join("lab").join(format!("nan-{rank}")), "").expect("a wish");
                release();
            }
            Fault::DiskFull => return self.fill_disk(release),
        }
        self.wait("a restart", |run| run.count("phalanx: restart ") > restarts);
    }

    /// Until a checkpoint has failed for it; those before it stay as they are.
    fn fill_disk(&mut self, release: impl Fn()) {
        let failures = self.count("no space left");
        let filler = self.disk().join("filler");
        let mut file = File::create(&filler).expect("the disk");
        // In small pieces: one that was begun before may still take or free some room.
        let piece = vec![0; 64 << 10];
        let mut fill = move || while file.write_all(&piece).is_ok() {};
        fill();
        let kept = newest(&self.disk());
        release();
        self.wait("a checkpoint that fails", |run| {
            fill();
            run.count("no space left") > failures
        });
        for (path, bytes) in kept {
            assert!(
                fs::read(&path).is_ok_and(|now| now == bytes),
                "{} has changed",
                path.display()
            );
        }
        fs::remove_file(filler).expect("removed");
    }
}

/// The files of the newest checkpoint that is complete.
fn newest(disk: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries(disk).map(|entry| entry.path());
    let complete = paths.filter(|path| path.join("manifest.json").exists());
    let Some(newest) = complete.max() else { return Vec::new() };
    entries(&newest).filter_map(|file| Some((file.path(), fs::read(file.path()).ok()?))).collect()
}

fn training(folder: &Path, steps: u64) -> Vec<String> {
    let place = |name| folder.join(name).display().to_string();
    let steps = steps.to_string();
    let own = [
        "--micro-batch",
        "2",
        "--steps",
        &steps,
        "--zero",
        "1",
        "--metrics",
        &place("metrics.jsonl"),
    ];
    let out = ["--output", &place("out")];
    FOUR.iter().chain(&own).chain(&out).map(|&text| text.to_owned()).collect()
}

fn begin(command: &mut Command) -> Owned {
    Owned::start(command.current_dir(env!("CARGO_MANIFEST_DIR")))
}

/// The same steps without faults, without snapshots: how long they take.
fn unbroken(folder: &Path, steps: u64) -> Duration {
    fs::create_dir_all(folder.join("lab")).expect("a folder");
    let mut command = Command::new(example("fault_lab"));
    command.arg("--lab").arg(folder.join("lab")).args(training(folder, steps));
    let begun = Instant::now();
    let mut run = begin(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let end = begun + DEADLINE + Duration::from_millis(steps * 1000);
    let status = loop {
        if let Some(status) = run.0.try_wait().expect("our own child") {
            break status;
        }
        assert!(Instant::now() < end, "a run without faults does not end");
        std::thread::park_timeout(Duration::from_millis(5));
    };
    assert!(status.success(), "{status:?}");
    begun.elapsed()
}

/// The last step that the metrics have, whatever their length.
pub(crate) fn last_step(folder: &Path) -> u64 {
    const TAIL: u64 = 4096;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(folder.join("metrics.jsonl"))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let step_of =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
    text.lines().rev().find_map(step_of).unwrap_or(0)
}

#[test]
fn a_soaked_run_ends_with_the_bits_of_a_dry_one() {
    let seed = number("PHALANX_SOAK_SEED", 1);
    let mut draws = Draws::new(seed);
    let Some(shell) = apart() else { return };
    match number("PHALANX_SOAK", 0) {
        0 => soak_at_steps(shell, seed, &mut draws),
        seconds => soak_for(shell, seconds, seed, &mut draws),
    }
}

fn soak_at_steps(shell: Command, seed: u64, draws: &mut Draws) {
    let (dry, wet) = (folder(), folder());
    unbroken(dry.path(), STEPS);
    fs::create_dir(wet.path().join("lab")).expect("a folder");
    let hold = |step: u64| wet.path().join(format!("lab/hold-{step}"));
    HOLDS.into_iter().for_each(|step| fs::write(hold(step), "").expect("a wish"));
    let mut run =
        Soaked::start(shell, wet.path(), STEPS, &["--memory-every", "2", "--save-every", "5"]);
    let mut left = ALL.to_vec();
    for step in HOLDS {
        let fault =
            left.swap_remove(usize::try_from(draws.below(left.len() as u64)).expect("small"));
        run.wait("a step", |_| last_step(wet.path()) >= step);
        run.inject(fault, draws, || fs::remove_file(hold(step)).expect("removed"));
    }
    end(run, dry.path(), seed);
}

/// What one kind of fault has cost.
#[derive(Clone, Copy, Default)]
struct Cost {
    count: u32,
    lost: Duration,
    worst: Duration,
}

fn soak_for(shell: Command, seconds: u64, seed: u64, draws: &mut Draws) {
    const TRIAL: u32 = 200;
    let (trial, dry, wet) = (folder(), folder(), folder());
    let of_trial = unbroken(trial.path(), TRIAL.into()) / TRIAL;
    let wanted = Duration::from_secs(seconds).as_nanos() / of_trial.as_nanos();
    let steps = u32::try_from(wanted).expect("not so many steps");
    let without = unbroken(dry.path(), steps.into());
    let a_step = without / steps;
    let begun = Instant::now();
    let mut run = Soaked::start(shell, wet.path(), steps.into(), &LONG_RUN);
    let mut costs = [Cost::default(); ALL.len()];
    let mut next = begun;
    // The last one needs steps in which to be found and got over.
    let last = u64::from(steps.saturating_sub(20));
    loop {
        next += Duration::from_millis(5_000 + draws.below(10_000));
        run.wait("the moment, or the end", |_| {
            Instant::now() >= next || last_step(wet.path()) > last
        });
        if last_step(wet.path()) > last {
            break;
        }
        let which = usize::try_from(draws.below(ALL.len() as u64)).expect("small");
        let resumed = run.count("resume step ");
        let (step, moment) = (last_step(wet.path()), Instant::now());
        run.inject(ALL[which], draws, || ());
        if ALL[which] != Fault::DiskFull {
            run.wait("ranks that go on", |run| run.count("resume step ") > resumed);
            run.wait("the next step", |_| last_step(wet.path()) > step);
        }
        let gained = u32::try_from(last_step(wet.path()).saturating_sub(step)).expect("few");
        let lost = moment.elapsed().saturating_sub(a_step * gained);
        let cost = &mut costs[which];
        *cost = Cost { count: cost.count + 1, lost: cost.lost + lost, worst: cost.worst.max(lost) };
    }
    end(run, dry.path(), seed);
    let with = begun.elapsed();
    report((steps, a_step), (without, in_steps(wet.path()), with), &costs);
}

/// The time of all steps that the run has kept.
fn in_steps(folder: &Path) -> Duration {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).expect("metrics");
    let step_ms = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).expect("an object a line");
        record["step_ms"].as_f64()
    };
    Duration::from_secs_f64(text.lines().filter_map(step_ms).sum::<f64>() / 1e3)
}

#[expect(clippy::print_stdout, reason = "a report")]
fn report(
    (steps, a_step): (u32, Duration),
    (without, own, with): (Duration, Duration, Duration),
    costs: &[Cost],
) {
    println!("{steps} steps of {a_step:.1?}");
    for (fault, cost) in ALL.iter().zip(costs) {
        let Cost { count, lost, worst } = cost;
        let mean = lost.as_secs_f64() / f64::from((*count).max(1));
        let share = 100.0 * lost.as_secs_f64() / with.as_secs_f64();
        let worst = worst.as_secs_f64();
        println!(
            "{:28} {count:3} × {mean:5.2} s, at most {worst:5.2} s: {share:4.1} % of the time",
            fault.name()
        );
    }
    let goodput = |useful: Duration| 100.0 * useful.as_secs_f64() / with.as_secs_f64();
    let (of_runs, of_steps) = (goodput(without), goodput(own));
    println!("without faults {without:.1?}, with them {with:.1?}: goodput {of_runs:.1} %");
    println!("its own steps {own:.1?}: goodput {of_steps:.1} %");
}

fn end(mut run: Soaked, dry: &Path, seed: u64) {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = run.run.0.try_wait().expect("our own child") {
            break status;
        }
        assert!(begun.elapsed() < DEADLINE, "no end:\n{}", run.said());
        std::thread::park_timeout(Duration::from_millis(5));
    };
    let said = run.said();
    assert!(status.success(), "seed {seed}: {status:?}\n{said}");
    assert!(weights(&run.folder) == weights(dry), "seed {seed}:\n{said}");
    assert_eq!(losses(&run.folder), losses(dry), "seed {seed}");
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}
