//! What goes wrong at the user's end: each mistake gets one clear message, an exit code that is
//! not 0, and leaves nothing running.

#[path = "support/mod.rs"]
mod support;
mod trial;

use std::fs;
use std::io::BufRead as _;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use trial::{signal, Trial};

const TINY: &str = "configs/bert_tiny.json";
const SOON: Duration = Duration::from_secs(60);
const RUN: Duration = Duration::from_secs(180);

#[test]
fn a_configuration_that_is_not_there_is_named() {
    let ended = Trial::start(&["--config", "no_such.json", "--nnodes", "2"], SOON).end();
    ended.assert_failed_saying(&["no_such.json", "configs/bert_tiny.json"]);
}

#[test]
fn a_configuration_that_is_not_json_is_shown_with_line_and_column() {
    let ended = with_config("{\n  \"model\": {,\n}");
    ended.assert_failed_saying(&["config.json", "line 2 column"]);
}

#[test]
fn an_unknown_field_is_named_by_its_path() {
    let ended = with_config("{\"optimizer\": {\"learning_rate\": 1e-3}}");
    ended.assert_failed_saying(&["optimizer", "learning_rate", "config.json"]);
}

#[test]
fn a_field_of_another_type_is_named_by_its_path() {
    let ended = with_config("{\"model\": {\"hidden_size\": \"wide\"}}");
    ended.assert_failed_saying(&["model.hidden_size", "wide"]);
}

