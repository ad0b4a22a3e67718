//! How a rank trains: one function for each of the script's.

use std::rc::Rc;

use phalanx_ddp_core::amp::LossScaler;
use phalanx_ddp_core::schedule::LinearWarmup;
use phalanx_ddp_core::Sync;
use tch::Kind;

use super::networks::ROWS;
use super::{Run, Way};

const STEPS: usize = 6;

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

/// With clipping.
pub(crate) fn clipped(run: &mut Run) {
    for step in 0..STEPS {
        one(run, step);
        let norm = run.optimizer.step(Some(0.5)).unwrap().gradient_norm;
        run.outcome.gradient_norms.push(norm);
    }
}

/// Three micro-batches a step, of which the last exchanges.
pub(crate) fn accumulated(run: &mut Run) {
    for step in 0..STEPS {
        let mut loss = 0.0;
        for part in 0..3 {
            let sum = run.network.loss_sum(step, run.rank, part, ROWS);
            let (last, rows) = (part == 2, ROWS as f64);
            match run.way {
                Way::Plain if last => (&sum / (3.0 * rows)).backward(),
                Way::Plain => run.ddp.no_sync(|| (&sum / (3.0 * rows)).backward()).unwrap(),
                Way::Weighted => {
                    let sync = if last { Sync::Reduce } else { Sync::Accumulate };
                    run.ddp.backward(&sum, rows, sync).unwrap();
                }
            }
            loss += sum.double_value(&[]) / (3.0 * rows);
        }
        run.outcome.losses.push(loss);
        run.optimizer.step(None).unwrap();
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

/// Rates of warm-up over three steps, then linearly to zero at step 8.
pub(crate) fn scheduled(run: &mut Run) {
    let schedule = LinearWarmup { peak: 0.01, warmup_steps: 3, total_steps: 8 };
    for step in 0..STEPS {
        let rate = schedule.lr(step as u64);
        run.optimizer.set_lr(rate).unwrap();
        run.outcome.rates.push(rate);
        one(run, step);
        run.optimizer.step(None).unwrap();
    }
}

/// Rank r's batch has 1 + r samples, and each counts alike.
pub(crate) fn weighted(run: &mut Run) {
    for step in 0..STEPS {
        let rows = 1 + run.rank;
        let sum = run.network.loss_sum(step, run.rank, 0, rows);
        run.backward(&sum, rows);
        // The loss of all is Σ sums / Σ rows: a rank's part of it, times the ranks that are averaged over.
        let all: usize = (1..=run.world_size).sum();
        run.outcome.losses.push(sum.double_value(&[]) * run.world_size as f64 / all as f64);
        run.optimizer.step(None).unwrap();
    }
}
