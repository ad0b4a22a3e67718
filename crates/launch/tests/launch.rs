//! Real launchers with real ranks on one machine: what is shown, what is reported, and that nothing stays behind.

mod support;

use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{assert_gone, command, lives, sorted, Finished, Job, LIMIT};

fn run(args: &str) -> Finished {
    Job::start(args).finish()
}

#[test]
fn emulated_nodes_are_announced_and_their_ranks_know_their_places() {
    let finished = run("--nnodes 2 --nproc-per-node 2 --threads 3 --act environment");
    assert_eq!(finished.code, Some(0), "{:?}", finished.errors);
    assert_eq!(finished.errors.len(), 1, "{:?}", finished.errors);
    assert!(finished.errors[0].contains("emulating 2 nodes on this machine, 2 ranks each"));
    let lines = sorted(finished.output);
    assert_eq!(lines.len(), 4);
    for (rank, line) in lines.iter().enumerate() {
        let (local, node) = (rank % 2, rank / 2);
        let start = format!(
            "[rank {rank}] rank {rank} of 4 local {local} of 2 node {node} of 2 at 127.0.0.1:"
        );
        assert!(line.starts_with(&start), "{line}");
        assert!(line.contains(" threads 3 run "), "{line}");
        assert!(line.ends_with("by Phalanx store Elsewhere"), "{line}");
    }
    let after_port = |line: &String| line.split_once("127.0.0.1:").map(|(_, rest)| rest.to_owned());
    assert!(lines.windows(2).all(|pair| after_port(&pair[0]) == after_port(&pair[1])));
}

#[test]
fn threads_are_the_users_choice_or_a_share_of_the_cores() {
    let mut chosen = command("--nnodes 2 --act environment");
    chosen.env("OMP_NUM_THREADS", "7");
    let lines = Job::of(chosen).finish().output;
    assert!(lines.iter().all(|line| line.contains(" threads 7 ")), "{lines:?}");
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let share = format!(" threads {} ", (cores / 2).max(1));
    let shared = run("--nnodes 2 --act environment").output;
    assert!(shared.iter().all(|line| line.contains(&share)), "{shared:?}");
}

#[test]
fn a_world_of_one_runs_in_the_process_itself_and_has_no_prefix() {
    let finished = run("--act environment");
    assert!(finished.output[0].starts_with("rank 0 of 1"), "{:?}", finished.output);
    assert!(finished.output[0].ends_with("by Single store ThisRank"));
    let launched = run("--threads 1 --act environment");
    assert!(launched.output[0].starts_with("rank 0 of 1"), "{:?}", launched.output);
    assert!(launched.output[0].ends_with("by Phalanx store Elsewhere"));
}

#[test]
fn all_ranks_join_through_the_launchers_store() {
    let finished = run("--nnodes 2 --nproc-per-node 2 --act join");
    assert_eq!(finished.code, Some(0), "{:?}", finished.errors);
    assert_eq!(finished.output.len(), 4);
    assert!(finished.output.iter().all(|line| line.ends_with("joined 0,1,2,3")));
}

#[test]
fn lines_are_prefixed_by_rank_on_their_own_stream() {
    let finished = run("--nproc-per-node 2 --act talk");
    let expected = |stream: &str| {
        let line = |rank| move |line| format!("[rank {rank}] {stream} {line} of {rank}");
        (0..2).flat_map(|rank| (0..3).map(line(rank))).collect::<Vec<_>>()
    };
    assert_eq!(sorted(finished.output), expected("out"));
    assert_eq!(sorted(finished.errors), expected("err"));
    let plain = run("--nproc-per-node 2 --no-prefix --act talk");
    assert!(plain.output.iter().all(|line| line.starts_with("out ")), "{:?}", plain.output);
}

#[test]
fn a_killed_rank_is_the_root_cause_and_the_others_end() {
    let finished = run("--nnodes 3 --act kill --rank 1");
    assert_eq!(finished.code, Some(70));
    let report = finished.report();
    assert!(report.starts_with("error[PHX0701]: rank 1 on host "), "{report}");
    assert!(report.contains("died: signal 9 (SIGKILL)"), "{report}");
    assert!(report.contains("last lines: about to die | help: "), "{report}");
    assert!(finished.errors.iter().any(|line| line == "[rank 1] about to die"));
    assert!(finished.errors.iter().any(|line| line.contains("rank 1 failed; ending the others")));
    // The report is the last word.
    assert_eq!(finished.errors.last().map(String::as_str), Some(report));
}

