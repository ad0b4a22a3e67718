//! The trainer under each launcher: equal world size, equal losses, bit for bit.

mod mesh;
#[path = "../../crates/comm/tests/support/namespaces.rs"]
#[expect(clippy::print_stderr, reason = "a skipped test is loud")]
mod namespaces;
mod over_mpi;
mod several_machines;
mod slurm;
#[path = "../support/mod.rs"]
mod support;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use support::{example, skip, Owned};

const DEADLINE: Duration = Duration::from_secs(150);
const TRAINING: &[&str] = &[
    "--config",
    "configs/bert_tiny.json",
    "--steps",
    "3",
    "--global-batch",
    "24", // for one to four ranks, and eight
    "--threads",
    "1",
    "--seed",
    "5",
];

/// The losses of each step, as written, when `launcher` starts the trainer with `flags`.
fn losses(launcher: Option<&mut Command>, flags: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut alone = Command::new(example("bert_large"));
    let command = match launcher {
        Some(launcher) => training(launcher, folder.path(), flags),
        None => with_flags(&mut alone, folder.path(), flags),
    };
    finished(Owned::start(command));
    let wanted = if flags.contains(&"mpi") { "mpi" } else { "host" };
    written_losses(&folder.path().join("metrics.jsonl"), wanted)
}

/// Adds the trainer and its flags to what starts it; it writes into `folder`.
fn training<'a>(launcher: &'a mut Command, folder: &Path, flags: &[&str]) -> &'a mut Command {
    with_flags(launcher.arg(example("bert_large")), folder, flags)
}

fn with_flags<'a>(command: &'a mut Command, folder: &Path, flags: &[&str]) -> &'a mut Command {
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(training_flags(flags));
    command.arg("--metrics").arg(folder.join("metrics.jsonl"));
    command.arg("--output").arg(folder.join("out"));
    // Open MPI makes and removes one folder for all jobs of a user, and fails where two jobs make it at once.
    command.env("OMPI_MCA_orte_tmpdir_base", folder.join("mpi"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped())
}

/// [`TRAINING`] with `flags`, which take the places of its own.
fn training_flags<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    let kept = TRAINING.chunks(2).filter(|flag| !flags.contains(&flag[0]));
    kept.flatten().chain(flags).copied().collect()
}

/// Waits for a good end.
fn finished(started: Owned) {
    let output = started.finish(DEADLINE);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{:?}\n{text}", output.status);
}

/// The losses in a file of metrics; the run was to use `backend`.
fn written_losses(metrics: &Path, backend: &str) -> Vec<String> {
    let written = fs::read_to_string(metrics).expect("metrics");
    let parse = |line: &str| serde_json::from_str::<Value>(line).expect("a JSON object a line");
    let lines: Vec<Value> = written.lines().map(parse).collect();
    let steps = lines.iter().filter(|step| step.get("loss").is_some());
    // As text: a float that is written shortest is equal exactly when its bits are.
    let losses: Vec<String> = steps.map(|step| step["loss"].to_string()).collect();
    let summary = &lines.last().expect("a summary")["summary"];
    assert_eq!(Some(losses.len() as u64), summary["steps"].as_u64(), "{written}");
    assert_eq!(summary["backend"], backend, "{written}");
    losses
}

/// Eight ranks on four emulated nodes, by our own launcher.
fn of_eight() -> &'static [String] {
    static LOSSES: OnceLock<Vec<String>> = OnceLock::new();
    LOSSES.get_or_init(|| losses(None, &["--nnodes", "4", "--nproc-per-node", "2"]))
}

/// Finds a program in the `PATH` or where daemons live.
fn program(name: &str) -> Option<PathBuf> {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(":/usr/sbin:/sbin"));
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn torchrun_file() -> Option<PathBuf> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("third_party/torch-python/bin/torchrun");
    if !file.is_file() {
        skip("torchrun", "no third_party/torch-python");
        return None;
    }
    Some(file)
}

fn torchrun() -> Option<Command> {
    let mut command = Command::new(torchrun_file()?);
    command.args(["--no-python", "--standalone", "--nproc-per-node", "8"]);
    Some(command)
}

#[test]
fn torchrun_gives_the_losses_of_our_launcher() {
    let Some(mut torchrun) = torchrun() else { return };
    // Flags of ours that say what the launcher says do no harm, here and below.
    let flags = ["--nnodes", "1", "--nproc-per-node", "8"];
    assert_eq!(losses(Some(&mut torchrun), &flags), of_eight());
}