#[test]
fn a_wrong_nccl_setting_is_named_before_any_rank_starts() {
    for (setting, parts) in [
        (
            r#""NCCL_DEBUG": "LOUD""#,
            ["config.json: nccl.NCCL_DEBUG: ", "VERSION, WARN, INFO, TRACE"],
        ),
        (r#""NCCL_P2P_LEVEL": "FAR""#, ["config.json: nccl.NCCL_P2P_LEVEL: ", "NVL"]),
        (r#""NCCL_PROTO": "LL256""#, ["config.json: nccl.NCCL_PROTO: ", "LL, LL128, Simple"]),
        (r#""NCCL_IB_TIMEOUT": "32""#, ["config.json: nccl.NCCL_IB_TIMEOUT: ", "between 1 and 31"]),
        (
            r#""NCCL_SOCKET_IFNAME": "=none0""#,
            ["nccl.NCCL_SOCKET_IFNAME: ", "no interface \"none0\"; it has: "],
        ),
        (r#""NCCL_IB_HCA": "none_5""#, ["nccl.NCCL_IB_HCA: ", "no InfiniBand adapter \"none_5\""]),
        (
            r#""NCCL_TOPO_FILE": "/none/topo.xml""#,
            ["nccl.NCCL_TOPO_FILE: ", "/none/topo.xml: No such"],
        ),
        (
            r#""NCCL_DEBUG_FILE": "/none/nccl.%h""#,
            ["nccl.NCCL_DEBUG_FILE: ", "there is no folder /none"],
        ),
    ] {
        let config = format!(r#"{{"ddp": {{"backend": "nccl"}}, "nccl": {{{setting}}}}}"#);
        let ended = with_config(&config);
        ended.assert_failed_saying(&parts);
        // The launcher's first line, and a rank's prefix.
        for unwanted in ["emulating 2 nodes", "[rank "] {
            assert!(!ended.output.contains(unwanted), "{setting}: {unwanted}:\n{}", ended.output);
        }
    }
}

/// Settings for the cluster's adapters do not keep the same file from a machine without GPUs.
#[test]
fn nccl_settings_for_other_machines_do_not_disturb_the_host_backend() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = fs::read_to_string(TINY).expect("the tiny configuration");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["nccl"] = serde_json::json!({ "NCCL_SOCKET_IFNAME": "=none0", "NCCL_IB_HCA": "none_5" });
    fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    let arguments = ["--config", "{folder}/config.json", "--backend", "host", "--nnodes", "2"];
    let more = ["--steps", "1", "--output", "{folder}/output"];
    let ended = Trial::start_in(folder, &[&arguments[..], &more[..]].concat(), RUN).end();
    assert!(ended.status.success(), "{}", ended.output);
}

#[test]
fn weights_of_other_shapes_are_listed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let weights = "tests/fixtures/bert_tiny_weights.safetensors";
    let config = fs::read_to_string(TINY).expect("the tiny configuration");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["model"]["hidden_size"] = 48.into();
    config["model"]["num_attention_heads"] = 4.into();
    fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    let arguments =
        ["--config", "{folder}/config.json", "--init-weights", weights, "--nnodes", "2"];
    let ended = Trial::start_in(folder, &arguments, SOON).end();
    ended.assert_failed_saying(&[weights, "bert.embeddings.LayerNorm.bias is [64]", "[48]"]);
}

#[test]
fn weights_that_are_not_safetensors_are_named() {
    let ended = tiny(&["--init-weights", "Cargo.toml"], SOON).end();
    ended.assert_failed_saying(&["Cargo.toml", "safetensors"]);
}

#[test]
fn a_data_folder_that_is_not_there_is_named() {
    let ended = tiny(&["--data", "/no/such/folder"], SOON).end();
    ended.assert_failed_saying(&["/no/such/folder"]);
}

#[test]
fn a_data_folder_without_text_is_named() {
    let ended = tiny(&["--data", "{folder}"], SOON).end();
    ended.assert_failed_saying(&["text"]);
}

#[test]
fn text_that_is_not_utf_8_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("latin.txt"), b"caf\xe9 noir").expect("written");
    let arguments = ["--config", TINY, "--nnodes", "2", "--data", "{folder}"];
    let ended = Trial::start_in(folder, &arguments, SOON).end();
    ended.assert_failed_saying(&["latin.txt", "UTF-8", "byte 3"]);
}

/// After the first step weights are so large that nothing is finite.
const FAR_TOO_FAST: [&str; 6] = ["--steps", "4", "--lr", "1e30", "--warmup-steps", "0"];

#[test]
fn gradients_that_are_not_finite_end_the_run_with_rank_step_and_parameter() {
    let ended = tiny_with(&FAR_TOO_FAST, &[]).end();
    let advice = "step 2: gradients are not finite; lower --lr, raise --warmup-steps, or take --non-finite skip_step";
    ended.assert_failed_saying(&[advice, "elements of the gradient of ", "in exchange 2"]);
}

#[test]
fn steps_that_are_skipped_are_counted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kept = folder.path().join("kept.jsonl");
    let metrics = kept.to_str().expect("a path in UTF-8");
    let ended =
        tiny_with(&FAR_TOO_FAST, &["--non-finite", "skip_step", "--metrics", metrics]).end();
    assert!(ended.status.success(), "{}", ended.output);
    assert!(ended.output.contains("3 steps were skipped"), "{}", ended.output);
    let text = fs::read_to_string(&kept).expect("metrics");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let skipped: Vec<_> = lines[..4].iter().map(|step| step["skipped"].as_u64()).collect();
    assert_eq!(skipped, [0, 1, 1, 1].map(Some));
    let summary = &lines[4]["summary"];
    assert_eq!(summary["skipped"], 3);
    assert!(summary["stragglers"].is_array(), "{summary}");
}

#[test]
fn no_ranks_at_all_are_refused() {
    let ended = Trial::start(&["--config", TINY, "--nnodes", "0"], SOON).end();
    ended.assert_failed_saying(&["--nnodes 0"]);
}

#[test]
fn a_flag_that_does_not_exist_is_named() {
    let ended = tiny(&["--learning-rate", "1"], SOON).end();
    ended.assert_failed_saying(&["--learning-rate", "--help"]);
}

