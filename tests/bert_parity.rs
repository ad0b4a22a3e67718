//! The whole program on real text: how many ranks there are does not change what is learnt.

mod support;

use support::{bert, Run};

const STEPS: &str = "20";

/// The tiny model in fp32 without dropout, one thread a rank, 12 sequences a step.
fn run(args: &[&str]) -> Run {
    let common = ["--config", "configs/bert_tiny.json", "--precision", "fp32", "--dropout", "0"];
    let fixed = ["--global-batch", "12", "--steps", STEPS, "--threads", "1", "--seed", "11"];
    let all: Vec<&str> = common.iter().chain(&fixed).chain(args).copied().collect();
    bert(&all)
}

#[test]
fn losses_agree_for_one_to_four_ranks() {
    let alone = run(&["--nnodes", "1"]).losses();
    assert_eq!(alone.len(), 20);
    assert!(alone[19] < alone[0], "the loss falls: {alone:?}");
    for nnodes in ["2", "3", "4"] {
        let losses = run(&["--nnodes", nnodes]).losses();
        for (step, (many, one)) in losses.iter().zip(&alone).enumerate() {
            // As in bert_model: n = 12 000 roundings in a row (8192 of them in the softmax), 5 √n 2^-24 = 3.3e-5 for a token, and the
            // mean of some 100 tokens is off by a tenth of that; three times as much with what the weights have become.
            let relative = (many - one).abs() / one;
            assert!(relative <= 1e-5, "step {step} on {nnodes} ranks: {many} and {one}");
        }
    }
}

#[test]
fn four_ranks_and_four_micro_batches_give_the_same_weights() {
    let ranks = run(&["--nnodes", "4", "--micro-batch", "3", "--accumulate", "1", "--zero", "0"]);
    let sharded = ["1", "2", "3"].map(|zero| {
        run(&["--nnodes", "4", "--micro-batch", "3", "--accumulate", "1", "--zero", zero])
    });
    let again = run(&["--nnodes", "4", "--micro-batch", "3", "--accumulate", "1", "--zero", "0"]);
    let alone = run(&["--nnodes", "1", "--micro-batch", "3", "--accumulate", "4", "--zero", "0"]);
    assert_eq!(ranks.losses(), alone.losses());
    assert!(ranks.weights() == again.weights(), "the same command twice");
    for (stage, other) in (1..).zip(&sharded) {
        assert!(ranks.weights() == other.weights(), "zero 0 and zero {stage}");
    }
    assert!(ranks.weights() == alone.weights(), "4 ranks × 1 and 1 rank × 4");
}

#[test]
fn dropout_and_bf16_repeat_bit_for_bit() {
    let args = [
        "--config",
        "configs/bert_tiny.json",
        "--precision",
        "bf16",
        "--dropout",
        "0.1",
        "--nnodes",
        "2",
        "--global-batch",
        "8",
        "--steps",
        "5",
        "--threads",
        "1",
        "--seed",
        "3",
    ];
    let (first, second) = (bert(&args), bert(&args));
    assert_eq!(first.losses(), second.losses());
    assert!(first.weights() == second.weights(), "the same command twice");
}

/// Nothing of a layer but its input is kept for backward, and every bit is what it was.
#[test]
fn recomputed_layers_change_no_bit() {
    for (precision, nnodes, zero) in [("bf16", "2", "1"), ("fp32", "1", "0")] {
        let args = ["--config", "configs/bert_tiny.json", "--precision", precision, "--zero", zero];
        let more =
            ["--nnodes", nnodes, "--global-batch", "8", "--micro-batch", "2", "--steps", "4"];
        let fixed = ["--threads", "1", "--seed", "3", "--dropout", "0.1"];
        let args: Vec<&str> = args.iter().chain(&more).chain(&fixed).copied().collect();
        let (kept, again) = (bert(&args), bert(&[&args[..], &["--recompute"]].concat()));
        assert_eq!(kept.losses(), again.losses(), "{precision}");
        assert!(kept.weights() == again.weights(), "{precision}");
    }
}

#[test]
fn each_step_says_where_its_time_went() {
    let run = run(&["--nnodes", "2"]);
    let keys = [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "step_ms",
        "data_wait_ms",
        "forward_ms",
        "backward_ms",
        "exposed_comm_ms",
        "optimizer_ms",
        "tokens_per_s",
    ];
    for step in &run.steps {
        for key in keys {
            assert!(step[key].as_f64().is_some_and(f64::is_finite), "{key} in {step}");
        }
    }
    assert!(run.steps.iter().all(|step| step["skipped"] == 0), "{:?}", run.steps);
    let summary = &run.summary["summary"];
    assert_eq!(summary["skipped"], 0);
    assert!(summary["stragglers"].is_array(), "{summary}");
    assert_eq!(summary["world_size"], 2);
    assert!(run.folder.path().join("out").read_dir().is_ok_and(|files| files
        .filter_map(Result::ok)
        .any(|file| file.path().extension().is_some_and(|e| e == "svg" || e == "png"))));
}
