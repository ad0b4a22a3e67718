//! What can be asked of the launcher.

use std::path::PathBuf;
use std::time::Duration;

/// How to start a job. [`Default`] is one rank on this machine.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// How many nodes the job has (at most, where [`LaunchOptions::nnodes_min`] is less).
    pub nnodes: usize,
    /// Real nodes: the job goes on with so many, and takes in others when they come. `None`: with all or not at all.
    pub nnodes_min: Option<usize>,
    /// How many ranks this node (each emulated node) starts.
    pub nproc_per_node: usize,
    /// This node's number. `None`: all nodes are emulated on this machine.
    pub node_rank: Option<usize>,
    /// Node 0's name or address, for real nodes.
    pub master_addr: Option<String>,
    /// Port of the store on node 0. `None`: 29500 for real nodes, any free one on one machine; 0 likewise.
    pub master_port: Option<u16>,
    /// Threads of each rank (`OMP_NUM_THREADS`). `None`: what the user has set, else cores ÷ ranks on this machine.
    pub threads: Option<usize>,
    /// Whether lines are prefixed by their rank.
    pub prefix: Prefix,
    /// How long ranks may take to end after they were asked to, before they are killed.
    pub grace: Duration,
    /// How often the ranks are started again after a failure; exit codes 64 and 65 (usage, data) are final. 0: never.
    pub max_restarts: u32,
    /// `max_restarts` is meant for a time as long as this. `None`: for the whole job, as torchrun means it.
    pub restart_window: Option<Duration>,
    /// So many attempts one after the other that come no further than the step before them are a crash loop, which ends
    /// the job. It needs ranks that tell their steps ([`progress`](crate::progress)).
    pub crash_loop: u32,
    /// How long nodes wait for each other.
    pub connect_timeout: Duration,
    /// Keep each rank's output and a record of errors (`errors.jsonl`) in a new folder of the run's name (`name-2` and so on where there is one) in here.
    pub log_dir: Option<PathBuf>,
}

/// Whether lines are prefixed by their rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefix {
    /// When there is more than one rank.
    #[default]
    Auto,
    /// Never.
    Off,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            nnodes: 1,
            nnodes_min: None,
            nproc_per_node: 1,
            node_rank: None,
            master_addr: None,
            master_port: None,
            threads: None,
            prefix: Prefix::Auto,
            // Long enough to finish writing a checkpoint of moderate size, short enough to wait for.
            grace: Duration::from_secs(10),
            max_restarts: 0,
            restart_window: None,
            // Once may be chance, twice bad luck.
            crash_loop: 3,
            // Nodes of a cluster boot, mount and pull images at different speeds.
            connect_timeout: Duration::from_secs(300),
            log_dir: None,
        }
    }
}
