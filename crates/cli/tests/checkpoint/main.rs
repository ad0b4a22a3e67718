//! `phalanx checkpoint …` as its user runs it: the real program, its output and its exit codes.

#[path = "../data/support.rs"]
#[expect(dead_code, reason = "what the tests of `data` need besides")]
mod support;

use std::path::{Path, PathBuf};

use phalanx_checkpoint::{
    Alone, Checkpoint, Dtype, Extent, Saver, SaverOptions, Snapshot, Strided,
};
use phalanx_checkpoint::{Tensors, Weights};
use support::{damage, phalanx, refused, text};

/// Steps 10 and 20: a model, and the two pieces of an optimizer's state.
fn saved(folder: &Path) -> PathBuf {
    let root = folder.join("ckpt");
    let mut saver = Saver::new(&root, SaverOptions::default()).expect("a saver");
    for step in [10_u8, 20] {
        let weights: Vec<u8> =
            (0..12_u8).flat_map(|n| (f32::from(n) + f32::from(step)).to_le_bytes()).collect();
        let bias = [step; 3];
        let mut snapshot = Snapshot::new();
        snapshot.whole("model/w", Dtype::F32, &[3, 4], &weights);
        snapshot.whole("model/b", Dtype::U8, &[3], &bias);
        for start in [0, 2] {
            let part = Extent::new(&[start, 0], &[if start == 0 { 2 } else { 1 }, 4]);
            let content = Strided::new(&weights, &[4, 1], 0, 4);
            snapshot.part("optimizer/m", Dtype::F32, &[3, 4], part, content);
        }
        snapshot.values(serde_json::json!({ "epoch": step / 10, "seed": 7 }));
        saver.save(&mut Alone, step.into(), &snapshot).expect("save");
        saver.finish(&mut Alone).expect("finish");
    }
    root
}

fn shard(root: &Path, step: &str) -> PathBuf {
    root.join(step).join("shard-00000-of-00001.safetensors")
}

#[test]
fn inspect_shows_a_folder_a_checkpoint_and_weights() {
    let folder = tempfile::tempdir().unwrap();
    let root = saved(folder.path());
    std::fs::create_dir(root.join("step-00000030.tmp-0")).unwrap();
    std::fs::create_dir(root.join("step-00000040")).unwrap();
    let out = phalanx(&["checkpoint", "inspect", text(&root), "--tensors"]).good();
    for part in [
        "step-00000010  4.1 KiB, 1 shards, complete\n",
        "step-00000030.tmp-0  incomplete",
        "step-00000040  damaged: ",
        "model/w      F32   [3, 4]  48 bytes\n",
        "optimizer/m  F32   [3, 4]  48 bytes, 2 pieces\n",
    ] {
        assert!(out.contains(part), "{part} in:\n{out}");
    }
    let one = root.join("step-00000020");
    let newest = phalanx(&["checkpoint", "inspect", text(&one)]).good();
    for part in ["step         20\n", "tensors      3 with 27 elements\n", "\"epoch\":2"] {
        assert!(newest.contains(part), "{part} in:\n{newest}");
    }
    let json = phalanx(&["checkpoint", "inspect", text(&one), "--json"]).json();
    assert_eq!((json["step"].as_u64(), json["tensors"][2]["pieces"].as_u64()), (Some(20), Some(2)));
    let all = phalanx(&["checkpoint", "inspect", text(&root), "--json"]).json();
    let states: Vec<_> =
        all["checkpoints"].as_array().unwrap().iter().map(|c| &c["state"]).collect();
    assert_eq!(states, ["complete", "complete", "incomplete", "damaged"]);
    let nothing = folder.path().join("nothing");
    refused(&["checkpoint", "inspect", text(&nothing)], 65, "neither a checkpoint");
}

