//! The networks of the GPT example against transformers' numbers (`scripts/gpt_fixtures.py`).

#![expect(clippy::print_stdout, reason = "how close the numbers are is worth seeing")]
#![expect(clippy::float_cmp, reason = "the same bits")]

#[path = "../examples/gpt/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod gpt;
#[path = "gpt/training.rs"]
#[expect(dead_code, reason = "the tests use a part of it")]
mod training;

use gpt::config::Precision;
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
        assert!(trained.losses.iter().chain(&trained.norms).all(|number| number.is_finite()));
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

/// Under autocast, on one rank and on two that have parts of the matrices or of the sequences. Some sixteen products round one behind another, to 2^-9 of
/// their results each: a thirtieth of the loss at most.
#[test]
fn bf16_trains_to_the_losses_of_f32_but_for_roundings() {
    for name in ["gpt2", "llama", "mixtral"] {
        for (tp, cp) in [(1, 1), (2, 1), (1, 2)] {
            let Case { mut job, expected } = case(name);
            let losses: Vec<f64> = numbers(&expected["losses"]);
            (job.config.train.precision, job.config.train.steps) = (Precision::Bf16, 2);
            (job.config.mesh.tp, job.config.mesh.cp) = (tp, cp);
            let found = job.run(tp * cp).losses;
            for (ours, theirs) in found.iter().zip(&losses) {
                let apart = (ours - theirs).abs() / theirs;
                assert!(apart < 1.0 / 30.0, "{name}, tp {tp}, cp {cp}: {found:?} and {losses:?}");
                // It is not f32 that was computed in.
                assert!(apart > 0.0, "{name}, tp {tp}, cp {cp}: {found:?}");
            }
        }
    }
}

#[test]
fn the_files_of_transformers_are_model_sections() {
    for (keys, parameters) in [
        (
            r#""activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
            "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
            "task_specific_params": { "text-generation": { "do_sample": true, "max_length": 50 } }, "vocab_size": 50257"#,
            124_439_808,
        ),
        (
            r#""activation_function": "gelu_new", "add_cross_attention": false, "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "dtype": "float32", "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": null, "n_layer": 12,
            "n_positions": 1024, "pad_token_id": null, "reorder_and_upcast_attn": false, "resid_pdrop": 0.1,
            "scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true, "summary_activation": null,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
            "tie_word_embeddings": true, "transformers_version": "5.0.0", "use_cache": true, "vocab_size": 50257"#,
            124_439_808,
        ),
        (
            r#""architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16",
            "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "mlp_bias": false, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": null, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
            "tie_word_embeddings": false, "transformers_version": "5.0.0", "use_cache": true, "vocab_size": 32000"#,
            6_738_415_616_u64,
        ),
    ] {
        let model = config(&format!(r#"{{ "model": {{ {keys} }} }}"#)).model;
        assert_eq!(model.parameter_count(), parameters, "{keys}");
    }
    let other = r#"{ "model": { "scale_attn_by_inverse_layer_idx": true } }"#;
    let refused = config(other).validate("test.json").expect_err("not supported");
    assert!(format!("{refused:#}").contains("scale_attn_by_inverse_layer_idx"), "{refused:#}");
}
