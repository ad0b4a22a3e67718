//! How a rank trains: one function for each of the script's.

use std::rc::Rc;

use phalanx_ddp_core::amp::LossScaler;
use phalanx_ddp_core::schedule::{Schedule, Shape};
use phalanx_ddp_core::{Clip, Sync};
use tch::Kind;

use super::networks::ROWS;
use super::{Run, Way};

const STEPS: usize = 6;

/// Warm-up over three steps, then linearly to zero at step 8.
fn schedule() -> Schedule {
    Schedule::new(Shape::Linear, 0.01, 8).unwrap().with_warmup(3).unwrap()
}

/// A backward, a step.
pub(crate) fn plain(run: &mut Run) {
    for step in 0..STEPS {
        one(run, step);
        run.optimizer.step(None).unwrap();
    }
}

fn one(run: &mut Run, step: usize) {
    let sum = run.network.loss_sum(step, run.rank, 0, ROWS);
    run.backward(&sum, ROWS);
    run.note_loss(&sum, ROWS);
}

/// The sum of each weight times its gradient.
pub(crate) fn products(run: &mut Run) {
    for step in 0..STEPS {
        let sum = run.network.products(step, run.rank);
        run.backward(&sum, 1);
        run.note_loss(&sum, 1);
        run.optimizer.step(None).unwrap();
    }
}

/// With clipping to the 2-norm.
pub(crate) fn clipped(run: &mut Run) {
    clipped_by(run, Clip::norm(0.5));
}

pub(crate) fn clipped_by_the_sum(run: &mut Run) {
    clipped_by(run, Clip::p_norm(2.0, 1.0));
}

pub(crate) fn clipped_by_cubes(run: &mut Run) {
    clipped_by(run, Clip::p_norm(0.2, 3.0));
}

pub(crate) fn clipped_by_the_largest(run: &mut Run) {
    clipped_by(run, Clip::p_norm(0.1, f64::INFINITY));
}

pub(crate) fn clamped(run: &mut Run) {
    clipped_by(run, Clip::value(0.05));
}

fn clipped_by(run: &mut Run, clip: Clip) {
    for step in 0..STEPS {
        one(run, step);
        let norm = run.optimizer.step(clip).unwrap().gradient_norm;
        run.outcome.gradient_norms.extend(norm);
    }
}

/// Backwards of micro-batches (step and part), of which the last exchanges.
fn micro_batches(run: &mut Run, batches: &[(usize, usize)]) {
    let rows = ROWS as f64;
    let all = rows * batches.len() as f64;
    let mut loss = 0.0;
    for (at, &(step, part)) in batches.iter().enumerate() {
        let sum = run.network.loss_sum(step, run.rank, part, ROWS);
        let is_last = at + 1 == batches.len();
        match run.way {
            Way::Plain if is_last => (&sum / all).backward(),
            Way::Plain => run.ddp.no_sync(|| (&sum / all).backward()).unwrap(),
            Way::Weighted => {
                let sync = if is_last { Sync::Reduce } else { Sync::Accumulate };
                run.ddp.backward(&sum, rows, sync).unwrap();
            }
        }
        loss += sum.double_value(&[]) / all;
    }
    run.outcome.losses.push(loss);
}

/// Three micro-batches a step.
pub(crate) fn accumulated(run: &mut Run) {
    for step in 0..STEPS {
        micro_batches(run, &[(step, 0), (step, 1), (step, 2)]);
        run.optimizer.step(None).unwrap();
    }
}

/// Of two micro-batches a step the first uses branches that the second, which exchanges, does not.
pub(crate) fn unused_in_the_last(run: &mut Run) {
    for step in (0..2 * STEPS).step_by(2) {
        micro_batches(run, &[(step, 0), (step + 1, 0)]);
        run.optimizer.step(None).unwrap();
    }
}

/// Micro-batches, clipping, groups and a schedule.
pub(crate) fn together(run: &mut Run) {
    let schedule = schedule();
    for step in 0..STEPS {
        run.optimizer.set_lr(schedule.lr(step as u64)).unwrap();
        micro_batches(run, &[(step, 0), (step, 1)]);
        let norm = run.optimizer.step(Some(0.5)).unwrap().gradient_norm.unwrap();
        run.outcome.gradient_norms.push(norm);
    }
}

