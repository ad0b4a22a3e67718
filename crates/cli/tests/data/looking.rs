//! inspect, verify and bench.

use std::fs;

use crate::support::{damage, phalanx, prepared, refused, text};

#[test]
fn inspect_shows_what_is_there_and_some_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = prepared(folder.path());
    let index = phalanx_data::format::TokenIndex::read(&target).unwrap();
    assert!(index.shards.len() > 1, "several shards");
    let out = phalanx(&["data", "inspect", text(&target), "--sample", "3"]).good();
    for part in [
        "phalanx-tokens 2, by phalanx-data",
        "documents    4\n",
        "cls 2",
        "sep 3",
        &index.fingerprint.to_string(),
        "tokens-00001.safetensors",
        "token 0: the king loves",
        "[SEP]\n",
    ] {
        assert!(out.contains(part), "{part} in:\n{out}");
    }

    let json = phalanx(&["data", "inspect", text(&target), "--json", "--sample", "2"]).json();
    assert_eq!(json["tokens"], index.token_count);
    assert_eq!(json["vocab_size"], index.vocab_size);
    assert_eq!(json["special"]["mask"], 4);
    assert_eq!(json["fingerprint"], index.fingerprint.to_string());
    assert_eq!(json["shards"].as_array().unwrap().len(), index.shards.len());
    let samples = json["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2);
    let (at, len) = (&samples[1]["at"], samples[1]["tokens"].as_array().unwrap().len() as u64);
    assert_eq!(at.as_u64().unwrap() + len, index.token_count, "the last one is at the end");
}

#[test]
fn verify_finds_good_data_good_and_names_every_damaged_block() {
    let folder = tempfile::tempdir().unwrap();
    let target = prepared(folder.path());
    let out = phalanx(&["data", "verify", text(&target)]).good();
    assert!(out.contains("all good"), "{out}");

    damage(&target.join("tokens-00000.safetensors"), 9000);
    damage(&target.join("tokens-00001.safetensors"), 5000);
    let found = phalanx(&["data", "verify", text(&target), "--threads", "2"]);
    assert_eq!(found.code, Some(65), "{found:?}");
    for part in [
        "tokens-00000.safetensors is damaged at offset 0 (block 0)",
        "tokens-00001.safetensors is damaged at offset 0 (block 0)",
        "2 of them are damaged",
    ] {
        assert!(found.out.contains(part), "{part} in:\n{}", found.out);
    }
    let quiet = phalanx(&["data", "verify", text(&target), "--json", "--quiet"]);
    let json: serde_json::Value = serde_json::from_str(&quiet.out).unwrap();
    assert_eq!((quiet.code, json["good"].as_bool()), (Some(65), Some(false)));
    assert_eq!(json["damage"].as_array().unwrap().len(), 2);

    let list = target.join("damage.json");
    assert!(!list.exists(), "only when it is asked for");
    assert_eq!(phalanx(&["data", "verify", text(&target), "--record"]).code, Some(65));
    let recorded: serde_json::Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
    assert_eq!(recorded["blocks"][1]["file"], "tokens-00001.safetensors");
    assert_eq!(recorded["blocks"].as_array().unwrap().len(), 2);
    for (shard, at) in [("tokens-00000.safetensors", 9000), ("tokens-00001.safetensors", 5000)] {
        damage(&target.join(shard), at);
    }
    phalanx(&["data", "verify", text(&target), "--record"]).good();
    assert!(!list.exists(), "nothing is damaged any more");
    assert_eq!(quiet.err, "");
}

#[test]
fn verify_compares_the_tokenizer_and_lists_no_damage_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = prepared(folder.path());
    let (tokenizer, list) = (target.join("tokenizer.json"), target.join("damage.json"));
    let right = fs::read(&tokenizer).unwrap();
    fs::write(&tokenizer, [&right[..], b" "].concat()).unwrap();
    let verify = || phalanx(&["data", "verify", text(&target), "--record"]);
    let found = verify();
    assert_eq!(found.code, Some(65), "{found:?}");
    let told = "tokenizer.json is not the tokenizer of the tokens beside it";
    assert!(found.out.contains(told) && found.out.contains("copy the one"), "{}", found.out);
    assert!(!list.exists() && found.err.lines().all(|line| !line.contains("error")), "{found:?}");
    // Blocks that are damaged besides are listed, and they alone.
    damage(&target.join("tokens-00001.safetensors"), 5000);
    assert_eq!(verify().code, Some(65));
    let recorded: serde_json::Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
    assert_eq!(recorded["blocks"].as_array().unwrap().len(), 1, "{recorded}");
    assert!(recorded["lost"].is_null(), "{recorded}");
    damage(&target.join("tokens-00001.safetensors"), 5000);
    fs::write(&tokenizer, right).unwrap();
    verify().good();
    // Who trains needs none.
    fs::remove_file(&tokenizer).unwrap();
    verify().good();
}

#[test]
fn verify_names_files_that_are_gone_or_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let target = prepared(folder.path());
    fs::remove_file(target.join("tokens-00000.safetensors")).unwrap();
    let shard = target.join("tokens-00001.safetensors");
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(5000).unwrap();
    let found = phalanx(&["data", "verify", text(&target)]);
    assert_eq!(found.code, Some(65));
    assert!(found.out.contains("cannot open"), "{}", found.out);
    assert!(found.out.contains("has 5000 bytes, expected"), "{}", found.out);
}

