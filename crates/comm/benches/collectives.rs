//! `all_reduce` on registered memory as nccl-tests prints it, beside `MPI_Allreduce` and the in-place
//! limit of this machine.
//!
//! ```text
//! cargo bench -p phalanx-comm --bench collectives -- [--ranks 2,4] [--sizes 1K,1M,64M]
//!     [--rounds 3] [--link auto|tcp] [--backend host|mpi] [--no-mpi] [--json FILE]
//! ```
//! `--checks` measures what checksums cost over TCP (`checks.rs`), `--send` what a message of two ranks takes (`messages.rs`).
//! `--backend mpi` (`--features mpi`) measures that, under `mpirun`, and how much of a collective is hidden.
//!
//! Each round runs ours, `OpenMPI`'s (compiled here from `mpi_all_reduce.c`, when `mpicc` is there) and the
//! limit, one after the other, each in processes (the limit: threads) of its own; the table shows
//! the fastest round of each and compares by ratio. The *limit* is the memory's: every rank adds its
//! segment over all buffers and writes the sum to all of them, between two barriers of a few
//! instructions. `algbw` is bytes ÷ time, `busbw` = `algbw` × 2 (n − 1) ÷ n, as in nccl-tests'
//! `doc/PERFORMANCE.md`.
#![expect(unsafe_code, reason = "the limit works on raw shared memory")]
#![expect(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::float_cmp,
    clippy::multiple_unsafe_ops_per_block,
    clippy::struct_excessive_bools,
    clippy::shadow_unrelated,
    reason = "a table of measurements; sums of small integers are exact"
)]

#[path = "collectives/checks.rs"]
mod checks;
#[path = "collectives/messages.rs"]
mod messages;
#[path = "collectives/overlap.rs"]
mod overlap;
#[path = "collectives/table.rs"]
mod table;

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use phalanx_comm::{Backend, Group, GroupOptions, Sum};

/// Fastest times of one size, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    bytes: usize,
    ours: f64,
    mpi: f64,
    limit: f64,
    wrong: usize,
}

struct Arguments {
    ranks: Vec<usize>,
    sizes: Vec<usize>,
    rounds: usize,
    link: String,
    backend: Backend,
    mpi: bool,
    json: Option<String>,
    worker: bool,
    checks: bool,
    send: bool,
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    if arguments.worker && arguments.checks {
        return checks::worker(&arguments.sizes);
    }
    if arguments.worker && arguments.send {
        return messages::worker(&arguments.sizes);
    }
    if arguments.worker {
        return worker(&arguments);
    }
    if arguments.send {
        return messages::measure(&arguments);
    }
    if arguments.checks {
        arguments.ranks.iter().try_for_each(|ranks| checks::measure(&arguments, *ranks))?;
        return Ok(());
    }
    let mpi = if arguments.mpi { compile_mpi()? } else { None };
    let mut json = String::new();
    for ranks in &arguments.ranks {
        let rows = measure(&arguments, *ranks, mpi.as_deref())?;
        table::print_table(*ranks, &arguments, &rows);
        for row in &rows {
            table::write_json(&mut json, *ranks, row)?;
        }
    }
    if let Some(path) = &arguments.json {
        let commit = output_of(Command::new("git").args(["rev-parse", "HEAD"])).unwrap_or_default();
        let host = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = host.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
        let model = model.trim_start_matches([' ', '\t', ':']);
        let text = format!(
            "{{\"commit\": {:?}, \"processor\": {model:?}, \"rows\": [\n{}\n]}}\n",
            commit.trim(),
            json.trim_end_matches(",\n")
        );
        std::fs::write(path, text).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

fn arguments() -> Result<Arguments> {
    let mut arguments = Arguments {
        ranks: vec![2, 4],
        sizes: [1 << 10, 64 << 10, 1 << 20, 4 << 20, 64 << 20, 256 << 20].to_vec(),
        rounds: 3,
        link: "auto".to_owned(),
        backend: Backend::Host,
        mpi: true,
        json: None,
        worker: false,
        checks: false,
        send: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--ranks" => arguments.ranks = list(&value()?, |text| Ok(text.parse()?))?,
            "--sizes" => arguments.sizes = list(&value()?, size)?,
            "--rounds" => arguments.rounds = value()?.parse()?,
            "--link" => arguments.link = value()?,
            "--backend" => arguments.backend = backend(&value()?)?,
            "--json" => arguments.json = Some(value()?),
            "--no-mpi" => arguments.mpi = false,
            "--worker" => arguments.worker = true,
            "--checks" => arguments.checks = true,
            "--send" => arguments.send = true,
            "--bench" => {}
            other => bail!("unknown argument {other}"),
        }
    }
    Ok(arguments)
}

fn backend(name: &str) -> Result<Backend> {
    let known = [Backend::Host, Backend::Mpi];
    known.into_iter().find(|one| one.name() == name).context("--backend is host or mpi")
}

fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    text.split(',').map(parse).collect()
}

