//! How many threads a rank computes with, where nobody has said.
//!
//! libtorch takes every core that its process may run on: right for one process, and too many by the number of ranks of
//! a machine for ranks that srun or a script started without binding them. torchrun sets `OMP_NUM_THREADS=1` for the ranks
//! of a node instead, and libtorch's MKL takes one thread where it finds Open MPI's or MPICH's variables, so that all
//! other cores idle. In all these cases a rank takes its share of the cores. What the user has
//! chosen stands: `OMP_NUM_THREADS` or `MKL_NUM_THREADS` (but for torchrun's own 1, which cannot be told from a
//! user's), and [`tch::set_num_threads`] after [`Ddp::new`](crate::Ddp::new). Our launcher sets `OMP_NUM_THREADS` to the share itself.
//!
//! Source: `torch/distributed/run.py` (`config_from_args`) for torchrun's default; `aten/src/ATen/ParallelOpenMP.cpp` for
//! what `set_num_threads` changes: the calling thread, and every thread that computes for the first time later. MKL tried
//! with libtorch 2.11: `OMPI_COMM_WORLD_LOCAL_SIZE` or `MPI_LOCALNRANKS`, whatever they say, make it one thread.

use phalanx_comm::environment::{Launcher, ThreadVariables};
use phalanx_comm::Group;

/// What decides.
#[derive(Debug, Clone)]
struct Facts {
    launcher: Launcher,
    /// Ranks of this machine.
    ranks: usize,
    /// Cores of this machine that are this rank's.
    cores: usize,
    /// What libtorch would compute with.
    threads: usize,
    variables: ThreadVariables,
}

/// The threads to set, and why; `None`: what stands is right, or the user's.
fn decide(facts: &Facts) -> Option<(usize, &'static str)> {
    let Facts { launcher, ranks, cores, threads, variables } = facts;
    let (has_neighbours, cores, threads) = (*ranks > 1, (*cores).max(1), *threads);
    // Ranks that are threads of one process share its threads.
    if *launcher == Launcher::Single || threads == cores {
        return None;
    }
    let asked = (variables.omp_num_threads.as_deref(), variables.mkl_num_threads.as_deref());
    let why = match (launcher, asked) {
        (Launcher::Torchrun, (Some("1"), None)) if threads == 1 && has_neighbours => {
            "torchrun sets OMP_NUM_THREADS=1 where nothing else is asked for"
        }
        (
            Launcher::OpenMpi | Launcher::Pmi | Launcher::Mvapich | Launcher::Horovod,
            (None, None),
        ) if threads == 1 => "libtorch's MKL takes one thread under an MPI launcher",
        (_, (None, None)) if threads > cores && has_neighbours => {
            "all ranks of this machine together would have more threads than it has cores"
        }
        _ => return None,
    };
    Some((cores, why))
}

/// Sets the number of libtorch's threads to this rank's share of the cores where nobody has chosen one, and says so.
pub(crate) fn share(group: &Group) {
    let facts = Facts {
        launcher: group.launcher(),
        ranks: group.machine_world_size(),
        cores: group.core_share(),
        threads: usize::try_from(tch::get_num_threads()).unwrap_or(1),
        variables: ThreadVariables::from_env(),
    };
    let Some((threads, why)) = decide(&facts) else { return };
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    let Facts { ranks, threads: before, .. } = facts;
    tracing::info!(
        "this rank computes with {threads} thread(s) instead of {before}: its share of the cores among {ranks} rank(s) of this \
         machine, because {why}; OMP_NUM_THREADS, or tch::set_num_threads after Ddp::new, chooses another number"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(launcher: Launcher, threads: usize, set: &[(&str, &str)]) -> Facts {
        let value = |name: &str| {
            let found = set.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        // 16 cores and 4 ranks.
        let variables = ThreadVariables::from_lookup(&value);
        Facts { launcher, ranks: 4, cores: 4, threads, variables }
    }

    fn decided(facts: &Facts) -> Option<usize> {
        decide(facts).map(|(threads, _)| threads)
    }

    #[test]
    fn a_rank_takes_its_share_where_torchrun_has_left_its_default() {
        let default = facts(Launcher::Torchrun, 1, &[("OMP_NUM_THREADS", "1")]);
        assert_eq!(decided(&default), Some(4));
        // torchrun sets nothing for a node with one rank: then 1 is the user's.
        assert_eq!(decided(&Facts { ranks: 1, cores: 16, ..default.clone() }), None);
        // One core a rank: there is nothing to change.
        assert_eq!(decided(&Facts { cores: 1, ..default }), None);
    }

    #[test]
    fn a_rank_takes_its_share_where_nothing_is_set_and_threads_outnumber_the_cores() {
        for launcher in [Launcher::OpenMpi, Launcher::Slurm, Launcher::Pmi, Launcher::Manual] {
            assert_eq!(decided(&facts(launcher, 16, &[])), Some(4));
            // Bound to cores of its own, or fewer than its share.
            assert_eq!(decided(&facts(launcher, 4, &[])), None);
            assert_eq!(decided(&facts(launcher, 2, &[])), None);
        }
    }

    #[test]
    fn a_rank_takes_its_share_where_mkl_takes_one_thread_under_mpi() {
        for launcher in [Launcher::OpenMpi, Launcher::Pmi] {
            let default = facts(launcher, 1, &[]);
            assert_eq!(decided(&default), Some(4));
            assert_eq!(decided(&Facts { ranks: 1, cores: 16, ..default }), Some(16));
        }
        // There it is the user's.
        assert_eq!(decided(&facts(Launcher::Slurm, 1, &[])), None);
    }

    #[test]
    fn what_the_user_has_chosen_stands() {
        let omp =
            |launcher, value, threads| facts(launcher, threads, &[("OMP_NUM_THREADS", value)]);
        for chosen in [
            omp(Launcher::Torchrun, "2", 2),
            omp(Launcher::Torchrun, "8", 8),
            // tch::set_num_threads(3) before.
            omp(Launcher::Torchrun, "1", 3),
            omp(Launcher::OpenMpi, "1", 1),
            omp(Launcher::Slurm, "16", 16),
            omp(Launcher::Phalanx, "1", 1),
            facts(Launcher::OpenMpi, 16, &[("MKL_NUM_THREADS", "16")]),
            facts(Launcher::Torchrun, 1, &[("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")]),
        ] {
            assert_eq!(decide(&chosen), None, "{chosen:?}");
        }
    }

    #[test]
    fn ranks_that_are_threads_of_one_process_are_left_alone() {
        let before = tch::get_num_threads();
        phalanx_comm::testing::run_ranks(3, |group| share(&group));
        assert_eq!(tch::get_num_threads(), before);
        assert_eq!(decide(&facts(Launcher::Single, 16, &[])), None);
    }
}
