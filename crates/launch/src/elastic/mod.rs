//! A job on several real nodes whose ranks are started again together: after a failure anywhere, without a node that is
//! lost, and with nodes that come.
//!
//! Decisions are [`membership`](crate::membership)'s; here they meet processes and the store.
//!
//! | file | what |
//! |---|---|
//! | `mod` | this node's life: wait for an order, run a generation, until the end |
//! | `link` | the agent of this node and its connection to node 0 |
//! | `host` | node 0: the coordinator, the store of each generation's ranks |
//! | `keys` | where in the store what is |

mod host;
pub(crate) mod keys;
mod link;

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_rendezvous::{Credentials, Store as _, StoreClient, StoreServer};

pub(crate) use self::host::Host;
pub(crate) use self::link::Link;
use crate::error::{system, LaunchError};
use crate::logs::Logs;
use crate::membership::{Action, Condition, Config, Coordinator, Order, Times, Verdict, Wish};
use crate::options::LaunchOptions;
use crate::plan::{Job, LaunchPlan, Nodes};
use crate::report::{Failure, Report};
use crate::restart::{Ending, GiveUp, Policy};
use crate::screen::Stream;
use crate::signals;
use crate::start::{patience, Starter};
use crate::supervise::{AttemptEnd, Leaving, Supervisor};

/// How long a launcher that ends waits until the others know it.
const FLUSH_MAX: Duration = Duration::from_secs(2);
/// Node 0 stays so long for launchers that have not heard the end.
const LINGER_MAX: Duration = Duration::from_secs(5);
/// Who waits for the end of the job looks this often.
const FINISH_LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a failed node has put down is there, or will not be.
const FAILURE_WAIT: Duration = Duration::from_secs(1);

/// One node of an elastic job.
pub(crate) struct Elastic<'a> {
    pub(crate) options: &'a LaunchOptions,
    pub(crate) program: &'a Path,
    pub(crate) args: &'a [OsString],
    pub(crate) plan: LaunchPlan,
    pub(crate) job: Job,
    pub(crate) logs: Logs,
}

/// The job's meeting place, and on node 0 what stands there.
pub(crate) struct Meeting {
    pub(crate) link: Link,
    pub(crate) host: Option<Host>,
}

/// Meets node 0 at its store, which `server` is on node 0.
pub(crate) fn meet(
    plan: &LaunchPlan,
    options: &LaunchOptions,
    credentials: &Credentials,
    server: Option<&StoreServer>,
    policy: Policy,
    deadline: Instant,
) -> Result<Meeting, LaunchError> {
    let Nodes::Real { count, mine, .. } = plan.nodes else {
        return Err(LaunchError::MissingOption {
            option: "--node-rank",
            because: "only real nodes come and go",
        });
    };
    let connect = || {
        StoreClient::connect(plan.master_addr(), plan.master_port, credentials.clone(), deadline)
    };
    let store = Arc::new(connect()?);
    let nodes_min = options.nnodes_min.unwrap_or(count);
    let terms = format!("{nodes_min}:{count}");
    let times = Times { gather_max: options.connect_timeout, ..Times::default() };
    let host = match server {
        None => None,
        Some(server) => {
            store.set(keys::TERMS, terms.as_bytes())?;
            let config = Config { nodes_min, nodes_max: count, times };
            let coordinator = Coordinator::new(config, policy, Duration::ZERO);
            let any_port = (server.address().ip(), 0).into();
            Some(Host::start(coordinator, connect()?, any_port, credentials.clone())?)
        }
    };
    let theirs = String::from_utf8_lossy(&store.get(keys::TERMS, deadline)?).into_owned();
    if theirs != terms {
        return Err(LaunchError::TermsMismatch { theirs, ours: terms });
    }
    let link = Link::join(store, mine, plan.ranks_per_node, times, deadline)?;
    Ok(Meeting { link, host })
}

/// What ends the wait for an order.
enum Next {
    Start(Arc<Order>),
    Finish(Verdict),
    /// Node 0 is not heard of.
    Gone,
}

