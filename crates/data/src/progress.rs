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
    /// Another process prepares the same data.
    Waiting,
}

impl Stage {
    fn describe(self) -> &'static str {
        match self {
            Stage::Counting => "reading text",
            Stage::Training => "training the vocabulary",
            Stage::Encoding => "tokenising",
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

/// Says nothing.
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
    Lines { done_bytes: u64, total_bytes: u64, last: Instant },
}

impl Terminal {
    /// Reports to standard error.
    pub fn stderr() -> Self {
        let shown = if std::io::stderr().is_terminal() {
            Shown::Bar(None)
        } else {
            Shown::Lines { done_bytes: 0, total_bytes: 0, last: Instant::now() }
        };
        Terminal { shown: Mutex::new(shown) }
    }
}

impl Progress for Terminal {
    fn report(&self, event: Event<'_>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *shown {
            Shown::Bar(current) => show(event, current),
            Shown::Lines { done_bytes, total_bytes, last } => {
                write_lines(event, done_bytes, total_bytes, last);
            }
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

fn write_lines(event: Event<'_>, done: &mut u64, total: &mut u64, last: &mut Instant) {
    match event {
        Event::Begin { stage, total_bytes } => {
            (*done, *total, *last) = (0, total_bytes, Instant::now());
            match total_bytes {
                0 => line(stage.describe()),
                _ => line(&format!("{} ({total_bytes} bytes)", stage.describe())),
            }
        }
        Event::Advance { stage, bytes } => {
            *done += bytes;
            if last.elapsed() >= LINE_INTERVAL {
                *last = Instant::now();
                line(&format!("{}: {done} of {total} bytes", stage.describe()));
            }
        }
        Event::End { .. } => {}
        Event::Notice(text) => line(text),
    }
}

fn line(text: &str) {
    // A closed standard error is no reason to stop preparing data.
    drop(writeln!(std::io::stderr().lock(), "data: {text}"));
}
