//! Kills at moments drawn at random, in training and in saving (F1, F14).

use std::time::Duration;

use super::support::kill_child_of;
use super::{finish, losses, start, steps_done, wait_until, weights, FOUR};

const STEPS: u64 = 12;

/// Numbers from a seed.
///
/// Source: `SplitMix64` (Steele et al. 2014).
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// What a variable asks for.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    let set = std::env::vars().find(|(name, _)| name == variable);
    set.map_or(default, |(_, value)| value.parse().expect("a number"))
}

/// Kills everything at a drawn moment, starts it again, as often as is asked for; a run that comes to its end is compared with
/// one that nothing has happened to, and the next one begins.
#[test]
fn after_any_number_of_kills_the_run_ends_with_the_bits_of_an_unbroken_one() {
    let (kills, seed) = (number("PHALANX_KILLS", 4), number("PHALANX_KILLS_SEED", 1));
    let mut draws = Draws::new(seed);
    let steps = STEPS.to_string();
    let all = |more: &[&'static str]| -> Vec<String> {
        let own = ["--steps", &steps, "--zero", "1"];
        FOUR.iter().chain(&own).chain(more).map(|&text| text.to_owned()).collect()
    };
    let whole = tempfile::tempdir().expect("a temporary folder");
    let plain = all(&[]);
    finish(whole.path(), &plain.iter().map(String::as_str).collect::<Vec<_>>());
    let (expected, expected_losses) = (weights(whole.path()), losses(whole.path()));
    let mut left = kills;
    while left > 0 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let checkpoints = folder.path().join("checkpoints").display().to_string();
        let mut args = all(&["--save-every", "2", "--checkpoint"]);
        args.push(checkpoints);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        while left > 0 {
            let done = steps_done(folder.path());
            let wanted = done as u64 + draws.below(6);
            if wanted >= STEPS {
                break;
            }
            let mut run = start(folder.path(), &args);
            wait_until("a step", || {
                steps_done(folder.path()) as u64 >= wanted
                    || run.0.try_wait().expect("our own child").is_some()
            });
            // The moment inside of the step, or of the save.
            std::thread::park_timeout(Duration::from_micros(draws.below(60_000)));
            run.signal("-KILL");
            drop(run);
            left -= 1;
        }
        let output = finish(folder.path(), &args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(weights(folder.path()) == expected, "seed {seed}, {left} kills left:\n{said}");
        assert_eq!(losses(folder.path()), expected_losses, "seed {seed}, {left} kills left");
    }
}

/// The launcher starts the ranks again by itself.
#[test]
fn a_rank_that_dies_costs_a_restart_and_no_bit() {
    let whole = tempfile::tempdir().expect("a temporary folder");
    let steps = ["--steps", "12"];
    finish(whole.path(), &[&FOUR[..], &steps].concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoints = folder.path().join("checkpoints").display().to_string();
    let more = ["--save-every", "2", "--max-restarts", "3", "--checkpoint", &checkpoints];
    let run = start(folder.path(), &[&FOUR[..], &steps, &more].concat());
    for wanted in [3, 7] {
        wait_until("a step", || steps_done(folder.path()) >= wanted);
        kill_child_of(run.0.id());
        // Killed ranks' steps are dropped from the metrics when the run goes on.
        wait_until("a restart", || steps_done(folder.path()) < wanted + 1);
    }
    let output = run.finish(super::DEADLINE);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("restart 2/3: rank ") && said.contains("signal 9"), "{said}");
    assert!(weights(folder.path()) == weights(whole.path()), "{said}");
    assert_eq!(losses(folder.path()), losses(whole.path()));
}
