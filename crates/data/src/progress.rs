//! Progress of preparing text: events for a callback, and a bar for terminals.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Reading the text and counting its words.
    Counting,
    /// Training the vocabulary. It has no bytes to count.
    Training,
    /// Turning text into tokens and writing shards.
    Encoding,
    /// Reading arrays or columns and writing records.
    Records,
    /// Comparing checksums.
    Verifying,
    /// Another process prepares the same data.
    Waiting,
}

impl Stage {
    fn describe(self) -> &'static str {
        match self {
            Stage::Counting => "reading text",
            Stage::Training => "training the vocabulary",
            Stage::Encoding => "tokenising",
            Stage::Records => "writing records",
            Stage::Verifying => "comparing checksums",
            Stage::Waiting => "waiting for another process that prepares the same data",
        }
    }
}

/// Something happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins; `total_bytes` of text will be worked on (0: not known).
    Begin {
        /// The stage.
        stage: Stage,
        /// Bytes of text it will work on.
        total_bytes: u64,
    },
    /// `bytes` more are done.
    Advance {
        /// The stage.
        stage: Stage,
        /// Bytes since the last event.
        bytes: u64,
    },
    /// The stage is done.
    End {
        /// The stage.
        stage: Stage,
    },
    /// Something that the user should know.
    Notice(&'a str),
}

/// Receives events, from several threads.
pub trait Progress: Sync {
    /// Called for each event, often some thousand times a second: it should be quick.
    fn report(&self, event: Event<'_>);
}

impl<F: Fn(Event<'_>) + Sync> Progress for F {
    fn report(&self, event: Event<'_>) {
        self(event);
    }
}

/// Ignores all events.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _event: Event<'_>) {}
}

/// Without a terminal, a stage that takes long says how far it is at this interval.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A bar on standard error if that is a terminal, and plain lines otherwise.
#[derive(Debug)]
pub struct Terminal {
    shown: Mutex<Shown>,
}

/// What stands on the screen.
#[derive(Debug)]
enum Shown {
    Bar(Option<ProgressBar>),
    Lines(PlainLines),
}

impl Terminal {
    /// Reports to standard error.
    pub fn stderr() -> Self {
        let shown = if std::io::stderr().is_terminal() {
            Shown::Bar(None)
        } else {
            Shown::Lines(PlainLines::default())
        };
        Terminal { shown: Mutex::new(shown) }
    }
}

impl Progress for Terminal {
    fn report(&self, event: Event<'_>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *shown {
            Shown::Bar(current) => show(event, current),
            Shown::Lines(lines) => lines.write(event),
        }
    }
}

fn show(event: Event<'_>, current: &mut Option<ProgressBar>) {
    match (event, current) {
        (Event::Begin { stage, total_bytes }, current) => *current = Some(bar(stage, total_bytes)),
        (Event::Advance { bytes, .. }, Some(bar)) => bar.inc(bytes),
        (Event::End { .. }, current) => {
            if let Some(bar) = current.take() {
                bar.finish_and_clear();
            }
        }
        (Event::Notice(text), Some(bar)) => bar.println(format!("data: {text}")),
        (Event::Notice(text), None) => line(text),
        (Event::Advance { .. }, None) => {}
    }
}

fn bar(stage: Stage, total_bytes: u64) -> ProgressBar {
    let target = ProgressDrawTarget::stderr();
    if total_bytes == 0 {
        let spinner = ProgressBar::with_draw_target(None, target);
        spinner.enable_steady_tick(Duration::from_millis(100));
        return spinner.with_message(stage.describe());
    }
    let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
    let bar = ProgressBar::with_draw_target(Some(total_bytes), target);
    let bar = bar.with_message(stage.describe());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_bad_template) => bar,
    }
}

/// A stage as plain lines.
#[derive(Debug)]
struct PlainLines {
    done_bytes: u64,
    total_bytes: u64,
    began: Instant,
    last: Instant,
}

impl Default for PlainLines {
    fn default() -> Self {
        PlainLines { done_bytes: 0, total_bytes: 0, began: Instant::now(), last: Instant::now() }
    }
}

impl PlainLines {
    fn write(&mut self, event: Event<'_>) {
        match event {
            Event::Begin { stage, total_bytes } => {
                *self = PlainLines { total_bytes, ..PlainLines::default() };
                match total_bytes {
                    0 => line(stage.describe()),
                    _ => line(&format!("{} ({total_bytes} bytes)", stage.describe())),
                }
            }
            Event::Advance { stage, bytes } => {
                self.done_bytes += bytes;
                if self.last.elapsed() >= LINE_INTERVAL {
                    self.last = Instant::now();
                    let state = state(self.done_bytes, self.total_bytes, self.began.elapsed());
                    line(&format!("{}: {state}", stage.describe()));
                }
            }
            Event::End { .. } => {}
            Event::Notice(text) => line(text),
        }
    }
}

/// How far a stage is, how fast it goes and how long it will take at this rate.
fn state(done: u64, total: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs().max(1);
    let rate = done / seconds;
    let left = total.saturating_sub(done).checked_div(rate);
    let eta = left.map_or_else(String::new, |left| format!(", {left} s left"));
    let megabytes = rate / 100_000;
    format!("{done} of {total} bytes, {}.{} MB/s{eta}", megabytes / 10, megabytes % 10)
}

fn line(text: &str) {
    // A closed standard error is no reason to stop preparing data.
    drop(writeln!(std::io::stderr().lock(), "data: {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_fast_it_goes_and_how_long_it_will_take() {
        let text = state(30_000_000, 90_000_000, Duration::from_secs(10));
        assert_eq!(text, "30000000 of 90000000 bytes, 3.0 MB/s, 20 s left");
        let unknown = state(0, 5, Duration::ZERO);
        assert_eq!(unknown, "0 of 5 bytes, 0.0 MB/s", "no rate, no forecast");
    }
}
