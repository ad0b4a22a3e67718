//! Faults of whole processes: what the survivors say, and how soon.

use std::time::{Duration, Instant};

use crate::support::{clock_ns, Ended, Ranks};
use phalanx_comm::{Error, Group, GroupOptions, Sum, Work};

/// From the fault to the last survivor's end. The bar for the error itself is half a second; the
/// processes' ends are seen a little later.
const DETECTED: Duration = Duration::from_millis(700);
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// What a rank does.
pub(crate) fn rank(role: &str) {
    let options = GroupOptions::default().with_timeout(Duration::from_secs(20));
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let victim = group.rank() == 1;
    match role {
        "killed in large all-reduces" => work_forever(&mut group, 4 << 20),
        "killed in small all-reduces" => work_forever(&mut group, 16),
        "killed while the others wait" if victim => idle(),
        "exits early" if victim => std::process::exit(0),
        "panics" if victim => panic!("a bug in rank 1"),
        "leaves early" if victim => {}
        "sums" => {
            let region = group.allocate::<f32>(300_000).expect("memory");
            region.write(0, &vec![group.rank() as f32; 300_000]);
            group.all_reduce(region.full(), Sum).and_then(Work::wait).expect("a sum");
            println!("sum {}", region.read(7..8)[0]);
        }
        _ => {
            let mut values = vec![1.0_f32; 1 << 20];
            group.barrier().and_then(Work::wait).ok();
            println!("waiting");
            let error = group.tagged("bucket 3").all_reduce(&mut values[..], Sum);
            report(error.and_then(Work::wait).expect_err("nobody can finish this"));
        }
    }
}

fn report(error: Error) {
    println!("error at {} ns", clock_ns());
    println!("error: {error}");
}

fn idle() {
    println!("idle");
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

fn work_forever(group: &mut Group, len: usize) {
    let region = group.allocate::<f32>(len).expect("memory");
    for step in 0..u64::MAX {
        let done = group.tagged("step").all_reduce(region.full(), Sum).and_then(Work::wait);
        if let Err(error) = done {
            return report(error);
        }
        if step == 20 {
            println!("under way");
        }
    }
}

/// The survivors blame rank 1, with its process, and end in time.
fn blamed(ended: &[Ended], pid: u32, what: &str) {
    blamed_within(ended, pid, what, DETECTED);
}

/// As `blamed`, with another limit.
pub(crate) fn blamed_within(ended: &[Ended], pid: u32, what: &str, limit: Duration) {
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != 1) {
        let line =
            ended.output.lines().find(|line| line.contains("error: ")).unwrap_or_else(|| {
                panic!("rank {rank} reported nothing ({}):\n{}", ended.status, ended.output)
            });
        assert!(line.contains("rank 1 (host "), "{line}");
        assert!(line.contains(&format!("pid {pid}")), "{line}");
        assert!(line.contains(what), "{line}");
        assert!(ended.after < limit, "rank {rank} after {:?}", ended.after);
    }
}

fn killed(role: &str, link: &str, when: &str, reporter: usize) {
    let mut ranks = Ranks::start(role, 3, link);
    ranks.wait_for_line(reporter, when);
    let pid = ranks.pid(1);
    ranks.kill(1);
    blamed(&ranks.finish(LIMIT), pid, "died");
}

#[test]
fn kill_9_during_large_collectives() {
    killed("killed in large all-reduces", "auto", "under way", 0);
    killed("killed in large all-reduces", "tcp", "under way", 0);
}

#[test]
fn kill_9_during_small_collectives() {
    killed("killed in small all-reduces", "auto", "under way", 0);
    killed("killed in small all-reduces", "tcp", "under way", 0);
}

#[test]
fn kill_9_of_a_rank_that_the_others_wait_for() {
    killed("killed while the others wait", "auto", "idle", 1);
}

#[test]
fn an_early_exit() {
    let ranks = Ranks::start("exits early", 3, "auto");
    let pid = ranks.pid(1);
    let ended = ranks.finish(LIMIT);
    blamed_without_time(&ended, pid, "died");
}

#[test]
fn a_panic() {
    let ranks = Ranks::start("panics", 3, "auto");
    let pid = ranks.pid(1);
    let ended = ranks.finish(LIMIT);
    assert!(ended[1].output.contains("a bug in rank 1"), "{}", ended[1].output);
    blamed_without_time(&ended, pid, "left the group after 0 collectives (it panicked)");
}

#[test]
fn an_early_end() {
    let ranks = Ranks::start("leaves early", 3, "auto");
    let pid = ranks.pid(1);
    blamed_without_time(&ranks.finish(LIMIT), pid, "left the group after 0 collectives");
}

/// As `blamed`, where the fault's own time is not known.
fn blamed_without_time(ended: &[Ended], pid: u32, what: &str) {
    blamed_within(ended, pid, what, Duration::from_secs(5));
}

#[test]
fn processes_sum_over_both_links() {
    for link in ["auto", "shm", "tcp"] {
        for ended in Ranks::start("sums", 3, link).finish(LIMIT) {
            assert!(ended.status.success(), "{}", ended.output);
            assert!(ended.output.contains("sum 3"), "{}", ended.output);
        }
    }
}

#[test]
fn nothing_with_a_name_is_left() {
    killed("killed in large all-reduces", "auto", "under way", 0);
    let entries = std::fs::read_dir("/dev/shm").expect("/dev/shm");
    let names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.contains("phalanx")), "{names:?}");
}
