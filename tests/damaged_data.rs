//! Training on data of which a block is damaged: an error that says where, or, once the damage is listed, training on what is left.

#[path = "support/mod.rs"]
mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use phalanx::data::convert::{prepare, PrepareOptions};
use phalanx::data::damage::{record_damage, verify};
use phalanx::data::progress::Silent;
use serde_json::{json, Value};
use support::{bert, example, Owned};

/// A text of a few blocks of tokens, prepared.
fn prepared(folder: &Path) -> PathBuf {
    let text = folder.join("text");
    fs::create_dir(&text).expect("a folder of our own");
    // Words of four letters that follow each other in no simple order.
    let letter = |number: usize| char::from(b'a' + u8::try_from(number % 13).expect("below 13"));
    let word = |number: usize| [1, 13, 169, 2197].map(|place| letter(number / place));
    let words = (0..900_000_usize).map(|at| String::from_iter(word(at * at % 20_011)));
    let lines: Vec<String> = words.collect();
    fs::write(text.join("words.txt"), lines.join(" ")).expect("written");
    let options = PrepareOptions { vocab_size: 2000, ..Default::default() };
    prepare(&text, &options, &Silent).expect("it can be prepared").folder
}

fn flip_a_bit(folder: &Path) {
    let entries = fs::read_dir(folder).expect("our own").flatten().map(|entry| entry.path());
    let is_shard = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors");
    let shard = entries.filter(is_shard).min().expect("a shard");
    let file = OpenOptions::new().read(true).write(true).open(shard).expect("open");
    assert!(file.metadata().expect("a file").len() > 2 << 20, "more than two blocks");
    let (mut byte, at) = ([0], (1 << 20) + 77_777);
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 4], at).expect("damage");
}

/// The tiny model on that data.
fn config(folder: &Path, data: &Path, on_damage: &str) -> PathBuf {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bert_tiny.json");
    let shipped = fs::read_to_string(shipped).expect("shipped");
    let mut config: Value = serde_json::from_str(&shipped).expect("JSON");
    config["data"]["path"] = json!(data);
    config["data"]["on_damage"] = json!(on_damage);
    let path = folder.join(format!("{on_damage}.json"));
    fs::write(&path, config.to_string()).expect("written");
    path
}

fn flags(config: &Path, ranks: &str) -> Vec<String> {
    let config = config.display().to_string();
    let flags = ["--config", &config, "--nnodes", ranks, "--threads", "1", "--global-batch", "16"];
    flags.iter().chain(&["--steps", "12"]).map(|flag| (*flag).to_owned()).collect()
}

#[test]
fn damaged_data_ends_the_run_or_once_listed_is_left_out_alike_on_all_ranks() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = prepared(folder.path());
    flip_a_bit(&data);

    let fail = config(folder.path(), &data, "fail");
    let mut command = Command::new(example("bert_large"));
    command.current_dir(folder.path()).args(flags(&fail, "2"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Owned::start(&mut command).finish(Duration::from_secs(120));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(said.contains("block 1") && said.contains(".safetensors"), "{said}");
    assert!(said.contains("phalanx data verify"), "what to do: {said}");

    let found = verify(&data, None, &Silent).expect("it can be verified");
    assert_eq!(found.blocks.len(), 1);
    record_damage(&data, &found).expect("the list");
    let skip = config(folder.path(), &data, "skip");
    let left_out = |ranks: &str| {
        let run = bert(&flags(&skip, ranks));
        let counts = run.steps.iter().map(|step| step["left_out"].as_u64().expect("a count"));
        let counts: Vec<u64> = counts.collect();
        let total: u64 = counts.iter().sum();
        assert!(total > 0 && total < 12 * 16, "{total}");
        let report = String::from_utf8_lossy(&run.output.stdout).into_owned();
        let line = format!("{total} damaged samples were left out");
        assert!(report.contains(&line), "{report}");
        assert!(run.losses().iter().all(|loss| loss.is_finite()));
        (counts, run.losses())
    };
    let [(alone, losses), (both, losses_of_both)] = ["1", "2"].map(left_out);
    assert_eq!(alone, both, "the same samples whatever the number of ranks");
    for (one, two) in losses.iter().zip(&losses_of_both) {
        // As in bert_parity.
        assert!((one - two).abs() < 1e-5 * one.abs(), "{one} and {two}");
    }
}
