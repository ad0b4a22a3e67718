//! A rank that stays: it trains in one generation after the other, without being started again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use phalanx_comm::recorder;
use phalanx_rendezvous::environment::{take_place, StayOffer};
use rustix::event::{poll, PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::process::timespec_until;
use crate::stay::{decode, MESSAGE_BYTES_MAX, STAYS, WAITS};
use crate::stop;

/// How long what is being committed when `train` ends is waited for; a launcher that has less patience kills.
const COMMIT_MAX: Duration = Duration::from_secs(60);
const COMMIT_LOOK_EVERY: Duration = Duration::from_millis(1);

/// Calls `train`, and again for each generation in which this process is to go on: after another rank or node is lost, and when
/// nodes come or go. It makes its group from the environment, builds its model, resumes and trains, each time anew; what it
/// returns is returned when there is no further generation.
///
/// Only phalanx's launcher keeps ranks, with `--max-restarts` or `--nnodes MIN:MAX`; elsewhere this is one call of `train`.
///
/// * `train` is called again when it ends with an error and a group of this process has failed because of another rank; when it ends with an error
///   that every rank has met (gradients that are not finite), which counts as one failure of the job; and when it
///   ends, however well, after the launcher has asked it to stop for a new generation ([`should_stop`](crate::should_stop), which
///   `Checkpointer::step` heeds). Any other error is returned: then the launcher starts this rank again, as all whose programs do not
///   call this.
/// * The process's environment stays as it was: ask [`World::from_env`](phalanx_rendezvous::environment::World::from_env) for rank and world size.
///   What `train` leaves in statics, it finds again.
/// * What it makes must be gone when it returns: a group that lives would keep its peers waiting.
///
/// # Errors
///
/// Those of `train`.
///
/// # Example
///
/// ```
/// use phalanx_comm::{Error, Group, GroupOptions, Sum};
///
/// let sum = phalanx_launch::each_generation(|| {
///     let mut group = Group::from_environment(GroupOptions::default())?;
///     let mut ranks = [1.0_f32];
///     group.all_reduce(&mut ranks[..], Sum)?.wait()?;
///     Ok::<_, Error>(ranks[0])
/// });
/// assert_eq!(sum.unwrap(), 1.0);
/// ```
pub fn each_generation<T, E>(mut train: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let launcher = StayOffer::from_env().and_then(|offer| {
        let opened = Launcher::open(&offer);
        let note = |error: &io::Error| tracing::warn!(%error, "the launcher cannot keep this rank");
        opened.inspect_err(note).ok()
    });
    loop {
        drop(recorder::take_shared_error()); // of before
        let outcome = train();
        let Some(launcher) = &launcher else { return outcome };
        let is_over = match &outcome {
            Ok(_) => !recorder::is_called_back(),
            Err(_) => !recorder::has_lost_another() && !fails_together(),
        };
        if is_over {
            return outcome;
        }
        match launcher.next_place() {
            Ok(Some(place)) => {
                stop::forget();
                take_place(place);
            }
            Ok(None) => return outcome,
            Err(error) => {
                tracing::warn!(%error, "the launcher has no next place for this rank");
                return outcome;
            }
        }
    }
}

/// Whether the error is every rank's; the launcher is told.
fn fails_together() -> bool {
    let shared = recorder::take_shared_error();
    shared.iter().for_each(|text| recorder::fail_together(text));
    shared.is_some()
}

/// The launcher, as a rank that stays sees it.
#[derive(Debug)]
struct Launcher {
    orders: File,
    news: File,
    patience: Duration,
}

impl Launcher {
    /// Says that this rank would stay.
    fn open(offer: &StayOffer) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let orders = options.clone().read(true).open(&offer.orders)?;
        let mut news = options.write(true).open(&offer.news)?;
        news.write_all(&[STAYS])?;
        Ok(Self { orders, news, patience: offer.patience })
    }

    /// Says that this rank waits, and waits. `None`: there is no next place.
    fn next_place(&self) -> io::Result<Option<Vec<(String, String)>>> {
        let committed_by = Instant::now() + COMMIT_MAX;
        while recorder::is_committing() && Instant::now() < committed_by {
            std::thread::park_timeout(COMMIT_LOOK_EVERY);
        }
        (&self.news).write_all(&[WAITS])?;
        let end = Instant::now() + self.patience;
        let mut message = vec![0; MESSAGE_BYTES_MAX];
        loop {
            match (&self.orders).read(&mut message) {
                Ok(count) => return Ok(decode(&message[..count])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut fds = [PollFd::new(&self.orders, PollFlags::IN)];
            match poll(&mut fds, Some(&timespec_until(end))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
