//! From options to a report: meet, start, supervise.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use phalanx_comm::environment::{JobToken, LauncherEnvironment, World};
use phalanx_comm::recorder;
use phalanx_comm::rendezvous::{listen_address, Credentials, StoreServer, TcpStoreServer};
use sha2::{Digest as _, Sha256};

use crate::error::{system, LaunchError};
use crate::flight;
use crate::gpus;
use crate::lines::{Lines, Style, Tail};
use crate::logs::Logs;
use crate::nodes::Nodes as NodeLink;
use crate::options::{LaunchOptions, Prefix};
use crate::plan::{environment, shares_gpus, sharing_notice, threads, Job, Nodes, Place, Plan};
use crate::process::{ErrorStream, Process, Start};
use crate::rank::Rank;
use crate::report::Report;
use crate::screen::{Screen, Stream};
use crate::signals::Signals;
use crate::supervise::Supervisor;

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
    let plan = Plan::new(options)?;
    let deadline = Instant::now() + options.connect_timeout;
    let ours = LauncherEnvironment::from_env()?;
    let credentials = credentials(&plan, &ours)?;
    let mut screen = Screen::new();
    announce(&mut screen, &plan);
    let server = host_store(&plan, &credentials, deadline)?;
    let torch_store = serve_torch(&mut screen, &plan, options)?;
    let (link, ranks_of_nodes) = match plan.nodes {
        Nodes::Here { count } => (None, vec![plan.ranks_per_node; count]),
        Nodes::Real { mine, .. } => {
            let (address, port) = (plan.master_addr(), plan.master_port);
            let count = plan.node_count();
            screen
                .notice(&format!("node {mine} of {count}: meeting the others at {address}:{port}"));
            let (link, ranks) = NodeLink::meet(&plan, mine, credentials.clone(), deadline)?;
            (Some(link), ranks)
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let is_set = ours.omp_num_threads.is_some();
    let gpu_count = gpus::count(ours.visible_gpus.as_deref());
    let job = Job {
        world_size: ranks_of_nodes.iter().sum(),
        node_count: plan.node_count(),
        master_addr: plan.master_addr().to_owned(),
        master_port: server.as_ref().map_or(plan.master_port, |server| server.address().port()),
        run_id: credentials.run_id,
        job_token: credentials.job_token.to_hex(),
        restart_count: 0,
        threads: threads(options.threads, is_set, cores, plan.ranks_here()),
        shares_gpus: shares_gpus(&plan, gpu_count),
    };
    if job.shares_gpus {
        screen.notice(&sharing_notice(&plan, gpu_count));
    }
    let logs = logs(options.log_dir.as_deref(), &job.run_id, link.as_ref(), deadline)?;
    // Until here a Ctrl-C ends this process as any other: nothing was started that could stay behind.
    let signals = Signals::register()?;
    let mut supervisor = Supervisor::new(signals, link, host_name(), options.grace);
    supervisor.lineup_path = logs.lineup(&job.run_id, &host_name());
    supervisor.world_size = job.world_size;
    let what = What { program, args, job: &job, logs: &logs };
    for place in plan.places(&ranks_of_nodes) {
        // An error here drops the ranks that are there already: see Supervisor's drop.
        supervisor.add(what.start(place, options.prefix)?);
    }
    let report = supervisor.run()?;
    logs.record(&report);
    // The store lives until the last rank has ended.
    drop((server, torch_store));
    Ok(report)
}

/// Says what is not obvious: that machines are played.
fn announce(screen: &mut Screen, plan: &Plan) {
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
fn credentials(plan: &Plan, ours: &LauncherEnvironment) -> Result<Credentials, LaunchError> {
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
fn short_hash(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// The store, if this launcher is to host it.
fn host_store(
    plan: &Plan,
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

/// A store for Python programs, where one was asked for.
fn serve_torch(
    screen: &mut Screen,
    plan: &Plan,
    options: &LaunchOptions,
) -> Result<Option<TcpStoreServer>, LaunchError> {
    let is_first = !matches!(plan.nodes, Nodes::Real { mine: 1.., .. });
    let Some(address) = options.torch_store.filter(|_| is_first) else { return Ok(None) };
    let server = TcpStoreServer::start(address)?;
    screen.notice(&format!(
        "a TCPStore for PyTorch is at {}: whoever reaches it can read and change it",
        server.address()
    ));
    Ok(Some(server))
}

/// The folder for logs, of the same name on all nodes: it may be the same folder.
fn logs(
    parent: Option<&Path>,
    run_id: &str,
    link: Option<&NodeLink>,
    deadline: Instant,
) -> Result<Logs, LaunchError> {
    let Some(link) = link else { return Logs::create(parent, run_id) };
    if !link.is_first() {
        return Logs::join(parent, &link.folder(deadline)?);
    }
    let logs = Logs::create(parent, run_id)?;
    link.name_folder(&logs.folder(parent).unwrap_or_else(|| run_id.to_owned()))?;
    Ok(logs)
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// What every rank is started from.
struct What<'w> {
    program: &'w Path,
    args: &'w [OsString],
    job: &'w Job,
    logs: &'w Logs,
}

impl What<'_> {
    fn start(&self, place: Place, prefix: Prefix) -> Result<Rank, LaunchError> {
        let prefix = match prefix {
            Prefix::Auto if self.job.world_size > 1 => {
                let width = (self.job.world_size - 1).to_string().len();
                Some(format!("[rank {:>width$}] ", place.rank))
            }
            _ => None,
        };
        let error_stream = if place.rank == 0 && Screen::is_terminal(Stream::Error) {
            ErrorStream::Terminal
        } else {
            ErrorStream::Pipe
        };
        let style = prefix.clone().map_or(Style::Plain, Style::Prefixed);
        let error_style = match error_stream {
            ErrorStream::Terminal => Style::Terminal(prefix.unwrap_or_default()),
            ErrorStream::Pipe => style.clone(),
        };
        let flight = recorder::memory().map_err(system("memfd_create"))?;
        let mut environment = environment(self.job, place);
        environment.push(("PHALANX_FLIGHT_RECORDER", flight::path(&flight)));
        let (log, log_path) = self.logs.of_rank(place.rank)?.unzip();
        let process = Process::start(&Start {
            program: self.program,
            args: self.args,
            environment: &environment,
            error_stream,
        })?;
        Ok(Rank {
            number: place.rank,
            process,
            lines: [Lines::new(style), Lines::new(error_style)],
            tail: Tail::default(),
            log,
            log_path,
            flight,
            ended: None,
        })
    }
}