#[test]
fn batches_that_are_not_there_are_named() {
    let ended = tiny(&["--batches", "no_such.safetensors"], SOON).end();
    ended.assert_failed_saying(&["no_such.safetensors"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let ended = tiny(&["--master-port", &port], SOON).end();
    ended.assert_failed_saying(&[&port, "in use"]);
}

/// Every ten seconds; the launcher that started this rank knows nothing of phalanx.
#[test]
fn a_rank_that_waits_for_others_says_for_whom() {
    let port = phalanx_comm::testing::free_ports(1).to_string();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(support::example("bert_large"));
    command.args(["--config", "configs/bert_tiny.json", "--steps", "1", "--output"]);
    command.arg(folder.path().join("out"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.envs([("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")]);
    command.envs([("LOCAL_WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1")]);
    command.env("MASTER_PORT", port).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut waiting = support::Owned::start(&mut command);
    let stderr = waiting.0.stderr.take().expect("piped");
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::BufReader::new(stderr).lines().map_while(Result::ok) {
            drop(sender.send(line));
        }
    });
    let mut said = String::new();
    let end = Instant::now() + Duration::from_secs(60);
    while !said.contains("waiting for ranks 1,2 (joined 1/3)") {
        let left = end.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left);
        said += &line.unwrap_or_else(|_| panic!("it does not say so:\n{said}"));
        said.push('\n');
    }
    waiting.signal("-KILL");
}

#[test]
fn a_model_that_does_not_fit_into_memory_is_refused_before_it_starts() {
    let ended = with_config(
        "{\"model\": {\"hidden_size\": 16384, \"num_hidden_layers\": 96, \
         \"num_attention_heads\": 128, \"intermediate_size\": 65536}}",
    );
    ended.assert_failed_saying(&["GiB", "bert_small"]);
}

#[test]
fn a_rank_killed_in_mid_step_ends_the_run_and_is_named() {
    let mut trial = long_run();
    trial.wait_for_lines("metrics.jsonl", 3);
    signal("KILL", trial.rank_pid(2));
    let ended = trial.end();
    ended.assert_failed_saying(&["rank 2", "signal 9"]);
}

#[test]
fn an_interrupt_ends_all_ranks() {
    let mut trial = long_run();
    trial.wait_for_lines("metrics.jsonl", 2);
    signal("INT", trial.pid());
    assert!(!trial.end().status.success());
}

#[test]
fn a_killed_launcher_takes_its_ranks_with_it() {
    let mut trial = long_run();
    trial.wait_for_lines("metrics.jsonl", 2);
    assert!(trial.processes().len() >= 5, "a launcher and four ranks: {:?}", trial.processes());
    signal("KILL", trial.pid());
    assert!(!trial.end().status.success());
}

/// The tiny configuration on two nodes with more arguments.
fn tiny(more: &[&str], deadline: Duration) -> Trial {
    let arguments = [&["--config", TINY, "--nnodes", "2", "--steps", "2"], more].concat();
    Trial::start(&arguments, deadline)
}

/// The tiny configuration on two nodes, to its end.
fn tiny_with(steps: &[&str], more: &[&str]) -> Trial {
    let arguments = ["--config", TINY, "--nnodes", "2", "--output", "{folder}/output"];
    Trial::start(&[&arguments[..], steps, more].concat(), RUN)
}

/// Far more steps than it will be let to make.
fn long_run() -> Trial {
    let arguments = ["--config", TINY, "--nnodes", "4", "--steps", "100000"];
    let metrics = ["--metrics", "{folder}/metrics.jsonl", "--output", "{folder}/output"];
    Trial::start(&[&arguments[..], &metrics[..]].concat(), RUN)
}

/// A run with this text as its configuration.
fn with_config(text: &str) -> trial::Ended {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("config.json"), text).expect("written");
    Trial::start_in(folder, &["--config", "{folder}/config.json", "--nnodes", "2"], SOON).end()
}
