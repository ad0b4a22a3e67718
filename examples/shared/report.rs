//! What is said at the end: one screen, the loss and where the time went.

use std::fmt::Write as _;

use phalanx_data::loader::SlowLoader;

use super::config::Hook;
use super::machine::gib;
use super::metrics::{StepRecord, Summary};

/// Picks one of the times of a step.
type Part = fn(&StepRecord) -> f64;

/// The screen. The first step is left out of the times when there are others: it pays for
/// allocation and warm caches.
pub(crate) fn screen(
    records: &[StepRecord],
    summary: &Summary,
    slow: &[SlowLoader],
    written: &[String],
) -> String {
    let (Some(first), Some(last)) = (records.first(), records.last()) else {
        return "no step was run\n".into();
    };
    let mut text = String::new();
    let mut add = |line: String| {
        let _infallible = writeln!(text, "{line}");
    };
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let Summary { world_size, readers, node_count, global_batch, .. } = summary;
    let Summary { micro_batch, accumulate, .. } = summary;
    add(format!(
        "\n{} M parameters, {world_size} rank{} on {node_count} node{}, {global_batch} samples a step \
         ({readers} × {micro_batch} × {accumulate})",
        millions(summary.parameters),
        plural(*world_size),
        plural(*node_count),
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
    let parts: [(&str, Part); 6] = [
        ("waiting for data", |r| r.data_wait_ms),
        ("forward", |r| r.forward_ms),
        ("backward", |r| r.backward_ms),
        ("exposed communication", |r| r.exposed_comm_ms),
        ("optimizer", |r| r.optimizer_ms),
        ("rest, slower ranks", rest),
    ];
    let of_pipeline: [(&str, Part); 1] = [("waiting for other stages", idle)];
    let has_stages = records.iter().any(|record| record.pipeline_idle_ms.is_some());
    for (name, part) in parts.into_iter().chain(of_pipeline.into_iter().filter(|_| has_stages)) {
        let time = median(timed, part);
        let share = if step > 0.0 { time / step } else { 0.0 };
        add(format!("  {name:<24} {time:>9.2} ms {:>5.1} %  {}", share * 100.0, bar(share)));
    }
    if !slow.is_empty() {
        add(waiting(slow));
    }
    remarks(records, summary).into_iter().for_each(&mut add);
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

/// What else was noticed, a line each.
fn remarks(records: &[StepRecord], summary: &Summary) -> Vec<String> {
    let mut lines = Vec::new();
    if summary.skipped > 0 {
        lines.push(format!(
            "{} step{} skipped: gradients were not finite",
            summary.skipped,
            if summary.skipped == 1 { " was" } else { "s were" }
        ));
    }
    lines.extend(summary.stragglers.iter().cloned());
    let left_out: usize = records.iter().map(|record| record.left_out).sum();
    if left_out > 0 {
        lines.push(format!("{left_out} damaged samples were left out"));
    }
    if summary.hook != Hook::None {
        let bytes = records.last().map_or(0, |record| record.bytes_sent);
        lines.push(format!(
            "gradients travelled by {}: {} MB a step and rank",
            summary.hook,
            millions(bytes)
        ));
    }
    lines
}

/// Whose loader is too slow, in a line.
pub(crate) fn waiting(slow: &[SlowLoader]) -> String {
    const SHOWN: usize = 4;
    let one = |loader: &SlowLoader| format!("rank {}: {:.0} %", loader.rank, loader.share * 100.0);
    let shown: Vec<String> = slow.iter().take(SHOWN).map(one).collect();
    let more = match slow.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" (and {more} ranks more)"),
    };
    let advice = "its storage is slow, or data.prefetch_threads is too low";
    format!("{} of step waiting for data{more}: {advice}", shown.join(", "))
}

/// What no other number holds: tensors of the batch, and waiting for ranks that finish later.
fn rest(record: &StepRecord) -> f64 {
    let StepRecord { step_ms, data_wait_ms, forward_ms, backward_ms, .. } = record;
    let known = data_wait_ms + forward_ms + backward_ms + idle(record);
    (step_ms - known - record.exposed_comm_ms - record.optimizer_ms).max(0.0)
}

fn idle(record: &StepRecord) -> f64 {
    record.pipeline_idle_ms.unwrap_or(0.0)
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

/// A count in millions with one digit.
#[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
pub(crate) fn millions(count: u64) -> String {
    format!("{:.1}", count as f64 / 1e6)
}
