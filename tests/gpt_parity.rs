//! The networks of the GPT example against transformers' numbers (`scripts/gpt_fixtures.py`).

#![expect(clippy::print_stdout, reason = "how close the numbers are is worth seeing")]
#![expect(clippy::float_cmp, reason = "the same bits")]

#[path = "../examples/gpt/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod gpt;
#[path = "gpt/training.rs"]
mod training;

use serde_json::Value;
use tch::Tensor;
use training::{apart, config, fixture, Job, Trained};

struct Case {
    expected: Value,
    job: Job,
}

fn case(name: &str) -> Case {
    let text = std::fs::read_to_string(fixture("gpt_losses.json")).expect("the numbers");
    let document: Value = serde_json::from_str(&text).expect("JSON");
    let expected = document["cases"][name].clone();
    let mut optimizer = document["optimizer"].clone();
    optimizer["schedule"] = "constant".into();
    let sections = serde_json::json!({ "model": expected["model"], "optimizer": optimizer });
    let mut config = config(&sections.to_string());
    config.train.steps = 10;
    let greedy = expected["greedy"].as_array().expect("prompts");
    let prompts = greedy.iter().map(|one| numbers(&one["prompt"])).collect();
    let first = format!("gpt_{}_first.safetensors", name.trim_end_matches("_tied"));
    let job = Job {
        config,
        global_batch: 4,
        // The balance of experts is that of a micro-batch, and there of the whole batch.
        micro_batches: if name == "mixtral" { 1 } else { 2 },
        first_weights: Some(fixture(&first)),
        prompts,
        new_tokens: numbers::<i64>(&greedy[0]["tokens"]).len(),
    };
    Case { expected, job }
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).expect("numbers")
}

impl Case {
    /// From the weights to a token's loss some n = 1000 operations follow one another, and three times as many to its gradients. Roundings of 2^-24 are as good as random,
    /// so that a token's loss is off by less than 5 √n 2^-24 = 1e-5 of it, and the mean of 96 tokens by a tenth of that; ten steps add up.
    fn check(&self) -> Trained {
        let trained = self.job.run(1);
        let losses: Vec<f64> = numbers(&self.expected["losses"]);
        let norms: Vec<f64> = numbers(&self.expected["grad_norms"]);
        let worst = |ours: &[f64], theirs: &[f64]| {
            ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max)
        };
        let (of_loss, of_norm) = (worst(&trained.losses, &losses), worst(&trained.norms, &norms));
        println!("losses within {of_loss:.1e}, gradient norms within {of_norm:.1e}");
        assert_eq!(trained.losses.len(), losses.len());
        assert!(of_loss < 1e-5, "{:?} and {losses:?}", trained.losses);
        assert!(of_norm < 1e-4, "{:?} and {norms:?}", trained.norms);
        let greedy = self.expected["greedy"].as_array().expect("prompts");
        for (ours, theirs) in trained.greedy.iter().zip(greedy) {
            assert_eq!(ours, &numbers::<i64>(&theirs["tokens"]), "greedy tokens");
        }
        assert_eq!(trained.greedy.len(), greedy.len());
        trained
    }
}

/// Ten steps of at most lr = 5e-3 each; roundings of gradients move them by some 1e-6 of that and more where a gradient is near Adam's eps of 1e-5.
fn check_weights(trained: &Trained, name: &str) {
    let theirs = Tensor::read_safetensors(fixture(name)).expect("transformers' weights");
    let (worst, at) = apart(&trained.weights, &theirs.into_iter().collect());
    println!("weights within {worst:.1e} ({at})");
    assert!(worst < 1e-4, "{at} is off by {worst:.1e}");
}

#[test]
fn ten_steps_of_gpt2_are_those_of_transformers() {
    check_weights(&case("gpt2").check(), "gpt_gpt2_last.safetensors");
}

#[test]
fn ten_steps_of_llama_are_those_of_transformers() {
    check_weights(&case("llama").check(), "gpt_llama_last.safetensors");
}

#[test]
fn ten_steps_of_llama_with_a_tied_head_are_those_of_transformers() {
    let trained = case("llama_tied").check();
    assert!(!trained.weights.contains_key("lm_head.weight"));
}

#[test]
fn ten_steps_of_mixtral_are_those_of_transformers() {
    check_weights(&case("mixtral").check(), "gpt_mixtral_last.safetensors");
}

#[test]
fn recomputed_blocks_change_no_bit() {
    for name in ["gpt2", "llama", "mixtral"] {
        let kept = case(name);
        let mut again = case(name).job;
        again.config.train.recompute = true;
        let (kept, again) = (kept.job.run(1), again.run(1));
        assert_eq!(kept.losses, again.losses, "{name}");
        assert_eq!(apart(&kept.weights, &again.weights).0, 0.0, "{name}");
    }
}