#[test]
fn verify_names_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let root = saved(folder.path());
    let out = phalanx(&["checkpoint", "verify", text(&root)]).good();
    assert!(out.contains("step-00000020: 1 files, 1 blocks") && out.contains("all good"), "{out}");

    damage(&shard(&root, "step-00000010"), 4100);
    phalanx(&["checkpoint", "verify", text(&root)]).good();
    let found = phalanx(&["checkpoint", "verify", text(&root), "--all"]);
    assert_eq!(found.code, Some(65), "{found:?}");
    for part in ["shard-00000-of-00001.safetensors is damaged in block 0", "tensor `", "expected "]
    {
        assert!(found.out.contains(part), "{part} in:\n{}", found.out);
    }
    damage(&root.join("step-00000020/manifest.json"), 30);
    let json = phalanx(&["checkpoint", "verify", text(&root.join("step-00000020")), "--json"]);
    let told: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((json.code, told["good"].as_bool()), (Some(65), Some(false)));
    assert!(told["checkpoints"][0]["damage"][0].as_str().unwrap().contains("its checksum"));
    refused(&["checkpoint", "verify", text(folder.path())], 65, "neither a checkpoint");
}

#[test]
fn convert_writes_weights_and_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let root = saved(folder.path());
    let (hf, small) = (folder.path().join("hf"), folder.path().join("small"));
    let args = ["checkpoint", "convert", text(&root), text(&hf), "--prefix", "model/"];
    let out = phalanx(&[&args[..], &["--dtype", "bf16"]].concat()).good();
    assert!(out.ends_with("hf/model.safetensors\n"), "{out}");
    let weights = Weights::open(&hf).unwrap();
    assert_eq!(weights.names(), ["b", "w"]);
    refused(&["checkpoint", "verify", text(&hf)], 64, "has no checksums");
    assert_eq!(weights.spec("w").unwrap().dtype, Dtype::BF16);
    refused(&args, 65, "is there already");

    let files =
        phalanx(&["checkpoint", "convert", text(&hf), text(&small), "--max-shard-bytes", "10"])
            .good();
    assert!(
        files.contains("model-00002-of-00002.safetensors") && files.ends_with("index.json\n"),
        "{files}"
    );
    assert_eq!(
        Weights::open(&small).unwrap().read_whole("w").unwrap(),
        weights.read_whole("w").unwrap()
    );

    let wide = folder.path().join("wide");
    let path =
        phalanx(&["checkpoint", "convert", text(&root), text(&wide), "--shards", "3"]).good();
    let written = Checkpoint::open(path.trim_end()).unwrap();
    assert_eq!((written.step(), written.files().count()), (20, 3));
    refused(
        &["checkpoint", "convert", text(&hf), text(&wide), "--shards", "3"],
        64,
        "not a checkpoint",
    );
    refused(
        &["checkpoint", "convert", text(&root), text(&wide), "--prefix", "x/"],
        64,
        "begins with `x/`",
    );
    refused(
        &["checkpoint", "convert", text(&root), text(&wide), "--shards", "0"],
        64,
        "invalid value",
    );
}

#[test]
fn diff_finds_what_differs_and_what_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let root = saved(folder.path());
    let (ten, twenty) = (root.join("step-00000010"), root.join("step-00000020"));
    assert_eq!(phalanx(&["checkpoint", "diff", text(&root), text(&twenty)]).good(), "the same\n");
    let found = phalanx(&["checkpoint", "diff", text(&ten), text(&twenty)]);
    assert_eq!(found.code, Some(1), "{found:?}");
    let expected = "model/b: 3 elements differ, by 1e1 at most\n\
                    model/w: 12 elements differ, by 1e1 at most\n\
                    optimizer/m: 12 elements differ, by 1e1 at most\n\
                    values /epoch: 1, 2\n";
    assert_eq!(found.out, expected);

    let hf = folder.path().join("w.safetensors");
    phalanx(&["checkpoint", "convert", text(&twenty), text(&hf), "--prefix", "model/"]).good();
    phalanx(&["checkpoint", "diff", text(&twenty), text(&hf), "--prefix", "model/"]).good();
    let json = phalanx(&["checkpoint", "diff", text(&ten), text(&hf), "--json"]);
    assert_eq!(json.code, Some(1));
    let told: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(told["tensors"].as_array().unwrap().len(), 5);
    assert_eq!(told["tensors"][0]["only"], "right");
}
