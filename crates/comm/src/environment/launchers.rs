//! The variables of each launcher, pure over a lookup.
//!
//! Source: torch 2.11 `local_elastic_agent.py`; Open MPI 4.1 and Slurm 22.05 as observed; Hydra and Intel MPI by their
//! manuals.

use super::slurm::{expand_nodes, expand_tasks};
use super::{
    derived_port, EnvironmentError, HostLink, JobToken, Launcher, LauncherEnvironment, StoreHost,
    World, LOOPBACK,
};

type Result<T> = std::result::Result<T, EnvironmentError>;

/// Typed access to the variables, with errors that name them.
pub(super) struct Variables<'l> {
    lookup: &'l dyn Fn(&str) -> Option<String>,
}

impl<'l> Variables<'l> {
    pub(super) fn new(lookup: &'l dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    fn text(&self, variable: &str) -> Option<String> {
        (self.lookup)(variable).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty())
    }

    fn has(&self, variable: &str) -> bool {
        self.text(variable).is_some()
    }

    fn parsed<T: std::str::FromStr>(
        &self,
        variable: &'static str,
        expected: &str,
    ) -> Result<Option<T>> {
        let Some(value) = self.text(variable) else { return Ok(None) };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(_) => Err(invalid(variable, value, expected)),
        }
    }

    fn number(&self, variable: &'static str) -> Result<Option<usize>> {
        self.parsed(variable, "a whole number, 0 or more")
    }

    fn count(&self, variable: &'static str) -> Result<Option<usize>> {
        match self.number(variable)? {
            Some(0) => Err(invalid(variable, "0".to_owned(), "a whole number, 1 or more")),
            other => Ok(other),
        }
    }

    fn port(&self, variable: &'static str) -> Result<Option<u16>> {
        const EXPECTED: &str = "a port, 1 to 65535";
        match self.parsed(variable, EXPECTED)? {
            Some(0) => Err(invalid(variable, "0".to_owned(), EXPECTED)),
            other => Ok(other),
        }
    }

    fn text_needed(&self, variable: &'static str, because: &str) -> Result<String> {
        self.text(variable).ok_or_else(|| missing(variable, because))
    }

    fn number_needed(&self, variable: &'static str, because: &str) -> Result<usize> {
        self.number(variable)?.ok_or_else(|| missing(variable, because))
    }

    fn count_needed(&self, variable: &'static str, because: &str) -> Result<usize> {
        self.count(variable)?.ok_or_else(|| missing(variable, because))
    }

    /// The token of `PHALANX_JOB_TOKEN`, else one derived from what everybody in the job (and, alas, beyond) knows.
    fn job_token(&self, facts: &[&str]) -> Result<JobToken> {
        Ok(self.given_token()?.unwrap_or_else(|| JobToken::derive(facts)))
    }

    fn given_token(&self) -> Result<Option<JobToken>> {
        const VARIABLE: &str = "PHALANX_JOB_TOKEN";
        match self.text(VARIABLE) {
            None => Ok(None),
            // The value stays out of the message: it is, or nearly is, a secret.
            Some(text) => JobToken::from_hex(&text).map(Some).ok_or_else(|| {
                let shown = format!("({} characters)", text.chars().count());
                invalid(
                    VARIABLE,
                    shown,
                    "64 hexadecimal digits (make one with: openssl rand -hex 32)",
                )
            }),
        }
    }

    fn host_link(&self) -> Result<HostLink> {
        const VARIABLE: &str = "PHALANX_HOST_LINK";
        match self.text(VARIABLE) {
            None => Ok(HostLink::Auto),
            Some(value) => match value.as_str() {
                "auto" => Ok(HostLink::Auto),
                "shm" => Ok(HostLink::Shm),
                "tcp" => Ok(HostLink::Tcp),
                _ => Err(invalid(VARIABLE, value, "auto, shm or tcp")),
            },
        }
    }

    fn restart_count(&self) -> Result<u32> {
        Ok(self.parsed("PHALANX_RESTART_COUNT", "a whole number, 0 or more")?.unwrap_or(0))
    }
}

