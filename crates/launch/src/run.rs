//! From options to a report: meet, start, supervise.

use std::ffi::OsString;
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use phalanx_comm::slots;
use phalanx_rendezvous::environment::{JobToken, LauncherEnvironment, World};
use phalanx_rendezvous::{listen_address, Credentials, Store as _, StoreClient, StoreServer};
use sha2::{Digest as _, Sha256};

use crate::attempts::Attempts;
use crate::elastic::{self, Elastic};
use crate::error::LaunchError;
use crate::flight;
use crate::gpus;
use crate::logs::Logs;
use crate::nodes::Nodes as NodeLink;
use crate::options::LaunchOptions;
use crate::plan::{shares_gpus, sharing_notice, threads, Job, LaunchPlan, Nodes};
use crate::report::Report;
use crate::restart::{Limits, Policy};
use crate::screen::Screen;
use crate::signals::Signals;
use crate::supervise::{Leaving, Supervisor};

/// Whether a launcher (ours, torchrun, mpirun, srun) has started this process as a rank.
#[must_use]
pub fn is_worker() -> bool {
    World::is_in_env()
}

/// Starts `program` with `args` as every rank of this machine, and waits for all of them.
///
/// Must be the only launcher of its process at a time: it takes over the signals, and does not put the former handlers
/// back.
///
/// # Errors
///
/// [`LaunchError`] when the job could not be started; what happens to the ranks afterwards is in the [`Report`].
pub fn run(
    options: &LaunchOptions,
    program: &Path,
    args: &[OsString],
) -> Result<Report, LaunchError> {
    run_as(options, program, args, None)
}

/// As [`run`], with a run's name and secret that others have been told already.
pub(crate) fn run_as(
    options: &LaunchOptions,
    program: &Path,
    args: &[OsString],
    told: Option<Credentials>,
) -> Result<Report, LaunchError> {
    let plan = LaunchPlan::new(options)?;
    let deadline = Instant::now() + options.connect_timeout;
    let ours = LauncherEnvironment::from_env()?;
    let credentials = told.map_or_else(|| credentials(&plan, &ours), Ok)?;
    let mut screen = Screen::new();
    announce(&mut screen, &plan);
    let server = host_store(&plan, &credentials, deadline)?;
    let mut job = job(&plan, options, &ours, &credentials);
    // It outlives the ranks of every attempt, and goes when this process does.
    let snapshots = memory_for_snapshots();
    job.snapshot_memory = snapshots.as_ref().map(flight::path);
    if job.shares_gpus {
        let gpu_count = gpus::count(ours.visible_gpus.as_deref());
        screen.notice(&sharing_notice(&plan, gpu_count));
    }
    let policy = Policy::new(limits(options));
    let report = if plan.is_elastic(options) {
        say_where(&mut screen, &plan);
        let policy_of_job = policy.clone();
        let met =
            elastic::meet(&plan, options, &credentials, server.as_ref(), policy_of_job, deadline)?;
        let store = (&**met.link.store(), met.link.node() == 0);
        let logs = logs(options.log_dir.as_deref(), &job.run_id, Some(store), deadline)?;
        let mut supervisor = Supervisor::new(Signals::register()?, None, options.grace, policy);
        if options.nnodes_min.is_some() && met.link.node() > 0 {
            supervisor.leaving = Leaving::May;
        }
        supervisor.link = Some(met.link);
        let node = Elastic { options, program, args, plan, job, logs };
        node.run(&mut supervisor, met.host, server)?
    } else {
        let (link, ranks_of_nodes) = meet(&mut screen, &plan, &credentials, deadline)?;
        job.world_size = ranks_of_nodes.iter().sum();
        if let Some(server) = &server {
            job.master_port = server.address().port();
        }
        let store = link.as_ref().map(|link| (link.store(), link.is_first()));
        let logs = logs(options.log_dir.as_deref(), &job.run_id, store, deadline)?;
        // Until here a Ctrl-C ends this process as any other: nothing was started that could stay behind.
        let mut supervisor = Supervisor::new(Signals::register()?, link, options.grace, policy);
        let attempts = Attempts {
            options,
            program,
            args,
            plan,
            ranks_of_nodes,
            job,
            logs,
            credentials,
            server,
        };
        attempts.run(&mut supervisor)?
    };
    // They live until the last rank has ended.
    drop(snapshots);
    Ok(report)
}

/// Nobody may ask for it, so a system that has none is no reason not to start.
fn memory_for_snapshots() -> Option<File> {
    let memory = slots::memory();
    memory.inspect_err(|error| tracing::warn!(%error, "no memory for snapshots")).ok()
}

fn say_where(screen: &mut Screen, plan: &LaunchPlan) {
    if let Nodes::Real { mine, count, .. } = plan.nodes {
        let (address, port) = (plan.master_addr(), plan.master_port);
        screen.notice(&format!("node {mine} of {count}: meeting the others at {address}:{port}"));
    }
}

