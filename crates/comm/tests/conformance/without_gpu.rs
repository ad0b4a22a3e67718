//! The NCCL backend on a machine without a GPU: on the stand-in of `tests/gpu_double/double.rs` for the
//! driver and libnccl, which is stricter than they are about what callers owe them.
#![expect(unsafe_code, reason = "calls of the CUDA driver")]
#![expect(clippy::multiple_unsafe_ops_per_block, reason = "one after the other on one buffer")]

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cudarc::driver::result;
use cudarc::driver::sys::CUdeviceptr;
use phalanx_comm::{Backend, DeviceSlice, Group, GroupOptions, Stream, Sum, Uploader, Work};

use crate::launched::{ranks, Running};
use crate::{device, gpu_faults, gpu_links, gpu_messages, gpu_settings};

pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// What a rank does.
pub(crate) fn rank(role: &str) {
    let options = GroupOptions { timeout: Duration::from_secs(20), ..GroupOptions::default() };
    let nccl = || GroupOptions { backend: Backend::Nccl, ..options.clone() };
    match role {
        "nccl suite" => suite(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl streams" => streams(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl killed" => killed(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl absent" => {
            let options = GroupOptions { timeout: Duration::from_secs(1), ..nccl() };
            absent(Group::from_environment(options).expect("the ranks meet"));
        }
        "nccl uploads" => uploads(),
        "nccl abort" => abort(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl factors" => {
            gpu_faults::factors(Group::from_environment(nccl()).expect("the ranks meet"));
        }
        "nccl permutations" => crate::gpu_permutations::rank(&nccl()),
        "nccl hang" => gpu_faults::hang(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl unnamed" => {
            gpu_faults::unnamed(Group::from_environment(nccl()).expect("the ranks meet"));
        }
        "nccl memory" => {
            gpu_faults::memory(Group::from_environment(nccl()).expect("the ranks meet"));
        }
        "nccl scarce" => {
            gpu_faults::scarce(Group::from_environment(nccl()).expect("the ranks meet"));
        }
        "nccl at once" => ends_at_once(Group::from_environment(nccl()).expect("the ranks meet")),
        "nccl leaves" | "nccl exits" | "nccl stops" => {
            let group = Group::from_environment(nccl()).expect("the ranks meet");
            gpu_faults::ends(group, &role[5..]);
        }
        message if message.starts_with("nccl message ") => {
            let group = Group::from_environment(nccl()).expect("the ranks meet");
            gpu_messages::rank(&message["nccl message ".len()..], group);
        }
        "nccl goes on" => gpu_links::goes_on(nccl()),
        "nccl settings" => gpu_settings::settings(nccl()),
        "nccl crossed" => {
            gpu_settings::crossed(Group::from_environment(nccl()).expect("the ranks meet"));
        }
        "nccl refused" => match Group::from_environment(nccl()) {
            Ok(group) => panic!("a group of {}", group.world_size()),
            Err(error) => println!("refused: {error}"),
        },
        "nccl auto" => {
            let group = Group::from_environment(GroupOptions { backend: Backend::Auto, ..options });
            let group = group.expect("the ranks meet");
            println!("chose {:?}: {}", group.backend(), group.backend_choice().unwrap_or(""));
        }
        other => panic!("no such role: {other}"),
    }
}

/// What a rank does whose GPU memory travels over MPI.
#[cfg(feature = "mpi")]
pub(crate) fn over_mpi(role: &str, group: phalanx_comm::Result<Group>) {
    match (role, group) {
        ("gpu suite", Ok(group)) => suite(group),
        ("gpu streams", Ok(group)) => streams(group),
        ("gpu crossed", Ok(group)) => crossed(group),
        ("gpu killed", Ok(group)) => killed(group),
        ("gpu absent", Ok(mut group)) => {
            group.barrier().and_then(Work::wait).expect("all are there");
            absent(group);
        }
        ("gpu refused", Err(error)) => println!("refused: {error}"),
        (role, group) => panic!("{role}: {group:?}"),
    }
}

/// A message passes a collective that waits for another message.
#[cfg(feature = "mpi")]
fn crossed(mut group: Group) {
    let [a, c] = [1, 2].map(|_| group.allocate::<f32>(50_000).expect("memory"));
    let limit = Duration::from_secs(5);
    let wait =
        |work: phalanx_comm::Result<Work<'_>>| work.and_then(Work::synchronize).expect("ends");
    for _ in 0..5 {
        if group.rank() == 0 {
            let received = group.within(limit).receive(a.full(), 1).expect("started");
            let sum = group.within(limit).all_reduce(a.full(), Sum).expect("started");
            std::thread::park_timeout(Duration::from_millis(30));
            wait(group.within(limit).send(c.full(), 1));
            received.synchronize().and(sum.synchronize()).expect("both end");
        } else {
            let sum = group.within(limit).all_reduce(a.full(), Sum).expect("started");
            wait(group.within(limit).receive(c.full(), 0));
            wait(group.within(limit).send(c.full(), 0));
            sum.synchronize().expect("a sum");
        }
    }
    println!("crossed");
}

fn suite(mut group: Group) {
    for (what, check) in device::CHECKS {
        let start = Instant::now();
        let said = check(&mut group).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        if group.rank() == 0 {
            println!("{what}: {said} ({:?})", start.elapsed());
        }
    }
    device::out_of_step(&mut group).unwrap_or_else(|error| panic!("out of step: {error:#}"));
    println!("all passed");
}

/// What the caller asks of its stream before and after a call is in that order with the call.
fn streams(mut group: Group) {
    const BYTES: usize = 4000;
    let (rank, world) = (group.rank(), group.world_size());
    result::init().expect("a driver");
    let gpu = result::device::get(0).expect("a GPU");
    // SAFETY: never released; the process ends soon.
    let context = unsafe { result::primary_ctx::retain(gpu) }.expect("a context");
    // SAFETY: retained just now.
    unsafe { result::ctx::set_current(context) }.expect("current");
    for round in 0..10_u8 {
        let kind = result::stream::StreamKind::NonBlocking;
        let stream = result::stream::create(kind).expect("a stream");
        group.set_stream(Stream(stream as usize));
        // SAFETY: memory of the device, freed when everything on it is done.
        unsafe {
            let memory: CUdeviceptr = result::malloc_sync(BYTES).expect("memory");
            let copy: CUdeviceptr = result::malloc_sync(BYTES).expect("memory");
            let mine = u8::try_from(rank).expect("few ranks") + round;
            result::memset_d8_async(memory, mine, BYTES, stream).expect("memset");
            let slice = DeviceSlice::<u8>::from_raw(memory, BYTES);
            let work = group.all_reduce(slice, Sum).expect("started");
            work.wait().expect("ordered");
            result::memcpy_dtod_async(copy, memory, BYTES, stream).expect("copy");
            // The collective must not see this.
            result::memset_d8_async(memory, 99, BYTES, stream).expect("memset");
            result::stream::synchronize(stream).expect("the stream");
            let mut bytes = vec![0_u8; BYTES];
            result::memcpy_dtoh_sync(&mut bytes, copy).expect("read");
            let sum = (0..world).map(|peer| peer + usize::from(round)).sum::<usize>();
            assert!(bytes.iter().all(|byte| usize::from(*byte) == sum), "{round}: {bytes:?}");
            result::free_sync(memory).expect("free");
            result::free_sync(copy).expect("free");
            result::stream::destroy(stream).expect("destroy");
        }
    }
    println!("in order");
}

/// Copies to the GPU come after what its memory was used for before, and before what is ordered after them.
fn uploads() {
    const BYTES: usize = 5000;
    let uploader = Uploader::open(0).expect("a GPU");
    result::init().expect("a driver");
    let gpu = result::device::get(0).expect("a GPU");
    // SAFETY: never released; the process ends soon.
    let context = unsafe { result::primary_ctx::retain(gpu) }.expect("a context");
    // SAFETY: retained just now.
    unsafe { result::ctx::set_current(context) }.expect("current");
    let kind = result::stream::StreamKind::NonBlocking;
    let stream = result::stream::create(kind).expect("a stream");
    let caller = Stream(stream as usize);
    let mut pinned = [uploader.pinned(BYTES).expect("memory"), uploader.pinned(7).expect("memory")];
    assert!(pinned[0].bytes().iter().all(|byte| *byte == 0));
    for round in 0..10_u8 {
        pinned[0].bytes_mut().fill(round + 1);
        pinned[1].bytes_mut().fill(round + 101);
        // SAFETY: memory of the device, freed when everything on it is done; the pinned memory is written
        // again only when the copies are done.
        unsafe {
            let memory: CUdeviceptr = result::malloc_sync(BYTES + 7).expect("memory");
            let copy: CUdeviceptr = result::malloc_sync(BYTES + 7).expect("memory");
            // Somebody used the memory before: that comes first.
            result::memset_d8_async(memory, 77, BYTES + 7, stream).expect("memset");
            let to = [memory, memory + BYTES as u64];
            let copies = [(pinned[0].bytes(), to[0]), (pinned[1].bytes(), to[1])];
            let upload = uploader.copy(&copies, caller).expect("started");
            upload.order(caller).expect("ordered");
            result::memcpy_dtod_async(copy, memory, BYTES + 7, stream).expect("copy");
            upload.wait(Duration::from_secs(10)).expect("done");
            assert!(upload.is_done().expect("done"));
            result::stream::synchronize(stream).expect("the stream");
            let mut bytes = vec![0_u8; BYTES + 7];
            result::memcpy_dtoh_sync(&mut bytes, copy).expect("read");
            assert!(bytes[..BYTES].iter().all(|byte| *byte == round + 1), "{round}");
            assert!(bytes[BYTES..].iter().all(|byte| *byte == round + 101), "{round}");
            result::free_sync(memory).expect("free");
            result::free_sync(copy).expect("free");
        }
    }
    println!("uploaded");
}

/// Stays, and calls nothing, until another rank has told that its time is over.
pub(crate) fn until_told(group: &Group) {
    let end = Instant::now() + LIMIT;
    while group.failure().is_none() {
        assert!(Instant::now() < end, "nobody has told");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

pub(crate) fn complain(start: Instant, error: &phalanx_comm::Error) -> ! {
    println!("error after {} ms: {error}", start.elapsed().as_millis());
    std::process::exit(3);
}

/// Rank 1 kills itself while collectives are on the streams.
fn killed(mut group: Group) {
    let region = group.allocate::<f32>(10_000).expect("memory");
    let mut other = group.duplicate().expect("a second communicator");
    let second = other.allocate::<f32>(100).expect("memory");
    for step in 0..1000 {
        let start = Instant::now();
        let work = group.all_reduce(region.full(), Sum);
        let beside = other.all_reduce(second.full(), Sum);
        if group.rank() == 1 && step == 5 {
            let own = std::process::id().to_string();
            drop(Command::new("kill").args(["-9", &own]).status());
        }
        let done = work.and_then(Work::synchronize).and(beside.and_then(Work::synchronize));
        if let Err(error) = done {
            complain(start, &error);
        }
    }
}

/// Rank 1 does not come.
fn absent(mut group: Group) {
    let region = group.allocate::<f32>(1000).expect("memory");
    if group.rank() == 1 {
        return until_told(&group);
    }
    let start = Instant::now();
    match group.all_reduce(region.full(), Sum).and_then(Work::synchronize) {
        Ok(()) => panic!("a sum without rank 1"),
        Err(error) => complain(start, &error),
    }
}

/// Rank 0 aborts while the others wait for it on the GPU.
fn abort(mut group: Group) {
    let region = group.allocate::<f32>(1000).expect("memory");
    group.all_reduce(region.full(), Sum).and_then(Work::synchronize).expect("a sum");
    let start = Instant::now();
    if group.rank() == 0 {
        // The other has its sum by then, and waits for the message.
        std::thread::park_timeout(Duration::from_millis(300));
        group.abort("enough");
    }
    match group.receive(region.full(), usize::from(group.rank() == 0)).and_then(Work::synchronize) {
        Ok(()) => panic!("a message that nobody sent"),
        Err(error) => complain(start, &error),
    }
}

/// The process ends right after its last call: the others must get their result.
fn ends_at_once(mut group: Group) {
    let region = group.allocate::<f32>(100_000).expect("memory");
    let work = group.all_reduce(region.full(), Sum).expect("started");
    if group.rank() > 0 {
        std::thread::park_timeout(Duration::from_millis(50));
        work.synchronize().expect("a sum");
    } else {
        drop(work); // not cancelled
    }
    drop(group);
    println!("ended");
}

/// The stand-in, built once for its source, under the names that are looked for.
pub(crate) fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu_double");
        let mut hash = DefaultHasher::new();
        let mut files: Vec<PathBuf> = std::fs::read_dir(&sources)
            .expect("its sources")
            .map(|entry| entry.expect("its sources").path())
            .collect();
        files.sort();
        for file in files {
            std::fs::read(file).expect("its source").hash(&mut hash);
        }
        let folder = format!("gpu_double-{:x}", hash.finish());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
        if folder.is_dir() {
            return folder;
        }
        let own = folder.with_extension(std::process::id().to_string());
        std::fs::create_dir_all(&own).expect("a folder");
        let library = own.join("libcuda.so.1");
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_unset| "rustc".to_owned());
        let options = ["--edition=2021", "--crate-type=cdylib", "-Copt-level=1", "-o"];
        let source = sources.join("double.rs");
        let built = Command::new(rustc).args(options).arg(&library).arg(source).output();
        let built = built.expect("rustc");
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success() && said.is_empty(), "{said}");
        // One file, so one library: both halves share their streams.
        let link = own.join("libnccl.so.2");
        std::os::unix::fs::symlink("libcuda.so.1", link).expect("a link");
        // Another test's process may have been faster.
        if std::fs::rename(&own, &folder).is_err() {
            drop(std::fs::remove_dir_all(&own));
        }
        folder
    })
}

