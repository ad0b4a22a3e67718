//! The BERT example's configuration, batch arithmetic and memory check: what bad input is told.
#![expect(clippy::shadow_unrelated, reason = "one case after the other, of the same names")]
#![expect(clippy::cast_precision_loss, reason = "millions of parameters are compared coarsely")]

#[path = "../../examples/bert/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod bert;
mod sections;

use std::path::Path;

use bert::batching::{Batching, Wanted};
use bert::config::{Config, NonFinite, Precision, Resume, Rule, SHIPPED};
use bert::flags::Flags;
use bert::machine::{self, Estimate, Free};
use bert::{data, failure, plot};
use clap::Parser as _;
use phalanx_comm::environment::NcclSettings;
use phalanx_data::progress::Silent;
use tch::{Device, Kind, Tensor};

fn parse(text: &str) -> Result<Config, String> {
    let config = Config::parse(text, Path::new("a.json")).map_err(|e| e.to_string())?;
    config.validate("a.json").map_err(|e| e.to_string())?;
    Ok(config)
}

/// The message for `text` has every part in `parts`.
fn check(text: &str, parts: &[&str]) {
    let message = parse(text).expect_err("the configuration is wrong");
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    assert!(!message.contains('\n'), "{message:?} is more than one line");
}

#[test]
fn what_is_left_out_takes_its_default() {
    let config = parse(r#"{ "model": { "hidden_size": 96 } }"#).unwrap();
    assert_eq!(config.model.hidden_size, 96);
    assert_eq!(config.model.num_hidden_layers, 12);
    assert_eq!(config.optimizer, Config::default().optimizer);
    assert_eq!(parse("{}").unwrap(), Config::default());
}

#[test]
fn a_config_json_of_transformers_is_a_model_section() {
    let text = r#"{ "model": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": false, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522 } }"#;
    assert_eq!(parse(text).unwrap().model, Config::default().model);
}

#[test]
fn shipped_configurations_are_valid_and_of_the_sizes_they_say() {
    let millions = |index: usize| {
        let (name, text) = SHIPPED[index];
        let config = parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        config.model.parameter_count() as f64 / 1e6
    };
    assert!((335.0..337.0).contains(&millions(3)), "large: {}", millions(3));
    assert!((109.0..111.0).contains(&millions(2)), "base: {}", millions(2));
    assert!((11.0..11.5).contains(&millions(1)), "small: {}", millions(1));
    assert!(millions(0) < 2.0, "tiny: {}", millions(0));
}

#[test]
fn errors_name_the_file_the_field_and_the_place() {
    check(
        r#"{ "optimizer": { "lr": "fast" } }"#,
        &["a.json: optimizer.lr: invalid type: string \"fast\"", "line 1 column"],
    );
    check(
        r#"{ "model": { "hiden_size": 4 } }"#,
        &["a.json: model.hiden_size: unknown field `hiden_size`", "`hidden_size`"],
    );
    check(r#"{ "trian": {} }"#, &["unknown field `trian`", "`train`"]);
    check("{ \"model\": {\n  \"hidden_size\": 4,,\n} }", &["a.json: ", "line 2 column 20"]);
    check(r#"{ "model": {"#, &["a.json: ", "EOF", "line 1"]);
    check(r#"{} {}"#, &["a.json: trailing characters", "line 1 column 4"]);
    check("", &["a.json: EOF"]);
    check(r#"{ "train": { "precision": "fp8" } }"#, &["train.precision", "`fp32`", "`bf16`"]);
    check(r#"{ "train": { "steps": -1 } }"#, &["train.steps", "-1"]);
}

#[test]
fn values_out_of_range_are_named() {
    check(r#"{ "model": { "hidden_size": 100 } }"#, &["hidden_size (100)", "heads (12)", "change"]);
    check(r#"{ "model": { "hidden_act": "relu" } }"#, &["hidden_act", "\"gelu\""]);
    check(r#"{ "model": { "num_hidden_layers": 0 } }"#, &["num_hidden_layers is 0"]);
    check(r#"{ "model": { "hidden_dropout_prob": 1.0 } }"#, &["hidden_dropout_prob is 1"]);
    check(r#"{ "model": { "vocab_size": 100 } }"#, &["data.vocab_size (8192)", "(100)"]);
    check(r#"{ "data": { "sequence_length": 1000 } }"#, &["sequence_length is 1000", "(512)"]);
    check(r#"{ "optimizer": { "lr": 0 } }"#, &["optimizer.lr is 0"]);
    check(r#"{ "optimizer": { "beta2": 1 } }"#, &["optimizer.beta2 is 1"]);
    check(r#"{ "train": { "steps": 0 } }"#, &["train.steps is 0"]);
    check(r#"{ "train": { "micro_batch": 0 } }"#, &["train.micro_batch is 0"]);
    check(r#"{ "ddp": { "zero": 4 } }"#, &["ddp.zero is 4"]);
    check(r#"{ "ddp": { "dead_after_s": 0.1 } }"#, &["ddp.dead_after_s is 0.1", "at least 0.5"]);
}

#[test]
fn a_missing_file_is_named_with_those_that_there_are() {
    let error = Config::read(Path::new("/nowhere/x.json")).unwrap_err().to_string();
    assert!(
        error.contains("/nowhere/x.json") && error.contains("configs/bert_tiny.json"),
        "{error}"
    );
}

fn wanted(numbers: [usize; 3]) -> Wanted {
    let [global_batch, micro_batch, accumulate] = numbers.map(|n| (n > 0).then_some(n));
    Wanted { global_batch, micro_batch, accumulate }
}

fn cut(world_size: usize, flags: [usize; 3], file: [usize; 3]) -> Result<[usize; 3], String> {
    Batching::resolve(world_size, wanted(flags), wanted(file))
        .map(|b| [b.global_batch, b.micro_batch, b.accumulate])
        .map_err(|error| error.to_string())
}

#[test]
fn batches_add_up_whatever_is_given() {
    for world in [1, 2, 3, 4, 7] {
        assert_eq!(cut(world, [0, 0, 0], [0, 0, 0]), Ok([8 * world, 8, 1]));
        assert_eq!(cut(world, [0, 0, 0], [0, 2, 0]), Ok([2 * world, 2, 1]));
        assert_eq!(cut(world, [0, 3, 2], [0, 8, 0]), Ok([6 * world, 3, 2]));
        assert_eq!(cut(world, [0, 0, 2], [0, 8, 0]), Ok([16 * world, 8, 2]));
        assert_eq!(cut(world, [12 * world, 4, 0], [0, 8, 0]), Ok([12 * world, 4, 3]));
        assert_eq!(cut(world, [12 * world, 0, 3], [0, 8, 0]), Ok([12 * world, 4, 3]));
        assert_eq!(cut(world, [12 * world, 4, 3], [0, 8, 0]), Ok([12 * world, 4, 3]));
        // The file's micro-batch is a limit when the flags give the global batch alone.
        assert_eq!(cut(world, [12 * world, 0, 0], [0, 8, 0]), Ok([12 * world, 6, 2]));
        assert_eq!(cut(world, [4 * world, 0, 0], [0, 8, 0]), Ok([4 * world, 4, 1]));
    }
}

#[test]
fn a_global_batch_that_does_not_divide_is_cut_as_evenly_as_can_be() {
    assert_eq!(cut(3, [32, 0, 0], [0, 8, 0]), Ok([32, 6, 2]));
    assert_eq!(cut(3, [32, 4, 0], [0, 8, 0]), Ok([32, 4, 3]));
    assert_eq!(cut(3, [0, 0, 0], [16, 4, 0]), Ok([16, 4, 2]));
}

#[test]
fn batches_that_do_not_add_up_say_why() {
    let error = cut(4, [32, 4, 4], [0, 8, 0]).unwrap_err();
    assert!(error.contains("= 64") && error.contains("global batch 32"), "{error}");
    let error = cut(4, [3, 0, 0], [0, 8, 0]).unwrap_err();
    assert!(error.contains("command line: global batch 3 is too small for 4 ranks"), "{error}");
    let error = cut(4, [8, 0, 4], [0, 8, 0]).unwrap_err();
    assert!(error.contains("4 ranks × 4 micro-batches") && error.contains("16"), "{error}");
    let error = cut(4, [0, 0, 0], [2, 0, 0]).unwrap_err();
    assert!(error.contains("configuration: "), "{error}");
}

fn estimate(name: &str, world_size: usize) -> Estimate {
    let (_, text) = SHIPPED.iter().find(|(n, _)| *n == name).expect("a shipped configuration");
    Estimate::new(&parse(text).expect("valid"), world_size, 2)
}

#[test]
fn too_little_memory_names_the_need_what_is_free_and_what_would_fit() {
    let large = estimate("configs/bert_large.json", 4);
    let smaller =
        ["configs/bert_base.json", "configs/bert_small.json"].map(|n| (n, estimate(n, 4)));
    let enough = Free { bytes: 4 * large.total(), control_group: None };
    machine::check(large, 4, &enough, &smaller).unwrap();
    let free = Free { bytes: 4 << 30, control_group: None };
    let message = machine::check(large, 4, &free, &smaller).unwrap_err().to_string();
    for part in ["too little memory: 4 ranks", "this machine has 4.00 GiB free", "bert_small.json"]
    {
        assert!(message.contains(part), "{message}");
    }
    assert!(message.contains("does not fit either") && message.contains(", fits)"), "{message}");
    let free = Free { bytes: 1 << 30, control_group: Some("/sys/fs/cgroup/job".into()) };
    let message = machine::check(large, 4, &free, &smaller).unwrap_err().to_string();
    assert!(message.contains("the control group /sys/fs/cgroup/job leaves 1.00 GiB"), "{message}");
}

#[test]
fn sharding_the_optimizer_state_shows_in_the_estimate() {
    let one = estimate("configs/bert_large.json", 1);
    let four = estimate("configs/bert_large.json", 4);
    assert_eq!(one.optimizer, 2 * one.parameters);
    assert_eq!(four.optimizer, one.optimizer / 4);
}

/// Writes files of a pretended system under a folder.
fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        let path = root.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
        std::fs::write(path, text).expect("a file");
    }
    root
}

const MEMINFO: (&str, &str) =
    ("proc/meminfo", "MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:     800 kB\n");

#[test]
fn free_memory_is_the_least_of_machine_and_control_groups() {
    let root = system(&[MEMINFO, ("proc/self/cgroup", "0::/a/b\n")]);
    let free = machine::free(root.path()).unwrap();
    assert_eq!(free, Free { bytes: 800 * 1024, control_group: None });

    // Version 2: the outer group has the tighter limit; its cached files count as free.
    let root = system(&[
        MEMINFO,
        ("proc/self/cgroup", "0::/a/b\n"),
        ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ("sys/fs/cgroup/a/b/memory.current", "5000\n"),
        ("sys/fs/cgroup/a/memory.max", "100000\n"),
        ("sys/fs/cgroup/a/memory.current", "60000\n"),
        ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 10000\n"),
    ]);
    let free = machine::free(root.path()).unwrap();
    assert_eq!(free.bytes, 50_000);
    assert!(free.control_group.unwrap().ends_with("sys/fs/cgroup/a"));

    // Version 1, inside a container: the path is the host's, only the root of the mount is there.
    let root = system(&[
        MEMINFO,
        ("proc/self/cgroup", "9:cpu:/docker/x\n4:memory:/docker/x\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "90000\n"),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "50000\n"),
        ("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 20000\n"),
    ]);
    assert_eq!(machine::free(root.path()).unwrap().bytes, 60_000);
}

fn flags(args: &[&str]) -> Result<Flags, clap::Error> {
    Flags::try_parse_from(std::iter::once("bert_large").chain(args.iter().copied()))
}

#[test]
fn flags_come_before_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.json");
    std::fs::write(&path, r#"{ "train": { "steps": 7, "seed": 5, "micro_batch": 2 } }"#).unwrap();
    let path = path.to_str().unwrap();
    let settings = flags(&["--config", path]).unwrap().settings().unwrap();
    assert_eq!((settings.config.train.steps, settings.config.train.seed), (7, 5));
    assert_eq!(settings.name, "mine");
    assert_eq!(settings.batching(4).unwrap().global_batch, 8);
    let args = [
        "--config",
        path,
        "--steps",
        "9",
        "--dropout",
        "0",
        "--zero",
        "1",
        "--lr",
        "0.5",
        "--no-shuffle",
        "--precision",
        "bf16",
        "--optimizer",
        "sgd",
        "--non-finite",
        "skip_step",
        "--global-batch",
        "16",
        "--checkpoint",
        "ck",
        "--save-every",
        "3",
        "--resume",
        "required",
    ];
    let settings = flags(&args).unwrap().settings().unwrap();
    let Config { model, data, optimizer, train, ddp, checkpoint, nccl } = &settings.config;
    assert_eq!(checkpoint.folder.as_deref(), Some("ck".as_ref()));
    assert_eq!((checkpoint.every_steps, checkpoint.resume), (3, Resume::Required));
    assert_eq!(nccl, &NcclSettings::default(), "no flag changes it");
    assert_eq!((train.steps, train.seed, ddp.zero, data.shuffle), (9, 5, 1, false));
    assert!(model.hidden_dropout_prob + model.attention_probs_dropout_prob < f64::MIN_POSITIVE);
    assert_eq!((optimizer.rule, train.precision), (Rule::Sgd, Precision::Bf16));
    assert_eq!(ddp.non_finite, NonFinite::SkipStep);
    assert_eq!(settings.batching(4).unwrap().accumulate, 2);
}

#[test]
fn the_nccl_section_holds_nccls_variables() {
    let text = r#"{ "nccl": { "NCCL_DEBUG": "INFO", "NCCL_ALGO": "^Tree,PAT" } }"#;
    let nccl = parse(text).unwrap().nccl;
    assert_eq!(nccl, [("NCCL_DEBUG", "INFO"), ("NCCL_ALGO", "^Tree,PAT")].into_iter().collect());
    // What was read is what is written, for metrics and logs.
    let written = serde_json::to_string(&nccl).unwrap();
    assert_eq!(serde_json::from_str::<NcclSettings>(&written).unwrap(), nccl);
}

#[test]
fn wrong_nccl_settings_are_named() {
    let debug = r#"{ "nccl": { "NCCL_DEBUG": "LOUD" } }"#;
    check(debug, &["nccl.NCCL_DEBUG: \"LOUD\"", "VERSION, WARN, INFO, TRACE"]);
    check(r#"{ "nccl": { "dbug": "INFO" } }"#, &["\"dbug\" is not one of", "NCCL_DEBUG"]);
    check(r#"{ "nccl": { "NCCL_ALGO": "Rings" } }"#, &["nccl.NCCL_ALGO: \"Rings\"", "Ring, Tree"]);
    let crossed = r#"{ "nccl": { "NCCL_MIN_NCHANNELS": "9", "NCCL_MAX_NCHANNELS": "8" } }"#;
    check(crossed, &["9 is more than NCCL_MAX_NCHANNELS, 8"]);
    check(r#"{ "nccl": { "NCCL_IB_DISABLE": 1 } }"#, &["nccl.NCCL_IB_DISABLE: ", "a string"]);
}

#[test]
fn a_wrong_flag_is_told_from_a_wrong_file() {
    let error = |args: &[&str]| flags(args).unwrap().settings().unwrap_err();
    let wrong = error(&["--zero", "4"]);
    assert_eq!(
        failure::message(&wrong),
        "command line: ddp.zero is 4; stages are 0 (nothing is sharded), 1 (optimizer state), 2 (gradients, too) \
         and 3 (parameters, too)"
    );
    assert_eq!(failure::exit_code(&wrong), failure::USAGE);
    assert_eq!(failure::exit_code(&error(&["--config", "/nowhere.json"])), failure::IO);
    assert!(flags(&["--precision", "fp8"]).is_err());
    assert!(flags(&["--non-finite", "skip"]).is_err());
    assert!(flags(&["--data", "a", "--batches", "b"]).is_err());
}

/// A file of samples of `length` tokens, the largest of which is `id_max`.
fn batches(folder: &Path, length: i64, id_max: i64) -> String {
    let path = folder.join(format!("{length}-{id_max}.safetensors"));
    let mut ids = Tensor::ones([4, length], (Kind::Int64, Device::Cpu));
    let ids = ids.put_(&Tensor::from_slice(&[0_i64]), &Tensor::from_slice(&[id_max]), false);
    Tensor::write_safetensors(&[("input_ids", &ids), ("labels", &ids)], &path).expect("written");
    path.to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn a_run_on_fixed_batches_needs_no_more_of_the_model_than_they_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("small.json");
    // Fewer positions than data.sequence_length, fewer tokens than data.vocab_size.
    let model = r#"{ "model": { "max_position_embeddings": 64, "vocab_size": 997 } }"#;
    std::fs::write(&config, model).unwrap();
    let config = config.to_str().unwrap();
    let refused = flags(&["--config", config]).unwrap().settings().unwrap_err();
    assert!(refused.to_string().contains("data.sequence_length is 128"), "{refused}");
    let open = |length, id_max| {
        let file = batches(folder.path(), length, id_max);
        let settings = flags(&["--config", config, "--batches", &file]).unwrap().settings();
        data::open(&settings.unwrap().config, &Silent).map(|source| source.description)
    };
    let description = open(64, 996).unwrap();
    assert!(description.starts_with("4 fixed samples of 64 tokens"), "{description}");
    for (error, parts) in [
        (open(65, 996).unwrap_err(), ["samples of 65 tokens", "max_position_embeddings is 64"]),
        (open(64, 997).unwrap_err(), ["holds token 997", "model.vocab_size is 997"]),
    ] {
        let message = failure::message(&error);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        assert_eq!(failure::exit_code(&error), failure::USAGE, "{message}");
    }
}

#[test]
fn prepared_data_brings_its_vocabulary_along() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let text = format!(r#"{{ "model": {{ "vocab_size": 997 }}, "data": {{ "path": "{data}" }} }}"#);
    check(&text, &["data.vocab_size (8192)", "(997)"]);
    std::fs::write(folder.path().join("index.json"), "{}").unwrap();
    parse(&text).unwrap();
}

/// Nothing outlives the process of this test; a wrong argument needs no record.
#[test]
fn a_failed_group_says_how_to_keep_a_record_of_its_operations() {
    let aborted = || phalanx_comm::Error::Aborted { rank: 1, reason: "no paper".into() };
    let through_ddp = phalanx_ddp_core::Error::Comm(aborted());
    for error in [anyhow::Error::from(aborted()), through_ddp.into()] {
        let message = failure::message(&error.context("step 7"));
        assert!(message.starts_with("step 7: rank 1 aborted the group: no paper"), "{message}");
        assert!(message.contains(" | help: ") && message.contains("phalanx flight"), "{message}");
    }
    let argument = phalanx_comm::Error::SelfMessage { op: "send", rank: 0 };
    assert!(!failure::message(&argument.into()).contains("help"));
}

#[test]
fn the_plot_shows_every_point_and_is_closed() {
    let points: Vec<_> = (1..=30).map(|i| (f64::from(i), 10.0 / f64::from(i))).collect();
    let svg = plot::loss_curve("a <b> & c", &points);
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<circle").count(), 30);
    assert!(svg.contains("a &lt;b&gt; &amp; c"));
    for empty in [&[][..], &[(1.0, f64::NAN)], &[(1.0, 2.0)]] {
        assert!(!plot::loss_curve("", empty).contains("NaN"));
    }
}
