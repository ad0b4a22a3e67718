//! How long faults take to be seen: one fault again and again. The figures of `docs/errors.md` come from here:
//!
//! `PHALANX_FAULT=F1 PHALANX_REPEAT=200 cargo test --release -p phalanx-comm --test processes -- --ignored --nocapture repeat_a_fault`

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::faults::{own_end, OWN_ENDS};
use crate::machines::{machines, Machines};
use crate::support::{clock_ns, Ended, Ranks};
use phalanx_comm::environment::{HostLink, JobToken};
use phalanx_comm::rendezvous::{
    join, Credentials, MemoryStore, RendezvousError, StoreClient, StoreServer,
};
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Group, GroupOptions, Max, Sum, Work};

const LIMIT: Duration = Duration::from_secs(30);
/// How long F20 and F22 wait; their figure is what comes on top.
const DEADLINE: Duration = Duration::from_secs(1);

/// The longest time from the fault to the error of a survivor, each of which must have blamed `culprit`.
fn survivors(ranks: Ranks, culprit: usize, stopped: Option<usize>) -> Duration {
    let fault_ns = clock_ns();
    let ended = ranks.finish_without(stopped, LIMIT);
    let survivors = ended.iter().enumerate().filter(|(rank, _)| *rank != culprit);
    survivors
        .map(|(rank, ended)| {
            let named = ended.output.contains(&format!("error: rank {culprit} (host "));
            assert!(named, "rank {rank}: {}", ended.output);
            Duration::from_nanos(ended.error_ns().saturating_sub(fault_ns))
        })
        .max()
        .expect("survivors")
}

fn working(link: &str) -> Ranks {
    let mut ranks = Ranks::start("killed in large all-reduces", 3, link);
    ranks.wait_for_line(0, "under way");
    ranks
}

fn credentials(run_id: &str) -> Credentials {
    Credentials {
        run_id: run_id.to_owned(),
        restart_count: 0,
        job_token: JobToken::derive(&["secret"]),
    }
}

/// A port that answers nothing at all, as a firewall that drops packets would: its queue is full.
struct Mute {
    port: u16,
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Mute {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        rustix::net::listen(&listener, 0).expect("a shorter queue");
        let address = listener.local_addr().expect("an address");
        let limit = Duration::from_millis(50);
        let fill = |_| TcpStream::connect_timeout(&address, limit).ok();
        let queue = (0..4).filter_map(fill).collect();
        Self { port: address.port(), _listener: listener, _queue: queue }
    }
}

/// The four ways in which a master cannot be reached, by turns: the time beyond the deadline.
fn unreachable_master(turn: usize) -> Duration {
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = closed.local_addr().expect("an address").port();
    drop(closed);
    let other = StoreServer::start(([127, 0, 0, 1], 0).into(), credentials("another"));
    let other = other.expect("a server");
    let mute = Mute::new();
    let start = Instant::now();
    let connect = |host: &str, to_port| {
        StoreClient::connect(host, to_port, credentials("ours"), start + DEADLINE).map(drop)
    };
    let error = match turn % 4 {
        0 => connect("127.0.0.1", port),
        1 => connect("no-such-host.invalid", port),
        2 => connect("127.0.0.1", mute.port),
        _ => connect("127.0.0.1", other.address().port()),
    };
    let after = start.elapsed().saturating_sub(DEADLINE);
    let error = error.expect_err("nobody is there");
    let expected = match turn % 4 {
        0 => matches!(error, RendezvousError::NobodyListens { .. }),
        1 => matches!(error, RendezvousError::NameNotResolved { .. }),
        2 => matches!(error, RendezvousError::Unreachable { .. }),
        _ => matches!(error, RendezvousError::WrongRun { .. }),
    };
    assert!(expected, "{error}");
    after
}

/// Three ranks over this link; the longest of the times that `rank` returns.
fn longest(turn: usize, rank: impl Fn(Group) -> Duration + Send + Sync + 'static) -> Duration {
    let link = if turn.is_multiple_of(2) { HostLink::Auto } else { HostLink::Tcp };
    let times = run_ranks_with(3, link, GroupOptions::default(), rank);
    times.into_iter().max().expect("three ranks")
}

