//! The GPT example as a program: a run goes on on another mesh, and what cannot be is said once.

mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use support::{example, run_of, Owned, Run};
use tch::Tensor;

const COMMON: [&str; 10] =
    ["--threads", "1", "--global-batch", "8", "--dropout", "0.1", "--sample", "6", "--seed", "5"];

fn gpt(args: &[&str]) -> Run {
    run_of("gpt", &[&COMMON[..], args].concat())
}

/// A run of four steps on one rank, and one on two meshes of two steps each: losses and weights, and what the last one printed.
fn check_goes_on(model: &[&str], alone: &[&str], meshes: [&[&str]; 2]) -> (Run, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = folder.path().join("checkpoints");
    let saves = ["--checkpoint", at.to_str().expect("a path of letters")];
    let one = gpt(&[model, alone, &["--steps", "4"]].concat());
    let first = gpt(&[model, meshes[0], &["--steps", "2"], &saves].concat());
    let goes_on = ["--steps", "4", "--resume", "required"];
    let second = gpt(&[model, meshes[1], &goes_on, &saves].concat());
    let losses = [first.losses(), second.losses()].concat();
    for (ours, theirs) in losses.iter().zip(one.losses()) {
        assert!((ours - theirs).abs() < 1e-5 * theirs, "{losses:?} and {:?}", one.losses());
    }
    assert_eq!((first.steps.len(), second.steps.len()), (2, 2));
    let read = |run: &Run| {
        let path = run.folder.path().join("out/model.safetensors");
        let mut all = Tensor::read_safetensors(path).expect("weights");
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let (ours, theirs) = (read(&second), read(&one));
    assert_eq!(ours.len(), theirs.len());
    for ((name, mine), (of, other)) in ours.iter().zip(&theirs) {
        assert_eq!(name, of);
        let worst = (mine - other).abs().max().double_value(&[]);
        assert!(worst < 1e-4, "{name} is off by {worst}");
    }
    let printed = String::from_utf8_lossy(&second.output.stdout).into_owned();
    assert!(printed.contains("resume step 2") && printed.contains("sample ["), "{printed}");
    (second, printed)
}

/// Saved by two stages of two parts of the matrices each, with half as many steps behind; gone on with by ranks with parts of sequences.
#[test]
fn a_checkpoint_of_one_mesh_is_gone_on_with_on_another() {
    let alone = ["--nnodes", "1", "--micro-batches", "4"];
    let first = ["--nnodes", "4", "--tp", "2", "--pp", "2", "--micro-batches", "4"];
    let second = ["--nnodes", "4", "--dp", "2", "--cp", "2", "--zero", "3"];
    let (second, _) = check_goes_on(&[], &alone, [&first, &second]);
    assert_eq!(second.summary["summary"]["mesh"], "dp_shard 2 × cp 2 = 4 ranks");
}

const EXPERTS: [&str; 2] = ["--config", "configs/mixtral_tiny.json"];

/// Micro-batches have one sample on every mesh, for the balance of experts is theirs.
#[test]
fn a_checkpoint_of_experts_on_two_ranks_is_gone_on_with_on_another_mesh() {
    let alone = ["--nnodes", "1", "--micro-batches", "8"];
    let first = ["--nnodes", "2", "--dp", "2", "--ep", "2", "--micro-batches", "4", "--zero", "1"];
    let second = ["--nnodes", "4", "--dp", "2", "--pp", "2", "--micro-batches", "4"];
    check_goes_on(&EXPERTS, &alone, [&first, &second]);
}

/// A run that ended before all of its last step was written goes on from the step before.
#[test]
fn a_step_of_which_a_part_is_missing_is_not_gone_on_from() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = folder.path().join("checkpoints");
    let saves = ["--checkpoint", at.to_str().expect("a path of letters"), "--save-every", "1"];
    let mesh = ["--nnodes", "2", "--ep", "2"];
    gpt(&[&EXPERTS[..], &mesh, &saves, &["--steps", "2"]].concat());
    let of_experts = std::fs::read_dir(at.join("experts")).expect("the experts' checkpoints");
    let mut steps: Vec<_> = of_experts.map(|entry| entry.expect("an entry").path()).collect();
    steps.sort();
    let newest = steps.pop().expect("two steps");
    assert!(!steps.is_empty(), "{}", newest.display());
    std::fs::remove_dir_all(newest).expect("the newest can be removed");
    let run = gpt(&[&EXPERTS[..], &mesh, &saves, &["--steps", "3"]].concat());
    let printed = String::from_utf8_lossy(&run.output.stdout).into_owned();
    assert!(printed.contains("resume step 1 "), "{printed}");
    assert_eq!(run.steps.len(), 2);
}

/// No rank is started, so that the error is there once.
#[test]
fn what_cannot_be_cut_is_one_error_with_what_can() {
    let cases: [(&[&str], &str); 6] = [
        (
            &["--nnodes", "3", "--tp", "3"],
            "num_attention_heads 4 cannot be divided by tp 3; possible: 1, 2, 4",
        ),
        (&["--nnodes", "5", "--pp", "5"], "5 stages are more than model.num_hidden_layers (4)"),
        (&["--nnodes", "4", "--tp", "3"], "does not fill a world of 4; possible: "),
        (
            &["--nnodes", "3", "--cp", "3"],
            "sequences of 64 tokens cannot be cut into 6 equal parts",
        ),
        (&["--nnodes", "2", "--ep", "2"], "a model of experts"),
        (
            &["--nnodes", "3", "--ep", "3", "--config", "configs/mixtral_tiny.json"],
            "num_local_experts 4 cannot be divided by ep 3; possible: 1, 2, 4",
        ),
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
