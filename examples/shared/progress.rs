//! How far training is: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::metrics::StepRecord;

/// A line at least this often, however slow the steps are.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows the steps of one run.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Redrawn in place, on stderr.
    Bar(ProgressBar),
    /// About twenty over the run, and one every few seconds, on stdout.
    Lines {
        /// Steps of the run.
        steps: u64,
        /// When the run began.
        start: Instant,
        /// When the last line was printed.
        last: Instant,
    },
}

impl Progress {
    /// For `steps` steps.
    pub(crate) fn new(steps: u64) -> Progress {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(steps);
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ETA {eta}");
            return Progress::Bar(
                bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())),
            );
        }
        Progress::Lines { steps, start: Instant::now(), last: Instant::now() }
    }

    /// After each step.
    #[expect(clippy::print_stdout, reason = "this is the program's output")]
    pub(crate) fn step(&mut self, record: &StepRecord) {
        let message = format!("loss {:.4}  {:.0} tokens/s", record.loss, record.tokens_per_s);
        match self {
            Progress::Bar(bar) => {
                bar.set_message(message);
                bar.set_position(record.step);
            }
            Progress::Lines { steps, start, last } => {
                let due = record.step.is_multiple_of((*steps / 20).max(1))
                    || last.elapsed() >= LINE_INTERVAL
                    || record.step == 1
                    || record.step == *steps;
                if due {
                    *last = Instant::now();
                    let rest = remaining(start.elapsed(), record.step, *steps);
                    println!(
                        "step {:>4}/{steps}  {message}  lr {:.2e}  ETA {rest}",
                        record.step, record.lr
                    );
                }
            }
        }
    }

    /// A line between the steps.
    #[expect(clippy::print_stdout, reason = "this is the program's output")]
    pub(crate) fn say(&self, line: &str) {
        match self {
            Progress::Bar(bar) => bar.println(line),
            Progress::Lines { .. } => println!("{line}"),
        }
    }

    /// Leaves the bar as it stands.
    pub(crate) fn finish(&self) {
        if let Progress::Bar(bar) = self {
            bar.finish();
        }
    }
}

fn remaining(elapsed: Duration, step: u64, steps: u64) -> String {
    let left = u32::try_from(steps.saturating_sub(step)).unwrap_or(u32::MAX);
    let done = u32::try_from(step).unwrap_or(u32::MAX).max(1);
    let seconds = (elapsed / done * left).as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}
