//! Which ranks run here, and what each is told. Pure: numbers and strings in, environments out.

use crate::error::LaunchError;
use crate::gpus;
use crate::options::LaunchOptions;

/// Port of the store when the nodes are real and none is given: torchrun's.
pub(crate) const DEFAULT_PORT: u16 = 29_500;
const LOOPBACK: &str = "127.0.0.1";

/// One valid arrangement of nodes; there are no others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Nodes {
    /// All on this machine: one real node, or several emulated ones.
    Here { count: usize },
    /// This machine is one of several.
    Real { count: usize, mine: usize, master_addr: String },
}

/// What the options come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaunchPlan {
    pub(crate) nodes: Nodes,
    pub(crate) ranks_per_node: usize,
    /// Where the store is, or is to be; 0 for any free port.
    pub(crate) master_port: u16,
}

/// A rank's place, and that of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) rank: usize,
    pub(crate) local_rank: usize,
    pub(crate) local_world_size: usize,
    pub(crate) node_rank: usize,
    /// Its number among the ranks of this launcher.
    pub(crate) number_here: usize,
}

impl LaunchPlan {
    /// Checks the options against each other.
    pub(crate) fn new(options: &LaunchOptions) -> Result<Self, LaunchError> {
        for (option, value) in
            [("--nnodes", options.nnodes), ("--nproc-per-node", options.nproc_per_node)]
        {
            if value == 0 || value > RANKS_MAX {
                return Err(wrong(option, value, format!("1 to {RANKS_MAX}")));
            }
        }
        if let Some(min) = options.nnodes_min.filter(|min| !(1..=options.nnodes).contains(min)) {
            return Err(wrong("--nnodes", min, format!("a minimum of 1 to {}", options.nnodes)));
        }
        if options.nnodes_min.is_some() && options.node_rank.is_none() {
            return Err(LaunchError::MissingOption {
                option: "--node-rank",
                because: "--nnodes MIN:MAX is for real nodes, which come and go",
            });
        }
        if options.threads == Some(0) {
            return Err(wrong("--threads", 0, "1 or more".to_owned()));
        }
        let nodes = Self::nodes(options)?;
        let is_real = matches!(nodes, Nodes::Real { .. });
        let master_port = options.master_port.unwrap_or(if is_real { DEFAULT_PORT } else { 0 });
        if is_real && master_port == 0 {
            let expected =
                "a port that every node can be told: 0 (any free one) is for one machine";
            return Err(wrong("--master-port", 0, expected.to_owned()));
        }
        Ok(Self { nodes, ranks_per_node: options.nproc_per_node, master_port })
    }

    fn nodes(options: &LaunchOptions) -> Result<Nodes, LaunchError> {
        let count = options.nnodes;
        let Some(mine) = options.node_rank else {
            return match &options.master_addr {
                Some(_) if count > 1 => Err(LaunchError::MissingOption {
                    option: "--node-rank",
                    because: "--master-addr with several nodes means real ones, and each needs its number; without both, \
                              the nodes are emulated on this machine",
                }),
                _ => Ok(Nodes::Here { count }),
            };
        };
        if mine >= count {
            return Err(wrong("--node-rank", mine, format!("below --nnodes {count}")));
        }
        match &options.master_addr {
            _ if count == 1 => Ok(Nodes::Here { count }),
            Some(address) => Ok(Nodes::Real { count, mine, master_addr: address.clone() }),
            None => Err(LaunchError::MissingOption {
                option: "--master-addr",
                because:
                    "--node-rank with several nodes means real ones, which meet at node 0's address",
            }),
        }
    }

    /// Whether nodes decide together about restarts, and may come and go.
    pub(crate) const fn is_elastic(&self, options: &LaunchOptions) -> bool {
        let is_asked_for = options.max_restarts > 0 || options.nnodes_min.is_some();
        is_asked_for && matches!(self.nodes, Nodes::Real { .. })
    }

    pub(crate) const fn node_count(&self) -> usize {
        match self.nodes {
            Nodes::Here { count } | Nodes::Real { count, .. } => count,
        }
    }

    pub(crate) fn master_addr(&self) -> &str {
        match &self.nodes {
            Nodes::Here { .. } => LOOPBACK,
            Nodes::Real { master_addr, .. } => master_addr,
        }
    }

    /// How many ranks this launcher starts.
    pub(crate) const fn ranks_here(&self) -> usize {
        match self.nodes {
            Nodes::Here { count } => count * self.ranks_per_node,
            Nodes::Real { .. } => self.ranks_per_node,
        }
    }

