//! What goes wrong on a GPU, or with its libraries, on the stand-in for them: memory, hangs, late news.
#![expect(unsafe_code, reason = "calls of the CUDA driver")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cudarc::driver::result;
use cudarc::driver::sys::CUdeviceptr;
use phalanx_comm::{Group, Sum, Work};

use crate::without_gpu::{all_end_well, complain, complaints, world, world_with};

/// Each step has a factor of its own.
pub(crate) fn factors(mut group: Group) {
    let region = group.allocate::<f32>(10).expect("memory");
    for step in 1..50_u8 {
        let sum = phalanx_comm::ScaledSum(1.0 / f64::from(step));
        group.all_reduce(region.full(), sum).and_then(Work::synchronize).expect("a sum");
    }
    println!("scaled");
}

fn wish(name: &str) {
    let folder = std::env::var("DOUBLE_FOLDER").expect("of the test");
    std::fs::write(Path::new(&folder).join(name), "").expect("written");
}

/// A call of NCCL's that does not return on rank 0.
pub(crate) fn hang(mut group: Group) {
    let region = group.allocate::<f32>(10).expect("memory");
    if group.rank() == 0 {
        wish("hang-0");
    }
    group.barrier().and_then(Work::wait).expect("all here");
    let start = Instant::now();
    let late = group.within(Duration::from_secs(1)).all_reduce(region.full(), Sum).expect("asked");
    // The first waits for the stream alone, the others for the data.
    let done = if group.rank() == 0 { late.wait() } else { late.synchronize() };
    complain(start, &done.expect_err("nobody answered"));
}

/// NCCL notices first that rank 1 is gone, and cannot say who it was.
pub(crate) fn unnamed(mut group: Group) {
    let region = group.allocate::<f32>(10).expect("memory");
    let start = Instant::now();
    // The news may overtake the end of this one.
    if let Err(error) = group.all_reduce(region.full(), Sum).and_then(Work::synchronize) {
        complain(start, &error);
    }
    if group.rank() == 1 {
        wish("dies");
        std::thread::park_timeout(Duration::from_millis(60));
        let own = std::process::id().to_string();
        drop(Command::new("kill").args(["-9", &own]).status());
    }
    let start = Instant::now();
    let done = group.all_reduce(region.full(), Sum).and_then(Work::synchronize);
    complain(start, &done.expect_err("rank 1 is gone"));
}

/// Rank 1 ends in some way while the others go on.
pub(crate) fn ends(mut group: Group, how: &str) {
    let region = group.allocate::<f32>(1000).expect("memory");
    for step in 0..1000 {
        if group.rank() == 1 && step == 5 {
            match how {
                "leaves" => return drop(group),
                "exits" => std::process::exit(0),
                _ => {}
            }
            let own = std::process::id();
            // It stays stopped for longer than the others may need, and then it goes.
            let script = format!("(sleep 9; kill -9 {own}) >/dev/null 2>&1 & kill -STOP {own}");
            drop(Command::new("sh").args(["-c", &script]).status());
        }
        let start = Instant::now();
        if let Err(error) = group.all_reduce(region.full(), Sum).and_then(Work::synchronize) {
            complain(start, &error);
        }
    }
}

