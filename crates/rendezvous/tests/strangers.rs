//! What strangers at the store's door cost: the memory of the server, which has a limit, and the patience of honest clients, who
//! must all be served; how much later is printed. A program of its own, because both are measured.
//!
//! `PHALANX_STRANGERS=1000,200 cargo test --release -p phalanx-rendezvous --test strangers -- --nocapture` has 1000 idle
//! connections and 200 new ones a second.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use phalanx_rendezvous::environment::JobToken;
use phalanx_rendezvous::{Credentials, Store as _, StoreClient, StoreServer};

/// Longer than anything takes here on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// One measurement at a time.
static ALONE: Mutex<()> = Mutex::new(());
/// Requests of an honest client in one measurement.
const REQUESTS: usize = 500;
/// Honest clients that come in one measurement.
const COMERS: usize = 200;
/// An honest request every so often, as heart-beats of a job would come.
const PAUSE: Duration = Duration::from_millis(1);

fn ours() -> Credentials {
    let job_token = JobToken::derive(&["secret"]);
    Credentials { run_id: "run".to_owned(), restart_count: 0, job_token }
}

fn serve() -> StoreServer {
    StoreServer::start(([127, 0, 0, 1], 0).into(), ours()).expect("a free port on loopback")
}

fn client(server: &StoreServer) -> StoreClient {
    let deadline = Instant::now() + LONG;
    let port = server.address().port();
    StoreClient::connect("127.0.0.1", port, ours(), deadline).expect("the server is there")
}

/// The 99th percentile of the time that something takes.
fn p99(count: usize, something: impl Fn()) -> Duration {
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            thread::park_timeout(PAUSE);
            let start = Instant::now();
            something();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[count * 99 / 100]
}

/// Connections that say nothing; the oldest, which the server may have closed, are replaced one by one.
fn idle(address: SocketAddr, count: usize, over: &AtomicBool, all_there: &AtomicBool) {
    let mut idle: VecDeque<TcpStream> = VecDeque::new();
    while !over.load(Ordering::Relaxed) {
        let is_full = idle.len() >= count;
        if is_full {
            all_there.store(true, Ordering::Relaxed);
            drop(idle.pop_front());
        }
        idle.extend(TcpStream::connect(address));
        // No faster than the server takes them, or the kernel turns away everybody.
        thread::park_timeout(Duration::from_millis(if is_full { 10 } else { 1 }));
    }
}

/// Connections that talk nonsense, so many a second.
fn garbage(address: SocketAddr, per_second: u32, over: &AtomicBool, sent: &AtomicUsize) {
    let nonsense: [&[u8]; 3] = [b"GET / HTTP/1.1\r\n\r\n", &[0xff; 512], b"PHXP and then nothing"];
    let mut last: VecDeque<TcpStream> = VecDeque::new();
    let start = Instant::now();
    for turn in 0_u32.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(mut stream) = TcpStream::connect(address) {
            // The server may have closed it already.
            drop(stream.write_all(nonsense[turn as usize % nonsense.len()]));
            sent.fetch_add(1, Ordering::Relaxed);
            last.push_back(stream);
        }
        if last.len() > 50 {
            drop(last.pop_front());
        }
        let due = start + Duration::from_secs(1) / per_second * (turn + 1);
        thread::park_timeout(due.saturating_duration_since(Instant::now()));
    }
}

/// What strangers add to the p99 of `something`: three rounds, each a quiet time and then a crowd of idle connections and
/// of new ones a second. By turns, because other programs run meanwhile.
#[expect(clippy::print_stdout, reason = "figures")]
fn crowded(crowd: (usize, u32), server: &StoreServer, count: usize, something: &dyn Fn()) {
    let (idle_count, per_second) = crowd;
    for _ in 0..3 {
        let quiet = p99(count, something);
        let (over, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
        let all_there = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| idle(server.address(), idle_count, &over, &all_there));
            let deadline = Instant::now() + LONG;
            while !all_there.load(Ordering::Relaxed) && Instant::now() < deadline {
                thread::park_timeout(Duration::from_millis(10));
            }
            scope.spawn(|| garbage(server.address(), per_second, &over, &sent));
            let start = Instant::now();
            let crowded = p99(count, something);
            let took_ms = start.elapsed().as_millis().max(1);
            let rate = sent.load(Ordering::Relaxed) as u128 * 1000 / took_ms;
            over.store(true, Ordering::Relaxed);
            println!("{idle_count} idle, {rate} a second: p99 {quiet:.1?} → {crowded:.1?}");
        });
        assert!(all_there.into_inner(), "{idle_count} strangers did not get in");
    }
}