/// Two backwards, of different losses, before each step. PyTorch exchanges after both; here the first accumulates, which
/// comes to the same.
pub(crate) fn two_losses(run: &mut Run) {
    for step in 0..STEPS {
        let rows = ROWS as f64;
        let first = run.network.loss_sum(step, run.rank, 0, ROWS);
        let second = run.network.output(step, run.rank, 1, ROWS).square().sum(Kind::Float);
        match run.way {
            Way::Plain => {
                run.ddp.no_sync(|| (&first / rows).backward()).unwrap();
                (&second / rows).backward();
            }
            // The same samples: they weigh once.
            Way::Weighted => {
                run.ddp.backward(&first, rows, Sync::Accumulate).unwrap();
                run.ddp.backward(&second, 0.0, Sync::Reduce).unwrap();
            }
        }
        run.note_loss(&(first + second), ROWS);
        run.optimizer.step(None).unwrap();
    }
}

/// Rank r ends after 3 + r steps.
pub(crate) fn joined(run: &mut Run) {
    let ddp = Rc::clone(&run.ddp);
    let join = ddp.join().unwrap();
    for step in 0..3 + run.rank {
        one(run, step);
        run.optimizer.step(None).unwrap();
    }
    join.finish(|| run.optimizer.step(None).map(drop)).unwrap();
}

/// The scale grows after two good steps; in step 2 a gradient of the last rank is infinite.
pub(crate) fn scaled(run: &mut Run) {
    let mut scaler = LossScaler::new(1024.0, 2.0, 0.5, 2).unwrap();
    for step in 0..=STEPS {
        let sum = run.network.loss_sum(step, run.rank, 0, ROWS);
        run.note_loss(&sum, ROWS);
        run.outcome.scales.push(scaler.value());
        let overflows = step == 2 && run.rank + 1 == run.world_size;
        let sum = if overflows { sum * 2_f64.powi(127) } else { sum };
        run.backward(&scaler.scale(&sum).unwrap(), ROWS);
        let done = run.optimizer.step_scaled(Some(0.5), &mut scaler).unwrap();
        run.outcome.skipped.push(done.skipped);
    }
    run.outcome.scales.push(scaler.value());
}

/// With a schedule.
pub(crate) fn scheduled(run: &mut Run) {
    let schedule = schedule();
    for step in 0..STEPS {
        let rate = schedule.lr(step as u64);
        run.optimizer.set_lr(rate).unwrap();
        run.outcome.rates.push(rate);
        one(run, step);
        run.optimizer.step(None).unwrap();
    }
}

/// Rank r's batch has 4 + r samples, by weight in step 3 the last one's none.
pub(crate) fn normed_together(run: &mut Run) {
    let by_weight = run.way == Way::Weighted;
    for step in 0..STEPS {
        let skips = |rank| by_weight && step == 3 && rank + 1 == run.world_size;
        let of = |rank| if skips(rank) { 0 } else { 4 + rank };
        let rows = of(run.rank);
        let sum = run.network.loss_sum(step, run.rank, 0, rows);
        run.backward(&sum, rows);
        let all: usize = (0..run.world_size).map(of).sum();
        let share = if by_weight { all as f64 / run.world_size as f64 } else { rows as f64 };
        run.outcome.losses.push(sum.double_value(&[]) / share);
        run.optimizer.step(None).unwrap();
    }
}

/// Rank r's batch has 1 + r samples, in step 3 the last one's none; each counts alike.
pub(crate) fn weighted(run: &mut Run) {
    for step in 0..STEPS {
        let of = |rank| if step == 3 && rank + 1 == run.world_size { 0 } else { 1 + rank };
        let rows = of(run.rank);
        let sum = run.network.loss_sum(step, run.rank, 0, rows);
        run.backward(&sum, rows);
        // The loss of all is Σ sums / Σ rows: a rank's part of it, times the ranks that are averaged over.
        let all: usize = (0..run.world_size).map(of).sum();
        run.outcome.losses.push(sum.double_value(&[]) * run.world_size as f64 / all as f64);
        run.optimizer.step(None).unwrap();
    }
}
