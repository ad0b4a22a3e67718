//! The sections `optimizer` and `ddp`: what is checked of them, and what the library is told.

use phalanx_ddp_core::{Buffers, DdpOptions, Zero};
use tch::Kind;

use super::bert::config::{Config, Hook};
use super::bert::machine::Estimate;
use super::bert::train;
use super::{check, parse};

#[test]
fn what_a_schedule_heeds_is_checked_and_nothing_else() {
    let optimizer = |fields: &str| format!(r#"{{ "optimizer": {{ "lr": 1e-3, {fields} }} }}"#);
    let wrong = |fields: &str, parts: &[&str]| check(&optimizer(fields), parts);
    wrong(r#""min_lr": 2e-3"#, &["optimizer.min_lr is 0.002", "optimizer.lr (0.001)"]);
    wrong(r#""min_lr": -1"#, &["optimizer.min_lr is -1"]);
    wrong(r#""schedule": "polynomial", "power": -2"#, &["optimizer.power is -2"]);
    let stable = r#""schedule": "warmup_stable_decay""#;
    wrong(stable, &["optimizer.decay_steps is 0", "at least 1"]);
    let long = format!(r#"{stable}, "warmup_steps": 20, "decay_steps": 81"#);
    wrong(&long, &["warmup_steps (20)", "decay_steps (81)", "train.steps (100)"]);
    wrong(r#""schedule": "exponential""#, &["unknown variant `exponential`", "`cosine`"]);
    for fine in [
        r#""schedule": "constant", "min_lr": 5, "power": -2, "decay_steps": 1000"#,
        r#""schedule": "cosine", "min_lr": 1e-4, "power": -2"#,
        r#""schedule": "polynomial", "power": 0.5, "decay_steps": 1000"#,
        // Cut short, as by --steps.
        r#""schedule": "linear", "warmup_steps": 1000"#,
    ] {
        parse(&optimizer(fine)).unwrap();
    }
}

#[test]
fn what_a_rule_heeds_is_checked_and_nothing_else() {
    let optimizer = |fields: &str| format!(r#"{{ "optimizer": {{ {fields} }} }}"#);
    let wrong = |fields: &str, parts: &[&str]| check(&optimizer(fields), parts);
    wrong(r#""rule": "adagrad""#, &["optimizer.rule: unknown variant `adagrad`", "`adam`, `sgd`"]);
    wrong(r#""rule": "adam", "beta1": -0.1"#, &["optimizer.beta1 is -0.1"]);
    wrong(r#""rule": "sgd", "momentum": -1"#, &["optimizer.momentum is -1"]);
    wrong(r#""rule": "sgd", "nesterov": true"#, &["optimizer.nesterov", "optimizer.momentum is 0"]);
    wrong(r#""rule": "sgd", "nesterov": 1"#, &["optimizer.nesterov: ", "expected a boolean"]);
    wrong(r#""rule": "muon", "momentum": 1"#, &["optimizer.momentum is 1", "below 1"]);
    wrong(r#""rule": "muon", "adamw_lr": 0"#, &["optimizer.adamw_lr is 0", "above 0"]);
    wrong(r#""rule": "muon", "adjust_lr": "no""#, &["unknown variant `no`", "`match_rms_adamw`"]);
    wrong(r#""rule": "lars", "trust_coefficient": 0"#, &["optimizer.trust_coefficient is 0"]);
    wrong(r#""rule": "lion", "beta1": 1"#, &["optimizer.beta1 is 1"]);
    for fine in [
        r#""rule": "sgd", "momentum": 0.9, "nesterov": true, "beta1": 2, "eps": 0"#,
        // A file for sgd under --optimizer adam, for one.
        r#""rule": "adam", "momentum": -1, "nesterov": true"#,
        r#""rule": "adafactor", "momentum": -1, "beta1": 2, "eps": 0"#,
        r#""rule": "lion", "eps": 0, "trust_coefficient": 0"#,
        r#""rule": "muon", "trust_coefficient": 0, "adamw_lr": 3e-4, "adjust_lr": "original""#,
    ] {
        parse(&optimizer(fine)).unwrap();
    }
}

#[test]
fn the_ddp_section_becomes_the_options_of_the_library() {
    let text = r#"{ "ddp": { "zero": 1, "bucket_mib": 2, "first_bucket_mib": 0.5, "static_graph": true,
        "buffers": "mean", "non_finite": "skip_step", "gradient_kind": "bf16", "fingerprint_interval": 7 } }"#;
    let expected = DdpOptions {
        zero: Zero::One,
        bucket_bytes: vec![1 << 19, 2 << 20],
        static_graph: true,
        buffers: Buffers::Mean,
        non_finite: phalanx_ddp_core::NonFinite::SkipStep,
        gradient_kind: Some(Kind::BFloat16),
        fingerprint_interval: 7,
        ..DdpOptions::default()
    };
    assert_eq!(parse(text).unwrap().ddp.options(), expected);
    assert_eq!(Config::default().ddp.options(), DdpOptions::default());
    let unused = r#"{ "ddp": { "find_unused_parameters": true, "gradient_kind": null } }"#;
    let options = parse(unused).unwrap().ddp.options();
    assert!(options.find_unused_parameters && options.gradient_kind.is_none());
}

#[test]
fn wrong_settings_of_ddp_are_named() {
    let wrong =
        |field: &str, parts: &[&str]| check(&format!(r#"{{ "ddp": {{ {field} }} }}"#), parts);
    wrong(r#""buffers": "none""#, &["ddp.buffers: unknown variant `none`", "`rank_zero`, `mean`"]);
    wrong(r#""non_finite": "skip""#, &["ddp.non_finite: unknown variant `skip`", "`skip_step`"]);
    wrong(r#""gradient_kind": "fp8""#, &["ddp.gradient_kind: unknown variant `fp8`", "`bf16`"]);
    wrong(r#""fingerprint_interval": -1"#, &["ddp.fingerprint_interval: ", "-1"]);
    wrong(r#""static_graph": "yes""#, &["ddp.static_graph: ", "expected a boolean"]);
    let both = r#""find_unused_parameters": true, "static_graph": true"#;
    wrong(both, &["ddp.find_unused_parameters and ddp.static_graph", "turn the first off"]);
}

#[test]
fn hooks_are_words_with_settings() {
    for (text, hook) in [
        ("none", Hook::None),
        ("noop", Hook::Noop),
        ("bf16", Hook::Bf16),
        ("fp16", Hook::Fp16),
        ("int8", Hook::Int8),
        ("topk:0.01", Hook::TopK(0.01)),
        ("powersgd:4:100", Hook::PowerSgd(4, 100)),
    ] {
        let config = parse(&format!(r#"{{ "ddp": {{ "hook": "{text}" }} }}"#)).unwrap();
        assert_eq!((config.ddp.hook, config.ddp.hook.to_string().as_str()), (hook, text));
    }
    let rank = parse(r#"{ "ddp": { "hook": "powersgd:2" } }"#).unwrap().ddp.hook;
    assert_eq!(rank, Hook::PowerSgd(2, 10));
    let wrong = |hook: &str, parts: &[&str]| {
        check(&format!(r#"{{ "ddp": {{ "hook": "{hook}" }} }}"#), parts);
    };
    wrong("int4", &["ddp.hook: \"int4\" is no hook; take none, noop, bf16", "powersgd:RANK"]);
    wrong("bf16:2", &["\"bf16:2\" is no hook"]);
    wrong("topk:0", &["ddp.hook: \"topk:0\": the share must be above 0 and at most 1"]);
    wrong("powersgd:0", &["\"powersgd:0\": rank (above 0)"]);
    wrong("powersgd:2:x", &["\"powersgd:2:x\"", "whole numbers"]);
}

#[test]
#[expect(clippy::float_cmp, reason = "values that are exact in f64")]
fn every_schedule_of_a_configuration_ends_where_it_says() {
    let rates = |name: &str, warmup_steps: u64, steps: [u64; 3]| {
        let text = format!(
            r#"{{ "optimizer": {{ "lr": 2, "min_lr": 0.5, "power": 2, "decay_steps": 4, "schedule": "{name}",
                "warmup_steps": {warmup_steps} }}, "train": {{ "steps": 12 }} }}"#
        );
        let config = parse(&text).unwrap();
        let schedule = train::schedule(&config.optimizer, config.train.steps).unwrap();
        steps.map(|step| schedule.lr(step))
    };
    assert_eq!(rates("linear", 4, [3, 8, 12]), [2.0, 1.25, 0.5]);
    assert_eq!(rates("cosine", 4, [3, 8, 12]), [2.0, 1.25, 0.5]);
    assert_eq!(rates("polynomial", 4, [3, 8, 12]), [2.0, 0.875, 0.5]);
    assert_eq!(rates("constant", 4, [3, 8, 12]), [2.0, 2.0, 2.0]);
    assert_eq!(rates("warmup_stable_decay", 4, [7, 10, 12]), [2.0, 1.25, 0.5]);
    assert_eq!(rates("linear", 16, [3, 7, 11]), [0.5, 1.0, 1.5]);
}

#[test]
fn rules_and_kinds_of_gradients_show_in_the_estimate() {
    let of = |text: &str| Estimate::new(&parse(text).expect("valid"), 1, 2);
    let states = |fields: &str| {
        let estimate = of(&format!(r#"{{ "optimizer": {{ {fields} }} }}"#));
        estimate.optimizer / estimate.parameters
    };
    assert_eq!(states(r#""rule": "adam""#), 2);
    assert_eq!(states(r#""rule": "lamb""#), 2);
    assert_eq!(states(r#""rule": "lion""#), 1);
    assert_eq!(states(r#""rule": "lars""#), 1);
    assert_eq!(states(r#""rule": "lars", "momentum": 0"#), 0);
    assert_eq!(states(r#""rule": "sgd""#), 0);
    assert_eq!(states(r#""rule": "sgd", "momentum": 0.9"#), 1);
    let half = of(r#"{ "ddp": { "gradient_kind": "bf16" } }"#);
    assert_eq!(half.gradients, half.parameters / 2);
    let kept = of(r#"{ "ddp": { "hook": "topk:0.1" } }"#);
    assert_eq!(kept.gradients, 2 * kept.parameters);
}

#[test]
fn recomputed_layers_show_in_the_estimate() {
    let activations = |recompute: bool, layers: u64| {
        let text = format!(
            r#"{{ "model": {{ "num_hidden_layers": {layers} }}, "train": {{ "recompute": {recompute} }} }}"#
        );
        Estimate::new(&parse(&text).expect("valid"), 1, 2).activations
    };
    // Of each layer its input, and the inside of one: two samples of 128 tokens, 768 f32 wide.
    let grows = |recompute| activations(recompute, 13) - activations(recompute, 12);
    assert_eq!(grows(true), 2 * 128 * 768 * 4);
    assert!(activations(true, 12) < activations(false, 12));
    assert!(activations(true, 1) >= activations(false, 1));
}

#[test]
fn what_is_saved_is_checked() {
    let section = |fields: &str| format!(r#"{{ "checkpoint": {{ {fields} }} }}"#);
    let wrong = |fields: &str, parts: &[&str]| check(&section(fields), parts);
    wrong(r#""every_steps": 5"#, &["checkpoint.folder is missing", "--checkpoint DIR"]);
    wrong(r#""resume": "required""#, &["checkpoint.folder is missing"]);
    wrong(r#""folder": "ck", "keep_last": 0"#, &["checkpoint.keep_last is 0", "at least 1"]);
    wrong(r#""folder": "ck", "keep_every": 0"#, &["checkpoint.keep_every is 0", "null"]);
    wrong(r#""resume": "maybe""#, &["checkpoint.resume: unknown variant `maybe`", "`auto`"]);
    let fine = r#""folder": "ck", "every_steps": 5, "keep_last": 3, "keep_every": 100"#;
    let options = parse(&section(fine)).unwrap().checkpoint.options();
    assert_eq!((options.every_steps, options.keep.last, options.keep.every), (5, 3, Some(100)));
}