impl Elastic<'_> {
    /// Runs this node's part of the job to the job's end.
    pub(crate) fn run(
        mut self,
        supervisor: &mut Supervisor,
        host: Option<Host>,
        server: Option<StoreServer>,
    ) -> Result<Report, LaunchError> {
        let mut last = AttemptEnd::default();
        let mut ended_by = None;
        let report = loop {
            match await_order(supervisor, &mut ended_by)? {
                Next::Start(order) => {
                    last = match self.generation(supervisor, &order) {
                        Ok(end) => end,
                        Err(error) => {
                            tell_error(supervisor, order.generation, &error);
                            if let Some(store) = server {
                                store.linger(LINGER_MAX);
                            }
                            return Err(error);
                        }
                    };
                    ended_by = ended_by.or(last.ended_by);
                    let (elapsed, restarts) = (supervisor.begun.elapsed(), supervisor.generation);
                    if supervisor.leaving == Leaving::Does {
                        break Report { failure: None, ended_by, elapsed, restarts, gave_up: None };
                    }
                }
                Next::Finish(verdict) => break self.finish(supervisor, verdict, last, ended_by),
                Next::Gone => break lost_node_0(supervisor, ended_by),
            }
        };
        supervisor.run_out()?;
        if let Some(failure) = &report.failure {
            supervisor.screen.write(Stream::Error, format!("{failure}\n").as_bytes());
        }
        if let Some(link) = supervisor.link.take() {
            link.leave(FLUSH_MAX);
        }
        drop(host);
        if let Some(server) = server {
            server.linger(LINGER_MAX);
        }
        Ok(report)
    }

    /// Starts this node's ranks of a generation and waits for their end.
    fn generation(
        &mut self,
        supervisor: &mut Supervisor,
        order: &Order,
    ) -> Result<AttemptEnd, LaunchError> {
        let plan = self.place(supervisor, order)?;
        let Self { options, program, args, job, .. } = self;
        let logs = self.logs.of_attempt(job.restart_count)?;
        supervisor.begin(job.world_size, logs.lineup(&job.run_id, &supervisor.host));
        supervisor.generation = order.generation;
        if order.generation > 0 {
            let before = order.generation - 1;
            let link = supervisor.link.as_ref();
            // What has not been told by this time is not waited for.
            let told = link.and_then(|link| Told::hear(link, before, Instant::now()));
            let cause = told.map_or_else(String::new, |told| format!("; before: {}", told.brief()));
            supervisor.notice(&format!("{}{cause}", generation_line(order)));
        }
        let patience = Some(patience(options));
        let starter = Starter { program, args, job, logs: &logs, prefix: options.prefix, patience };
        let ranks_of_nodes: Vec<usize> = order.members.iter().map(|member| member.ranks).collect();
        starter.start_all(&plan.places(&ranks_of_nodes), supervisor)?;
        let end = supervisor.run()?;
        if supervisor.has_left_behind() {
            // No other generation may run beside it.
            return Err(system("end the ranks")(rustix::io::Errno::TIMEDOUT));
        }
        if let Some(Failure::Rank(failure)) = &end.failure {
            self.logs.record(failure, order.generation, end.step);
        }
        if let Some(link) = &supervisor.link {
            link.ended(condition(&end));
        }
        Ok(end)
    }

    /// This node's place among those of the generation, and what its ranks are told.
    fn place(&mut self, supervisor: &Supervisor, order: &Order) -> Result<LaunchPlan, LaunchError> {
        let Some(link) = &supervisor.link else { return Ok(self.plan.clone()) };
        let deadline = Instant::now() + self.options.connect_timeout.max(FAILURE_WAIT);
        let port = link.store().get(&keys::port(order.generation), deadline)?;
        let mine = order.members.iter().position(|member| member.node == link.node());
        let nodes = Nodes::Real {
            count: order.members.len(),
            mine: mine.unwrap_or(0),
            master_addr: self.plan.master_addr().to_owned(),
        };
        self.job.world_size = order.members.iter().map(|member| member.ranks).sum();
        self.job.node_count = order.members.len();
        self.job.restart_count = order.generation;
        self.job.master_port = keys::number(&port);
        Ok(LaunchPlan { nodes, ..self.plan.clone() })
    }

    fn finish(
        &self,
        supervisor: &mut Supervisor,
        verdict: Verdict,
        last: AttemptEnd,
        ended_by: Option<i32>,
    ) -> Report {
        let mine = supervisor.link.as_ref().map_or(0, Link::node);
        let mut gave_up = None;
        let failure = match verdict {
            Verdict::Well => None,
            Verdict::Ended { node, .. } if node == mine => None,
            Verdict::Ended { node, signal } => {
                let name = signals::name(signal);
                let report = format!(
                    "error[PHX0704]: the job was ended by {name} to the launcher of node {node}"
                );
                let code = u8::try_from(128 + signal).unwrap_or(70);
                Some(Failure::Node { node, report, code })
            }
            Verdict::TooFew { nodes } => {
                let min = self.options.nnodes_min.unwrap_or(self.options.nnodes);
                let report = format!(
                    "error[PHX0705]: {nodes} nodes are there, and the job needs {min} | help: start the launcher on the others, or give a lower minimum (--nnodes MIN:MAX)"
                );
                Some(Failure::Node { node: 0, report, code: 69 })
            }
            Verdict::NoOrders => {
                let report = "error[PHX0707]: node 0's launcher can give no more orders; its own output says why".to_owned();
                Some(Failure::Node { node: 0, report, code: 71 })
            }
            Verdict::Failed { node, why } => {
                gave_up = Some(why);
                if why != GiveUp::NotWanted {
                    supervisor.notice(&format!("giving up: {why}"));
                }
                if node == mine {
                    last.failure
                } else {
                    told_failure(supervisor, node)
                }
            }
        };
        let (elapsed, restarts) = (supervisor.begun.elapsed(), supervisor.generation);
        Report { failure, ended_by, elapsed, restarts, gave_up }
    }
}