/// `64K`, `1M`, `256`.
fn size(text: &str) -> Result<usize> {
    let (number, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(number) if text.ends_with('K') => (number, 10),
        Some(number) if text.ends_with('M') => (number, 20),
        Some(number) => (number, 30),
        None => (text, 0),
    };
    Ok(number.parse::<usize>()? << shift)
}

/// About half a second of work, but never few.
fn iterations(bytes: usize) -> usize {
    match bytes {
        0..=0x1000 => 20_000,
        0x1001..=0x0004_0000 => 4000,
        0x0004_0001..=0x0010_0000 => 1000,
        0x0010_0001..=0x0080_0000 => 150,
        0x0080_0001..=0x0800_0000 => 12,
        _ => 5,
    }
}

fn measure(arguments: &Arguments, ranks: usize, mpi: Option<&str>) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> =
        arguments.sizes.iter().map(|bytes| Row { bytes: *bytes, ..Row::default() }).collect();
    let keep = |best: &mut f64, time: f64| {
        if *best == 0.0 || time < *best {
            *best = time;
        }
    };
    for _ in 0..arguments.rounds {
        for (row, (time, wrong)) in rows.iter_mut().zip(run_ours(arguments, ranks)?) {
            keep(&mut row.ours, time);
            row.wrong += wrong;
        }
        if let Some(program) = mpi {
            for (row, (time, wrong)) in rows.iter_mut().zip(run_mpi(arguments, ranks, program)?) {
                keep(&mut row.mpi, time);
                ensure!(wrong == 0, "MPI_Allreduce gave {wrong} wrong values");
            }
        }
        for row in &mut rows {
            keep(&mut row.limit, limit(ranks, row.bytes)?);
        }
    }
    Ok(rows)
}

/// Starts this program again, once for each rank.
fn run_ours(arguments: &Arguments, ranks: usize) -> Result<Vec<(f64, usize)>> {
    let program = std::env::current_exe()?;
    let sizes: Vec<String> = arguments.sizes.iter().map(ToString::to_string).collect();
    if arguments.backend == Backend::Mpi {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "-np", &ranks.to_string()]);
        command.arg(program).args(["--worker", "--backend", "mpi", "--sizes", &sizes.join(",")]);
        let text = output_of(&mut command)?;
        text.lines().filter(|line| line.starts_with('#')).for_each(|line| println!("{line}"));
        return parse_lines(&text, arguments.sizes.len());
    }
    parse_lines(&output_of_ranks(arguments, ranks, &["--worker"])?, arguments.sizes.len())
}

/// Starts this program once for each rank, over our own backend; what rank 0 prints.
fn output_of_ranks(arguments: &Arguments, ranks: usize, flags: &[&str]) -> Result<String> {
    let program = std::env::current_exe()?;
    let sizes: Vec<String> = arguments.sizes.iter().map(ToString::to_string).collect();
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let token = format!("{:064x}", u128::from(std::process::id()));
    let mut children = Vec::new();
    for rank in 0..ranks {
        let mut command = Command::new(&program);
        command.args(flags).args(["--sizes", &sizes.join(",")]);
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", ranks.to_string()).env("LOCAL_WORLD_SIZE", ranks.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env("PHALANX_JOB_TOKEN", &token).env("PHALANX_HOST_LINK", &arguments.link);
        let stdout = if rank == 0 { Stdio::piped() } else { Stdio::null() };
        children.push(command.stdout(stdout).spawn()?);
    }
    let mut text = String::new();
    for child in children {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "a rank failed: {}", output.status);
        text.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    Ok(text)
}

