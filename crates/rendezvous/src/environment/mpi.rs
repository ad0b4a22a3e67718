//! MPI's launchers, which tell ranks and no address: loopback on one machine, `MASTER_ADDR` on several. Programs that
//! are built with MPI need neither: their ranks meet over it.
//!
//! Source: Open MPI 4.1 and MPICH 4.0 as observed; Intel MPI, MVAPICH2 and Cray's by their manuals, Horovod by its sources.

use super::launchers::{finish, RankFacts, StoreFacts, StoreIn};
use super::variables::{missing, Result, Variables};
use super::{derived_port, slurm_step, EnvironmentError, Launcher, World, LOOPBACK};

pub(super) fn open_mpi(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "OMPI_COMM_WORLD_RANK is set";
    let rank = variables.number_needed("OMPI_COMM_WORLD_RANK", BECAUSE)?;
    let world_size = variables.count_needed("OMPI_COMM_WORLD_SIZE", BECAUSE)?;
    let local_rank = variables.number_needed("OMPI_COMM_WORLD_LOCAL_RANK", BECAUSE)?;
    let local_world_size = variables.count_needed("OMPI_COMM_WORLD_LOCAL_SIZE", BECAUSE)?;
    let place = RankFacts {
        rank: ("OMPI_COMM_WORLD_RANK", rank),
        world_size: ("OMPI_COMM_WORLD_SIZE", world_size),
        local_rank: ("OMPI_COMM_WORLD_LOCAL_RANK", local_rank),
        local_world_size: ("OMPI_COMM_WORLD_LOCAL_SIZE", local_world_size),
        // OMPI_COMM_WORLD_NODE_RANK is no node index, in spite of its name.
        node_rank: ("OMPI_COMM_WORLD_RANK / OMPI_COMM_WORLD_LOCAL_SIZE", rank / local_world_size),
        node_count: (
            "OMPI_COMM_WORLD_SIZE / OMPI_COMM_WORLD_LOCAL_SIZE",
            world_size.div_ceil(local_world_size),
        ),
    };
    let job = variables
        .text("PMIX_NAMESPACE")
        .or_else(|| variables.text("OMPI_MCA_ess_base_jobid"))
        .ok_or_else(|| missing("PMIX_NAMESPACE", BECAUSE));
    let meeting = mpi_meeting(
        variables,
        &place,
        MpiJob {
            launcher: Launcher::OpenMpi,
            name: "Open MPI",
            example: "mpirun -x MASTER_ADDR=node0",
            run_id: job.map(|job| format!("openmpi-{job}")),
        },
    )?;
    finish(variables, &place, meeting)
}

pub(super) fn pmi(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "PMI_RANK is set";
    let rank = variables.number_needed("PMI_RANK", BECAUSE)?;
    let world_size = variables.count_needed("PMI_SIZE", BECAUSE)?;
    if slurm_step::is_rank(variables, rank, world_size)? {
        return slurm_step::world(variables);
    }
    // Hydra's names, else Cray's.
    let names = if variables.has("MPI_LOCALRANKID") || !variables.has("PMI_LOCAL_RANK") {
        ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    } else {
        ["PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"]
    };
    let is_placed = variables.has(names[0]) && variables.has(names[1]);
    let (local_rank, local_world_size) = if variables.over_mpi && !is_placed {
        (0, 1) // until MPI says which ranks share a machine
    } else {
        let local_rank = variables.number_needed(names[0], BECAUSE)?;
        (local_rank, variables.count_needed(names[1], BECAUSE)?)
    };
    let place = RankFacts {
        rank: ("PMI_RANK", rank),
        world_size: ("PMI_SIZE", world_size),
        local_rank: (names[0], local_rank),
        local_world_size: (names[1], local_world_size),
        node_rank: ("PMI_RANK / ranks of this machine", rank / local_world_size),
        node_count: ("PMI_SIZE / ranks of this machine", world_size.div_ceil(local_world_size)),
    };
    // Only what is the same for all ranks of a job, and unlike other jobs', will do.
    let job = variables.text("PMI_JOBID").or_else(|| variables.text("PMI_PORT"));
    let job = job_or_given(variables, job, "PMI_RANK is set without PMI_JOBID or PMI_PORT");
    let meeting = mpi_meeting(
        variables,
        &place,
        MpiJob {
            launcher: Launcher::Pmi,
            name: "PMI (MPICH, Intel MPI)",
            example: "mpiexec -genv MASTER_ADDR node0",
            run_id: job.map(|job| format!("pmi-{job}")),
        },
    )?;
    finish(variables, &place, meeting)
}

