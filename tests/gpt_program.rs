//! The GPT example as a program: a run goes on on another mesh, and what cannot be is said once.

mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use support::{example, run_of, Owned, Run};
use tch::Tensor;

const COMMON: [&str; 12] = [
    "--threads",
    "1",
    "--global-batch",
    "8",
    "--dropout",
    "0.1",
    "--attention-dropout",
    "0",
    "--sample",
    "6",
    "--seed",
    "5",
];

fn gpt(args: &[&str]) -> Run {
    run_of("gpt", &[&COMMON[..], args].concat())
}

/// Saved by two stages of two parts of the matrices each; gone on with by ranks with parts of sequences, and then by two stages with other layers.
#[test]
fn a_checkpoint_of_one_mesh_is_gone_on_with_on_another() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = folder.path().join("checkpoints");
    let at = at.to_str().expect("a path of letters");
    let one = gpt(&["--nnodes", "1", "--micro-batches", "4", "--steps", "6"]);
    let first = gpt(&[
        "--nnodes",
        "4",
        "--tp",
        "2",
        "--pp",
        "2",
        "--stages",
        "1,3",
        "--micro-batches",
        "4",
        "--steps",
        "2",
        "--checkpoint",
        at,
    ]);
    let second = gpt(&[
        "--nnodes",
        "4",
        "--dp",
        "2",
        "--cp",
        "2",
        "--zero",
        "3",
        "--steps",
        "4",
        "--checkpoint",
        at,
        "--resume",
        "required",
    ]);
    let third = gpt(&[
        "--nnodes",
        "2",
        "--pp",
        "2",
        "--stages",
        "4,0",
        "--micro-batches",
        "4",
        "--steps",
        "6",
        "--checkpoint",
        at,
        "--resume",
        "required",
    ]);
    let losses = [first.losses(), second.losses(), third.losses()].concat();
    for (ours, theirs) in losses.iter().zip(one.losses()) {
        assert!((ours - theirs).abs() < 1e-5 * theirs, "{losses:?} and {:?}", one.losses());
    }
    assert_eq!((first.steps.len(), second.steps.len(), third.steps.len()), (2, 2, 2));
    let read = |run: &Run| {
        let path = run.folder.path().join("out/model.safetensors");
        let mut all = Tensor::read_safetensors(path).expect("weights");
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    for ((name, ours), (of, theirs)) in read(&third).iter().zip(&read(&one)) {
        assert_eq!(name, of);
        let worst = (ours - theirs).abs().max().double_value(&[]);
        assert!(worst < 1e-4, "{name} is off by {worst}");
    }
    let printed = |run: &Run| String::from_utf8_lossy(&run.output.stdout).into_owned();
    let text = printed(&second);
    assert!(text.contains("resume step 2") && text.contains("sample ["), "{text}");
    let text = printed(&third);
    assert!(text.contains("stages embedding + 4 blocks | head (4,0)"), "{text}");
    assert_eq!(first.summary["summary"]["stage_blocks"], serde_json::json!([1, 3]));
    assert_eq!(second.summary["summary"]["mesh"], "dp_shard 2 × cp 2 = 4 ranks");
}

/// No rank is started, so that the error is there once.
#[test]
fn what_cannot_be_cut_is_one_error_with_what_can() {
    let cases: [(&[&str], &str); 7] = [
        (
            &["--nnodes", "3", "--tp", "3"],
            "num_attention_heads 4 cannot be divided by tp 3; possible: 1, 2, 4",
        ),
        (&["--nnodes", "7", "--pp", "7"], "7 stages are more than model.num_hidden_layers (4)"),
        (
            &["--nnodes", "2", "--pp", "2", "--stages", "2,3"],
            "are 5 blocks and model.num_hidden_layers is 4",
        ),
        (&["--nnodes", "2", "--pp", "2", "--stages", "half"], "there are auto, even, measured"),
        (&["--nnodes", "4", "--tp", "3"], "does not fill a world of 4; possible: "),
        (
            &["--nnodes", "3", "--cp", "3"],
            "sequences of 64 tokens cannot be cut into 3 equal parts",
        ),
        (&["--nnodes", "2", "--ep", "2"], "a model of experts"),
    ];
    for (args, expected) in cases {
        let mut command = Command::new(example("gpt"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = Owned::start(&mut command).finish(Duration::from_secs(60));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("error")).collect();
        assert_eq!(errors.len(), 1, "{args:?}: {text}");
        assert!(errors[0].contains(expected), "{args:?}: {text}");
        assert_eq!(output.status.code(), Some(64), "{args:?}");
    }
}
