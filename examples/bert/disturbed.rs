//! Loaders that are slow or break, to try what the ranks make of it.

use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::batches::{Rows, Scratch};
use phalanx_data::fingerprint::Fingerprint;
use phalanx_data::order::MixtureComponent;
use phalanx_data::{Column, Result, Samples};

/// What happens to each batch of a slow loader: many steps of a tiny model, also on a busy machine.
const DELAY: Duration = Duration::from_millis(500);

/// So many batches are built before the loader breaks.
const GOOD_BATCHES: usize = 5;

/// What befalls a rank's loader.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disturbance {
    trouble: Trouble,
    pub(crate) rank: usize,
}

#[derive(Debug, Clone, Copy)]
enum Trouble {
    Slow,
    Panic,
}

impl FromStr for Disturbance {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once(':').and_then(|(trouble, rank)| {
            let trouble = match trouble {
                "slow" => Trouble::Slow,
                "panic" => Trouble::Panic,
                _ => return None,
            };
            Some(Disturbance { trouble, rank: rank.parse().ok()? })
        });
        parts.ok_or_else(|| format!("`{text}` is not slow:RANK or panic:RANK"))
    }
}

impl Disturbance {
    /// These samples, disturbed.
    pub(crate) fn of(self, samples: Arc<dyn Samples>) -> Arc<dyn Samples> {
        let filled = AtomicUsize::new(0);
        Arc::new(Disturbed { samples, trouble: self.trouble, filled })
    }
}

struct Disturbed {
    samples: Arc<dyn Samples>,
    trouble: Trouble,
    filled: AtomicUsize,
}

impl Samples for Disturbed {
    fn sample_count(&self) -> u64 {
        self.samples.sample_count()
    }

    fn columns(&self) -> &[Column] {
        self.samples.columns()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.samples.fingerprint()
    }

    fn sample_len(&self, id: u64, scratch: &mut Scratch) -> Result<usize> {
        self.samples.sample_len(id, scratch)
    }

    fn parts(&self) -> Vec<MixtureComponent> {
        self.samples.parts()
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        self.samples.damaged()
    }

    fn will_need(&self, samples: Range<u64>, scratch: &mut Scratch) {
        self.samples.will_need(samples, scratch);
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        match self.trouble {
            Trouble::Slow => wait(DELAY),
            Trouble::Panic => {
                if self.filled.fetch_add(1, Ordering::Relaxed) == GOOD_BATCHES {
                    give_up();
                }
            }
        }
        self.samples.fill(seed, rows, scratch)
    }
}

#[expect(clippy::panic, reason = "that is the trouble that was asked for")]
fn give_up() {
    panic!("this loader was to break");
}

/// Parking may end early.
fn wait(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        std::thread::park_timeout(left);
    }
}
