//! Makes a program that fails smaller while it still fails.

use std::time::{Duration, Instant};

use crate::program::{Program, Statement};
use crate::verdict;

/// How long one program is made smaller.
const LIMIT: Duration = Duration::from_secs(20);

/// A smaller program that fails in the same way. Where the mistake is what counts, all of it is needed.
pub(crate) fn smaller(program: &Program) -> Program {
    let Some(kind) = kind(program).filter(|_| program.mistake.is_none()) else {
        return program.clone();
    };
    let mut best = program.clone();
    let start = Instant::now();
    let mut goes_on = true;
    while goes_on {
        goes_on = false;
        for candidate in candidates(&best) {
            if start.elapsed() > LIMIT {
                return best;
            }
            if self::kind(&candidate).as_ref() == Some(&kind) {
                best = candidate;
                goes_on = true;
                break;
            }
        }
    }
    best
}

/// The failure, without its numbers.
fn kind(program: &Program) -> Option<String> {
    let why = verdict::of(program).err()?;
    let first = why.lines().take(2).map(|line| line.chars().filter(|c| c.is_alphabetic()).take(40));
    Some(first.flatten().collect())
}

fn candidates(program: &Program) -> Vec<Program> {
    let mut all = Vec::new();
    let change = |all: &mut Vec<Program>, change: &dyn Fn(&mut Program)| {
        let mut candidate = program.clone();
        change(&mut candidate);
        all.push(candidate);
    };
    for step in 0..program.steps.len() {
        if program.steps.len() > 1 {
            change(&mut all, &|p| drop(p.steps.remove(step)));
        }
    }
    // What prepares others stays.
    let is_free = |statement: &Statement| {
        matches!(statement, Statement::Backward { sync: false, .. } | Statement::AtStep(_))
    };
    for step in 0..program.steps.len() {
        for at in (0..program.steps[step].len()).filter(|&at| is_free(&program.steps[step][at])) {
            change(&mut all, &|p| drop(p.steps[step].remove(at)));
        }
    }
    if program.clip.is_some() {
        change(&mut all, &|p| p.clip = None);
    }
    if program.grouped {
        change(&mut all, &|p| p.grouped = false);
    }
    all
}
