//! Which launcher it was, and what ours, torchrun or the user's hand has set.
//!
//! Source: torch 2.11 `local_elastic_agent.py` and `rendezvous.py`.

use super::variables::{invalid, missing, Result, Variables};
use super::{mpi, slurm_step, Launcher, LauncherEnvironment, StoreHost, World};

/// What a launcher wants to know.
pub(super) fn launcher_environment(variables: &Variables<'_>) -> Result<LauncherEnvironment> {
    Ok(LauncherEnvironment {
        job_token: variables.given_token()?,
        run_id: variables.text("PHALANX_RUN_ID"),
        omp_num_threads: variables.text("OMP_NUM_THREADS"),
        visible_gpus: variables.text("CUDA_VISIBLE_DEVICES"),
    })
}

/// Picks the launcher and reads its variables.
pub(super) fn world(variables: &Variables<'_>) -> Result<World> {
    let has = |variable| variables.has(variable);
    if has("RANK") && has("WORLD_SIZE") && has("MASTER_ADDR") {
        return ranks_given(variables);
    }
    if has("OMPI_COMM_WORLD_RANK") {
        return mpi::open_mpi(variables);
    }
    if has("MV2_COMM_WORLD_RANK") {
        return mpi::by_names(variables, &mpi::MVAPICH);
    }
    if has("HOROVOD_RANK") {
        return mpi::by_names(variables, &mpi::HOROVOD);
    }
    if has("PMI_RANK") {
        return mpi::pmi(variables);
    }
    if slurm_step::is_here(variables) {
        return slurm_step::world(variables);
    }
    if has("PMIX_RANK") {
        return Err(missing(
            "WORLD_SIZE",
            "PMIX_RANK is set, and PMIx tells how many ranks there are through its library alone \
             (RANK, MASTER_ADDR and MASTER_PORT are needed as well)",
        ));
    }
    // WORLD_SIZE alone is left lying around by other tools; RANK alone, or both without an address, is a job half described.
    if has("RANK") {
        for variable in ["WORLD_SIZE", "MASTER_ADDR"] {
            variables.text_needed(variable, "RANK is set")?;
        }
    }
    let mut world = World::single();
    world.host_link = variables.host_link()?;
    world.data_checks = variables.data_checks()?;
    Ok(world)
}