fn run_mpi(arguments: &Arguments, ranks: usize, program: &str) -> Result<Vec<(f64, usize)>> {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-np", &ranks.to_string(), program]);
    for bytes in &arguments.sizes {
        // What takes us a second may take it ten.
        command.arg(format!("{bytes}:{}", (iterations(*bytes) / 3).max(3)));
    }
    parse_lines(&output_of(&mut command)?, arguments.sizes.len())
}

fn parse_lines(text: &str, count: usize) -> Result<Vec<(f64, usize)>> {
    let mut rows = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, time, wrong] = words[..] {
            rows.push((time.parse()?, wrong.parse()?));
        }
    }
    ensure!(rows.len() == count, "expected {count} lines, got:\n{text}");
    Ok(rows)
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().context(format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn compile_mpi() -> Result<Option<String>> {
    if Command::new("mpicc").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("# mpicc is not installed: no comparison with MPI");
        return Ok(None);
    }
    let program = std::env::temp_dir().join(format!("phalanx-mpi-{}", std::process::id()));
    let program = program.to_string_lossy().into_owned();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/mpi_all_reduce.c");
    output_of(Command::new("mpicc").args(["-O2", "-o", &program, source]))?;
    Ok(Some(program))
}

/// One rank of ours.
fn worker(arguments: &Arguments) -> Result<()> {
    let options = GroupOptions { backend: arguments.backend, ..GroupOptions::default() };
    let mut group = Group::from_environment(options)?;
    if arguments.backend == Backend::Mpi && group.world_size() == 2 {
        overlap::measure(&mut group)?;
    }
    for bytes in &arguments.sizes {
        let count = bytes / size_of::<f32>();
        let region = group.allocate::<f32>(count)?;
        let rank = group.rank();
        let values: Vec<f32> = (0..count).map(|i| (rank + i % 13) as f32).collect();
        region.write(0, &values);
        group.all_reduce(region.full(), Sum)?.wait()?;
        let ranks = group.world_size();
        let expected = |i: usize| (ranks * (ranks - 1) / 2 + ranks * (i % 13)) as f32;
        let values = region.read(0..count);
        let wrong = values.iter().enumerate().filter(|(i, v)| **v != expected(*i)).count();
        region.write(0, &vec![0.0; count]);
        for _ in 0..iterations(*bytes) / 10 + 1 {
            group.all_reduce(region.full(), Sum)?.wait()?;
        }
        group.barrier()?.wait()?;
        let start = Instant::now();
        for _ in 0..iterations(*bytes) {
            group.all_reduce(region.full(), Sum)?.wait()?;
        }
        let time = start.elapsed().as_secs_f64() / iterations(*bytes) as f64 * 1e6;
        if rank == 0 {
            println!("{bytes} {time:.4} {wrong}");
        }
    }
    Ok(())
}

/// The time of the in-place limit, in microseconds.
fn limit(ranks: usize, bytes: usize) -> Result<f64> {
    let plain = limit_with(ranks, bytes, false)?;
    // Whether stores had better go around the caches depends on the machine: take the better.
    Ok(if bytes < 4 << 20 { plain } else { plain.min(limit_with(ranks, bytes, true)?) })
}

fn limit_with(ranks: usize, bytes: usize, streaming: bool) -> Result<f64> {
    let count = bytes / size_of::<f32>();
    let mut buffers = Vec::new();
    for _ in 0..ranks {
        buffers.push(SharedBuffer::new(bytes)?);
    }
    let barrier = YieldBarrier { ranks, count: AtomicUsize::new(0) };
    let iterations = iterations(bytes);
    let time = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for rank in 0..ranks {
            let (barrier, buffers) = (&barrier, &buffers);
            threads.push(scope.spawn(move || {
                let mut start = Instant::now();
                for iteration in 0..iterations + iterations / 10 + 1 {
                    if iteration == iterations / 10 + 1 {
                        start = Instant::now();
                    }
                    barrier.wait();
                    let share = count.div_ceil(ranks).next_multiple_of(1024);
                    let (from, to) = ((rank * share).min(count), ((rank + 1) * share).min(count));
                    limit_kernel(buffers, from, to, streaming);
                    barrier.wait();
                }
                start.elapsed()
            }));
        }
        threads.into_iter().filter_map(|thread| thread.join().ok()).max().unwrap_or(Duration::ZERO)
    });
    Ok(time.as_secs_f64() / iterations as f64 * 1e6)
}