#[test]
fn a_panic_is_reported_with_its_message() {
    let finished = run("--nnodes 2 --act panic --rank 1");
    assert_eq!(finished.code, Some(70));
    let report = finished.report();
    assert!(report.contains("rank 1 on host") && report.contains("exit code 101"), "{report}");
    assert!(report.contains("panicked at") && report.contains("rank.rs"), "{report}");
    assert!(report.contains("⏎ rank 1 is out of paper |"), "{report}");
}

#[test]
fn exit_codes_of_the_contract_pass_through_and_others_become_70() {
    for (of_rank, of_job) in [(1, 70), (65, 65), (74, 74), (75, 75), (255, 70)] {
        let finished = run(&format!("--nnodes 2 --act exit --code {of_rank}"));
        assert_eq!(finished.code, Some(of_job));
        let report = finished.report();
        assert!(report.contains(&format!("ended with exit code {of_rank} after")), "{report}");
        assert!(report.contains("cannot go on ⏎ because of this"), "{report}");
    }
}

#[test]
fn ranks_that_end_because_a_peer_is_gone_are_not_the_root_cause() {
    for _ in 0..5 {
        let finished = run("--nnodes 3 --act cascade --rank 2");
        assert!(finished.report().contains("rank 2 on host"), "{}", finished.report());
        assert_eq!(finished.code, Some(70));
    }
}

#[test]
fn stubborn_ranks_are_killed_after_the_grace() {
    let job = Job::start("--nproc-per-node 2 --grace 0.3 --act stubborn");
    let pids = job.numbers("pid", 2);
    let start = Instant::now();
    job.signal(Signal::TERM);
    let finished = job.finish();
    assert_eq!(finished.code, Some(143));
    assert!(start.elapsed() >= Duration::from_millis(300), "{:?}", start.elapsed());
    assert!(finished.errors.iter().any(|line| line.contains("2 ranks did not end within 0.3 s")));
    assert_gone(&pids, Duration::ZERO);
}

#[test]
fn the_first_ctrl_c_asks_and_the_second_kills_at_once() {
    let job = Job::start("--nproc-per-node 2 --grace 600 --act stubborn");
    let pids = job.numbers("pid", 2);
    job.signal(Signal::INT);
    let notice = job.errors.recv_timeout(LIMIT).unwrap();
    assert!(notice.contains("SIGINT: the ranks have 600 s to end"), "{notice}");
    assert!(pids.iter().all(|&pid| lives(pid)));
    job.signal(Signal::INT);
    assert_eq!(job.finish().code, Some(130));
    assert_gone(&pids, Duration::ZERO);
}

#[test]
fn ranks_that_end_well_when_asked_are_no_failure() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::TERM, 143)] {
        let job = Job::start("--nproc-per-node 2 --act polite");
        job.numbers("pid", 2);
        job.signal(signal);
        let finished = job.finish();
        assert_eq!(finished.code, Some(code));
        assert_eq!(sorted(finished.output), ["[rank 0] saved", "[rank 1] saved"]);
        assert!(finished.errors.iter().all(|line| !line.starts_with("error[")));
    }
}

#[test]
fn nothing_is_left_when_the_launcher_is_killed() {
    for _ in 0..3 {
        let mut job = Job::start("--nnodes 2 --nproc-per-node 2 --act children");
        let mut pids = Vec::new();
        while pids.len() < 8 {
            let line = job.output.recv_timeout(LIMIT).unwrap();
            pids.extend(line.split(' ').next_back().and_then(|pid| pid.parse::<i32>().ok()));
        }
        assert!(pids.iter().all(|&pid| lives(pid)), "{pids:?}");
        job.signal(Signal::KILL);
        job.status();
        assert_gone(&pids, LIMIT);
    }
}

#[test]
fn children_of_ranks_are_ended_with_them() {
    let job = Job::start("--nproc-per-node 2 --act children");
    let children = job.numbers("child", 2);
    job.signal(Signal::INT);
    assert_eq!(job.finish().code, Some(130));
    assert_gone(&children, LIMIT);
}

