//! Random programs: whatever training loop somebody writes, it is training as one process does it, or every rank gets an
//! error that names what is wrong. Never different weights in silence, never a hang.
//!
//! A program is a value made from a seed ([`generate`]). Ranks run it as threads ([`run`]); one process that knows
//! nothing of `Ddp` says what it means ([`oracle`]). Many programs hold one mistake on purpose ([`mistakes`]).
//!
//! `PHALANX_PROGRAMS` programs from `PHALANX_PROGRAMS_SEED` on; a failure prints its seed and the program, made smaller.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::shadow_unrelated,
    clippy::struct_excessive_bools,
    clippy::fn_params_excessive_bools,
    clippy::large_enum_variant,
    clippy::panic_in_result_fn,
    reason = "programs are made of switches that have nothing to do with each other"
)]

mod draw;
mod generate;
mod mistakes;
mod oracle;
mod program;
mod run;
mod shrink;
mod verdict;

use std::collections::BTreeMap;
use std::time::Instant;

/// Programs of an ordinary run of the tests.
const PROGRAMS: u64 = 800;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn every_program_is_right_or_refused_on_every_rank() {
    let (first, count) =
        (setting("PHALANX_PROGRAMS_SEED", 1), setting("PHALANX_PROGRAMS", PROGRAMS));
    tch::set_num_threads(1);
    quiet_ranks();
    let start = Instant::now();
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    let mut failures = 0;
    let at_most = setting("PHALANX_PROGRAMS_FAILURES", 1);
    for seed in first..first + count {
        let program = generate::program(seed);
        match verdict::of(&program) {
            Ok(kind) => *kinds.entry(kind).or_default() += 1,
            Err(why) => {
                let smaller = shrink::smaller(&program);
                let again = verdict::of(&smaller).err().unwrap_or(why);
                println!("program {seed} fails: {again}\n{smaller}\n");
                failures += 1;
                if failures >= at_most {
                    break;
                }
            }
        }
    }
    println!("{count} programs from seed {first} in {:.1?}", start.elapsed());
    for (kind, times) in &kinds {
        println!("{times:6} {kind}");
    }
    assert_eq!(
        failures, 0,
        "programs fail; run one with PHALANX_PROGRAMS_SEED=… PHALANX_PROGRAMS=1"
    );
}

/// Panics of ranks are outcomes here, not news.
fn quiet_ranks() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let is_rank = std::thread::current().name().is_some_and(|name| name.starts_with("rank-"));
        if !is_rank {
            usual(info);
        }
    }));
}