fn limits(options: &LaunchOptions) -> Limits {
    Limits {
        restarts_max: options.max_restarts,
        window: options.restart_window,
        attempts_in_vain_max: options.crash_loop.max(1),
    }
}

/// Meets the launchers of the other nodes, if those are real; returns how many ranks each node starts, too.
fn meet(
    screen: &mut Screen,
    plan: &LaunchPlan,
    credentials: &Credentials,
    deadline: Instant,
) -> Result<(Option<NodeLink>, Vec<usize>), LaunchError> {
    let mine = match plan.nodes {
        Nodes::Here { count } => return Ok((None, vec![plan.ranks_per_node; count])),
        Nodes::Real { mine, .. } => mine,
    };
    say_where(screen, plan);
    let (link, ranks) = NodeLink::meet(plan, mine, credentials.clone(), deadline)?;
    Ok((Some(link), ranks))
}

/// What all ranks of the first attempt are told alike.
fn job(
    plan: &LaunchPlan,
    options: &LaunchOptions,
    ours: &LauncherEnvironment,
    credentials: &Credentials,
) -> Job {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let is_set = ours.omp_num_threads.is_some();
    Job {
        world_size: plan.ranks_here(),
        node_count: plan.node_count(),
        master_addr: plan.master_addr().to_owned(),
        master_port: plan.master_port,
        run_id: credentials.run_id.clone(),
        job_token: credentials.job_token.to_hex(),
        restart_count: credentials.restart_count,
        restarts_max: options.max_restarts,
        threads: threads(options.threads, is_set, cores, plan.ranks_here()),
        shares_gpus: shares_gpus(plan, gpus::count(ours.visible_gpus.as_deref())),
        snapshot_memory: None,
    }
}

/// Says what is not obvious: that machines are played.
fn announce(screen: &mut Screen, plan: &LaunchPlan) {
    if let Nodes::Here { count } = plan.nodes {
        if count > 1 {
            let ranks = plan.ranks_per_node;
            let plural = if ranks == 1 { "" } else { "s" };
            screen.notice(&format!(
                "emulating {count} nodes on this machine, {ranks} rank{plural} each (real ones: --node-rank and --master-addr)"
            ));
        }
    }
}

/// Run id and secret: fresh ones on one machine, agreed ones on several.
fn credentials(plan: &LaunchPlan, ours: &LauncherEnvironment) -> Result<Credentials, LaunchError> {
    let (job_token, run_id) = match &plan.nodes {
        Nodes::Here { .. } => {
            let fresh = JobToken::generate()?;
            let run_id = short_hash(&[fresh.as_bytes(), b"run id"]);
            (ours.job_token.clone().unwrap_or(fresh), run_id)
        }
        Nodes::Real { master_addr, .. } => {
            let token = ours.job_token.clone().ok_or(LaunchError::NoJobToken)?;
            // Not of the token: nodes with different ones should hear that it is the token.
            let port = plan.master_port.to_le_bytes();
            let run_id = short_hash(&[master_addr.as_bytes(), &port]);
            (token, run_id)
        }
    };
    let run_id = ours.run_id.clone().unwrap_or(run_id);
    Ok(Credentials { run_id, restart_count: 0, job_token })
}

/// Eight hexadecimal digits: a name, not a secret.
pub(crate) fn short_hash(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// The store, if this launcher is to host it.
pub(crate) fn host_store(
    plan: &LaunchPlan,
    credentials: &Credentials,
    deadline: Instant,
) -> Result<Option<StoreServer>, LaunchError> {
    let address = match &plan.nodes {
        Nodes::Here { .. } => SocketAddr::from(([127, 0, 0, 1], plan.master_port)),
        Nodes::Real { mine: 0, master_addr, .. } => {
            listen_address(master_addr, plan.master_port, deadline)?
        }
        Nodes::Real { .. } => return Ok(None),
    };
    Ok(Some(StoreServer::start(address, credentials.clone())?))
}

/// The folder for logs, of the same name on all nodes: it may be the same folder.
fn logs(
    parent: Option<&Path>,
    run_id: &str,
    store: Option<(&StoreClient, bool)>,
    deadline: Instant,
) -> Result<Logs, LaunchError> {
    const FOLDER_KEY: &str = "launch/folder";
    let Some((store, is_first)) = store else { return Logs::create(parent, run_id) };
    if !is_first {
        let name = store.get(FOLDER_KEY, deadline)?;
        return Logs::join(parent, &String::from_utf8_lossy(&name));
    }
    let logs = Logs::create(parent, run_id)?;
    let name = logs.folder(parent).unwrap_or_else(|| run_id.to_owned());
    store.set(FOLDER_KEY, name.as_bytes())?;
    Ok(logs)
}