fn invalid(variable: &'static str, value: String, expected: &str) -> EnvironmentError {
    EnvironmentError::Invalid { variable, value, expected: expected.to_owned() }
}

fn missing(variable: &'static str, because: &str) -> EnvironmentError {
    EnvironmentError::Missing { variable, because: because.to_owned() }
}

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
        return open_mpi(variables);
    }
    if has("PMI_RANK") {
        return pmi(variables);
    }
    if has("SLURM_STEP_ID") && has("SLURM_PROCID") {
        return slurm_step(variables);
    }
    // WORLD_SIZE alone is left lying around by other tools; RANK alone, or both without an address, is a job half described.
    if has("RANK") {
        for variable in ["WORLD_SIZE", "MASTER_ADDR"] {
            variables.text_needed(variable, "RANK is set")?;
        }
    }
    let mut world = World::single();
    world.host_link = variables.host_link()?;
    Ok(world)
}

/// Where a rank stands; checked for sense before a [`World`] is made of it.
struct Place {
    rank: (&'static str, usize),
    world_size: (&'static str, usize),
    local_rank: (&'static str, usize),
    local_world_size: (&'static str, usize),
    node_rank: (&'static str, usize),
    node_count: (&'static str, usize),
}

impl Place {
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
struct Meeting {
    launcher: Launcher,
    master_addr: String,
    master_port: u16,
    run_id: String,
    restart_count: u32,
    /// The launcher hosts the store.
    store_in_launcher: bool,
}

fn finish(variables: &Variables<'_>, place: &Place, meeting: Meeting) -> Result<World> {
    place.check()?;
    let hosts = place.rank.1 == 0 && !meeting.store_in_launcher;
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
        store_host: if hosts { StoreHost::ThisRank } else { StoreHost::Elsewhere },
        launcher: meeting.launcher,
        host_link: variables.host_link()?,
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
        None => Meeting {
            launcher: if store_in_launcher { Launcher::Phalanx } else { Launcher::Manual },
            run_id: variables
                .text("PHALANX_RUN_ID")
                .unwrap_or_else(|| format!("manual-{master_addr}-{port}")),
            restart_count: variables.restart_count()?,
            master_addr,
            master_port: port,
            store_in_launcher,
        },
    };
    finish(variables, &place, meeting)
}

fn place_of_ranks_given(
    variables: &Variables<'_>,
    rank: usize,
    world_size: usize,
) -> Result<Place> {
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
    Ok(Place {
        rank: ("RANK", rank),
        world_size: ("WORLD_SIZE", world_size),
        local_rank: ("LOCAL_RANK", local_rank),
        local_world_size: ("LOCAL_WORLD_SIZE", local_world_size),
        node_rank: ("GROUP_RANK", node_rank),
        node_count: ("GROUP_WORLD_SIZE", node_count),
    })
}

/// torchrun's agent listens on `MASTER_PORT` with PyTorch's own protocol (unless it says that it does not); our store,
/// hosted by rank 0, takes the port after it.
fn torchrun_meeting(
    variables: &Variables<'_>,
    run_id: &str,
    master_addr: String,
    port: u16,
) -> Result<Meeting> {
    let restart_count: u32 =
        variables.parsed("TORCHELASTIC_RESTART_COUNT", "a whole number, 0 or more")?.unwrap_or(0);
    let one_node = variables.count("GROUP_WORLD_SIZE")? == Some(1);
    // torchrun writes Python's `True` and `False`; absent means an old torchrun, whose agent kept the port too.
    let agent_has_port = variables.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() != Some("False");
    let next_port = if port == u16::MAX { port - 1 } else { port + 1 };
    Ok(Meeting {
        launcher: Launcher::Torchrun,
        // "none" for every job without --rdzv-id: the address and port tell such jobs apart.
        run_id: variables
            .text("PHALANX_RUN_ID")
            .unwrap_or_else(|| format!("torchrun-{run_id}-{master_addr}-{port}")),
        master_addr,
        master_port: if agent_has_port { next_port } else { port },
        // torchrun counts the restarts that this node caused: nodes differ, so on several it cannot be compared.
        restart_count: if one_node { restart_count } else { 0 },
        store_in_launcher: false,
    })
}

fn open_mpi(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "OMPI_COMM_WORLD_RANK is set";
    let rank = variables.number_needed("OMPI_COMM_WORLD_RANK", BECAUSE)?;
    let world_size = variables.count_needed("OMPI_COMM_WORLD_SIZE", BECAUSE)?;
    let local_rank = variables.number_needed("OMPI_COMM_WORLD_LOCAL_RANK", BECAUSE)?;
    let local_world_size = variables.count_needed("OMPI_COMM_WORLD_LOCAL_SIZE", BECAUSE)?;
    let place = Place {
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
        .ok_or_else(|| missing("PMIX_NAMESPACE", BECAUSE))?;
    let meeting = mpi_meeting(
        variables,
        &place,
        MpiJob {
            launcher: Launcher::OpenMpi,
            name: "Open MPI",
            example: "mpirun -x MASTER_ADDR=node0",
            run_id: format!("openmpi-{job}"),
        },
    )?;
    finish(variables, &place, meeting)
}

fn pmi(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "PMI_RANK is set";
    let rank = variables.number_needed("PMI_RANK", BECAUSE)?;
    let world_size = variables.count_needed("PMI_SIZE", BECAUSE)?;
    let same_as_slurm = variables.has("SLURM_STEP_ID")
        && variables.number("SLURM_PROCID")? == Some(rank)
        && slurm_size(variables)? == Some(world_size);
    if same_as_slurm {
        return slurm_step(variables);
    }
    let local_rank = variables.number_needed("MPI_LOCALRANKID", BECAUSE)?;
    let local_world_size = variables.count_needed("MPI_LOCALNRANKS", BECAUSE)?;
    let place = Place {
        rank: ("PMI_RANK", rank),
        world_size: ("PMI_SIZE", world_size),
        local_rank: ("MPI_LOCALRANKID", local_rank),
        local_world_size: ("MPI_LOCALNRANKS", local_world_size),
        node_rank: ("PMI_RANK / MPI_LOCALNRANKS", rank / local_world_size),
        node_count: ("PMI_SIZE / MPI_LOCALNRANKS", world_size.div_ceil(local_world_size)),
    };
    // Hydra names its control port: the same for all ranks of a job on one machine, and unlike other jobs'.
    let job = variables
        .text("PMI_JOBID")
        .or_else(|| variables.text("PMI_PORT"))
        .or_else(|| variables.text("PHALANX_RUN_ID"))
        .or_else(|| variables.text("MASTER_PORT"))
        .ok_or_else(|| {
            missing("PHALANX_RUN_ID", "PMI_RANK is set without PMI_JOBID or PMI_PORT")
        })?;
    let meeting = mpi_meeting(
        variables,
        &place,
        MpiJob {
            launcher: Launcher::Pmi,
            name: "PMI (MPICH, Intel MPI)",
            example: "mpiexec -genv MASTER_ADDR node0",
            run_id: format!("pmi-{job}"),
        },
    )?;
    finish(variables, &place, meeting)
}

struct MpiJob {
    launcher: Launcher,
    name: &'static str,
    example: &'static str,
    run_id: String,
}

/// MPI launchers give ranks but no address: loopback on one machine, an error that says what to set on several.
fn mpi_meeting(variables: &Variables<'_>, place: &Place, job: MpiJob) -> Result<Meeting> {
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => address,
        None if place.node_count.1 == 1 => LOOPBACK.to_owned(),
        None => {
            return Err(EnvironmentError::NoMasterAddress {
                launcher: job.name,
                local_world_size: place.local_world_size.1,
                world_size: place.world_size.1,
                example: job.example,
            })
        }
    };
    let run_id = variables.text("PHALANX_RUN_ID").unwrap_or(job.run_id);
    Ok(Meeting {
        launcher: job.launcher,
        master_addr,
        master_port: variables.port("MASTER_PORT")?.unwrap_or_else(|| derived_port(&run_id)),
        run_id,
        restart_count: variables.restart_count()?,
        store_in_launcher: false,
    })
}

fn slurm_size(variables: &Variables<'_>) -> Result<Option<usize>> {
    for variable in ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"] {
        if let Some(size) = variables.count(variable)? {
            return Ok(Some(size));
        }
    }
    Ok(None)
}

fn slurm_step(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "SLURM_STEP_ID is set";
    let node_count = match variables.count("SLURM_STEP_NUM_NODES")? {
        Some(count) => count,
        None => variables.count_needed("SLURM_NNODES", BECAUSE)?,
    };
    let node_rank = variables.number_needed("SLURM_NODEID", BECAUSE)?;
    let place = Place {
        rank: ("SLURM_PROCID", variables.number_needed("SLURM_PROCID", BECAUSE)?),
        world_size: (
            "SLURM_STEP_NUM_TASKS",
            slurm_size(variables)?.ok_or_else(|| missing("SLURM_STEP_NUM_TASKS", BECAUSE))?,
        ),
        local_rank: ("SLURM_LOCALID", variables.number_needed("SLURM_LOCALID", BECAUSE)?),
        local_world_size: ("tasks of this node", slurm_local_size(variables, node_rank)?),
        node_rank: ("SLURM_NODEID", node_rank),
        node_count: ("SLURM_STEP_NUM_NODES", node_count),
    };
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => address,
        None if node_count == 1 => LOOPBACK.to_owned(),
        None => slurm_first_node(variables)?,
    };
    let job = variables.text_needed("SLURM_JOB_ID", BECAUSE)?;
    let step = variables.text_needed("SLURM_STEP_ID", BECAUSE)?;
    let run_id = variables.text("PHALANX_RUN_ID").unwrap_or_else(|| format!("slurm-{job}.{step}"));
    let meeting = Meeting {
        launcher: Launcher::Slurm,
        master_addr,
        // Two steps of one job run at the same time: the step is part of the run id.
        master_port: variables.port("MASTER_PORT")?.unwrap_or_else(|| derived_port(&run_id)),
        run_id,
        restart_count: variables.restart_count()?,
        store_in_launcher: false,
    };
    finish(variables, &place, meeting)
}

/// Never tasks ÷ nodes: Slurm places unevenly without being asked.
fn slurm_local_size(variables: &Variables<'_>, node_rank: usize) -> Result<usize> {
    if let Some(ids) = variables.text("SLURM_GTIDS") {
        let all_numbers = ids.split(',').all(|id| id.trim().parse::<usize>().is_ok());
        return if all_numbers {
            Ok(ids.split(',').count())
        } else {
            Err(invalid("SLURM_GTIDS", ids, "a list of task numbers such as 0,1,2"))
        };
    }
    const VARIABLE: &str = "SLURM_STEP_TASKS_PER_NODE";
    let list = variables.text_needed(VARIABLE, "SLURM_STEP_ID is set without SLURM_GTIDS")?;
    expand_tasks(&list).and_then(|tasks| tasks.get(node_rank).copied()).ok_or_else(|| {
        let expected = format!("a list such as 5,1(x3) that reaches node {node_rank}");
        invalid(VARIABLE, list, &expected)
    })
}

fn slurm_first_node(variables: &Variables<'_>) -> Result<String> {
    const STEP: &str = "SLURM_STEP_NODELIST";
    const JOB: &str = "SLURM_JOB_NODELIST";
    let (variable, list) = match variables.text(STEP) {
        Some(list) => (STEP, list),
        None => (JOB, variables.text_needed(JOB, "SLURM_STEP_ID is set and so is no MASTER_ADDR")?),
    };
    expand_nodes(&list)
        .and_then(|nodes| nodes.into_iter().next())
        .ok_or_else(|| invalid(variable, list, "a node list such as n[1-4],m7"))
}
