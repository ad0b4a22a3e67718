//! What ranks say in the log while they wait, and of strangers: a program of its own, because its log is read.
#![expect(clippy::unwrap_used, reason = "tests: a failure is a panic")]

use std::io::{Read as _, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use phalanx_comm::environment::{HostLink, JobToken};
use phalanx_comm::rendezvous::{join, Credentials, Store as _, StoreClient, StoreServer};
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Group, GroupOptions, Sum, Work};

/// The log of this program.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init());
}

/// The lines that contain all of `words`.
fn lines(words: &[&str]) -> Vec<String> {
    let log = String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned();
    let fits = |line: &&str| words.iter().all(|word| line.contains(word));
    log.lines().filter(fits).map(str::to_owned).collect()
}

fn ours() -> Credentials {
    let job_token = JobToken::derive(&["secret"]);
    Credentials { run_id: "run".to_owned(), restart_count: 0, job_token }
}

#[test]
fn whoever_finds_no_store_says_so_every_five_seconds() {
    listen();
    // A port on which nobody listens.
    let port = phalanx_comm::testing::free_port();
    let deadline = Instant::now() + Duration::from_secs(11);
    let error = StoreClient::connect("127.0.0.1", port, ours(), deadline).unwrap_err();
    let port = format!(":{port}");
    let said = lines(&["still connecting to the store", &port]);
    // At 5 and at 10 seconds; a busy machine may come too late for the second.
    assert!((1..=2).contains(&said.len()), "{said:?} {error}");
    assert!(said[0].contains(" s left: ") && said[0].contains("nobody listens"), "{said:?}");
}

#[test]
fn whoever_waits_for_ranks_says_for_whom_every_ten_seconds() {
    listen();
    let server = StoreServer::start(([127, 0, 0, 1], 0).into(), ours()).unwrap();
    let soon = Instant::now() + Duration::from_secs(60);
    let store = StoreClient::connect("127.0.0.1", server.address().port(), ours(), soon).unwrap();
    for rank in [0, 2] {
        store.set(&format!("late/{rank:08}"), b"").unwrap();
    }
    // Halfway between the first line and the second.
    let deadline = Instant::now() + Duration::from_secs(15);
    join(&store, "late", 0, 4, b"", deadline).unwrap_err();
    let said = lines(&["late: waiting for ranks 1,3 (joined 2/4)"]);
    assert_eq!(said.len(), 1, "{said:?}");
}

/// How many bytes the server has taken from a connection that it has closed.
fn read_of(stream: &mut TcpStream, sent: &[u8]) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // It may close in the middle.
    drop(stream.write_all(sent));
    let mut rest = Vec::new();
    drop(stream.read_to_end(&mut rest));
    // The greeting, and not a byte more.
    assert!(rest.len() <= 56, "{rest:?}");
}

#[test]
fn strangers_get_one_line_together_and_an_honest_rank_its_answers() {
    listen();
    let server = Arc::new(StoreServer::start(([127, 0, 0, 1], 0).into(), ours()).unwrap());
    let address = server.address();
    let soon = Instant::now() + Duration::from_secs(60);
    let store = StoreClient::connect("127.0.0.1", address.port(), ours(), soon).unwrap();
    store.set("key", b"value").unwrap();
    let mut peers = Vec::new();
    for round in 0..20 {
        let mut stream = TcpStream::connect(address).unwrap();
        peers.push(stream.local_addr().unwrap().to_string());
        let sent: &[u8] =
            if round % 2 == 0 { b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" } else { &[0xff; 200] };
        read_of(&mut stream, sent);
    }
    assert_eq!(store.get("key", soon).unwrap(), b"value");
    // Told when there was time for it.
    let until = Instant::now() + Duration::from_secs(60);
    let named = || {
        let said = lines(&["closed a connection to the store"]);
        said.into_iter()
            .filter(|line| peers.iter().any(|peer| line.contains(peer.as_str())))
            .count()
    };
    while named() == 0 && Instant::now() < until {
        thread::yield_now();
    }
    assert_eq!(named(), 1, "one line for twenty strangers");
}

/// Ends when the log has two lines about rank 0's wait for this one in `what`, and one knows what this one called last,
/// which over sockets a heartbeat says.
fn stay_away_until_asked_for_twice(what: &str) {
    let until = Instant::now() + Duration::from_secs(60);
    let words = ["WARN", "rank 0 has waited", what, "for rank 1 (host ", "that rank is alive"];
    let knows = |line: &String| line.contains("whose last call was ");
    while lines(&words).len() < 2 || !lines(&words).iter().any(knows) {
        assert!(Instant::now() < until, "{:?}", lines(&[what]));
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// One rank does something else while another waits for it in a collective, and in a message.
fn long_wait(mut group: Group, link: &str) {
    let (sums, message) = (format!("sum over {link}"), format!("message over {link}"));
    group.tagged(&format!("before {link}")).barrier().and_then(Work::wait).unwrap();
    for len in [8, 100_000] {
        let mut values = vec![1.0_f32; len];
        let tag = format!("{sums} of {len}");
        if group.rank() == 1 {
            stay_away_until_asked_for_twice(&tag);
        }
        group.tagged(&tag).all_reduce(&mut values[..], Sum).and_then(Work::wait).unwrap();
        assert!(values.iter().all(|value| value.to_bits() == 2.0_f32.to_bits()));
    }
    let mut values = [0_u8; 5];
    if group.rank() == 0 {
        group.tagged(&message).receive(&mut values[..], 1).and_then(Work::wait).unwrap();
        assert_eq!(values, [7; 5]);
    } else {
        stay_away_until_asked_for_twice(&message);
        group.tagged(&message).send(&[7_u8; 5], 0).and_then(Work::wait).unwrap();
    }
}

#[test]
fn whoever_waits_long_for_a_rank_that_lives_says_so_again_and_again_and_goes_on() {
    listen();
    for (link, name) in [(HostLink::Shm, "memory"), (HostLink::Tcp, "sockets")] {
        let options =
            GroupOptions { remind_after: Duration::from_millis(10), ..GroupOptions::default() };
        run_ranks_with(2, link, options, move |group| long_wait(group, name));
        let said = lines(&["rank 0 has waited", &format!("sum over {name} of 8")]);
        let last = format!("whose last call was barrier #0 \"before {name}\"");
        let limit = "it is an error after 1800 s";
        let fits = |line: &String| line.contains(&last) && line.contains(limit);
        assert!(said.iter().any(fits), "{said:?}");
    }
}
