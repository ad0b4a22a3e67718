//! A job on the hosts of a file: this launcher is node 0, and starts those of the others.
//!
//! | file | what |
//! |---|---|
//! | `mod` | from a hostfile to a report |
//! | `file` | pure: the hostfile, and words for a shell |
//! | `remote` | a launcher on another host, through ssh |

mod file;
mod remote;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phalanx_rendezvous::environment::{JobToken, LauncherEnvironment};
use phalanx_rendezvous::{Credentials, Store as _, StoreClient};

use self::file::Host;
use self::remote::{Remote, RemoteNode};
use crate::args::LaunchArgs;
use crate::error::{system, LaunchError};
use crate::options::LaunchOptions;
use crate::plan::DEFAULT_PORT;
use crate::report::Report;
use crate::run::{run_as, short_hash};

/// How often it is looked whether a host's launcher could not be started.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After the job's end launchers on other hosts have their ranks' grace and this to end.
const END_MAX: Duration = Duration::from_secs(10);

/// A hostfile and the flags beside it.
pub(crate) struct Fleet<'f> {
    pub(crate) file: &'f Path,
    pub(crate) flags: &'f LaunchArgs,
}

impl Fleet<'_> {
    /// Starts the job on all hosts; this machine is the first of them.
    pub(crate) fn run(
        &self,
        mut options: LaunchOptions,
        program: &Path,
        args: &[OsString],
    ) -> Result<Report, LaunchError> {
        let hosts = self.hosts(&mut options)?;
        if hosts.len() == 1 {
            return run_as(&options, program, args, None);
        }
        let first = &hosts[0].name;
        let name = first.rsplit('@').next().unwrap_or(first).to_owned();
        let master_addr = options.master_addr.get_or_insert(name).clone();
        options.node_rank = Some(0);
        let master_port = options.master_port.unwrap_or(DEFAULT_PORT);
        let ours = LauncherEnvironment::from_env()?;
        let job_token = ours.job_token.map_or_else(JobToken::generate, Ok)?;
        let fresh = || short_hash(&[job_token.as_bytes(), b"run id"]);
        let run_id = ours.run_id.unwrap_or_else(fresh);
        let credentials = Credentials { run_id, restart_count: 0, job_token };
        let remote = Remote {
            ssh: &self.flags.ssh,
            node_count: hosts.len(),
            job_token: &credentials.job_token.to_hex(),
            run_id: &credentials.run_id,
            master_addr: &master_addr,
            master_port,
            folder: text(std::env::current_dir().map_err(system("find this folder"))?.as_os_str()),
            command: own_command()?,
        };
        let others = hosts.iter().enumerate().skip(1);
        let nodes =
            others.map(|(node, host)| remote.start(node, host)).collect::<Result<_, _>>()?;
        let meeting = (master_addr.clone(), master_port, credentials.clone());
        let watch = Watch::start(nodes, meeting, options.grace)?;
        let report = run_as(&options, program, args, Some(credentials));
        watch.end();
        report
    }

    /// Reads the file, and brings the options into line with it.
    fn hosts(&self, options: &mut LaunchOptions) -> Result<Vec<Host>, LaunchError> {
        let path = || self.file.display().to_string();
        let content = std::fs::read_to_string(self.file)
            .map_err(|source| LaunchError::Hostfile { path: path(), source })?;
        let mut hosts = file::parse(&content).map_err(|bad| LaunchError::HostfileLine {
            path: path(),
            number: bad.number,
            text: bad.text,
        })?;
        let count = hosts.len();
        if count == 0 || self.flags.nnodes.is_some() && options.nnodes != count {
            let value = options.nnodes.to_string();
            let expected = format!("the number of hosts in {}: {count}", path());
            return Err(LaunchError::Option { option: "--nnodes", value, expected });
        }
        options.nnodes = count;
        // One number for all stands above what the file says.
        for host in hosts.iter_mut().filter(|_| self.flags.nproc_per_node.is_some()) {
            host.slots = None;
        }
        options.nproc_per_node = hosts[0].slots.unwrap_or(options.nproc_per_node);
        Ok(hosts)
    }
}

fn own_command() -> Result<Vec<String>, LaunchError> {
    let program = std::env::current_exe().map_err(system("find this program's own path"))?;
    let args = std::env::args_os().skip(1);
    Ok(std::iter::once(program.into()).chain(args).map(|word| text(&word)).collect())
}

fn text(word: &OsStr) -> String {
    word.to_string_lossy().into_owned()
}

/// A thread that has the launchers of other hosts, and says in the store which of them will not come.
struct Watch {
    /// Dropped when the job has ended.
    running: Sender<()>,
    thread: JoinHandle<()>,
}

impl Watch {
    fn start(
        nodes: Vec<RemoteNode>,
        meeting: (String, u16, Credentials),
        grace: Duration,
    ) -> Result<Self, LaunchError> {
        let (running, job) = mpsc::channel();
        let body = move || watch(nodes, &meeting, &job, grace);
        let thread = thread::Builder::new().name("launchers of other hosts".to_owned());
        let thread = thread.spawn(body).map_err(system("start a thread"))?;
        Ok(Self { running, thread })
    }

    fn end(self) {
        drop(self.running);
        if self.thread.join().is_err() {
            tracing::error!("the thread that has the launchers of other hosts panicked");
        }
    }
}

fn watch(
    mut nodes: Vec<RemoteNode>,
    meeting: &(String, u16, Credentials),
    job: &Receiver<()>,
    grace: Duration,
) {
    let mut is_known = vec![false; nodes.len()];
    while job.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        for (at, node) in nodes.iter_mut().enumerate() {
            let end = if is_known[at] { None } else { node.early_end() };
            if let Some(why) = end {
                is_known[at] = true;
                say_gone(meeting, at + 1, &why);
            }
        }
    }
    let deadline = Instant::now() + grace + END_MAX;
    for node in &mut nodes {
        node.end(deadline);
    }
}

/// In the place of what that node would say when it meets the others.
fn say_gone((host, port, credentials): &(String, u16, Credentials), node: usize, why: &str) {
    let deadline = Instant::now() + LOOK_EVERY;
    let said = StoreClient::connect(host, *port, credentials.clone(), deadline)
        .map_err(|error| error.to_string())
        .and_then(|store| {
            let value = format!("gone {why}");
            let key = crate::nodes::meeting_key(node);
            store.compare_set(&key, None, value.as_bytes()).map_err(|error| error.to_string())
        });
    if let Err(error) = said {
        tracing::warn!(node, %error, "{why}, and the others could not be told");
    }
}
