//! A disk that is full (F13): the checkpoint that fails is told, the one before it stays byte for byte, and training ends with the exit code
//! for input and output, or goes on, as was asked for.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::support::{apart, example, Owned};
use super::DEADLINE;

/// Room for one checkpoint of the tiny model with its optimizer (17 MiB), and not for two.
const ROOM: &str = "size=24m";

/// Two ranks that save after steps 2, 4 and 6 to `disk`, under a `shell`, whose script has the folder in `$0` and the trainer in `$@`.
fn save(folder: &Path, disk: &Path, must_succeed: bool, steps: &str, mut shell: Command) -> Output {
    let tiny =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bert_tiny.json"));
    let mut config: serde_json::Value = serde_json::from_str(&tiny.expect("a file")).expect("JSON");
    config["checkpoint"] = serde_json::json!({ "must_succeed": must_succeed });
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).expect("a file");
    let command = shell.current_dir(env!("CARGO_MANIFEST_DIR")).arg(folder);
    command.arg(example("bert_large")).arg("--config").arg(path);
    command.args(["--nnodes", "2", "--threads", "1", "--micro-batch", "2", "--steps", steps]);
    command.arg("--checkpoint").arg(disk).args(["--save-every", "2"]);
    command.arg("--output").arg(folder.join("out"));
    Owned::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).finish(DEADLINE)
}

/// In a mount namespace of its own, where the disk is small. What is on it at the end is copied to `after`.
fn save_to_full_disk(folder: &Path, must_succeed: bool, mut shell: Command) -> Output {
    let script = format!(
        "mkdir \"$0/disk\" \"$0/after\" && mount -t tmpfs -o {ROOM} tmpfs \"$0/disk\" && \"$@\"; \
         code=$?; cp -a \"$0/disk/.\" \"$0/after\" && exit $code"
    );
    shell.arg(script);
    save(folder, &folder.join("disk"), must_succeed, "6", shell)
}

/// The shards of a checkpoint, by name.
fn shards(folder: &Path) -> Vec<(OsString, Vec<u8>)> {
    let files = fs::read_dir(folder).expect("a folder").flatten();
    let shards = files.filter(|file| file.path().extension().is_some_and(|it| it == "safetensors"));
    let mut all: Vec<_> =
        shards.map(|file| (file.file_name(), fs::read(file.path()).expect("readable"))).collect();
    all.sort();
    all
}

#[test]
fn a_full_disk_costs_the_checkpoint_that_does_not_fit_and_nothing_else() {
    let whole = tempfile::tempdir().expect("a temporary folder");
    let disk = whole.path().join("disk");
    let mut plain = Command::new("sh");
    plain.args(["-c", "exec \"$@\""]);
    let unbroken = save(whole.path(), &disk, true, "2", plain);
    assert!(unbroken.status.success(), "{}", String::from_utf8_lossy(&unbroken.stderr));
    let expected = shards(&disk.join("step-00000002"));
    assert_eq!(expected.len(), 2, "a shard of each rank");
    for (must_succeed, code) in [(true, 74), (false, 0)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let Some(shell) = apart() else { return };
        let ended = save_to_full_disk(folder.path(), must_succeed, shell);
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{said}");
        let named = said.contains("checkpoint of step 4: no space left on ");
        assert!(named && said.contains(": needs 17.0 MiB, "), "{said}");
        let after = folder.path().join("after");
        let left: Vec<_> =
            fs::read_dir(&after).expect("copied").flatten().map(|it| it.file_name()).collect();
        assert_eq!(left, ["step-00000002"], "nothing of the failed one: {said}");
        assert!(shards(&after.join("step-00000002")) == expected, "it has changed: {said}");
        let weights = folder.path().join("out/model.safetensors").exists();
        assert_eq!(weights, !must_succeed, "trained to the end: {said}");
    }
}