/// F6: rank 1 leaves one of many equal collectives out, and is found out by the next; until all know.
fn skipped_call(turn: usize) -> Duration {
    longest(turn, |mut group| {
        let mut values = vec![1.0_f32; 10_000];
        let skips = group.rank() == 1;
        for step in (0..10).filter(|step| !(skips && *step == 5)) {
            let start = Instant::now();
            let work = group.tagged(&format!("step {step}")).all_reduce(&mut values[..], Sum);
            if let Err(error) = work.and_then(Work::wait) {
                let after = start.elapsed();
                let (error, at) = (error.to_string(), if skips { 6 } else { 5 });
                assert!(
                    error.contains("#5 \"step 5\"") && error.contains("#5 \"step 6\""),
                    "{error}"
                );
                assert_eq!(step, at, "found at once: {error}");
                return after;
            }
        }
        panic!("nobody noticed");
    })
}

/// F6: rank 1 leaves a collective out and calls nothing more; the time beyond the others' time limit.
fn absent_call(turn: usize) -> Duration {
    let link = if turn.is_multiple_of(2) { HostLink::Auto } else { HostLink::Tcp };
    let options = GroupOptions { timeout: DEADLINE, ..GroupOptions::default() };
    let times = run_ranks_with(3, link, options, |mut group| {
        group.barrier().and_then(Work::wait).expect("a barrier");
        if group.rank() == 1 {
            crate::silence::pause(DEADLINE + Duration::from_millis(500));
            return Duration::ZERO;
        }
        let mut values = vec![1.0_f32; 10_000];
        let start = Instant::now();
        let error = group.all_reduce(&mut values[..], Sum).and_then(Work::wait);
        let after = start.elapsed().saturating_sub(DEADLINE);
        let error = error.expect_err("rank 1 does not come").to_string();
        // Behind a socket that is known from the last heartbeat, which may be older.
        let last =
            ["whose last call was barrier", "which has called nothing yet", "not known here"];
        let is_named = error.contains("rank 1 (host");
        assert!(is_named && last.iter().any(|words| error.contains(words)), "{error}");
        after
    });
    times.into_iter().max().expect("three ranks")
}

/// F11: a data connection is reset; until both ranks know.
fn reset_data(machines: &Machines) -> Duration {
    let mut ranks = machines.start(&[0, 1], "killed in large all-reduces");
    ranks.wait_for_line(0, "under way");
    let connections = machines.connections();
    let fault_ns = clock_ns();
    machines.reset(connections.last().expect("a data connection"));
    let ended = ranks.finish(LIMIT);
    for ended in &ended {
        assert!(ended.output.contains("lost, peer alive"), "{}", ended.output);
    }
    let last = ended.iter().map(Ended::error_ns).max().expect("two ranks");
    Duration::from_nanos(last.saturating_sub(fault_ns))
}

/// F11: the control connection of a job is reset four times; until a new one is there, each time.
fn reset_control(machines: &Machines) -> Vec<Duration> {
    let mut ranks = machines.start(&[0, 1], "messages");
    ranks.wait_for_line(0, "under way");
    let mut times = Vec::new();
    for _ in 0..4 {
        let connections = machines.connections();
        machines.reset(&connections[1]); // the busier one: the messages are on it
        times.push(crate::resets::back(machines, &connections[1]));
        crate::silence::pause(Duration::from_millis(150));
    }
    ranks.say(0, crate::resets::ENOUGH);
    for ended in ranks.finish(LIMIT) {
        assert!(ended.output.contains("no error in"), "{}", ended.output);
    }
    times
}

/// F24: a stranger announces a length of 2^31, 2^40 or 2^63; until the store has closed its connection.
fn giant_length(turn: usize) -> Duration {
    let server = StoreServer::start(([127, 0, 0, 1], 0).into(), credentials("ours"));
    let server = server.expect("a server");
    let length = 1_u64 << [31, 40, 63][turn % 3];
    let words = [&b"PHXq\x01\0\0\0"[..], &[length.to_le_bytes(); 7].concat()].concat();
    let start = Instant::now();
    let mut stranger = TcpStream::connect(server.address()).expect("the server is there");
    stranger.write_all(&words).expect("sent");
    assert!(is_shown_out(&mut stranger), "2^{length}");
    start.elapsed()
}

