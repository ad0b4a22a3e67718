//! The variables of a task that `srun` started.
//!
//! Source: Slurm 22.05 as observed; `slurm/slurm.h` for the numbers of steps that are no steps.

use super::launchers::{finish, RankFacts, StoreFacts, StoreIn};
use super::slurm::{expand_nodes, expand_tasks};
use super::variables::{invalid, missing, Result, Variables};
use super::{derived_port, Launcher, World, LOOPBACK};

/// From here on step numbers name what runs outside of `srun`: the batch script, the interactive shell, the prologue.
const SPECIAL_STEPS: u32 = 0xFFFF_FFF0;

/// Whether `srun` started this process. A batch script sees a `SLURM_PROCID` too, but no step of its own.
pub(super) fn is_here(variables: &Variables<'_>) -> bool {
    let step = variables.text("SLURM_STEP_ID");
    let is_special = |text: &String| text.parse().is_ok_and(|number: u32| number >= SPECIAL_STEPS);
    variables.has("SLURM_PROCID") && step.is_some_and(|step| !is_special(&step))
}

/// Whether `srun` says the same as PMI does (`--mpi=pmi2`).
pub(super) fn is_rank(variables: &Variables<'_>, rank: usize, world_size: usize) -> Result<bool> {
    Ok(is_here(variables)
        && variables.number("SLURM_PROCID")? == Some(rank)
        && size(variables)? == Some(world_size))
}

fn size(variables: &Variables<'_>) -> Result<Option<usize>> {
    for variable in ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"] {
        if let Some(size) = variables.count(variable)? {
            return Ok(Some(size));
        }
    }
    Ok(None)
}

pub(super) fn world(variables: &Variables<'_>) -> Result<World> {
    const BECAUSE: &str = "SLURM_STEP_ID is set";
    let node_count = match variables.count("SLURM_STEP_NUM_NODES")? {
        Some(count) => count,
        None => variables.count_needed("SLURM_NNODES", BECAUSE)?,
    };
    let node_rank = variables.number_needed("SLURM_NODEID", BECAUSE)?;
    let place = RankFacts {
        rank: ("SLURM_PROCID", variables.number_needed("SLURM_PROCID", BECAUSE)?),
        world_size: (
            "SLURM_STEP_NUM_TASKS",
            size(variables)?.ok_or_else(|| missing("SLURM_STEP_NUM_TASKS", BECAUSE))?,
        ),
        local_rank: ("SLURM_LOCALID", variables.number_needed("SLURM_LOCALID", BECAUSE)?),
        local_world_size: ("tasks of this node", local_size(variables, node_rank)?),
        node_rank: ("SLURM_NODEID", node_rank),
        node_count: ("SLURM_STEP_NUM_NODES", node_count),
    };
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => address,
        None if node_count == 1 => LOOPBACK.to_owned(),
        None => first_node(variables)?,
    };
    let job = variables.text_needed("SLURM_JOB_ID", BECAUSE)?;
    let step = variables.text_needed("SLURM_STEP_ID", BECAUSE)?;
    let run_id = variables.text("PHALANX_RUN_ID").unwrap_or_else(|| format!("slurm-{job}.{step}"));
    let meeting = StoreFacts {
        launcher: Launcher::Slurm,
        master_addr,
        // Two steps of one job run at the same time: the step is part of the run id.
        master_port: variables.port("MASTER_PORT")?.unwrap_or_else(|| derived_port(&run_id)),
        run_id,
        restart_count: variables.restart_count()?,
        store: StoreIn::Rank0,
    };
    finish(variables, &place, meeting)
}

/// Never tasks ÷ nodes: Slurm places unevenly without being asked.
fn local_size(variables: &Variables<'_>, node_rank: usize) -> Result<usize> {
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

fn first_node(variables: &Variables<'_>) -> Result<String> {
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