/// Where a rank stands; checked for sense before a [`World`] is made of it.
pub(super) struct RankFacts {
    pub(super) rank: (&'static str, usize),
    pub(super) world_size: (&'static str, usize),
    pub(super) local_rank: (&'static str, usize),
    pub(super) local_world_size: (&'static str, usize),
    pub(super) node_rank: (&'static str, usize),
    pub(super) node_count: (&'static str, usize),
}

impl RankFacts {
    fn check(&self) -> Result<()> {
        let below = |(variable, value): (&'static str, usize), (limit_variable, limit)| {
            if value < limit {
                return Ok(());
            }
            let expected = format!("below {limit_variable}={limit}");
            Err(invalid(variable, value.to_string(), &expected))
        };
        let at_most = |(variable, value): (&'static str, usize), (limit_variable, limit)| {
            if value <= limit {
                return Ok(());
            }
            let expected = format!("at most {limit_variable}={limit}");
            Err(invalid(variable, value.to_string(), &expected))
        };
        below(self.rank, self.world_size)?;
        below(self.local_rank, self.local_world_size)?;
        below(self.node_rank, self.node_count)?;
        at_most(self.local_world_size, self.world_size)?;
        at_most(self.node_count, self.world_size)
    }
}

/// How the job is met: what differs between launchers besides the numbers.
pub(super) struct StoreFacts {
    pub(super) launcher: Launcher,
    pub(super) master_addr: String,
    pub(super) master_port: u16,
    pub(super) run_id: String,
    pub(super) restart_count: u32,
    pub(super) store: StoreIn,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum StoreIn {
    /// Our launcher.
    Launcher,
    Rank0,
    /// Rank 0 as well, advertised by torchrun's agent.
    Agent,
    /// Rank 0 as well, told over MPI.
    Mpi,
}

pub(super) fn finish(
    variables: &Variables<'_>,
    place: &RankFacts,
    meeting: StoreFacts,
) -> Result<World> {
    place.check()?;
    let store_host = match meeting.store {
        StoreIn::Agent => StoreHost::Agent,
        StoreIn::Mpi => StoreHost::Mpi,
        StoreIn::Rank0 if place.rank.1 == 0 => StoreHost::ThisRank,
        StoreIn::Rank0 | StoreIn::Launcher => StoreHost::Elsewhere,
    };
    let restarts = meeting.restart_count.to_string();
    Ok(World {
        rank: place.rank.1,
        world_size: place.world_size.1,
        local_rank: place.local_rank.1,
        local_world_size: place.local_world_size.1,
        node_rank: place.node_rank.1,
        node_count: place.node_count.1,
        job_token: variables.job_token(&[&meeting.run_id, &meeting.master_addr, &restarts])?,
        master_addr: meeting.master_addr,
        master_port: meeting.master_port,
        run_id: meeting.run_id,
        restart_count: meeting.restart_count,
        store_host,
        launcher: meeting.launcher,
        host_link: variables.host_link()?,
        data_checks: variables.data_checks()?,
    })
}

/// Our launcher, torchrun, or by hand: all use torchrun's names.
fn ranks_given(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "RANK, WORLD_SIZE and MASTER_ADDR are set";
    let rank = variables.number_needed("RANK", BECAUSE)?;
    let world_size = variables.count_needed("WORLD_SIZE", BECAUSE)?;
    let place = place_of_ranks_given(variables, rank, world_size)?;
    let port = variables.port("MASTER_PORT")?.ok_or_else(|| missing("MASTER_PORT", BECAUSE))?;
    let store_in_launcher = match variables.text("PHALANX_AGENT_STORE") {
        None => false,
        Some(value) if value == "1" => true,
        Some(value) if value == "0" => false,
        Some(value) => return Err(invalid("PHALANX_AGENT_STORE", value, "0 or 1")),
    };
    let torchrun = variables.text("TORCHELASTIC_RUN_ID").filter(|_| !store_in_launcher);
    let master_addr = variables.text_needed("MASTER_ADDR", BECAUSE)?;
    let meeting = match torchrun {
        Some(run_id) => torchrun_meeting(variables, &run_id, master_addr, port)?,
        None => StoreFacts {
            launcher: if store_in_launcher { Launcher::Phalanx } else { Launcher::Manual },
            run_id: variables
                .text("PHALANX_RUN_ID")
                .unwrap_or_else(|| format!("manual-{master_addr}-{port}")),
            restart_count: variables.restart_count()?,
            master_addr,
            master_port: port,
            store: if store_in_launcher { StoreIn::Launcher } else { StoreIn::Rank0 },
        },
    };
    finish(variables, &place, meeting)
}

fn place_of_ranks_given(
    variables: &Variables<'_>,
    rank: usize,
    world_size: usize,
) -> Result<RankFacts> {
    let local_rank = variables.number("LOCAL_RANK")?;
    let local_world_size = variables.count("LOCAL_WORLD_SIZE")?;
    let (local_rank, local_world_size) = match (local_rank, local_world_size) {
        (Some(local_rank), Some(size)) => (local_rank, size),
        // By hand or by a container platform that starts one rank per machine.
        (None, None) => (0, 1),
        (Some(_), None) => return Err(missing("LOCAL_WORLD_SIZE", "LOCAL_RANK is set")),
        (None, Some(_)) => return Err(missing("LOCAL_RANK", "LOCAL_WORLD_SIZE is set")),
    };
    // In blocks, unless the launcher says otherwise.
    let node_rank = variables.number("GROUP_RANK")?.unwrap_or(rank / local_world_size);
    let node_count =
        variables.count("GROUP_WORLD_SIZE")?.unwrap_or(world_size.div_ceil(local_world_size));
    Ok(RankFacts {
        rank: ("RANK", rank),
        world_size: ("WORLD_SIZE", world_size),
        local_rank: ("LOCAL_RANK", local_rank),
        local_world_size: ("LOCAL_WORLD_SIZE", local_world_size),
        node_rank: ("GROUP_RANK", node_rank),
        node_count: ("GROUP_WORLD_SIZE", node_count),
    })
}

/// torchrun's agent serves a `TCPStore` on `MASTER_PORT`, through which rank 0 says where it hosts ours; unless the agent
/// says that it does not (then nobody has the port, and rank 0 hosts there), or the user chose a port.
fn torchrun_meeting(
    variables: &Variables<'_>,
    run_id: &str,
    master_addr: String,
    port: u16,
) -> Result<StoreFacts> {
    let restart_count: u32 =
        variables.parsed("TORCHELASTIC_RESTART_COUNT", "a whole number, 0 or more")?.unwrap_or(0);
    let one_node = variables.count("GROUP_WORLD_SIZE")? == Some(1);
    // Python's spelling, compared as torch compares it.
    let agent_serves = variables.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
    let (master_port, store) = match variables.port("PHALANX_STORE_PORT")? {
        Some(chosen) => (chosen, StoreIn::Rank0),
        None if agent_serves => (port, StoreIn::Agent),
        None => (port, StoreIn::Rank0),
    };
    Ok(StoreFacts {
        launcher: Launcher::Torchrun,
        // "none" for every job without --rdzv-id: the address and port tell such jobs apart.
        run_id: variables
            .text("PHALANX_RUN_ID")
            .unwrap_or_else(|| format!("torchrun-{run_id}-{master_addr}-{port}")),
        master_addr,
        master_port,
        // torchrun counts the restarts that this node caused: nodes differ, so on several it cannot be compared.
        restart_count: if one_node { restart_count } else { 0 },
        store,
    })
}
