//! Is the outcome of a program one that is allowed?

use std::sync::Arc;
use std::time::Duration;

use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::GroupOptions;
use phalanx_ddp_core::Zero;

use crate::oracle;
use crate::program::{Mistake, Program};
use crate::run::{self, Ended, Values};

/// No error may need it, so that it can be long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Texts that are no user's business.
const BUGS: [&str; 6] = [
    "panic in a gradient hook",
    "panicked inside the reducer",
    "index out of bounds",
    "assertion",
    "unreachable",
    "inside of a backward",
];

/// What kind of right outcome it is; or what is wrong with it.
pub(crate) fn of(program: &Program) -> Result<String, String> {
    let shared = Arc::new(program.clone());
    let options = GroupOptions { timeout: TIMEOUT, ..GroupOptions::default() };
    let ended = run_ranks_with(program.world_size, program.settings.link, options, move |group| {
        run::rank(&shared, group)
    });
    judge(program, &ended).map_err(|why| format!("{why}\n{}", shown(&ended)))
}

fn judge(program: &Program, ended: &[Ended]) -> Result<String, String> {
    let texts: Vec<&str> =
        ended.iter().filter_map(|e| e.as_ref().err().map(String::as_str)).collect();
    let values: Vec<&Values> = ended.iter().filter_map(|e| e.as_ref().ok()).collect();
    if let Some(text) = texts.iter().find(|text| BUGS.iter().any(|bug| text.contains(bug))) {
        return Err(format!("an error that is our bug: {text}"));
    }
    match (program.mistake, texts.len()) {
        (None, 0) => match right(program, &values) {
            Ok(()) => Ok(String::from("right")),
            Err(why) => Err(why),
        },
        (None, _) => Err(String::from("a right program is refused")),
        (Some(mistake), 0) => match mistake.may_pass() && alike(program, &values) {
            true => Ok(format!("{mistake:?}: without effect")),
            false => Err(format!("{mistake:?} passes in silence")),
        },
        (Some(mistake), count) if count < ended.len() => {
            Err(format!("{mistake:?} passes in silence on some ranks"))
        }
        (Some(mistake), _) => {
            let is_said = texts.iter().any(|text| mistake.words().iter().any(|w| text.contains(w)))
                || is_seen_by_another(program, &texts);
            let waited = texts.iter().all(|text| text.contains(" passed on rank "));
            match (waited, is_said) {
                (true, _) => Err(format!("{mistake:?} needs a timeout")),
                (_, false) => Err(format!("{mistake:?} is told in other words")),
                (false, true) => Ok(format!("{mistake:?}: named")),
            }
        }
    }
}

/// Where the ranks have one copy of the parameters, one that accumulates sees what another changes, if it is quick enough.
fn is_seen_by_another(program: &Program, texts: &[&str]) -> bool {
    let has_one_copy = program.settings.zero == Zero::Three;
    let is_told = texts.iter().any(|text| text.contains("was changed between accumulating"));
    program.mistake == Some(Mistake::Poked) && has_one_copy && is_told
}

/// Whether all ranks have the same weights.
fn alike(program: &Program, values: &[&Values]) -> bool {
    let weights = |values: &Values| bits(&values[..program.models.len()]);
    values.iter().all(|of_rank| weights(of_rank) == weights(values[0]))
}

fn right(program: &Program, values: &[&Values]) -> Result<(), String> {
    if !alike(program, values) {
        return Err(String::from("the ranks' weights differ"));
    }
    for (rank, (ours, right)) in values.iter().zip(oracle::values(program)).enumerate() {
        for (number, (ours, right)) in ours.iter().zip(&right).enumerate() {
            let off = |(a, b): (&f64, &f64)| !((a - b).abs() <= 0.0 || (a.is_nan() && b.is_nan()));
            if let Some(at) = ours.iter().zip(right).position(off) {
                return Err(format!(
                    "rank {rank}: number {at} of model or buffers {number} is {}, expected {}",
                    ours[at], right[at]
                ));
            }
        }
    }
    Ok(())
}

fn bits(values: &[Vec<f64>]) -> Vec<u64> {
    values.iter().flatten().map(|value| value.to_bits()).collect()
}

fn shown(ended: &[Ended]) -> String {
    let mut lines = String::new();
    for (rank, ended) in ended.iter().enumerate() {
        let line = match ended {
            Ok(values) => format!(
                "weights begin with {:?}",
                values.iter().map(|v| v.iter().take(3).collect::<Vec<_>>()).collect::<Vec<_>>()
            ),
            Err(text) => format!("error: {text}"),
        };
        lines += &format!("  rank {rank}: {line}\n");
    }
    lines
}