/// F24: a stranger begins well and stops; the time beyond the two seconds that it has.
fn truncated_frame(server: &StoreServer) -> Duration {
    let start = Instant::now();
    let mut stranger = TcpStream::connect(server.address()).expect("the server is there");
    stranger.write_all(b"PHXP").expect("sent");
    assert!(is_shown_out(&mut stranger), "still there");
    start.elapsed().saturating_sub(Duration::from_secs(2))
}

fn is_shown_out(stranger: &mut TcpStream) -> bool {
    stranger.set_read_timeout(Some(LIMIT)).expect("a time-out");
    let end = stranger.read_to_end(&mut Vec::new());
    end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

/// A call of rank 1 that is not the others', and theirs.
type Differing = fn(&mut Group, &mut [f32], bool) -> phalanx_comm::Result<()>;

/// F8: rank 1 calls another operation, type, length, root or reduction by mistake: what all must say.
const DIFFERING: [(&str, Differing); 5] = [
    ("all_gather #1 (3 × f32)", |group, values, mistaken| {
        let work = if mistaken {
            group.all_gather(&[1.0], &mut values[..3])
        } else {
            group.all_reduce(values, Sum)
        };
        work.and_then(Work::wait)
    }),
    ("all_reduce #1 (50000 × f64, sum)", |group, values, mistaken| {
        let mut wide = vec![1.0_f64; values.len() / 2];
        let work = if mistaken {
            group.all_reduce(&mut wide[..], Sum)
        } else {
            group.all_reduce(values, Sum)
        };
        work.and_then(Work::wait)
    }),
    ("all_reduce #1 (99999 × f32, sum)", |group, values, mistaken| {
        group.all_reduce(&mut values[usize::from(mistaken)..], Sum).and_then(Work::wait)
    }),
    ("broadcast #1 (100000 × f32, root 1)", |group, values, mistaken| {
        group.broadcast(values, usize::from(mistaken)).and_then(Work::wait)
    }),
    ("all_reduce #1 (100000 × f32, max)", |group, values, mistaken| {
        let work =
            if mistaken { group.all_reduce(values, Max) } else { group.all_reduce(values, Sum) };
        work.and_then(Work::wait)
    }),
];

/// F8, by turns; until all know.
fn another_call(turn: usize) -> Duration {
    let (said, call) = DIFFERING[turn / 2 % DIFFERING.len()];
    longest(turn, move |mut group| {
        group.barrier().and_then(Work::wait).expect("a barrier");
        let mut values = vec![1.0_f32; 100_000];
        let start = Instant::now();
        let mistaken = group.rank() == 1;
        let result = call(&mut group, &mut values, mistaken);
        let after = start.elapsed();
        let error = result.expect_err("the calls differ").to_string();
        assert!(error.contains(&format!("rank 1 called {said}")), "{error}");
        assert!(values.iter().all(|value| *value == 1.0), "memory changed though the calls differ");
        after
    })
}

/// F9: rank 1 has fewer batches than the others; until they know.
fn early_end(turn: usize) -> Duration {
    longest(turn, |mut group| {
        let steps = if group.rank() == 1 { 97 } else { 100 };
        let mut values = vec![1.0_f32; 10_000];
        for _ in 0..steps {
            let start = Instant::now();
            if let Err(error) = group.all_reduce(&mut values[..], Sum).and_then(Work::wait) {
                let error = error.to_string();
                assert!(error.contains("left the group after 97 collectives"), "{error}");
                return start.elapsed();
            }
        }
        assert_eq!(group.rank(), 1, "the others cannot finish");
        Duration::ZERO
    })
}

fn port_in_use() -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let start = Instant::now();
    let error = StoreServer::start(address, credentials("ours")).map(drop).expect_err("taken");
    let after = start.elapsed();
    assert!(error.to_string().contains(&format!("by pid {} (", std::process::id())), "{error}");
    after
}