    /// The ranks of this launcher, when node `n` starts `ranks_of_nodes[n]`.
    pub(crate) fn places(&self, ranks_of_nodes: &[usize]) -> Vec<Assignment> {
        let mut first = 0;
        let mut places = Vec::new();
        for (node_rank, &local_world_size) in ranks_of_nodes.iter().enumerate() {
            let is_here = match self.nodes {
                Nodes::Here { .. } => true,
                Nodes::Real { mine, .. } => node_rank == mine,
            };
            if is_here {
                let here = places.len();
                places.extend((0..local_world_size).map(|local_rank| Assignment {
                    rank: first + local_rank,
                    local_rank,
                    local_world_size,
                    node_rank,
                    number_here: here + local_rank,
                }));
            }
            first += local_world_size;
        }
        places
    }
}

/// More processes than any machine runs: a slip of the finger, not a job.
const RANKS_MAX: usize = 65_536;

fn wrong(option: &'static str, value: usize, expected: String) -> LaunchError {
    LaunchError::Option { option, value: value.to_string(), expected }
}

/// What all ranks of this launcher are told alike.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) world_size: usize,
    pub(crate) node_count: usize,
    pub(crate) master_addr: String,
    pub(crate) master_port: u16,
    pub(crate) run_id: String,
    pub(crate) job_token: String,
    pub(crate) restart_count: u32,
    /// How many restarts the user allows.
    pub(crate) restarts_max: u32,
    /// `None`: the user has set `OMP_NUM_THREADS`.
    pub(crate) threads: Option<usize>,
    /// The ranks are more than the machine's GPUs.
    pub(crate) shares_gpus: bool,
    /// How a rank opens the memory for snapshots, where the system has such memory.
    pub(crate) snapshot_memory: Option<String>,
}

/// The environment contract with `phalanx_rendezvous::environment`.
pub(crate) fn environment(job: &Job, place: Assignment) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("RANK", place.rank.to_string()),
        ("WORLD_SIZE", job.world_size.to_string()),
        ("LOCAL_RANK", place.local_rank.to_string()),
        ("LOCAL_WORLD_SIZE", place.local_world_size.to_string()),
        ("GROUP_RANK", place.node_rank.to_string()),
        ("GROUP_WORLD_SIZE", job.node_count.to_string()),
        ("MASTER_ADDR", job.master_addr.clone()),
        ("MASTER_PORT", job.master_port.to_string()),
        ("PHALANX_RUN_ID", job.run_id.clone()),
        ("PHALANX_JOB_TOKEN", job.job_token.clone()),
        ("PHALANX_RESTART_COUNT", job.restart_count.to_string()),
        ("PHALANX_AGENT_STORE", "1".to_owned()),
        // For programs that know torchrun alone.
        ("TORCHELASTIC_RESTART_COUNT", job.restart_count.to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", job.restarts_max.to_string()),
    ];
    variables.extend(job.threads.map(|threads| ("OMP_NUM_THREADS", threads.to_string())));
    variables.extend(
        job.snapshot_memory
            .as_ref()
            .map(|memory| ("PHALANX_SNAPSHOT_MEMORY", format!("{memory}:{}", place.number_here))),
    );
    if job.shares_gpus {
        variables.extend(gpus::sharing(place.rank));
    }
    variables
}

/// Whether ranks have to share GPUs: only emulated nodes may. Pure.
pub(crate) fn shares_gpus(plan: &LaunchPlan, gpu_count: usize) -> bool {
    let is_emulated = matches!(plan.nodes, Nodes::Here { count } if count > 1);
    is_emulated && gpu_count > 0 && plan.ranks_here() > gpu_count
}

/// What the user is told where ranks share GPUs. Pure.
pub(crate) fn sharing_notice(plan: &LaunchPlan, gpu_count: usize) -> String {
    let (ranks, plural) = (plan.ranks_here(), if gpu_count == 1 { "" } else { "s" });
    format!(
        "{ranks} ranks share {gpu_count} GPU{plural}: NCCL is set up to take each rank for a machine of its own \
         (NCCL_HOSTID and loopback sockets); good for correctness, meaningless for speed"
    )
}

