//! The GPT trainer on a mesh: the losses of our launcher under the others, and of the host backend over MPI.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::over_mpi::compare;
use super::support::{example, skip, Owned};
use super::{finished, program, slurm, written_losses};

const TRAINING: [&str; 18] = [
    "--config",
    "configs/gpt_tiny.json",
    "--steps",
    "3",
    "--global-batch",
    "8",
    "--micro-batches",
    "2",
    "--dropout",
    "0.1",
    "--attention-dropout",
    "0",
    "--sample",
    "8",
    "--threads",
    "1",
    "--seed",
    "5",
];
/// Of eight ranks: every axis is between processes, and the outer ones between nodes.
const MESHES: [&[&str]; 2] = [
    &["--dp", "2", "--pp", "2", "--tp", "2", "--sequence-parallel", "--zero", "1"],
    &["--pp", "2", "--cp", "2", "--tp", "2", "--schedule", "zb-h1"],
];

/// The losses of each step, as written, when `launcher` starts the trainer with `flags`.
fn losses(launcher: Option<Command>, flags: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = example("gpt");
    let mut command = match launcher {
        Some(mut launcher) => {
            launcher.arg(program);
            launcher
        }
        None => Command::new(program),
    };
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(TRAINING).args(flags);
    command.arg("--metrics").arg(folder.path().join("metrics.jsonl"));
    command.arg("--output").arg(folder.path().join("out"));
    command.env("OMPI_MCA_orte_tmpdir_base", folder.path().join("mpi"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    finished(Owned::start(&mut command));
    let wanted = if flags.contains(&"mpi") { "mpi" } else { "host" };
    written_losses(&folder.path().join("metrics.jsonl"), wanted)
}

/// Of each mesh, by our own launcher on four emulated nodes.
fn of_eight() -> &'static [Vec<String>; 2] {
    static LOSSES: OnceLock<[Vec<String>; 2]> = OnceLock::new();
    let nodes = ["--nnodes", "4", "--nproc-per-node", "2"];
    LOSSES.get_or_init(|| MESHES.map(|mesh| losses(None, &[mesh, &nodes].concat())))
}

fn mpirun(ranks: &str) -> Option<Command> {
    let Some(mpirun) = program("mpirun.openmpi") else {
        skip("mpi", "no Open MPI");
        return None;
    };
    let mut mpirun = Command::new(mpirun);
    // Containers run as root, and machines have fewer cores than ranks.
    mpirun.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", ranks]);
    Some(mpirun)
}

#[test]
fn mpirun_gives_a_mesh_the_losses_of_our_launcher() {
    for (mesh, expected) in MESHES.into_iter().zip(of_eight()) {
        let Some(mpirun) = mpirun("8") else { return };
        assert_eq!(&losses(Some(mpirun), mesh), expected, "{mesh:?}");
    }
}

#[test]
fn srun_gives_a_mesh_on_four_nodes_the_losses_of_our_launcher() {
    let Some(cluster) = slurm::Cluster::start() else { return };
    for (mesh, expected) in MESHES.into_iter().zip(of_eight()) {
        let srun = cluster.srun(&["--mpi=none", "-N4", "-n8", "--ntasks-per-node=2"]);
        assert_eq!(&losses(Some(srun), mesh), expected, "{mesh:?}");
    }
}

#[test]
fn over_mpi_a_mesh_has_the_losses_of_the_host_backend() {
    if cfg!(not(feature = "mpi")) {
        return skip("mpi", "this test was built without --features mpi");
    }
    for axes in [["--dp", "--tp"], ["--pp", "--tp"], ["--cp", "--pp"]] {
        let mesh = [axes[0], "2", axes[1], "2"];
        let Some(mpirun) = mpirun("4") else { return };
        let over_mpi = losses(Some(mpirun), &[&mesh[..], &["--backend", "mpi"]].concat());
        let host = losses(None, &[&mesh[..], &["--nnodes", "4", "--backend", "host"]].concat());
        compare(&host, &over_mpi);
    }
}