#[test]
fn bench_measures_the_loader() {
    let folder = tempfile::tempdir().unwrap();
    let target = prepared(folder.path());
    let run = |extra: &[&str]| {
        let mut args = vec!["data", "bench", text(&target), "--seconds", "0.2", "--seq-len", "64"];
        args.extend_from_slice(extra);
        phalanx(&args)
    };
    for access in ["read", "map"] {
        let json = run(&["--json", "--batch", "8", "--access", access, "--threads", "0"]).json();
        let sequences = json["sequences_per_second"].as_f64().unwrap();
        let tokens = json["tokens_per_second"].as_f64().unwrap();
        assert!(sequences > 100.0, "{json}");
        assert!((tokens / sequences - 64.0).abs() < 0.01, "{json}");
        assert!(json["first_batch_ms"].as_f64().unwrap() > 0.0, "{json}");
        assert!(json["data_wait_us_mean"].as_f64().unwrap() > 0.0, "{json}");
    }
    let out = run(&["--threads", "2"]).good();
    assert!(out.contains("sequences/s") && out.contains("data wait"), "{out}");
    assert!(out.contains("order        shuffled: distance 1.0"), "{out}");
    let blocks = run(&["--order", "b64x4", "--json"]).json();
    assert_eq!(blocks["order"], "b64x4");
    // The order does not depend on batches and threads.
    let hash = |more: &[&str]| run(&[&["--json"], more].concat()).json()["order_hash"].clone();
    let shuffled = hash(&[]);
    assert_eq!(hash(&["--threads", "3", "--batch", "5"]), shuffled);
    assert_ne!(hash(&["--seed", "1"]), shuffled);
    assert_ne!(blocks["order_hash"], shuffled);
    assert!(out.contains(&format!("order hash   {}", shuffled.as_str().unwrap())), "{out}");
    let distance = blocks["order_distance"].as_f64().unwrap();
    assert!(distance > 0.1 && distance < 0.9, "{blocks}");
    let sequential = run(&["--order", "sequential"]).good();
    assert!(sequential.contains("sequential: distance 0.00, entropy 0.00"), "{sequential}");
}

#[test]
fn bad_input_is_one_message_and_a_code() {
    let folder = tempfile::tempdir().unwrap();
    let path = text(folder.path());
    let missing = format!("{path}/none");
    for command in ["inspect", "verify", "bench"] {
        refused(&["data", command, path], 65, "is not a prepared folder");
        refused(&["data", command, &missing], 65, "does not exist");
        refused(&["data", command], 64, "DIR");
    }
    fs::write(folder.path().join("index.json"), "{\"format\":").unwrap();
    refused(&["data", "verify", path], 65, "error: ");
    refused(&["data", "bench", path, "--seconds", "-1"], 64, "above 0");

    let data = folder.path().join("text");
    fs::create_dir(&data).unwrap();
    let target = prepared(&data);
    refused(&["data", "bench", text(&target), "--seq-len", "2"], 64, "sequence_len is 2");
    let many = ["data", "bench", text(&target), "--batch", "100000000"];
    refused(&many, 65, "fewer than the global batch");
    assert_eq!(phalanx(&["data", "--help"]).code, Some(0));
    assert_eq!(phalanx(&["data", "nonsense"]).code, Some(64));
}

/// Two documents of 1500 and 2500 tokens, byte by byte as the format is published.
fn megatron(folder: &std::path::Path) -> std::path::PathBuf {
    let mut idx = b"MMIDIDX\0\0".to_vec();
    idx.extend(1_u64.to_le_bytes());
    idx.push(8);
    idx.extend([2_u64, 3].iter().flat_map(|count| count.to_le_bytes()));
    idx.extend([1500_i32, 2500].iter().flat_map(|length| length.to_le_bytes()));
    idx.extend([0_i64, 3000].iter().flat_map(|offset| offset.to_le_bytes()));
    idx.extend([0_i64, 1, 2].iter().flat_map(|first| first.to_le_bytes()));
    let bin: Vec<u8> = (0..4000_u16).flat_map(|at| (at % 777).to_le_bytes()).collect();
    fs::write(folder.join("my.corpus.idx"), idx).expect("write the index");
    fs::write(folder.join("my.corpus.bin"), bin).expect("write the tokens");
    folder.join("my.corpus")
}

#[test]
fn megatrons_files_are_shown_checked_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = megatron(folder.path());
    let index = folder.path().join("my.corpus.idx");
    for path in [&prefix, &index] {
        let shown = phalanx(&["data", "inspect", text(path), "--sample", "2"]).good();
        for part in ["tokens       4 000\n", "documents    2\n", "token 0: [0, 1, 2", "103, 114]\n"]
        {
            let part = part.replace("103, 114]", "113, 114]");
            assert!(shown.contains(&part), "{part} in:\n{shown}");
        }
    }
    let json = phalanx(&["data", "verify", text(&prefix), "--json"]).json();
    assert_eq!((&json["largest_token"], &json["tokens"]), (&776.into(), &4000.into()));
    let args = ["data", "bench", text(&prefix), "--seq-len", "64", "--seconds", "0.1", "--json"];
    let timed = phalanx(&args).json();
    assert!(timed["sequences_per_second"].as_f64().unwrap() > 100.0, "{timed}");
    refused(&[&args[..], &["--samples", "masked"]].concat(), 64, "--samples next");
    refused(&["data", "verify", text(&prefix), "--record"], 64, "no checksums");
    fs::write(folder.path().join("my.corpus.bin"), [0; 5000]).unwrap();
    refused(&["data", "verify", text(&prefix)], 65, "sequence 1, 2500 tokens at 3000");
}