/// Threads of each rank: an equal share of the cores, unless the user chose.
pub(crate) fn threads(
    asked: Option<usize>,
    is_set: bool,
    cores: usize,
    ranks_here: usize,
) -> Option<usize> {
    match asked {
        Some(threads) => Some(threads),
        None if is_set => None,
        None => Some((cores / ranks_here).max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(nnodes: usize, nproc_per_node: usize) -> LaunchOptions {
        LaunchOptions { nnodes, nproc_per_node, ..LaunchOptions::default() }
    }

    fn real(mine: usize) -> LaunchOptions {
        LaunchOptions {
            node_rank: Some(mine),
            master_addr: Some("node0".to_owned()),
            ..options(3, 2)
        }
    }

    #[test]
    fn without_a_node_rank_all_nodes_are_here() {
        let plan = LaunchPlan::new(&options(4, 2)).unwrap();
        assert_eq!(plan.nodes, Nodes::Here { count: 4 });
        assert_eq!((plan.ranks_here(), plan.master_addr(), plan.master_port), (8, "127.0.0.1", 0));
        let places = plan.places(&[2; 4]);
        let expected = |rank| Assignment {
            rank,
            local_rank: rank % 2,
            local_world_size: 2,
            node_rank: rank / 2,
            number_here: rank,
        };
        assert_eq!(places, (0..8).map(expected).collect::<Vec<_>>());
    }

    #[test]
    fn real_nodes_may_be_uneven() {
        let plan = LaunchPlan::new(&real(1)).unwrap();
        assert_eq!((plan.ranks_here(), plan.master_port), (2, DEFAULT_PORT));
        let places = plan.places(&[3, 2, 1]);
        let numbers = places.iter().map(|place| (place.rank, place.number_here));
        assert_eq!(numbers.collect::<Vec<_>>(), [(3, 0), (4, 1)]);
        assert!(places.iter().all(|place| place.node_rank == 1 && place.local_world_size == 2));
    }

    #[test]
    fn one_node_is_never_a_meeting_of_machines() {
        let one = LaunchOptions { nnodes: 1, node_rank: Some(0), ..real(0) };
        assert_eq!(LaunchPlan::new(&one).unwrap().nodes, Nodes::Here { count: 1 });
    }

    #[test]
    fn options_that_do_not_fit_are_named() {
        let message = |options: &LaunchOptions| LaunchPlan::new(options).unwrap_err().to_string();
        assert!(message(&options(0, 1)).contains("--nnodes 0"));
        assert!(message(&options(1, 0)).contains("--nproc-per-node 0"));
        assert!(message(&real(3)).contains("--node-rank 3 is not below --nnodes 3"));
        let no_address = LaunchOptions { master_addr: None, ..real(0) };
        assert!(message(&no_address).contains("--master-addr is missing"));
        let no_number = LaunchOptions { node_rank: None, ..real(0) };
        assert!(message(&no_number).contains("--node-rank is missing"));
        let any_port = LaunchOptions { master_port: Some(0), ..real(0) };
        assert!(message(&any_port).contains("--master-port 0"));
        let no_threads = LaunchOptions { threads: Some(0), ..options(1, 1) };
        assert!(message(&no_threads).contains("--threads 0"));
    }

    #[test]
    fn only_emulated_nodes_share_gpus_and_only_where_those_are_too_few() {
        let shares = |options: &LaunchOptions, gpu_count| {
            shares_gpus(&LaunchPlan::new(options).unwrap(), gpu_count)
        };
        let counts = |options: &LaunchOptions| [0, 1, 3, 4].map(|count| shares(options, count));
        assert_eq!(counts(&options(4, 1)), [false, true, true, false]);
        assert_eq!(counts(&options(2, 2)), [false, true, true, false]);
        // One real node, whose ranks want a GPU each, and one of three.
        assert_eq!(counts(&options(1, 4)), [false; 4]);
        assert_eq!(counts(&real(1)), [false; 4]);
    }

    #[test]
    fn a_rank_is_told_what_it_shares_and_where_its_place_is() {
        let plan = LaunchPlan::new(&options(4, 2)).unwrap();
        assert!(sharing_notice(&plan, 1).starts_with("8 ranks share 1 GPU: NCCL "));
        assert!(sharing_notice(&plan, 3).starts_with("8 ranks share 3 GPUs: NCCL "));
        let told = |shares_gpus, name: &str| {
            let job = Job {
                world_size: 8,
                node_count: 4,
                master_addr: LOOPBACK.to_owned(),
                master_port: 1,
                run_id: "a".to_owned(),
                job_token: "b".to_owned(),
                restart_count: 0,
                restarts_max: 0,
                threads: None,
                shares_gpus,
                snapshot_memory: Some("/proc/1/fd/9".to_owned()),
            };
            let place = plan.places(&[2; 4])[5];
            let find = |(variable, _): &(&str, String)| *variable == name;
            environment(&job, place).into_iter().find(find).map(|(_, value)| value)
        };
        assert_eq!(told(true, "NCCL_HOSTID").as_deref(), Some("rank5"));
        assert_eq!(told(false, "NCCL_HOSTID"), None);
        assert_eq!(told(false, "PHALANX_SNAPSHOT_MEMORY").as_deref(), Some("/proc/1/fd/9:5"));
    }

    #[test]
    fn threads_are_a_share_of_the_cores_unless_chosen() {
        assert_eq!(threads(None, false, 8, 2), Some(4));
        assert_eq!(threads(None, false, 2, 4), Some(1));
        assert_eq!(threads(None, true, 8, 2), None);
        assert_eq!(threads(Some(3), true, 8, 2), Some(3));
    }
}