/// One fault, and how long it took; some come several times at once.
fn once(fault: &str, turn: usize) -> Vec<Duration> {
    let link = if turn.is_multiple_of(2) { "auto" } else { "tcp" };
    let time = match fault {
        "F1" => {
            let mut ranks = working(link);
            ranks.kill(1);
            survivors(ranks, 1, None)
        }
        "F2" => own_end(OWN_ENDS[turn % OWN_ENDS.len()], link),
        "F3" => {
            let ranks = working(link);
            ranks.signal(1, Signal::STOP);
            survivors(ranks, 1, Some(1))
        }
        "F6" => skipped_call(turn),
        "F6 absent" => absent_call(turn),
        "F8" => another_call(turn),
        "F9" => early_end(turn),
        "F10" | "F11" | "F11 control" => {
            let Some(machines) = machines() else { return Vec::new() };
            match fault {
                "F10" => partition(&machines),
                "F11" => reset_data(&machines),
                _ => return reset_control(&machines),
            }
        }
        "F19" => port_in_use(),
        "F20" => unreachable_master(turn),
        "F22" => missing_ranks(),
        "F24" => giant_length(turn),
        "F24 truncated" => {
            // Many at a time, or it would take long.
            let server = StoreServer::start(([127, 0, 0, 1], 0).into(), credentials("ours"));
            let server = server.expect("a server");
            return thread::scope(|scope| {
                let all = [(); 20].map(|()| scope.spawn(|| truncated_frame(&server)));
                all.map(|one| one.join().expect("shown out")).to_vec()
            });
        }
        _ => panic!(
            "PHALANX_FAULT is F1, F2, F3, F6, F6 absent, F8, F9, F10, F11, F11 control, F19, F20, F22, F24 or F24 truncated"
        ),
    };
    vec![time]
}

/// F10: until both sides know.
fn partition(machines: &Machines) -> Duration {
    let mut ranks = machines.start(&[0, 1], "killed in large all-reduces");
    ranks.wait_for_line(0, "under way");
    machines.partition();
    let fault_ns = clock_ns();
    let ended = ranks.finish(LIMIT);
    for (rank, ended) in ended.iter().enumerate() {
        let named = format!("error: rank {} (host ", 1 - rank);
        assert!(ended.output.contains(&named), "rank {rank}: {}", ended.output);
    }
    let last = ended.iter().map(Ended::error_ns).max().expect("two ranks");
    Duration::from_nanos(last.saturating_sub(fault_ns))
}

/// F22: three of four never come; the time beyond the deadline.
fn missing_ranks() -> Duration {
    let start = Instant::now();
    let store = MemoryStore::new();
    let error = join(&store, "start", 0, 4, b"", start + DEADLINE).expect_err("alone");
    let after = start.elapsed().saturating_sub(DEADLINE);
    assert!(error.to_string().contains("ranks 1,2,3"), "{error}");
    after
}

#[test]
#[ignore = "takes minutes: the figures of docs/errors.md"]
fn repeat_a_fault() {
    let fault = std::env::var("PHALANX_FAULT").unwrap_or_else(|_| "F1".to_owned());
    let asked = std::env::var("PHALANX_REPEAT").ok().and_then(|count| count.parse().ok());
    let count: usize = asked.unwrap_or(20);
    let mut times = Vec::new();
    for turn in 0..count {
        if times.len() < count {
            times.extend(once(&fault, turn));
        }
    }
    times.sort_unstable();
    let (Some(max), Some(middle)) = (times.last(), times.get(times.len() / 2)) else {
        eprintln!("SKIPPED: {fault} cannot be made here");
        return;
    };
    println!("{fault}: {} times, p50 {middle:.1?}, max {max:.1?}", times.len());
    let bar = match &fault[..] {
        "F3" | "F10" => Duration::from_secs(6),
        "F20" => DEADLINE / 10,
        "F6" | "F8" | "F19" => Duration::from_millis(100),
        "F9" | "F11 control" => Duration::from_secs(1),
        "F24" => Duration::from_secs(2),
        _ => Duration::from_millis(500),
    };
    let verdict = if *max <= bar { "within" } else { "ABOVE" };
    println!("{fault}: {verdict} the bar of {bar:?}");
}
