//! The trainer with MPI moving the data: the losses of the host backend.

use std::process::Command;

use super::support::skip;
use super::{losses, program, slurm};

/// How much further from the host backend's a loss may be, of itself. Only sums over up to four ranks have another order, of losses
/// and of gradients: three roundings of 6e-8 each, and the gradients' reach the next losses times the learning rate.
const APART_MAX: f64 = 1e-6;

fn numbers(losses: &[String]) -> Vec<f64> {
    losses.iter().map(|loss| loss.parse().expect("a number")).collect()
}

#[test]
fn over_mpi_the_losses_are_those_of_the_host_backend() {
    if cfg!(not(feature = "mpi")) {
        return skip("mpi", "this test was built without --features mpi");
    }
    let Some(mpirun) = program("mpirun.openmpi") else { return skip("mpi", "no Open MPI") };
    for ranks in ["1", "2", "3", "4"] {
        let host = losses(None, &["--nproc-per-node", ranks, "--backend", "host"]);
        let mut mpirun = Command::new(&mpirun);
        mpirun.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", ranks]);
        let over_mpi = losses(Some(&mut mpirun), &["--backend", "mpi"]);
        compare(&host, &over_mpi);
    }
}

/// On four nodes of Slurm, whose pmix plugin brings Open MPI's ranks together.
#[test]
fn over_mpi_under_srun_the_losses_are_those_of_the_host_backend() {
    if cfg!(not(feature = "mpi")) {
        return skip("mpi", "this test was built without --features mpi");
    }
    let Some(cluster) = slurm::Cluster::start() else { return };
    let mut srun = cluster.srun(&["--mpi=pmix", "-N4", "-n4", "--ntasks-per-node=1"]);
    let over_mpi = losses(Some(&mut srun), &["--backend", "mpi"]);
    compare(&losses(None, &["--nnodes", "4"]), &over_mpi);
}

pub(super) fn compare(host: &[String], over_mpi: &[String]) {
    for (of_host, of_mpi) in numbers(host).into_iter().zip(numbers(over_mpi)) {
        let apart = ((of_host - of_mpi) / of_host).abs();
        assert!(apart <= APART_MAX, "{of_host} and over MPI {of_mpi}");
    }
}
