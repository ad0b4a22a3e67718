//! Another number of ranks and another stage on the way: every sample once, the same losses.

use super::{finish, losses};

/// Losses of steps that `legs` made, one after the other in one folder.
fn run(legs: &[(&str, &str, &str)]) -> Vec<f64> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoints = folder.path().join("checkpoints").display().to_string();
    for (world_size, zero, steps) in legs {
        let args = [
            ["--config", "configs/bert_tiny.json"],
            ["--nnodes", *world_size],
            ["--threads", "1"],
            ["--zero", *zero],
            ["--steps", *steps],
            ["--global-batch", "12"],
            ["--micro-batch", "3"],
            // What a rank drops depends on the cut of the batch, and the schedule on the number of steps.
            ["--dropout", "0"],
            ["--warmup-steps", "9"],
            ["--checkpoint", &checkpoints],
        ];
        finish(folder.path(), &args.concat());
    }
    let parsed = losses(folder.path()).into_iter().map(|(step, loss)| (step, loss.parse::<f64>()));
    let (steps, losses): (Vec<u64>, Vec<_>) = parsed.unzip();
    assert_eq!(steps, (1..=9).collect::<Vec<_>>(), "every step once");
    losses.into_iter().map(|loss| loss.expect("a number")).collect()
}

#[test]
fn four_ranks_then_two_then_three_have_the_losses_of_four() {
    let whole = run(&[("4", "1", "9")]);
    let changed = run(&[("4", "1", "3"), ("2", "0", "6"), ("3", "1", "9")]);
    for (step, (one, other)) in changed.iter().zip(&whole).enumerate() {
        assert!((one - other).abs() <= 1e-6 * other.abs(), "step {}: {one} and {other}", step + 1);
    }
}
