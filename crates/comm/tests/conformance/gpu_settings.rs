//! What is set before NCCL starts and what happens when groups are used in different orders, on the stand-in.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use phalanx_comm::environment::{NcclSettings, World};
use phalanx_comm::recorder::{lineup, FlightRecord};
use phalanx_comm::{Group, GroupOptions, Sum, Work};

use crate::without_gpu::{world_with, Exchange};

/// Settings are applied and shown as a program does it; then NCCL starts.
pub(crate) fn settings(options: GroupOptions) {
    println!(); // the test's name has no line of its own
    let asked = [("DEBUG", "WARN"), ("MAX_NCHANNELS", "4"), ("LAUNCH_ORDER_IMPLICIT", "1")];
    let settings: NcclSettings =
        asked.into_iter().map(|(name, value)| (format!("NCCL_{name}"), value)).collect();
    let seen = settings.apply().expect("good settings");
    let world = World::from_env().expect("a world");
    for line in NcclSettings::lines(&seen, world.rank) {
        println!("{line}");
    }
    match Group::from_environment(options) {
        Ok(mut group) => {
            let region = group.allocate::<f32>(10).expect("memory");
            group.all_reduce(region.full(), Sum).and_then(Work::synchronize).expect("a sum");
            println!("summed");
        }
        Err(error) => println!("refused: {error}"),
    }
}

/// Rank 0 uses one group and then the other, rank 1 the other way round; each waits for the first.
pub(crate) fn crossed(mut a: Group) {
    let mut b = a.duplicate().expect("a second communicator");
    let (first, second) = (a.allocate::<f32>(100), b.allocate::<f32>(100));
    let (first, second) = (first.expect("memory"), second.expect("memory"));
    let (limit, enough) = (Duration::from_secs(1), Duration::from_secs(20));
    let rank = a.rank();
    let mut of_a = |tag: &str, limit: Duration| {
        let work = a.tagged(tag).within(limit).all_reduce(first.full(), Sum);
        work.and_then(Work::synchronize)
    };
    let mut of_b = |tag: &str, limit: Duration| {
        let work = b.tagged(tag).within(limit).all_reduce(second.full(), Sum);
        work.and_then(Work::synchronize)
    };
    of_a("in order", enough).and_then(|()| of_b("in order", enough)).expect("the same order");
    let start = Instant::now();
    let done = if rank == 0 {
        of_a("of a", limit).and_then(|()| of_b("of b", limit))
    } else {
        of_b("of b", limit).and_then(|()| of_a("of a", limit))
    };
    let error = done.expect_err("each waits for the other");
    println!("\nerror after {} ms: {error}", start.elapsed().as_millis());
    // The end of a process would be another error for the other.
    let folder = std::env::var("DOUBLE_FOLDER").expect("of the test");
    let mark = |rank: usize| Path::new(&folder).join(format!("has-failed-{rank}"));
    std::fs::write(mark(rank), "").expect("written");
    let deadline = start + Duration::from_secs(60);
    while !mark(1 - rank).exists() && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The lines of an output that begin so.
fn lines<'a>(output: &'a str, start: &str) -> Vec<&'a str> {
    output.lines().filter(|line| line.starts_with(start)).collect()
}

#[test]
fn settings_are_shown_by_rank_0_as_nccl_sees_them() {
    let given = |command: &mut Command, _| {
        command.env("NCCL_MAX_NCHANNELS", "7").env_remove("NCCL_DEBUG");
        command.env_remove("NCCL_LAUNCH_ORDER_IMPLICIT").env("DOUBLE_SHOWS_VARIABLES", "1");
    };
    let all = world_with(3, "nccl settings", given);
    for (rank, (code, output)) in all.iter().enumerate() {
        assert!(*code == Some(0) && output.contains("summed"), "{output}");
        let expected: &[&str] = match rank {
            0 => &[
                "nccl   NCCL_DEBUG=WARN (from the configuration)",
                "nccl   NCCL_LAUNCH_ORDER_IMPLICIT=1 (from the configuration)",
                "nccl   NCCL_MAX_NCHANNELS=7 (set in the environment)",
            ],
            _ => &[],
        };
        assert_eq!(lines(output, "nccl "), expected, "rank {rank}: {output}");
        let shows_first = output.find("nccl   ").is_none_or(|at| Some(at) < output.find("summed"));
        assert!(shows_first, "{output}");
        for name in ["NCCL_DEBUG=WARN", "NCCL_MAX_NCHANNELS=7", "NCCL_LAUNCH_ORDER_IMPLICIT=1"] {
            let seen = format!("the library sees {name}");
            assert_eq!(lines(output, &seen), [seen.as_str()], "rank {rank}: {output}");
        }
    }
}

#[test]
fn a_launch_order_needs_a_library_that_knows_it() {
    let old = |command: &mut Command, _| {
        command.env("DOUBLE_VERSION", "22503").env_remove("NCCL_LAUNCH_ORDER_IMPLICIT");
    };
    for (code, output) in world_with(2, "nccl settings", old) {
        assert_eq!(code, Some(0), "{output}");
        let [refused] = lines(&output, "refused: ")[..] else { panic!("{output}") };
        assert!(refused.contains("NCCL_LAUNCH_ORDER_IMPLICIT"), "{refused}");
        assert!(refused.contains("install a newer one than this 2.25"), "{refused}");
    }
}

#[test]
fn without_the_library_the_error_says_what_to_install() {
    let none = |command: &mut Command, rank| {
        if rank == 1 {
            command.env("PHALANX_NCCL_LIBRARY", "/nonexistent/libnccl.so.2");
        }
    };
    for (code, output) in world_with(2, "nccl refused", none) {
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("/nonexistent/libnccl.so.2"), "{output}");
        assert!(output.contains("install NCCL 2.18 or newer"), "{output}");
    }
}

#[test]
fn groups_in_crossed_order_end_at_the_deadline_and_the_order_is_shown() {
    let kept = Exchange::new();
    let keeps = |command: &mut Command, _| {
        command.env("PHALANX_FLIGHT_RECORDER", &kept.0);
    };
    let all = world_with(2, "nccl crossed", keeps);
    for (rank, (code, output)) in all.iter().enumerate() {
        assert_eq!(*code, Some(0), "{output}");
        let own = ["\"of a\"", "\"of b\""][rank];
        let [error] = lines(output, "error after ")[..] else { panic!("{output}") };
        assert!(error.contains(own) && error.contains("1s passed on rank "), "{error}");
    }
    let mut records: Vec<FlightRecord> = std::fs::read_dir(&kept.0)
        .expect("the records' folder")
        .map(|entry| std::fs::File::open(entry.expect("a record").path()).expect("a record"))
        .filter_map(|file| FlightRecord::read(file).expect("a record"))
        .collect();
    records.sort_by_key(|record| record.rank);
    let text = lineup(&records);
    let (heads, both) = text.split_once("\nrank 0 of 2").expect("both ranks");
    let (first, second) = both.split_once("\nrank 1 of 2").expect("both ranks");
    for line in ["rank 0 in all_reduce #", "rank 1 after all_reduce #", "rank 1 in all_reduce #"] {
        assert!(heads.contains(line), "{text}");
    }
    // Calls have their places; either rank may also know of the other's failure.
    let called = |of: &str, tag: &str| {
        of.lines().any(|line| line.contains(tag) && line.contains("gpu_settings.rs"))
    };
    assert!(called(first, "\"of a\"") && !called(first, "\"of b\""), "{text}");
    assert!(called(second, "\"of b\"") && !called(second, "\"of a\""), "{text}");
}