/// Where the ranks of a test exchange what the stand-in moves; removed with the test.
pub(crate) struct Exchange(pub(crate) PathBuf);

impl Exchange {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let base = Path::new("/dev/shm");
        let base = if base.is_dir() { base.to_owned() } else { std::env::temp_dir() };
        let folder = base.join(format!("nccl-double-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Runs a world on the stand-in: exit status and output by rank.
pub(crate) fn world_with(
    world: usize,
    role: &str,
    add: impl Fn(&mut Command, usize),
) -> Vec<(Option<i32>, String)> {
    let folder = libraries();
    let exchange = Exchange::new();
    let running = ranks(world, role, |command, rank| {
        command.env("LD_LIBRARY_PATH", folder).env_remove("PHALANX_NCCL_LIBRARY");
        command.env("DOUBLE_FOLDER", &exchange.0).env("DOUBLE_UUID", rank.to_string());
        add(command, rank);
    });
    let finish = |rank: Running| {
        let (status, output) = rank.finish(LIMIT);
        (status.code(), output)
    };
    running.into_iter().map(finish).collect()
}

pub(crate) fn world(ranks: usize, role: &str) -> Vec<(Option<i32>, String)> {
    world_with(ranks, role, |_, _| ())
}

/// Every rank ended well, and said so.
#[track_caller]
pub(crate) fn all_end_well(world: &[(Option<i32>, String)], said: &str) {
    for (code, output) in world {
        assert!(*code == Some(0) && output.contains(said), "{} ranks: {output}", world.len());
    }
}

#[test]
fn the_suite_passes_over_nccl() {
    for size in [1, 2, 3, 4] {
        all_end_well(&world(size, "nccl suite"), "all passed");
    }
}

#[test]
fn other_versions_serve_too() {
    for version in ["21805", "22602", "22703", "23007"] {
        let old = |command: &mut Command, _| {
            command.env("DOUBLE_VERSION", version);
        };
        all_end_well(&world_with(2, "nccl suite", old), "all passed");
    }
}

#[test]
fn copies_to_the_gpu_are_in_order_with_the_callers_stream() {
    all_end_well(&world(1, "nccl uploads"), "uploaded");
}

#[test]
fn calls_are_in_order_with_the_callers_stream() {
    all_end_well(&world(3, "nccl streams"), "in order");
}

/// The survivors' errors. Each says what was seen, which no time-out would know.
pub(crate) fn complaints(all: &[(Option<i32>, String)]) -> Vec<String> {
    let said = all.iter().flat_map(|(_, output)| output.lines());
    said.filter(|line| line.contains("error after")).map(str::to_owned).collect()
}

#[test]
fn survivors_of_a_killed_rank_say_who_died_and_end() {
    let all = world(3, "nccl killed");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 2, "{all:?}");
    for line in lines {
        assert!(line.contains("rank 1 (host ") && line.contains("died"), "{line}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let all = world(3, "nccl absent");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 2, "{all:?}");
    let is_named = |line: &String| line.contains("1s passed") && line.contains("rank 1");
    assert!(lines.iter().all(is_named), "{lines:?}");
}

#[test]
fn an_abort_frees_those_who_wait_on_the_gpu() {
    let all = world(2, "nccl abort");
    let lines = complaints(&all);
    assert_eq!(lines.len(), 2, "{all:?}");
    assert!(lines.iter().all(|line| line.contains("enough")), "{lines:?}");
}

#[test]
fn a_process_that_ends_at_once_has_done_its_part() {
    all_end_well(&world(3, "nccl at once"), "ended");
}

#[test]
fn two_ranks_on_one_gpu_are_refused_with_both_names() {
    let same = |command: &mut Command, _| {
        command.env("DOUBLE_UUID", "7");
    };
    for (code, output) in world_with(3, "nccl refused", same) {
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("ranks 0 and 1 are on the same GPU"), "{output}");
    }
    for (code, output) in world_with(3, "nccl auto", same) {
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("chose Host: ranks 0 and 1 are on the same GPU"), "{output}");
    }
    // Set up by the launcher as machines of their own.
    let apart = |command: &mut Command, rank: usize| {
        command.env("DOUBLE_UUID", "7").env("NCCL_HOSTID", format!("rank{rank}"));
    };
    for (code, output) in world_with(2, "nccl suite", apart) {
        assert!(code == Some(0) && output.contains("all passed"), "{output}");
    }
}

#[test]
fn a_rank_without_a_gpu_is_named_by_all() {
    let one_without = |command: &mut Command, rank: usize| {
        if rank == 1 {
            command.env("DOUBLE_GPUS", "0");
        }
    };
    for (code, output) in world_with(3, "nccl refused", one_without) {
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("shows this process no GPU"), "{output}");
    }
    for (code, output) in world_with(3, "nccl auto", one_without) {
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("chose Host: rank 1 cannot use NCCL"), "{output}");
    }
    all_end_well(&world(2, "nccl auto"), "chose Nccl: every rank has a GPU");
}

#[test]
fn versions_must_agree() {
    let mixed = |command: &mut Command, rank: usize| {
        command.env("DOUBLE_VERSION", if rank == 0 { "22809" } else { "22703" });
    };
    for (code, output) in world_with(2, "nccl refused", mixed) {
        assert!(code == Some(0) && output.contains("install one version of NCCL"), "{output}");
    }
}