/// Memory of the same kind as a region's.
struct SharedBuffer(*mut f32);
// SAFETY: plain memory; the threads of `limit` divide it among them.
unsafe impl Sync for SharedBuffer {}

impl SharedBuffer {
    fn new(bytes: usize) -> Result<Self> {
        use rustix::mm::{mmap, MapFlags, ProtFlags};
        let fd = rustix::fs::memfd_create("limit", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED | MapFlags::POPULATE, &fd, 0)
        }?;
        Ok(Self(base.cast()))
    }
}

struct YieldBarrier {
    ranks: usize,
    count: AtomicUsize,
}

impl YieldBarrier {
    fn wait(&self) {
        let ticket = self.count.fetch_add(1, Ordering::AcqRel);
        let target = (ticket / self.ranks + 1) * self.ranks;
        let mut spins = 0_u32;
        while self.count.load(Ordering::Acquire) < target {
            spins += 1;
            if spins.is_multiple_of(64) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn limit_kernel(buffers: &[SharedBuffer], from: usize, to: usize, streaming: bool) {
    if !is_x86_feature_detected!("avx2") {
        return plain_kernel(buffers, from, to);
    }
    // SAFETY: AVX2 is there; the ranges of the threads are disjoint and inside the buffers.
    unsafe { avx2_kernel(buffers, from, to, streaming) }
}

#[cfg(not(target_arch = "x86_64"))]
fn limit_kernel(buffers: &[SharedBuffer], from: usize, to: usize, _: bool) {
    plain_kernel(buffers, from, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2_kernel(buffers: &[SharedBuffer], from: usize, to: usize, streaming: bool) {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_load_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_store_ps,
        _mm256_storeu_ps, _mm256_stream_ps, _mm_sfence,
    };
    const LANES: usize = 8;
    const UNROLLED: usize = 4;
    const BLOCK: usize = 1024;
    let whole = from + (to - from) / (LANES * UNROLLED) * (LANES * UNROLLED);
    let mut sums = [0.0_f32; BLOCK];
    for at in (from..whole).step_by(LANES * UNROLLED) {
        let mut sum = [_mm256_setzero_ps(); UNROLLED];
        for (index, sum) in sum.iter_mut().enumerate() {
            // SAFETY: UNROLLED vectors from `at` are inside every buffer, aligned to 32 bytes.
            *sum = unsafe { _mm256_load_ps(buffers[0].0.add(at + index * LANES)) };
        }
        for buffer in &buffers[1..] {
            for (index, sum) in sum.iter_mut().enumerate() {
                // SAFETY: as above.
                let value = unsafe { _mm256_load_ps(buffer.0.add(at + index * LANES)) };
                *sum = _mm256_add_ps(*sum, value);
            }
        }
        if streaming {
            let place = (at - from) % BLOCK;
            for (index, sum) in sum.iter().enumerate() {
                // SAFETY: BLOCK is a multiple of the step.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(place + index * LANES), *sum) };
            }
            let end = place + LANES * UNROLLED;
            if end == BLOCK || at + LANES * UNROLLED == whole {
                for buffer in buffers {
                    for lane in (0..end).step_by(LANES) {
                        // SAFETY: the block's first `end` sums are written.
                        let sum = unsafe { _mm256_loadu_ps(sums.as_ptr().add(lane)) };
                        // SAFETY: the block began at `at - place`.
                        unsafe { _mm256_stream_ps(buffer.0.add(at - place + lane), sum) };
                    }
                }
            }
            continue;
        }
        for buffer in buffers {
            for (index, sum) in sum.iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_store_ps(buffer.0.add(at + index * LANES), *sum) };
            }
        }
    }
    _mm_sfence();
    plain_kernel(buffers, whole, to);
}

fn plain_kernel(buffers: &[SharedBuffer], from: usize, to: usize) {
    for at in from..to {
        // SAFETY: inside every buffer.
        let sum = buffers.iter().map(|buffer| unsafe { *buffer.0.add(at) }).sum();
        for buffer in buffers {
            // SAFETY: as above; this thread's range.
            unsafe { *buffer.0.add(at) = sum };
        }
    }
}
