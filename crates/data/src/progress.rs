//! Progress of preparing text: events for a callback, and a bar for terminals.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

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

/// A bar on standard error if that is a terminal, and plain lines otherwise.
#[derive(Debug)]
pub struct Terminal {
    bar: Mutex<Option<ProgressBar>>,
    is_terminal: bool,
}

impl Terminal {
    /// Reports to standard error.
    pub fn stderr() -> Self {
        Terminal { bar: Mutex::new(None), is_terminal: std::io::stderr().is_terminal() }
    }

    fn begin(stage: Stage, total_bytes: u64) -> ProgressBar {
        let target = ProgressDrawTarget::stderr();
        if total_bytes == 0 {
            let bar = ProgressBar::with_draw_target(None, target);
            bar.enable_steady_tick(Duration::from_millis(100));
            return bar.with_message(stage.describe());
        }
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        let style = ProgressStyle::with_template(template);
        let bar = ProgressBar::with_draw_target(Some(total_bytes), target);
        let bar = bar.with_message(stage.describe());
        match style {
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_bad_template) => bar,
        }
    }

    fn line(text: &str) {
        // A closed standard error is no reason to stop preparing data.
        drop(writeln!(std::io::stderr().lock(), "data: {text}"));
    }
}

impl Progress for Terminal {
    fn report(&self, event: Event<'_>) {
        let mut bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Begin { stage, total_bytes } if self.is_terminal => {
                *bar = Some(Self::begin(stage, total_bytes));
            }
            Event::Begin { stage, total_bytes: 0 } => Self::line(stage.describe()),
            Event::Begin { stage, total_bytes } => {
                Self::line(&format!("{} ({total_bytes} bytes)", stage.describe()));
            }
            Event::Advance { bytes, .. } => {
                if let Some(bar) = &*bar {
                    bar.inc(bytes);
                }
            }
            Event::End { .. } => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
            }
            Event::Notice(text) => match &*bar {
                Some(bar) => bar.println(format!("data: {text}")),
                None => Self::line(text),
            },
        }
    }
}
