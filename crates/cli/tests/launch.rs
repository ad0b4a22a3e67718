//! `phalanx launch`, with shells as ranks.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

/// A launcher that is gone when this is dropped.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What a finished launcher has said, and its exit code.
struct Finished {
    code: Option<i32>,
    output: Vec<String>,
    errors: String,
}

/// Runs `phalanx launch flags -- sh -c script`.
fn launch(flags: &str, script: &str) -> Finished {
    run(flags, &["sh", "-c", script])
}

fn run(flags: &str, program: &[&str]) -> Finished {
    run_with(flags, program, None)
}

fn command(flags: &str, program: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phalanx"));
    command.arg("launch").args(flags.split_whitespace()).arg("--").args(program);
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "PHALANX_JOB_TOKEN", "PHALANX_RUN_ID"] {
        command.env_remove(name);
    }
    command
}

fn run_with(flags: &str, program: &[&str], job_token: Option<&str>) -> Finished {
    let mut command = command(flags, program);
    command.envs(job_token.map(|token| ("PHALANX_JOB_TOKEN", token)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Owned(command.spawn().expect("the command starts"));
    let (mut out, mut err) = (running.0.stdout.take(), running.0.stderr.take());
    let errors = std::thread::spawn(move || std::io::read_to_string(err.take().expect("piped")));
    let output = std::thread::spawn(move || std::io::read_to_string(out.take().expect("piped")));
    let end = Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = running.0.try_wait().expect("our own child") {
            break status;
        }
        assert!(Instant::now() < end, "the launcher has not ended");
        std::thread::park_timeout(Duration::from_millis(5));
    };
    let [output, errors] =
        [output, errors].map(|text| text.join().expect("a reader").expect("text"));
    let mut output: Vec<String> = output.lines().map(str::to_owned).collect();
    output.sort();
    Finished { code: status.code(), output, errors }
}

#[test]
fn any_program_runs_as_ranks() {
    let script =
        "echo $RANK of $WORLD_SIZE on $GROUP_RANK, $1; echo attempt $PHALANX_RESTART_COUNT >&2";
    let finished = run("--nnodes 2 --nproc-per-node 2", &["sh", "-c", script, "sh", "--flag"]);
    assert_eq!(finished.code, Some(0), "{}", finished.errors);
    let expected =
        [0, 1, 2, 3].map(|rank| format!("[rank {rank}] {rank} of 4 on {}, --flag", rank / 2));
    assert_eq!(finished.output, expected);
    assert_eq!(finished.errors.matches("attempt 0").count(), 4, "{}", finished.errors);
}

#[test]
fn the_job_ends_with_the_exit_code_of_its_failure() {
    for (of_rank, of_job) in [(0, 0), (3, 70), (74, 74), (75, 75)] {
        let finished = launch("--nproc-per-node 1", &format!("exit {of_rank}"));
        assert_eq!(finished.code, Some(of_job), "{}", finished.errors);
        assert_eq!(finished.errors.contains("error[PHX0702]: rank 0 on host "), of_job != 0);
    }
}

#[test]
fn what_fails_is_started_again() {
    let script = "[ $TORCHELASTIC_RESTART_COUNT = 2 ] && echo well || kill -9 $$";
    let finished = launch("--max-restarts 2", script);
    assert_eq!((finished.code, &finished.output[..]), (Some(0), &["well".to_owned()][..]));
    for line in ["restart 1/2: rank 0 on host ", "restart 2/2: rank 0 on host ", "after 2 restarts"]
    {
        assert!(finished.errors.contains(line), "no {line:?} in {}", finished.errors);
    }
}

#[test]
fn what_cannot_be_launched_says_why() {
    for (flags, program, code, said) in [
        ("", "/no/such/program", 64, "cannot start /no/such/program"),
        ("--nnodes 0", "true", 64, "--nnodes 0"),
        ("--restart-window 5", "true", 64, "--max-restarts"),
        ("--nnodes 2 --node-rank 0 --master-addr 127.0.0.1", "true", 64, "PHALANX_JOB_TOKEN"),
    ] {
        let finished = run(flags, &[program]);
        assert_eq!(finished.code, Some(code), "{}", finished.errors);
        assert!(finished.errors.contains(said), "{}", finished.errors);
    }
}

#[test]
fn a_node_that_cannot_start_its_ranks_ends_the_job_on_all() {
    let port = phalanx_comm::testing::free_port();
    let node = move |rank: usize, program: &'static [&str]| {
        let flags = format!(
            "--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port} --max-restarts 3"
        );
        run_with(&flags, program, Some(&"5a".repeat(32)))
    };
    let first = std::thread::spawn(move || node(0, &["sleep", "600"]));
    let second = node(1, &["/no/such/program"]);
    let first = first.join().expect("no panic");
    assert_eq!((first.code, second.code), (Some(64), Some(64)), "{}", first.errors);
    assert!(second.errors.contains("cannot start /no/such/program"), "{}", second.errors);
    let said = "error[PHX0706]: node 1: cannot start /no/such/program";
    assert!(first.errors.contains(said), "{}", first.errors);
}

/// Whether a process is there and more than a corpse that nobody collected.
fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn what_ranks_of_a_later_attempt_have_started_dies_with_a_killed_launcher() {
    let script = "[ $PHALANX_RESTART_COUNT = 0 ] && exit 1; sleep 600 & echo child $!; wait";
    let mut command = command("--nproc-per-node 2 --max-restarts 1", &["sh", "-c", script]);
    let mut job = Owned(command.stdout(Stdio::piped()).spawn().expect("the command starts"));
    let output = job.0.stdout.take().expect("piped");
    let (sender, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            drop(sender.send(line));
        }
    });
    let child = || {
        let line = said.recv_timeout(DEADLINE).expect("each rank names its child");
        line.rsplit(' ').next().unwrap_or_default().to_owned()
    };
    let children = [child(), child()];
    assert!(children.iter().all(|pid| lives(pid)), "{children:?}");
    drop(job); // kill -9
    let end = Instant::now() + DEADLINE;
    while children.iter().any(|pid| lives(pid)) {
        assert!(Instant::now() < end, "still there: {children:?}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