/// A rank is killed; torchrun starts all again, and they go on from the checkpoint.
#[test]
fn what_torchrun_starts_again_goes_on_to_the_same_losses() {
    let Some(file) = torchrun_file() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoints = folder.path().join("checkpoints").display().to_string();
    let mut torchrun = Command::new(file);
    torchrun.args(["--no-python", "--nproc-per-node", "2", "--max-restarts", "1"]);
    // Static rendezvous: a free port of its own.
    torchrun.args(["--master-addr", "127.0.0.1", "--master-port"]);
    torchrun.arg(support::free_port().to_string());
    let steps = ["--steps", "20"];
    let flags = [&steps[..], &["--save-every", "3", "--checkpoint", &checkpoints]].concat();
    let metrics = folder.path().join("metrics.jsonl");
    let done = || fs::read_to_string(&metrics).unwrap_or_default().matches("\"step\":").count();
    let mut run = Owned::start(training(&mut torchrun, folder.path(), &flags));
    support::wait_until("five steps", DEADLINE, || {
        done() >= 5 || run.0.try_wait().expect("our own child").is_some()
    });
    support::kill_child_of(run.0.id());
    finished(run);
    let whole = losses(None, &[&steps[..], &["--nnodes", "2"]].concat());
    assert_eq!(written_losses(&metrics, "host"), whole);
}

#[test]
fn mpirun_gives_the_losses_of_our_launcher() {
    let Some(mpirun) = program("mpirun.openmpi") else { return skip("mpi", "no Open MPI") };
    let mut mpirun = Command::new(mpirun);
    // Containers run as root, and machines have fewer cores than ranks.
    mpirun.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "8"]);
    assert_eq!(losses(Some(&mut mpirun), &[]), of_eight());
}

#[test]
fn mpiexec_of_mpich_gives_the_losses_of_our_launcher() {
    let Some(mpiexec) = program("mpiexec.hydra") else { return skip("mpich", "no MPICH") };
    let mut mpiexec = Command::new(mpiexec);
    let job = format!("test-{}", std::process::id());
    mpiexec.args(["-genv", "PHALANX_RUN_ID", &job, "-n", "8"]);
    assert_eq!(losses(Some(&mut mpiexec), &[]), of_eight());
}

#[test]
fn srun_gives_the_losses_of_our_launcher_however_it_starts_mpi() {
    let Some(cluster) = slurm::Cluster::start() else { return };
    // Uneven, as Slurm likes it: 5, 1, 1 and 1 tasks.
    let nodes = ["--nnodes", "4"];
    let none = losses(Some(&mut cluster.srun(&["--mpi=none", "-N4", "-n8"])), &nodes);
    assert_eq!(none, of_eight());
    let pmi2 = ["--mpi=pmi2", "-N4", "-n8", "--ntasks-per-node=2"];
    assert_eq!(losses(Some(&mut cluster.srun(&pmi2)), &[]), of_eight());
    let pmix = losses(Some(&mut cluster.srun(&["--mpi=pmix", "-N4", "-n8"])), &[]);
    assert_eq!(pmix, of_eight());
}

#[test]
fn a_batch_file_starts_ranks_by_srun_and_mpirun_in_it_is_not_misled() {
    let Some(cluster) = slurm::Cluster::start() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = folder.path().display();
    let program = example("bert_large").display().to_string();
    let training = TRAINING.join(" ");
    let mpirun = "mpirun.openmpi --allow-run-as-root --oversubscribe --bind-to none -n 4";
    let metrics = |name: &str| format!("--metrics {place}/{name}.jsonl --output {place}/{name}");
    let text = format!(
        "#!/bin/sh\n\
         #SBATCH -N1 -n4 --output={place}/log\n\
         srun {program} {training} {} || exit 1\n\
         {mpirun} {program} {training} {} || exit 2\n",
        metrics("srun"),
        metrics("mpirun")
    );
    fs::write(folder.path().join("job.sbatch"), text).expect("written");
    let mut sbatch = cluster.client("sbatch");
    sbatch.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--wait");
    sbatch.arg(folder.path().join("job.sbatch")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Owned::start(&mut sbatch).finish(DEADLINE);
    let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    assert!(output.status.success(), "{output:?}\n{log}");
    let read = |name: &str| {
        let path = folder.path().join(format!("{name}.jsonl"));
        let written = fs::read_to_string(path).expect("metrics");
        let parse = |line: &str| serde_json::from_str::<Value>(line).expect("JSON");
        let steps: Vec<Value> = written.lines().map(parse).collect();
        steps.iter().filter_map(|step| step.get("loss").map(Value::to_string)).collect::<Vec<_>>()
    };
    assert_eq!(read("srun"), read("mpirun"));
    assert_eq!(read("srun").len(), 3);
}

/// A folder in which the example batch file finds what it needs.
fn submit_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let programs = folder.path().join("target/release/examples");
    fs::create_dir_all(&programs).expect("a folder");
    let link = std::os::unix::fs::symlink::<PathBuf, PathBuf>;
    link(example("bert_large"), programs.join("bert_large")).expect("a link");
    for name in ["configs", "third_party"] {
        link(root.join(name), folder.path().join(name)).expect("a link");
    }
    folder
}

