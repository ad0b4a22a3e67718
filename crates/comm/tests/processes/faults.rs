//! Faults of whole processes: what the survivors say. That a rank died is known from its sockets, not from a time that has passed;
//! how soon is for `figures`.

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::time::{Duration, Instant};

use rustix::process::{getpid, kill_process, Signal};

use crate::support::{clock_ns, Ended, Ranks};
use phalanx_comm::{Error, Group, GroupOptions, Sum, Work};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// What a rank does.
pub(crate) fn rank(role: &str) {
    let options = GroupOptions { timeout: Duration::from_secs(20), ..GroupOptions::default() };
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let victim = group.rank() == 1;
    match role {
        "killed in large all-reduces" => work_forever(&mut group, 4 << 20),
        "killed in small all-reduces" => work_forever(&mut group, 16),
        "killed in large messages" => message_forever(&mut group, 5 << 20),
        "killed in small messages" => message_forever(&mut group, 100),
        "killed while the others wait" | "killed while the others send" if victim => idle(),
        "killed while the others send" => {
            let sent = group.tagged("weights").send(&vec![1_u8; 50 << 20], 1);
            report(sent.and_then(Work::wait).expect_err("nobody receives this"));
        }
        "leaves early" if victim => {}
        "sums and forgets" => sum_and_forget(group),
        "starts alone" => start_alone(group),
        "divides without descriptors" => divide_without_descriptors(&mut group, victim),
        "sums" => {
            let region = group.allocate::<f32>(300_000).expect("memory");
            region.write(0, &vec![group.rank() as f32; 300_000]);
            group.all_reduce(region.full(), Sum).and_then(Work::wait).expect("a sum");
            println!("sum {}", region.read(7..8)[0]);
        }
        _ if victim => fail_by_itself(&mut group, role),
        _ => {
            let mut values = vec![1.0_f32; 1 << 20];
            group.barrier().and_then(Work::wait).ok();
            println!("waiting");
            let error = group.tagged("bucket 3").all_reduce(&mut values[..], Sum);
            report(error.and_then(Work::wait).expect_err("nobody can finish this"));
        }
    }
}

/// How a rank brings its own end about, after a first collective.
pub(crate) const OWN_ENDS: [&str; 4] = ["exits early", "panics", "aborts itself", "segfaults"];

fn fail_by_itself(group: &mut Group, role: &str) {
    group.barrier().and_then(Work::wait).expect("a barrier");
    println!("fault at {} ns", clock_ns());
    match role {
        "exits early" => std::process::exit(0),
        "panics" => panic!("a bug in rank 1"),
        "aborts itself" => std::process::abort(),
        // The first only takes Rust's own handler away, and may be taken by another thread.
        "segfaults" => loop {
            kill_process(getpid(), Signal::SEGV).expect("own process");
            crate::silence::pause(Duration::from_millis(1));
        },
        other => panic!("no such role: {other}"),
    }
}

/// Starts sums that nobody of this process waits for, and forgets the group that has them: the others
/// get them all the same.
fn sum_and_forget(mut group: Group) {
    let mut values = vec![1.0_f32; 1 << 20];
    let mut small = [1.0_f32; 4];
    let mine = group.rank() == 1;
    group.barrier().and_then(Work::wait).expect("a barrier");
    if mine {
        drop(group.all_reduce(&mut values[..], Sum).expect("a start"));
        drop(group.all_reduce(&mut small[..], Sum).expect("a start"));
        _ = std::mem::ManuallyDrop::new(group);
        std::process::exit(0);
    }
    // The other one has exited by then, or waits for these.
    crate::silence::pause(Duration::from_millis(200));
    group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("a sum");
    group.all_reduce(&mut small[..], Sum).and_then(Work::wait).expect("a small sum");
    assert_eq!((values[7], small[3]), (3.0, 3.0));
    println!("summed");
}

/// Rank 1 starts what nobody joins, and its process ends with the group alive, while rank 0 is there until it is killed.
fn start_alone(mut group: Group) {
    group.barrier().and_then(Work::wait).expect("a barrier");
    if group.rank() == 1 {
        let mut values = vec![1.0_f32; 1 << 20];
        drop(group.all_reduce(&mut values[..], Sum).expect("a start"));
        _ = std::mem::ManuallyDrop::new(group);
        println!("exits at {} ns", clock_ns());
    } else {
        std::io::stdin().read_line(&mut String::new()).expect("the end of the test");
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

/// Messages go round the ranks.
fn message_forever(group: &mut Group, len: usize) {
    let (rank, ranks) = (group.rank(), group.world_size());
    let (mine, mut theirs) = (vec![1_u8; len], vec![0; len]);
    let mut round = || {
        let arriving = group.receive_bytes(len, (rank + ranks - 1) % ranks)?;
        let sent = group.send(&mine, (rank + 1) % ranks)?;
        arriving.wait_into(&mut theirs)?;
        sent.wait()
    };
    for step in 0..u64::MAX {
        if let Err(error) = round() {
            return report(error);
        }
        if step == 20 {
            println!("under way");
        }
    }
}

/// The survivors blame rank 1, with its process.
pub(crate) fn blamed(ended: &[Ended], pid: u32, what: &str) {
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != 1) {
        let line =
            ended.output.lines().find(|line| line.contains("error: ")).unwrap_or_else(|| {
                panic!("rank {rank} reported nothing ({}):\n{}", ended.status, ended.output)
            });
        assert!(line.contains("rank 1 (host "), "{line}");
        assert!(line.contains(&format!("pid {pid}")), "{line}");
        assert!(line.contains(what), "{line}");
    }
}

fn killed(role: &str, link: &str, when: &str, reporter: usize) {
    let mut ranks = Ranks::start(role, 3, link);
    ranks.wait_for_line(reporter, when);
    let pid = ranks.pid(1);
    ranks.kill(1);
    blamed(&ranks.finish(LIMIT), pid, "died");
}

/// Rank 1 can open no more sockets when the group is divided.
fn divide_without_descriptors(group: &mut Group, victim: bool) {
    let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if victim {
        let none = rustix::process::Rlimit { current: Some(3), ..before };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, none).expect("less");
    }
    let error = group.duplicate().map(drop).expect_err("rank 1 cannot");
    println!("error: {error}");
    rustix::process::setrlimit(rustix::process::Resource::Nofile, before).expect("as before");
    // The undivided group is as good as before.
    group.barrier().and_then(Work::wait).expect("the ranks go on");
    println!("goes on");
}