#[test]
fn a_stopped_launcher_can_be_continued() {
    let job = Job::start("--nproc-per-node 2 --act polite");
    let mut pids = job.numbers("pid", 2);
    pids.push(i32::try_from(job.child.id()).expect("a process id"));
    let is_stopped = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(") T ")
    };
    job.signal(Signal::TSTP);
    let deadline = Instant::now() + LIMIT;
    while !pids.iter().all(|&pid| is_stopped(pid)) {
        assert!(Instant::now() < deadline);
        thread::park_timeout(Duration::from_millis(2));
    }
    job.signal(Signal::CONT);
    job.signal(Signal::TERM);
    assert_eq!(job.finish().code, Some(143));
}

#[test]
fn what_cannot_start_says_why_and_what_to_do() {
    let error = |args: &str, code: i32| {
        let finished = run(args);
        assert_eq!(finished.code, Some(code), "{args}: {:?}", finished.errors);
        finished.errors.join("\n")
    };
    let no_token = error("--nnodes 2 --node-rank 0 --master-addr 127.0.0.1 --act wait", 64);
    assert!(no_token.contains("openssl rand -hex 32"), "{no_token}");
    let no_rank = error("--nnodes 2 --master-addr 127.0.0.1 --act wait", 64);
    assert!(no_rank.contains("--node-rank is missing"), "{no_rank}");
    let no_ranks = error("--nproc-per-node 0 --act wait", 64);
    assert!(no_ranks.contains("--nproc-per-node 0"), "{no_ranks}");
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port();
    let (named, end) =
        (format!("port {port} on 127.0.0.1 is in use by pid"), Instant::now() + LIMIT);
    loop {
        let in_use = error(&format!("--nnodes 2 --master-port {port} --act wait"), 69);
        if in_use.contains(&named) {
            break;
        }
        // Who has it is looked for only for a moment, which a busy machine may need for other things.
        assert!(in_use.contains("is in use") && Instant::now() < end, "{in_use}");
    }
    let no_folder = error("--nnodes 2 --log-dir /proc/none --act wait", 74);
    assert!(no_folder.contains("--log-dir"), "{no_folder}");
}

#[test]
fn a_rank_of_another_launcher_starts_no_ranks() {
    let mut rank = command("--nnodes 2 --nproc-per-node 1 --master-addr a --act environment");
    rank.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "4000")]);
    let finished = Job::of(rank).finish();
    assert!(finished.output[0].starts_with("rank 1 of 2"), "{:?}", finished.output);
    assert!(finished.output[0].ends_with("by Manual store Elsewhere"), "{:?}", finished.output);
    // A shell inside `srun --pty`: a world of one, while the user asks for two.
    let mut alone = command("--nnodes 2 --act environment");
    alone.envs([("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "4000")]);
    let refused = Job::of(alone).finish();
    assert_eq!(refused.code, Some(64));
    assert!(
        refused.errors[0].contains("--nnodes 2 contradicts whoever set RANK"),
        "{:?}",
        refused.errors
    );
}

#[test]
fn a_missing_program_is_named() {
    let options = phalanx_launch::LaunchOptions::default();
    let program = std::path::Path::new("/no/such/program");
    let error = phalanx_launch::run(&options, program, &[]).unwrap_err();
    assert_eq!(error.exit_code(), 64);
    assert!(error.to_string().contains("cannot start /no/such/program"), "{error}");
}

#[test]
fn logs_and_the_record_of_the_failure_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    let finished = run(&format!("--nnodes 2 --act panic --rank 1 --log-dir {path}"));
    assert_eq!(finished.code, Some(70));
    let run_dir = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let log = std::fs::read_to_string(run_dir.join("rank1.log")).unwrap();
    assert!(log.contains("out of paper"), "{log}");
    let record = std::fs::read_to_string(run_dir.join("errors.jsonl")).unwrap();
    let record: serde_json::Value = serde_json::from_str(record.trim()).unwrap();
    assert_eq!((&record["rank"], &record["exit_code"]), (&1.into(), &101.into()));
    assert_eq!(record["message"], finished.report());
    let last_lines = record["last_lines"].to_string();
    assert!(last_lines.contains("panicked at") && last_lines.contains("rank.rs:"), "{last_lines}");
}

/// A launcher whose run has the same name as others; real machines have one of their address and port.
fn run_again(args: &str, temporary: &Path) -> Finished {
    let mut job = command(args);
    job.env("PHALANX_RUN_ID", "again").env("TMPDIR", temporary);
    Job::of(job).finish()
}

#[test]
fn a_run_of_the_same_name_gets_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let args =
        |act: &str| format!("--nnodes 2 --act {act} --rank 1 --log-dir {}", dir.path().display());
    run_again(&args("panic"), dir.path());
    run_again(&args("kill"), dir.path());
    for (folder, said) in [("again", "out of paper"), ("again-2", "about to die")] {
        let text = |file| std::fs::read_to_string(dir.path().join(folder).join(file)).unwrap();
        assert!(text("rank1.log").contains(said), "{folder}");
        assert_eq!(text("errors.jsonl").lines().count(), 1, "{folder}");
    }
}

