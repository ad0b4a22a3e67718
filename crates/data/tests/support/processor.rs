//! Time on processors, for programs that measure: what one thread or all of them had, whatever else the machine does.

use std::time::{Duration, Instant};

use rustix::time::{clock_gettime, ClockId};

/// Seconds for which this thread had a processor.
pub(crate) fn on_processor() -> anyhow::Result<f64> {
    seconds_of(ClockId::ThreadCPUTime)
}

/// The same of all threads of this process.
fn all_on_processor() -> anyhow::Result<f64> {
    seconds_of(ClockId::ProcessCPUTime)
}

fn seconds_of(clock: ClockId) -> anyhow::Result<f64> {
    let time = clock_gettime(clock);
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?).as_secs_f64())
}

/// Per cent of a processor that all threads take while `step` is called once in `period`.
pub(crate) fn paced(
    seconds: f64,
    period: Duration,
    mut step: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let (started, before, mut steps) = (Instant::now(), all_on_processor()?, 0);
    while started.elapsed().as_secs_f64() < seconds {
        step()?;
        steps += 1;
        let next = period * steps;
        while let Some(left) = next.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
            std::thread::park_timeout(left);
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    Ok((all_on_processor()? - before) / elapsed * 100.0)
}