#[test]
fn a_rank_that_fails_before_its_part_is_made_is_named_and_the_group_goes_on() {
    let ended = Ranks::start("divides without descriptors", 3, "auto").finish(LIMIT);
    for (rank, ended) in ended.iter().enumerate() {
        let output = &ended.output;
        assert!(ended.status.success() && output.contains("goes on"), "{output}");
        let said = if rank == 1 { "os error 24" } else { "rank 1 could not open its sockets" };
        assert!(output.contains(said), "rank {rank}: {output}");
    }
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
fn kill_9_during_messages() {
    for link in ["auto", "tcp"] {
        killed("killed in large messages", link, "under way", 0);
        killed("killed in small messages", link, "under way", 0);
        killed("killed while the others send", link, "idle", 1);
    }
}

/// Rank 1 ends by itself; how long until the last survivor's error.
pub(crate) fn own_end(role: &str, link: &str) -> Duration {
    let what = match role {
        "exits early" => "left the group after 1 collectives, while",
        "panics" => "left the group after 1 collectives (it panicked)",
        _ => "died",
    };
    let ranks = Ranks::start(role, 3, link);
    let pid = ranks.pid(1);
    let ended = ranks.finish(LIMIT);
    blamed(&ended, pid, what);
    if role == "panics" {
        assert!(ended[1].output.contains("a bug in rank 1"), "{}", ended[1].output);
    }
    let fault_ns = ended[1].time_ns("fault at ");
    let survivors = [&ended[0], &ended[2]].map(Ended::error_ns);
    Duration::from_nanos(survivors.into_iter().max().unwrap_or(0).saturating_sub(fault_ns))
}

#[test]
fn ranks_that_end_by_themselves() {
    for role in OWN_ENDS {
        for link in ["auto", "tcp"] {
            println!("{role} over {link}: known after {:.1?}", own_end(role, link));
        }
    }
}

#[test]
fn what_was_started_is_finished_though_the_group_is_forgotten() {
    for link in ["auto", "tcp"] {
        let ended = Ranks::start("sums and forgets", 3, link).finish(LIMIT);
        for (rank, ended) in ended.iter().enumerate() {
            assert!(ended.status.success(), "rank {rank}: {}", ended.output);
            assert_eq!(ended.output.contains("summed"), rank != 1, "{}", ended.output);
        }
    }
}

#[test]
fn exiting_waits_ten_seconds_at_most_for_a_collective_that_nobody_joins() {
    // Rank 0 does not end by itself: waiting for it would take longer than this test waits.
    let ended = Ranks::start("starts alone", 2, "auto").finish_without(Some(0), LIMIT);
    let waited = Duration::from_nanos(clock_ns() - ended[1].time_ns("exits at "));
    assert!(waited > Duration::from_secs(8), "{waited:?}");
    assert!(ended[1].status.success(), "{}", ended[1].output);
}

#[test]
fn an_early_end() {
    let ranks = Ranks::start("leaves early", 3, "auto");
    let pid = ranks.pid(1);
    blamed(&ranks.finish(LIMIT), pid, "left the group after 0 collectives");
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

/// The names of phalanx's unix sockets that a process holds, abstract ones included.
fn socket_names(pid: u32) -> BTreeSet<String> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the rank lives");
    let target = |entry: std::io::Result<DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
    let links = open.filter_map(target).map(|link| link.to_string_lossy().into_owned());
    let inodes: BTreeSet<String> = links
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = std::fs::read_to_string("/proc/net/unix").expect("Linux");
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields
        .filter(|fields| fields.len() == 8 && inodes.contains(fields[6]))
        .map(|fields| fields[7].to_owned())
        .filter(|name| name.contains("phalanx"))
        .collect()
}

/// F1 leaves neither sockets nor memory that others could find.
#[test]
fn nothing_with_a_name_is_left() {
    let mut ranks = Ranks::start("killed in large all-reduces", 3, "auto");
    ranks.wait_for_line(0, "under way");
    let names: BTreeSet<String> = (0..3).flat_map(|rank| socket_names(ranks.pid(rank))).collect();
    assert!(
        !names.is_empty(),
        "ranks of a machine talk over named sockets: look for them elsewhere"
    );
    let pid = ranks.pid(1);
    ranks.kill(1);
    blamed(&ranks.finish(LIMIT), pid, "died");
    let left = std::fs::read_to_string("/proc/net/unix").expect("Linux");
    for name in names {
        assert!(!left.contains(&name), "{name} is left:\n{left}");
    }
    let entries = std::fs::read_dir("/dev/shm").expect("/dev/shm");
    let files: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(files.iter().all(|name| !name.contains("phalanx")), "{files:?}");
}