/// Waits until this node is to start ranks, or the job has ended.
fn await_order(
    supervisor: &mut Supervisor,
    ended_by: &mut Option<i32>,
) -> Result<Next, LaunchError> {
    loop {
        if let Some(signal) = supervisor.is_interrupted() {
            // Twice is meant.
            if ended_by.replace(signal).is_some() {
                return Ok(Next::Gone);
            }
            if let Some(link) = &supervisor.link {
                link.wish(Wish::End(signal));
            }
        }
        while let Some(action) = supervisor.link.as_ref().and_then(Link::next_action) {
            match action {
                Action::Start(order) => return Ok(Next::Start(order)),
                Action::Finish(verdict) => return Ok(Next::Finish(verdict)),
                Action::StopSoon | Action::StopNow | Action::Tell => {}
            }
        }
        if supervisor.link.as_ref().is_none_or(Link::is_gone) {
            return Ok(Next::Gone);
        }
        supervisor.wait_for_orders()?;
    }
}

/// This node cannot start its ranks, or watch them: the others hear that, and of usage errors that it would come again.
fn tell_error(supervisor: &mut Supervisor, generation: u32, error: &LaunchError) {
    supervisor.kill_all();
    let Some(link) = supervisor.link.take() else { return };
    let code = error.exit_code();
    let report = format!("error[PHX0706]: node {}: {error}", link.node());
    link.announce(generation, &failure_text(code, None, &report));
    let ending = match code {
        64 | 65 => Ending::Certain(code.into()),
        _ => Ending::Failed,
    };
    link.ended(Condition::Failed(ending, None));
    let deadline = Instant::now() + FLUSH_MAX;
    while Instant::now() < deadline {
        match link.next_action() {
            Some(Action::Finish(_)) => break,
            Some(_) => {}
            None => link.wait(FINISH_LOOK_EVERY),
        }
    }
    link.leave(FLUSH_MAX);
}

fn condition(end: &AttemptEnd) -> Condition {
    match &end.failure {
        _ if end.was_stopped || end.ended_by.is_some() => Condition::Stopped,
        Some(Failure::Rank(failure)) => Condition::Failed(Ending::of(failure.exit), end.step),
        Some(Failure::Node { .. }) => Condition::Stopped,
        None => Condition::Well,
    }
}

/// `generation 2 begins: nodes 0,2, 16 ranks`
fn generation_line(order: &Order) -> String {
    let nodes: Vec<String> = order.members.iter().map(|member| member.node.to_string()).collect();
    let ranks: usize = order.members.iter().map(|member| member.ranks).sum();
    format!("generation {} begins: nodes {}, {ranks} ranks", order.generation, nodes.join(","))
}

/// What the node that failed first says of a generation.
struct Told {
    code: u8,
    step: String,
    report: String,
}

impl Told {
    fn hear(link: &Link, generation: u32, deadline: Instant) -> Option<Self> {
        let told = link.store().get(&keys::failure(generation), deadline).ok()?;
        let text = String::from_utf8_lossy(&told).into_owned();
        let (code, rest) = text.split_once(' ')?;
        let (step, report) = rest.split_once(' ')?;
        let (step, report) = (step.to_owned(), report.to_owned());
        Some(Self { code: code.parse().ok()?, step, report })
    }

    /// `rank 2 on host a (pid 811) died: signal 9 (SIGKILL) after 3.2 s; step 120`
    fn brief(&self) -> String {
        let report = self.report.split_once("]: ").map_or(&self.report[..], |(_, rest)| rest);
        let brief = report.split(" | ").next().unwrap_or(report);
        match &self.step[..] {
            "-" => format!("{brief}; no step was told"),
            step => format!("{brief}; step {step}"),
        }
    }
}

/// What this node puts down for the others.
pub(crate) fn failure_text(code: u8, step: Option<u64>, report: &str) -> String {
    let step = step.map_or_else(|| "-".to_owned(), |step| step.to_string());
    format!("{code} {step} {report}")
}

/// The failure of another node, as that tells it.
fn told_failure(supervisor: &Supervisor, node: usize) -> Option<Failure> {
    let link = supervisor.link.as_ref()?;
    let told = Told::hear(link, supervisor.generation, Instant::now() + FAILURE_WAIT);
    let (code, report) = told.map_or_else(
        || (70, "error[PHX0703]: a node has failed, and has not said how".to_owned()),
        |told| (told.code, told.report),
    );
    Some(Failure::Node { node, report, code })
}

fn lost_node_0(supervisor: &Supervisor, ended_by: Option<i32>) -> Report {
    let report =
        "error[PHX0703]: the launcher of node 0 is gone | help: look at its output".to_owned();
    let failure = Failure::Node { node: 0, report, code: 69 };
    let failure = ended_by.is_none().then_some(failure);
    let (elapsed, restarts) = (supervisor.begun.elapsed(), supervisor.generation);
    Report { failure, ended_by, elapsed, restarts, gave_up: None }
}