/// Submits the file that users are given, as it is; gives the job's number.
fn submit(cluster: &slurm::Cluster, folder: &Path, options: &[&str], flags: &[&str]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/slurm/bert_large.sbatch");
    let mut sbatch = cluster.client("sbatch");
    sbatch.current_dir(folder).args(["--cpus-per-task=1"]).args(options);
    sbatch.env_remove("PHALANX_JOB_TOKEN").env_remove("SLURM_MPI_TYPE");
    sbatch.arg(file).args(training_flags(flags));
    sbatch.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Owned::start(&mut sbatch).finish(DEADLINE);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let job = said.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    assert!(output.status.success(), "{output:?}\n{}", log_of(folder, &job));
    job
}

fn log_of(folder: &Path, job: &str) -> String {
    fs::read_to_string(folder.join(format!("bert_large-{job}.log"))).unwrap_or_default()
}

#[test]
fn the_example_batch_file_gives_the_losses_of_our_launcher() {
    let Some(cluster) = slurm::Cluster::start() else { return };
    let folder = submit_folder();
    let job = submit(&cluster, folder.path(), &["--wait", "--ntasks-per-node=2"], &[]);
    let metrics = folder.path().join(format!("runs/bert_large-{job}.jsonl"));
    assert_eq!(written_losses(&metrics, "host"), of_eight());
}

/// Slurm's warning before the time is up, and what the example batch file does then.
#[test]
fn a_job_whose_time_is_up_queues_again_and_goes_on_to_the_same_losses() {
    let Some(cluster) = slurm::Cluster::start() else { return };
    let flags = ["--steps", "25"];
    let folder = submit_folder();
    let job = submit(&cluster, folder.path(), &["--nodes=2", "--ntasks-per-node=1"], &flags);
    let metrics = folder.path().join(format!("runs/bert_large-{job}.jsonl"));
    let steps = || fs::read_to_string(&metrics).unwrap_or_default().matches("\"step\":").count();
    let log = || log_of(folder.path(), &job);
    cluster.wait("a third step", &log, &|| steps() >= 3);
    let run = |client: &str, arguments: &[&str]| {
        let output = cluster.client(client).args(arguments).output().expect("it starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run("scancel", &["--signal=USR1", &job]);
    let shown = || run("scontrol", &["show", "job", "--oneliner", &job]);
    cluster.wait("the job again in the queue", &log, &|| {
        let shown = shown();
        shown.contains("Restarts=1") && !shown.contains("JobState=COMPLETING")
    });
    // Slurm holds such a job back for two minutes, until what the first start has left is surely gone.
    cluster.wait("the end of the first start's daemons", &log, &|| !slurm::has_daemon(&job));
    run("scontrol", &["update", &format!("JobId={job}"), "StartTime=now"]);
    cluster.wait("the end", &log, &|| shown().contains("JobState=COMPLETED"));
    assert!(log().contains("resume step "), "{}", log());
    let whole = losses(None, &["--nnodes", "2", "--steps", "25"]);
    assert_eq!(written_losses(&metrics, "host"), whole);
}

/// Four nodes are emulated by our own launcher alone.
#[test]
fn a_flag_that_contradicts_the_launcher_is_refused_with_what_both_say() {
    let mpirun = program("mpirun.openmpi").map(|mpirun| {
        let mut mpirun = Command::new(mpirun);
        mpirun.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]);
        (mpirun, "mpirun (Open MPI)")
    });
    if mpirun.is_none() {
        skip("mpi", "no Open MPI");
    }
    let torchrun = torchrun().map(|torchrun| (torchrun, "torchrun"));
    for (mut launcher, name) in mpirun.into_iter().chain(torchrun) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let command = training(&mut launcher, folder.path(), &["--nnodes", "4"]);
        let output = Owned::start(command).finish(DEADLINE);
        assert!(!output.status.success(), "{name}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let wanted = format!("--nnodes 4 contradicts {name}, which has started this process");
        assert!(text.contains(&wanted) && text.contains("nodes: 1"), "{text}");
        assert!(!folder.path().join("metrics.jsonl").exists(), "no step was made");
    }
}

#[test]
fn torchrun_shows_what_a_rank_died_of() {
    let Some(mut torchrun) = torchrun() else { return };
    torchrun.arg(example("bert_large")).current_dir(env!("CARGO_MANIFEST_DIR"));
    torchrun.args(["--config", "configs/bert_tiny.json", "--data", "/no/such/folder"]);
    torchrun.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Owned::start(&mut torchrun).finish(DEADLINE);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    let (_, report) = text.split_once("Root Cause").expect("torchrun's report");
    assert!(report.contains("/no/such/folder"), "{text}");
}
