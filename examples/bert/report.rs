//! What is said at the end: one screen, the loss and where the time went.

use std::fmt::Write as _;

use super::memory::gib;
use super::metrics::{StepRecord, Summary};

/// Picks one of the times of a step.
type Part = fn(&StepRecord) -> f64;

/// The screen. The first step is left out of the times when there are others: it pays for
/// allocation and warm caches.
pub(crate) fn screen(records: &[StepRecord], summary: &Summary, written: &[String]) -> String {
    let (Some(first), Some(last)) = (records.first(), records.last()) else {
        return "no step was run\n".into();
    };
    let mut text = String::new();
    let mut add = |line: String| {
        let _infallible = writeln!(text, "{line}");
    };
    let million = as_f64(summary.parameters) / 1e6;
    add(format!(
        "\n{million:.1} M parameters, {} ranks on {} {}, {} samples a step ({} × {} × {})",
        summary.world_size,
        summary.node_count,
        if summary.node_count == 1 { "node" } else { "nodes" },
        summary.global_batch,
        summary.world_size,
        summary.micro_batch,
        summary.accumulate,
    ));
    let lowest = records.iter().map(|r| r.loss).fold(f64::INFINITY, f64::min);
    add(format!(
        "loss  {:.4} in step {} → {:.4} in step {} (lowest {lowest:.4})",
        first.loss, first.step, last.loss, last.step
    ));
    let timed = if records.len() > 1 { &records[1..] } else { records };
    let step = median(timed, |r| r.step_ms);
    add(format!(
        "step  {step:.1} ms (median), {:.0} tokens/s, first step {:.1} ms\n",
        median(timed, |r| r.tokens_per_s),
        first.step_ms
    ));
    add("where the time of a step went (medians, rank 0)".into());
    let parts: [(&str, Part); 5] = [
        ("waiting for data", |r| r.data_wait_ms),
        ("forward", |r| r.forward_ms),
        ("backward", |r| r.backward_ms),
        ("exposed communication", |r| r.exposed_comm_ms),
        ("optimizer", |r| r.optimizer_ms),
    ];
    for (name, part) in parts {
        let time = median(timed, part);
        let share = if step > 0.0 { time / step } else { 0.0 };
        add(format!("  {name:<22} {time:>9.2} ms {:>5.1} %  {}", share * 100.0, bar(share)));
    }
    let ranks: Vec<String> =
        summary.peak_memory.iter().map(|m| gib(m.resident_peak_bytes)).collect();
    add(format!(
        "\npeak memory {} over all ranks, shared pages once (resident, by rank: {})",
        gib(summary.peak_memory_sum_bytes),
        ranks.join(", ")
    ));
    for line in written {
        add(format!("wrote {line}"));
    }
    text
}

fn bar(share: f64) -> String {
    const LENGTH: u32 = 40;
    (0..LENGTH)
        .take_while(|cell| f64::from(*cell) + 0.5 <= share * f64::from(LENGTH))
        .map(|_| '#')
        .collect()
}

/// The middle one (the lower of two).
pub(crate) fn median(records: &[StepRecord], value: impl Fn(&StepRecord) -> f64) -> f64 {
    let mut values: Vec<f64> = records.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn as_f64(count: u64) -> f64 {
    count as f64
}