#[test]
fn the_operations_of_a_second_failure_are_kept_beside_those_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let args = "--nproc-per-node 2 --act group --rank 1 --fault exit";
    let files = [0, 1].map(|_| {
        let finished = run_again(args, dir.path());
        let named = finished.report().split_once("operations of all ranks: ");
        let (_, file) = named.unwrap_or_else(|| panic!("{}", finished.report()));
        file.split(" | ").next().unwrap().to_owned()
    });
    assert_ne!(files[0], files[1]);
    for file in files {
        let lineup = std::fs::read_to_string(&file).unwrap();
        assert!(lineup.contains("rank 1 of 2 (pid "), "{file}: {lineup}");
    }
}

#[test]
fn a_progress_bar_of_rank_0_survives_on_a_terminal() {
    // script(1) gives the launcher a terminal, and ranks leave marks in the folder, as does this test: the line of rank 1 comes
    // while the bar is there.
    let folder = tempfile::tempdir().unwrap();
    let rank = env!("CARGO_BIN_EXE_launch-test-rank");
    let mut script = Command::new("timeout");
    script
        .args(["--foreground", "--kill-after=5", &LIMIT.as_secs().to_string(), "script", "-qec"])
        .args([&format!("{rank} --nproc-per-node 2 --act bar"), "/dev/null"])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .env_remove("RANK");
    let mut child = script.spawn().expect("timeout of coreutils, script of util-linux");
    let mut output = child.stdout.take().unwrap();
    let (mut bytes, mut more) = (Vec::new(), [0; 4096]);
    while let Some(count) = output.read(&mut more).ok().filter(|count| *count > 0) {
        bytes.extend_from_slice(&more[..count]);
        if String::from_utf8_lossy(&bytes).contains("line between\r\n") {
            std::fs::write(folder.path().join("seen"), "").unwrap();
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    assert!(child.wait().unwrap().success(), "{text}");
    for step in 1..=5 {
        assert!(text.contains(&format!("\r\u{1b}[2Kstep {step}/5")), "{text:?}");
    }
    // The line of the other rank does not stick to the bar: the bar is cleared first.
    assert!(text.contains("\r\u{1b}[2K[rank 1] line between\r\n"), "{text:?}");
}

#[test]
fn a_panic_is_left_where_torchrun_looks_for_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("error.json");
    let mut panicking = command("--nproc-per-node 2 --act panic --rank 1");
    panicking.env("TORCHELASTIC_ERROR_FILE", &file);
    assert_ne!(Job::of(panicking).finish().code, Some(0));
    let text = std::fs::read_to_string(&file).expect("a record");
    let record: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let message = record["message"]["message"].as_str().expect("a message");
    assert!(message.contains("panicked at") && message.contains("rank.rs"), "{message}");
    // torchrun without logs: an empty name is none.
    let mut unnamed = command("--nproc-per-node 2 --act panic --rank 1");
    unnamed.env("TORCHELASTIC_ERROR_FILE", "");
    let finished = Job::of(unnamed).finish();
    assert!(!finished.errors.iter().any(|line| line.contains("torchrun")), "{:?}", finished.errors);
}