#[test]
fn honest_requests_are_answered_when_strangers_crowd_the_door() {
    let _alone = ALONE.lock();
    let asked = std::env::var("PHALANX_STRANGERS").unwrap_or_else(|_| "300,100".to_owned());
    let (idle_count, per_second) = asked.split_once(',').expect("IDLE,PER_SECOND");
    let crowd = (idle_count.parse().expect("a number"), per_second.parse().expect("a number"));
    let server = serve();
    let store = client(&server);
    let request = || assert!(store.add("n", 1).is_ok(), "the server lives");
    crowded(crowd, &server, REQUESTS, &request);
    assert_eq!(store.list("").expect("the server lives"), ["n"], "nothing else has changed");
}

/// Who comes has to get past the strangers: a connection, a handshake and a request.
#[test]
fn honest_ranks_get_in_past_1000_idle_strangers_and_200_new_ones_a_second() {
    let _alone = ALONE.lock();
    let server = serve();
    let come = || assert!(client(&server).add("n", 1).is_ok(), "the server lives");
    crowded((1000, 200), &server, COMERS, &come);
}

/// Does the handshake by hand and returns the authenticated stream: a client of ours, gone mad.
fn insider(server: &StoreServer) -> TcpStream {
    let proxy = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = proxy.local_addr().expect("an address").port();
    let deadline = Instant::now() + LONG;
    let honest = thread::spawn(move || StoreClient::connect("127.0.0.1", port, ours(), deadline));
    let (mut near, _) = proxy.accept().expect("the honest client");
    let mut far = TcpStream::connect(server.address()).expect("the server is there");
    far.set_read_timeout(Some(LONG)).expect("a time-out");
    let (mut greeting, mut proof, mut verdict) = ([0; 56], [0; 64], [0; 40]);
    far.read_exact(&mut greeting).expect("greeting");
    near.write_all(&greeting).expect("greeting");
    near.read_exact(&mut proof).expect("proof");
    far.write_all(&proof).expect("proof");
    far.read_exact(&mut verdict).expect("verdict");
    near.write_all(&verdict).expect("verdict");
    drop(honest.join().expect("no panic").expect("handshake"));
    far
}

/// Waits for the end of the connection; false when its read time-out comes first.
fn is_closed(stream: &mut TcpStream) -> bool {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

fn header(key: u32, value: u32, expected: u32) -> Vec<u8> {
    let mut bytes = b"PHXq\x01\x00\x00\x00".to_vec();
    for length in [key, value, expected] {
        bytes.extend(length.to_le_bytes());
    }
    bytes.extend([0; 12]);
    bytes
}

/// Announces giant lengths, as an insider and as a stranger, and the most that is allowed, of which
/// nothing comes.
fn giants(server: &StoreServer) -> Vec<TcpStream> {
    for (key, value, expected) in
        [(u32::MAX, 0, 0), (0, 1 << 31, 0), (0, u32::MAX, u32::MAX), (8193, 0, 0), (0, 0, 0)]
    {
        let mut stream = insider(server);
        stream.write_all(&header(key, value, expected)).expect("sent");
        if key != 0 || value != 0 {
            assert!(is_closed(&mut stream), "{key} {value}");
        }
        let mut stranger = TcpStream::connect(server.address()).expect("the server is there");
        stranger.set_read_timeout(Some(LONG)).expect("a time-out");
        stranger.write_all(&header(key, value, expected)).expect("sent");
        assert!(is_closed(&mut stranger), "{key} {value}");
    }
    let stalled = |_| {
        let mut stream = insider(server);
        stream.write_all(&header(8192, 8 << 20, 0)).expect("sent");
        stream
    };
    (0..40).map(stalled).collect()
}

#[test]
fn giant_lengths_are_closed_without_allocating_even_from_an_insider() {
    let _alone = ALONE.lock();
    let server = serve();
    let store = client(&server);
    // Once for what the test itself and the allocator need.
    drop(giants(&server));
    store.set("k", b"v").expect("the server lives");
    let before = resident_kib();
    let stalled = giants(&server);
    store.set("k", b"v").expect("the server lives");
    let grown = resident_kib().saturating_sub(before);
    println!("{grown} KiB");
    assert!(grown <= 1024, "{grown} KiB");
    drop(stalled);
}
