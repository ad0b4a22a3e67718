//! Flags beside the environment of another launcher: what they say must be the same. Pure.

use phalanx_rendezvous::environment::{Launcher, StoreHost, World};

use crate::args::LaunchArgs;
use crate::error::LaunchError;

const LOOPBACK: [&str; 3] = ["127.0.0.1", "localhost", "::1"];

impl LaunchArgs {
    /// Compares the flags that were given with what the launcher that started this process says. Flags that agree are
    /// welcome (`srun -N4 train --nnodes 4`). Our own launcher hands its flags on to its ranks: there is nothing to compare.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Contradiction`] names the first flag that says something else, and what the launcher says.
    pub fn check_against(&self, world: &World) -> Result<(), LaunchError> {
        if matches!(world.launcher, Launcher::Phalanx | Launcher::Single) {
            return Ok(());
        }
        let differs = |option, asked: String, says: String| {
            Err(LaunchError::Contradiction { option, asked, launcher: world.launcher, says })
        };
        for (option, asked, says, what) in numbers(self, world) {
            if asked.is_some_and(|asked| asked != says) {
                let asked = asked.unwrap_or_default().to_string();
                return differs(option, asked, format!("{what} {says}"));
            }
        }
        if let Some(asked) = self.master_addr.as_ref().filter(|asked| !is_master(asked, world)) {
            return differs("--master-addr", asked.clone(), master(world, &world.master_addr));
        }
        // 0 asks for any port.
        let port = self.master_port.filter(|port| ![0, world.master_port].contains(port));
        if let Some(asked) = port {
            let says = master(world, &format!("at port {}", world.master_port));
            return differs("--master-port", asked.to_string(), says);
        }
        let nothing = || "nothing of it: it is for ranks that phalanx's launcher starts".to_owned();
        if let Some(restarts) = self.max_restarts.filter(|restarts| *restarts > 0) {
            return differs("--max-restarts", restarts.to_string(), nothing());
        }
        self.log_dir
            .as_ref()
            .map_or(Ok(()), |folder| differs("--log-dir", folder.display().to_string(), nothing()))
    }
}

type Number = (&'static str, Option<usize>, usize, &'static str);

fn numbers(args: &LaunchArgs, world: &World) -> Vec<Number> {
    let nnodes = args.nnodes.map(|count| count.max);
    let asked = nnodes.zip(args.nproc_per_node);
    let ranks = asked.map(|(nodes, ranks)| nodes.saturating_mul(ranks));
    if world.store_host == StoreHost::Mpi {
        // Which ranks share a machine is known when they have met.
        return vec![("--nnodes times --nproc-per-node", ranks, world.world_size, "ranks:")];
    }
    let of_node =
        ("--nproc-per-node", args.nproc_per_node, world.local_world_size, "ranks of this node:");
    if world.nodes_are_guessed() {
        return vec![of_node];
    }
    vec![
        ("--nnodes", nnodes, world.node_count, "nodes:"),
        of_node,
        ("--node-rank", args.node_rank, world.node_rank, "this node's number:"),
    ]
}

fn is_master(asked: &str, world: &World) -> bool {
    let here = world.store_host != StoreHost::Mpi && world.node_count == 1;
    asked == world.master_addr || here && LOOPBACK.contains(&asked)
}

fn master(world: &World, place: &str) -> String {
    match world.store_host {
        StoreHost::Mpi => "ranks meet over MPI, which chooses the place".to_owned(),
        _ => format!("ranks meet {place}"),
    }
}