/// The job's name: the launcher's own, else what the user gave to tell jobs apart.
fn job_or_given(variables: &Variables<'_>, job: Option<String>, because: &str) -> Result<String> {
    job.or_else(|| variables.text("PHALANX_RUN_ID"))
        .or_else(|| variables.text("MASTER_PORT"))
        .ok_or_else(|| {
            let because =
                format!("{because}, and jobs must be told apart (any name will do, the same for all ranks of a job: mpiexec -genv PHALANX_RUN_ID job-17)");
            missing("PHALANX_RUN_ID", &because)
        })
}

/// The variables of a launcher that has one for each number.
pub(super) struct MpiNames {
    launcher: Launcher,
    name: &'static str,
    example: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    local_world_size: &'static str,
    /// The node and how many there are.
    node: Option<[&'static str; 2]>,
}

/// By its manual.
pub(super) const MVAPICH: MpiNames = MpiNames {
    launcher: Launcher::Mvapich,
    name: "MVAPICH2",
    example: "mpirun_rsh … MASTER_ADDR=node0 program",
    rank: "MV2_COMM_WORLD_RANK",
    world_size: "MV2_COMM_WORLD_SIZE",
    local_rank: "MV2_COMM_WORLD_LOCAL_RANK",
    local_world_size: "MV2_COMM_WORLD_LOCAL_SIZE",
    node: None,
};

/// By its sources.
pub(super) const HOROVOD: MpiNames = MpiNames {
    launcher: Launcher::Horovod,
    name: "horovodrun",
    example: "MASTER_ADDR=node0 horovodrun …",
    rank: "HOROVOD_RANK",
    world_size: "HOROVOD_SIZE",
    local_rank: "HOROVOD_LOCAL_RANK",
    local_world_size: "HOROVOD_LOCAL_SIZE",
    node: Some(["HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE"]),
};

/// A launcher that names its numbers and nothing else.
pub(super) fn by_names(variables: &Variables<'_>, names: &MpiNames) -> Result<World> {
    let because = format!("{} is set", names.rank);
    let rank = variables.number_needed(names.rank, &because)?;
    let world_size = variables.count_needed(names.world_size, &because)?;
    let local_rank = variables.number_needed(names.local_rank, &because)?;
    let local_world_size = variables.count_needed(names.local_world_size, &because)?;
    let (node_rank, node_count) = match names.node {
        Some([node, count]) if variables.has(node) => (
            (node, variables.number_needed(node, &because)?),
            (count, variables.count_needed(count, &because)?),
        ),
        _ => (
            ("rank / local size", rank / local_world_size),
            ("size / local size", world_size.div_ceil(local_world_size)),
        ),
    };
    let place = RankFacts {
        rank: (names.rank, rank),
        world_size: (names.world_size, world_size),
        local_rank: (names.local_rank, local_rank),
        local_world_size: (names.local_world_size, local_world_size),
        node_rank,
        node_count,
    };
    let job = job_or_given(variables, None, &because);
    let job = MpiJob {
        launcher: names.launcher,
        name: names.name,
        example: names.example,
        run_id: job.map(|job| format!("mpi-{job}")),
    };
    let meeting = mpi_meeting(variables, &place, job)?;
    finish(variables, &place, meeting)
}

struct MpiJob {
    launcher: Launcher,
    name: &'static str,
    example: &'static str,
    /// Or which variable would name it.
    run_id: Result<String>,
}

/// MPI launchers give ranks but no address: loopback on one machine; on several over MPI where that is possible, else an
/// error that says what to set.
fn mpi_meeting(variables: &Variables<'_>, place: &RankFacts, job: MpiJob) -> Result<StoreFacts> {
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => Ok(address),
        None if place.node_count.1 == 1 => Ok(LOOPBACK.to_owned()),
        None => Err(EnvironmentError::NoMasterAddress {
            launcher: job.name,
            local_world_size: place.local_world_size.1,
            world_size: place.world_size.1,
            example: job.example,
        }),
    };
    let run_id = variables.text("PHALANX_RUN_ID").map_or(job.run_id, Ok);
    let launcher = job.launcher;
    // Horovod starts programs without MPI as well.
    let over_mpi = variables.over_mpi && launcher != Launcher::Horovod;
    if over_mpi && (master_addr.is_err() || run_id.is_err()) {
        return Ok(StoreFacts {
            launcher,
            master_addr: String::new(),
            master_port: 0,
            run_id: String::new(),
            restart_count: 0,
            store: StoreIn::Mpi,
        });
    }
    let (master_addr, run_id) = (master_addr?, run_id?);
    Ok(StoreFacts {
        launcher,
        master_addr,
        master_port: variables.port("MASTER_PORT")?.unwrap_or_else(|| derived_port(&run_id)),
        run_id,
        restart_count: variables.restart_count()?,
        store: StoreIn::Rank0,
    })
}