/// Memory is zero before anybody writes it, and stays while the caller's stream works on it.
pub(crate) fn memory(mut group: Group) {
    result::init().expect("a driver");
    let gpu = result::device::get(0).expect("a GPU");
    // SAFETY: never released; the process ends soon.
    let context = unsafe { result::primary_ctx::retain(gpu) }.expect("a context");
    // SAFETY: retained just now.
    unsafe { result::ctx::set_current(context) }.expect("current");
    let kind = result::stream::StreamKind::NonBlocking;
    let stream = result::stream::create(kind).expect("a stream");
    for _ in 0..50 {
        let region = group.allocate::<u8>(1000).expect("memory");
        let at = region.as_ptr() as CUdeviceptr;
        // SAFETY: the region's own memory, which stays until its GPU is done with it.
        unsafe { result::memset_d8_async(at, 7, 1000, stream) }.expect("memset");
        // SAFETY: made above.
        unsafe { result::stream::synchronize(stream) }.expect("the stream");
        assert!(region.read(0..1000).iter().all(|byte| *byte == 7), "zeroed after the write");
        // SAFETY: as above.
        unsafe { result::memset_d8_async(at, 8, 1000, stream) }.expect("memset");
        drop(region);
    }
    let region = group.allocate::<u8>(64).expect("memory");
    let (input, output) = (region.range(0..32), region.range(16..48));
    let error = group.all_to_all(input, output).expect_err("they overlap").to_string();
    assert!(error.contains("overlap"), "{error}");
    let (input, output) = (region.range(32..64), region.range(0..32));
    group.all_to_all(input, output).and_then(Work::synchronize).expect("beside it");
    println!("kept");
}

#[test]
fn operations_of_earlier_factors_are_let_go() {
    all_end_well(&world(2, "nccl factors"), "scaled");
}

#[test]
fn memory_is_zero_at_first_and_stays_while_it_is_used() {
    all_end_well(&world(2, "nccl memory"), "kept");
}

/// What was let go and is still in use on the GPU counts as free for the next allocation.
pub(crate) fn scarce(mut group: Group) {
    for _ in 0..20 {
        let region = group.allocate::<u8>(600_000).expect("memory");
        drop(group.all_reduce(region.full(), Sum).expect("started"));
    }
    // More than there is fails, and says so.
    let error = group.allocate::<u8>(2_000_000).expect_err("too much").to_string();
    assert!(error.contains("out of memory"), "{error}");
    println!("enough");
}

#[test]
fn memory_that_was_let_go_can_be_had_again() {
    let small = |command: &mut Command, _| {
        command.env("DOUBLE_MEMORY", "1000000");
    };
    all_end_well(&world_with(2, "nccl scarce", small), "enough");
}

#[test]
fn an_error_does_not_wait_for_an_abort_that_takes_long() {
    let slow = |command: &mut Command, _| {
        // Longer than this test waits for its ranks.
        command.env("DOUBLE_ABORT_MS", "600000");
    };
    let all = world_with(3, "nccl killed", slow);
    assert_eq!(complaints(&all).len(), 2, "{all:?}");
}

#[test]
fn a_caller_notices_that_the_library_hangs() {
    let all = world(2, "nccl hang");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 2, "{all:?}");
}

#[test]
fn the_one_who_died_is_named_when_the_library_is_first_to_notice() {
    let all = world(3, "nccl unnamed");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 2, "{all:?}");
    assert!(lines.iter().all(|line| line.contains("rank 1 (host ")), "{lines:?}");
}

#[test]
fn a_rank_that_cannot_join_ends_the_joining_of_the_others() {
    let one_fails = |command: &mut Command, rank: usize| {
        if rank == 1 {
            command.env("DOUBLE_INIT", "fails");
        }
    };
    for (code, output) in world_with(3, "nccl refused", one_fails) {
        assert!(code == Some(0) && output.contains("as the test wants it"), "{output}");
    }
}

#[test]
fn a_rank_that_ends_or_stops_is_named() {
    for role in ["leaves", "exits", "stops"] {
        let all = world(3, &format!("nccl {role}"));
        let lines = complaints(&all);
        assert_eq!(lines.len(), 2, "{role}: {all:?}");
        assert!(lines.iter().all(|line| line.contains("rank 1 (host ")), "{role}: {lines:?}");
    }
}

#[test]
fn a_library_that_is_too_old_is_refused_with_what_is_needed() {
    let old = |command: &mut Command, _| {
        command.env("DOUBLE_VERSION", "21704");
    };
    for (code, output) in world_with(2, "nccl refused", old) {
        let said = "NCCL 2.17.4 is too old: 2.18 or newer is needed";
        assert!(code == Some(0) && output.contains(said), "{output}");
    }
}