#[cfg(test)]
mod tests {

    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        launch: LaunchArgs,
    }

    const TORCHRUN: &str = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 GROUP_WORLD_SIZE=2 \
                            MASTER_ADDR=n0 MASTER_PORT=29400 TORCHELASTIC_RUN_ID=j TORCHELASTIC_USE_AGENT_STORE=True";
    /// The first of two ranks on the second node, after five on the first.
    const UNEVEN: &str =
        "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=7 OMPI_COMM_WORLD_LOCAL_RANK=0 \
                          OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=7 MASTER_ADDR=n0";
    const MPIRUN: &str =
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 \
                          OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=7";
    /// The second of four nodes, whose tasks are 5, 1, 1 and 1.
    const SRUN: &str = "SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=0 SLURM_GTIDS=5 SLURM_NODEID=1 \
                        SLURM_STEP_NUM_NODES=4 SLURM_STEP_NODELIST=n[1-4] SLURM_JOB_ID=7 SLURM_STEP_ID=0";
    const OURS: &str =
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 GROUP_WORLD_SIZE=1 \
                        MASTER_ADDR=127.0.0.1 MASTER_PORT=4000 PHALANX_AGENT_STORE=1";

    fn world(environment: &str) -> World {
        let lookup = |name: &str| {
            let mut variables = environment.split(' ').filter_map(|one| one.split_once('='));
            variables.find(|(variable, _)| *variable == name).map(|(_, value)| value.to_owned())
        };
        World::from_lookup(&lookup).expect("a whole environment")
    }

    fn check(environment: &str, flags: &str) -> Result<(), String> {
        let flags = std::iter::once("train").chain(flags.split_whitespace());
        let program = Program::try_parse_from(flags).expect("flags");
        program.launch.check_against(&world(environment)).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_that_agree_are_welcome() {
        for (environment, flags) in [
            (TORCHRUN, ""),
            (TORCHRUN, "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr n0"),
            (TORCHRUN, "--master-port 29400 --threads 3 --no-prefix --grace 1"),
            (MPIRUN, "--nnodes 1 --nproc-per-node 4 --master-addr localhost --master-port 0"),
            // That launcher does not say which node this is, or how many there are.
            (UNEVEN, "--nnodes 2 --nproc-per-node 2 --node-rank 1 --master-addr n0"),
            (SRUN, "--nnodes 4 --nproc-per-node 1 --node-rank 1 --master-addr n1"),
            // Handed on by our launcher, which may have had other flags on other nodes.
            (OURS, "--nnodes 3 --nproc-per-node 1 --log-dir logs"),
            ("", "--nnodes 3"),
        ] {
            assert_eq!(check(environment, flags), Ok(()), "{environment}: {flags}");
        }
    }

    #[test]
    fn a_flag_that_says_something_else_is_refused_with_both() {
        for (environment, flags, parts) in [
            (TORCHRUN, "--nnodes 4", ["--nnodes 4", "torchrun", "nodes: 2"]),
            // Left out is not the same as 1.
            (TORCHRUN, "--nnodes 1", ["--nnodes 1", "torchrun", "nodes: 2"]),
            (TORCHRUN, "--nproc-per-node 8", ["--nproc-per-node 8", "torchrun", "this node: 4"]),
            (TORCHRUN, "--node-rank 0", ["--node-rank 0", "torchrun", "number: 1"]),
            (TORCHRUN, "--master-addr n9", ["--master-addr n9", "torchrun", "meet n0"]),
            (TORCHRUN, "--master-port 29500", ["--master-port 29500", "torchrun", "port 29400"]),
            (TORCHRUN, "--master-addr localhost", ["--master-addr localhost", "torchrun", "n0"]),
            (TORCHRUN, "--max-restarts 3", ["--max-restarts 3", "torchrun", "nothing of it"]),
            (TORCHRUN, "--log-dir logs", ["--log-dir logs", "torchrun", "nothing of it"]),
            (MPIRUN, "--nnodes 4", ["--nnodes 4", "mpirun (Open MPI)", "nodes: 1"]),
            (UNEVEN, "--nproc-per-node 5", ["--nproc-per-node 5", "mpirun", "this node: 2"]),
            (SRUN, "--nnodes 2", ["--nnodes 2", "srun", "nodes: 4"]),
            (SRUN, "--nproc-per-node 2", ["--nproc-per-node 2", "srun", "this node: 1"]),
        ] {
            let message = check(environment, flags).expect_err(flags);
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn over_mpi_only_what_is_known_before_ranks_meet_is_compared() {
        let world =
            World { store_host: StoreHost::Mpi, master_addr: String::new(), ..world(MPIRUN) };
        let check = |flags: &str| {
            let flags = std::iter::once("train").chain(flags.split_whitespace());
            let program = Program::try_parse_from(flags).expect("flags");
            program.launch.check_against(&world).map_err(|error| error.to_string())
        };
        assert_eq!(check("--nnodes 2 --nproc-per-node 2"), Ok(()));
        assert_eq!(check("--nnodes 2"), Ok(()));
        let message = check("--nnodes 2 --nproc-per-node 4").expect_err("8 are not 4");
        assert!(message.contains("--nnodes times --nproc-per-node 8"), "{message}");
        assert!(check("--master-addr n0").expect_err("no choice").contains("over MPI"));
        assert!(check("--log-dir logs").is_err());
    }
}
