//! How much of an `all_reduce` is hidden behind work of the caller: compute alone, communicate alone, both.
//!
//! `overlap = (compute + communicate − both) ÷ the shorter of the two`. With as many ranks as cores, computing
//! takes every core, and what the processors copy and add for the collective can be hidden behind nothing;
//! only waiting can. Hence a second line, in which the caller's work is elsewhere (a GPU, a disk) and leaves its
//! core free.

use std::time::{Duration, Instant};

use anyhow::Result;
use phalanx_comm::{Group, Sum};

const BYTES: usize = 32 << 20;
const ROUNDS: usize = 12;

/// Prints both lines on rank 0.
pub(crate) fn measure(group: &mut Group) -> Result<()> {
    line(group, "on the same cores", &|time| {
        std::hint::black_box(compute(time));
    })?;
    line(group, "elsewhere", &|time| {
        // A sleep that does not end early.
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
    })
}

fn line(group: &mut Group, what: &str, work: &dyn Fn(Duration)) -> Result<()> {
    let region = group.allocate::<f32>(BYTES / size_of::<f32>())?;
    let mut communicate = Duration::MAX;
    for _ in 0..ROUNDS {
        group.barrier()?.wait()?;
        let start = Instant::now();
        group.all_reduce(region.full(), Sum)?.wait()?;
        communicate = communicate.min(start.elapsed());
    }
    // As long as the collective, the same on every rank.
    let mut mine = [communicate.as_secs_f64()];
    group.all_reduce(&mut mine[..], phalanx_comm::Max)?.wait()?;
    let wanted = Duration::from_secs_f64(mine[0]);
    let (mut alone, mut both) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        group.barrier()?.wait()?;
        let start = Instant::now();
        work(wanted);
        alone = alone.min(start.elapsed());
        group.barrier()?.wait()?;
        let start = Instant::now();
        let started = group.all_reduce(region.full(), Sum)?;
        work(wanted);
        started.wait()?;
        both = both.min(start.elapsed());
    }
    let mut times = [alone, communicate, both].map(|time| time.as_secs_f64() * 1e3);
    group.all_reduce(&mut times[..], phalanx_comm::Max)?.wait()?;
    let [alone, communicate, both] = times;
    let overlap = (alone + communicate - both) / alone.min(communicate);
    if group.rank() == 0 {
        println!(
            "# overlap of {} MiB, work {what}: compute {alone:.1} ms, communicate {communicate:.1} ms, both {both:.1} ms: {:.0} %",
            BYTES >> 20,
            overlap * 100.0
        );
    }
    Ok(())
}

/// As much arithmetic in registers as fits in `time` on a free core, from a rate measured once.
fn compute(time: Duration) -> f32 {
    use std::sync::OnceLock;
    static ROUNDS_PER_MS: OnceLock<f64> = OnceLock::new();
    let rate = *ROUNDS_PER_MS.get_or_init(|| {
        let rate = |_| {
            let start = Instant::now();
            std::hint::black_box(multiply(200_000));
            200_000.0 / (start.elapsed().as_secs_f64() * 1e3)
        };
        (0..20).map(rate).fold(0.0, f64::max)
    });
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    multiply((rate * time.as_secs_f64() * 1e3) as usize)
}

fn multiply(rounds: usize) -> f32 {
    let mut sums = [1.0_f32; 64];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(0.999, 0.001);
        }
        std::hint::black_box(&mut sums);
    }
    sums.iter().sum()
}
