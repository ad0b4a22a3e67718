//! The bundle for GPU machines, packed of the programs that the tests are built with: it starts where there is no GPU,
//! and says so; and what does not start is not packed.

mod support;

use std::fs::{create_dir_all, set_permissions, write, Permissions};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use support::{example, Owned};

const PROGRAMS: [&str; 2] = ["gpu_check", "bert_large"];
/// The programs are started twice, and do nothing.
const DEADLINE: Duration = Duration::from_secs(120);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn script(path: &Path, text: &str) {
    write(path, format!("#!/bin/sh\n{text}\n")).expect("written");
    set_permissions(path, Permissions::from_mode(0o755)).expect("executable");
}

fn finish(command: &mut Command) -> Output {
    Owned::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).finish(DEADLINE)
}

fn pack(programs: &Path, bundle: &Path) -> Output {
    let mut command = Command::new(root().join("scripts/gpu_bundle.sh"));
    finish(command.arg("--programs").arg(programs).arg(bundle))
}

#[test]
fn the_bundle_starts_without_a_gpu_and_says_that_there_is_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bundle = folder.path().join("bundle");
    let built = example(PROGRAMS[0]);
    let packed = pack(built.parent().expect("its folder"), &bundle);
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));

    // In place of PyTorch's wheel and of the driver's tool.
    let (site, bin) = (folder.path().join("site"), folder.path().join("bin"));
    for path in [&site.join("torch"), &bin] {
        create_dir_all(path).expect("a folder");
    }
    symlink(root().join("third_party/libtorch/lib"), site.join("torch/lib")).expect("a link");
    script(&bin.join("python3"), &format!("echo '{}'", site.display()));
    script(&bin.join("nvidia-smi"), "exit 9");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").expect("a PATH"));
    let driver = bundle.join("run.sh");
    let ran = finish(Command::new(driver).arg("60").env("PATH", path).env_remove("OUT"));

    let table = String::from_utf8_lossy(&ran.stdout);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{table}{said}");
    assert!(said.contains("no GPU here"), "{said}");
    let state = |name: &str| {
        let row = table.lines().find(|line| line.split_whitespace().next() == Some(name));
        row.unwrap_or_else(|| panic!("no {name} in {table}"))[22..].trim().to_owned()
    };
    for program in PROGRAMS {
        let state = state(&format!("starts-{program}"));
        assert!(state.starts_with("ok"), "{program}: {state}: {table}");
    }
    for check in ["nccl-1-rank", "nccl-2-ranks", "bert-large-bf16", "torch-ddp"] {
        assert!(state(check).starts_with("NO GPU"), "{check}: {table}");
    }
    assert!(bundle.join("configs/bert_tiny.json").is_file(), "what the checks are given");
    assert!(bundle.join("text").read_dir().is_ok_and(|mut files| files.next().is_some()));
}

#[test]
fn a_program_that_does_not_start_is_told_when_it_is_packed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let programs = folder.path().join("built");
    create_dir_all(&programs).expect("a folder");
    for program in PROGRAMS {
        // A program of its own kind: strip takes it, and it ends badly.
        symlink("/bin/false", programs.join(program)).expect("a link");
    }
    let packed = pack(&programs, &folder.path().join("bundle"));
    let said = String::from_utf8_lossy(&packed.stderr);
    assert_eq!(packed.status.code(), Some(1), "{said}");
    assert!(said.contains("the packed gpu_check does not start"), "{said}");
}
