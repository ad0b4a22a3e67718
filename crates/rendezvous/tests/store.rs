//! The store over real sockets: what honest clients get, and what strangers do not.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use phalanx_rendezvous::environment::{JobToken, StoreHost, World};
use phalanx_rendezvous::testing::free_port;
use phalanx_rendezvous::{
    connect, join, Credentials, MemoryStore, RendezvousError, Store, StoreClient, StoreError,
    StoreServer,
};

const LOOPBACK: &str = "127.0.0.1";
/// Longer than anything takes here on a busy machine: whoever waits so long waits for nothing.
const LONG: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + LONG
}

fn credentials(run_id: &str, restart_count: u32, secret: &str) -> Credentials {
    let job_token = JobToken::derive(&[secret]);
    Credentials { run_id: run_id.to_owned(), restart_count, job_token }
}

fn ours() -> Credentials {
    credentials("run", 0, "secret")
}

fn serve(credentials: Credentials) -> StoreServer {
    StoreServer::start(([127, 0, 0, 1], 0).into(), credentials).expect("a free port on loopback")
}

fn dial(
    server: &StoreServer,
    credentials: Credentials,
    limit: Duration,
) -> Result<StoreClient, RendezvousError> {
    StoreClient::connect(LOOPBACK, server.address().port(), credentials, Instant::now() + limit)
}

fn client(server: &StoreServer) -> StoreClient {
    dial(server, ours(), LONG).expect("the server is there")
}

/// A stranger that has read the greeting.
fn stranger(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("the server is there");
    stream.set_read_timeout(Some(LONG)).expect("a time-out");
    let mut greeting = [0; 56];
    stream.read_exact(&mut greeting).expect("a greeting");
    stream
}

/// Waits until the server closes `stream`; panics when it does not.
fn wait_for_close(stream: &mut TcpStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server did not close the connection: {error}"),
    }
}

/// The same facts for every store.
fn conformance(store: &dyn Store) {
    store.set("k", b"v").expect("set");
    assert_eq!(store.get("k", soon()).expect("get"), b"v");
    store.set("k", b"").expect("an empty value");
    assert_eq!(store.get("k", soon()).expect("get"), b"");
    assert_eq!(store.add("n", 5).expect("add"), 5);
    assert_eq!(store.add("n", -6).expect("add"), -1);
    assert_eq!(store.get("n", soon()).expect("get"), b"-1");
    assert!(matches!(store.add("k", 1), Err(StoreError::NotACounter { .. })));
    assert_eq!(store.compare_set("c", Some(b"x"), b"a").expect("compare_set"), None);
    assert_eq!(store.compare_set("c", None, b"a").expect("compare_set"), Some(b"a".to_vec()));
    assert_eq!(store.compare_set("c", None, b"b").expect("compare_set"), Some(b"a".to_vec()));
    assert!(store.check(&["k", "n", "c"]).expect("check"));
    assert!(!store.check(&["k", "absent"]).expect("check"));
    assert!(store.check(&[]).expect("check"));
    assert!(store.delete("c").expect("delete"));
    assert!(!store.delete("c").expect("delete"));
    assert_eq!(store.list("").expect("list"), ["k", "n"]);
    assert_eq!(store.list("n").expect("list"), ["n"]);
    let large: Vec<u8> = (0..8_u32 << 20).map(|at| at.to_le_bytes()[0]).collect();
    store.set("large", &large).expect("the longest value");
    assert!(store.get("large", soon()).expect("get") == large);
    let too_large = vec![0; large.len() + 1];
    assert!(matches!(store.set("large", &too_large), Err(StoreError::ValueTooLong { .. })));
    let key = "k".repeat(8 << 10);
    store.set(&key, b"v").expect("the longest key");
    assert!(store.check(&vec![key.as_str(); 3000]).expect("more keys than one frame holds"));
    assert!(matches!(store.set(&format!("{key}k"), b""), Err(StoreError::KeyTooLong { .. })));
    let start = Instant::now();
    let error = store.get("absent", start + Duration::from_millis(100)).expect_err("no such key");
    assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(100));
    store.cancel();
    assert!(matches!(store.get("absent", soon()), Err(StoreError::Cancelled { .. })));
}

#[test]
fn memory_and_tcp_stores_do_the_same() {
    conformance(&MemoryStore::new());
    conformance(&client(&serve(ours())));
}

#[test]
fn waiting_reads_of_many_clients_are_answered_by_one_set_and_hold_up_nobody() {
    let server = serve(ours());
    let store = Arc::new(client(&server));
    let waiters: Vec<_> = (0..8)
        .map(|_| {
            let store = Arc::clone(&store);
            thread::spawn(move || store.get("go", soon()))
        })
        .collect();
    for _ in 0..100 {
        store.add("busy", 1).unwrap();
    }
    store.set("go", b"now").unwrap();
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap().unwrap(), b"now");
    }
    assert_eq!(store.add("busy", 0).unwrap(), 100);
}

#[test]
fn cancel_ends_a_wait() {
    let server = serve(ours());
    let store = Arc::new(client(&server));
    let waiter = Arc::clone(&store);
    let start = Arc::new(std::sync::Barrier::new(2));
    let at_start = Arc::clone(&start);
    let thread = thread::spawn(move || {
        at_start.wait();
        waiter.get("never", soon())
    });
    start.wait();
    store.cancel();
    assert!(matches!(thread.join().unwrap(), Err(StoreError::Cancelled { .. })));
    client(&server).set("k", b"others are unaffected").unwrap();
}

#[test]
fn a_server_that_ends_ends_the_waits() {
    let server = serve(ours());
    let store = client(&server);
    let thread = thread::spawn(move || store.get("never", soon()));
    drop(server);
    let error = thread.join().unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Disconnected { .. }), "{error}");
}

#[test]
fn each_wrong_credential_has_its_own_message() {
    let server = serve(credentials("run", 3, "secret"));
    let within = |limit, wrong| dial(&server, wrong, limit).map(drop).unwrap_err().to_string();
    let message = |wrong| within(LONG, wrong);
    let token = message(credentials("run", 3, "other"));
    assert!(token.contains("PHALANX_JOB_TOKEN"), "{token}");
    let run = message(credentials("new run", 3, "secret"));
    assert!(run.contains("another run") && run.contains("\"new run\""), "{run}");
    let stale = message(credentials("run", 2, "secret"));
    assert!(stale.contains("generation 3") && stale.contains("of generation 2"), "{stale}");
    // An older store may give way to the newer one: that is waited for until the deadline, and the last attempt counts, which begins
    // half a second before this one.
    let newer = within(Duration::from_millis(3100), credentials("run", 4, "secret"));
    assert!(newer.contains("generation 3") && newer.contains("of generation 4"), "{newer}");
}

#[test]
fn a_client_outlasts_an_older_generation_on_the_same_port() {
    let old = serve(credentials("run", 0, "secret"));
    let address = old.address();
    let thread = thread::spawn(move || {
        StoreClient::connect(LOOPBACK, address.port(), credentials("run", 1, "secret"), soon())
    });
    drop(old);
    let _new = StoreServer::start(address, credentials("run", 1, "secret")).unwrap();
    thread.join().unwrap().unwrap().set("k", b"v").unwrap();
}

#[test]
fn nobody_listening_no_name_and_no_store_are_different_messages_at_the_deadline() {
    let limit = Duration::from_secs(2);
    let port = free_port();
    let attempt = |host: &str, to_port| {
        let start = Instant::now();
        StoreClient::connect(host, to_port, ours(), start + limit).map(drop).unwrap_err()
    };
    let refused = attempt(LOOPBACK, port);
    assert!(matches!(refused, RendezvousError::NobodyListens { .. }), "{refused}");
    let nameless = attempt("no-such-host.invalid", port);
    assert!(matches!(nameless, RendezvousError::NameNotResolved { .. }), "{nameless}");
    // Accepts (the kernel does, into the backlog) and says nothing, as an HTTP server would.
    let silent = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let mute = attempt(LOOPBACK, silent.local_addr().unwrap().port());
    assert!(mute.to_string().contains("does not greet"), "{mute}");
}

#[test]
fn a_program_that_talks_first_is_not_a_store() {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let dialer =
        thread::spawn(move || StoreClient::connect(LOOPBACK, port, ours(), soon()).map(drop));
    thread::spawn(move || {
        // It comes back a few times: a store may be about to take the port over.
        for stream in listener.incoming() {
            drop(stream.unwrap().write_all(&b"SSH-2.0-OpenSSH_9.2p1 and more ".repeat(4)));
        }
    });
    let error = dialer.join().unwrap().unwrap_err();
    assert!(matches!(error, RendezvousError::NotAStore { .. }), "{error}");
}

#[test]
fn a_port_in_use_names_its_owner() {
    let server = serve(ours());
    let end = soon();
    loop {
        let error = StoreServer::start(server.address(), ours()).map(drop).unwrap_err().to_string();
        if error.contains(&format!("by pid {} (", std::process::id())) {
            return;
        }
        // The name is looked for only for a moment, which a crowded machine may need for other things.
        assert!(error.contains("in use") && Instant::now() < end, "{error}");
    }
}

#[test]
fn garbage_and_http_are_closed_and_change_nothing() {
    let server = serve(ours());
    let store = client(&server);
    store.set("k", b"v").unwrap();
    let garbage =
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 64], &[0xff; 4096], b"P", b"PHXPxx"];
    let mut streams = garbage.map(|bytes| {
        let mut stream = stranger(server.address());
        stream.write_all(bytes).unwrap();
        stream
    });
    for stream in &mut streams {
        wait_for_close(stream);
    }
    assert_eq!(store.list("").unwrap(), ["k"]);
    assert_eq!(store.get("k", soon()).unwrap(), b"v");
}

#[test]
fn a_replayed_handshake_is_refused() {
    let server = serve(ours());
    // Listen in on an honest client through a proxy that records what it sends.
    let proxy = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let proxy_port = proxy.local_addr().unwrap().port();
    let honest = thread::spawn(move || {
        let store = StoreClient::connect(LOOPBACK, proxy_port, ours(), soon()).unwrap();
        store.set("honest", b"1").unwrap();
    });
    let (mut near, _) = proxy.accept().unwrap();
    let mut far = TcpStream::connect(server.address()).unwrap();
    let (mut greeting, mut proof, mut verdict) = ([0; 56], [0; 64], [0; 40]);
    far.read_exact(&mut greeting).unwrap();
    near.write_all(&greeting).unwrap();
    near.read_exact(&mut proof).unwrap();
    far.write_all(&proof).unwrap();
    far.read_exact(&mut verdict).unwrap();
    near.write_all(&verdict).unwrap();
    let mut request = vec![0; 32 + 6 + 1];
    near.read_exact(&mut request).unwrap();
    far.write_all(&request).unwrap();
    let mut reply = [0; 24];
    far.read_exact(&mut reply).unwrap();
    near.write_all(&reply).unwrap();
    honest.join().unwrap();

    let store = client(&server);
    assert!(store.delete("honest").unwrap());
    let mut replay = stranger(server.address());
    replay.write_all(&proof).unwrap();
    let sent = replay.write_all(&request);
    wait_for_close(&mut replay);
    // It may have been closed before it had said all.
    drop(sent);
    assert_eq!(store.list("").unwrap(), Vec::<String>::new());
}

#[test]
fn a_slow_loris_is_closed_after_two_seconds_however_it_trickles() {
    let server = serve(ours());
    let start = Instant::now();
    let mut stream = stranger(server.address());
    let mut trickle = stream.try_clone().unwrap();
    let thread = thread::spawn(move || {
        // For as long as it is let: a server that waited for a silence would never close it.
        for byte in b"PHXP\x01\x00\x01\x00".iter().cycle() {
            if trickle.write_all(&[*byte]).is_err() {
                return;
            }
            thread::park_timeout(Duration::from_millis(100));
        }
    });
    wait_for_close(&mut stream);
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    thread.join().unwrap();
}

#[test]
fn more_idle_strangers_than_places_do_not_keep_honest_clients_out() {
    let server = serve(ours());
    let mut idle = Vec::new();
    for _ in 0..400 {
        idle.push(TcpStream::connect(server.address()).unwrap());
    }
    for _ in 0..20 {
        client(&server).add("n", 1).unwrap();
    }
    assert_eq!(client(&server).add("n", 0).unwrap(), 20);
}

/// How often the test that `PHALANX_REPEAT` is meant for repeats its races.
fn repetitions() -> usize {
    let asked = std::env::var("PHALANX_REPEAT").ok().and_then(|count| count.parse().ok());
    asked.unwrap_or(100)
}

#[test]
fn stale_ranks_never_join_a_newer_generation() {
    let (old, new) = (credentials("run", 0, "secret"), credentials("run", 1, "secret"));
    for race in 0..repetitions() {
        // The old server gives way to the new one, on the same port, while ranks of both come.
        let old_server = serve(old.clone());
        let address = old_server.address();
        let go = std::sync::Barrier::new(3);
        let dial = |who: &Credentials, limit| {
            go.wait();
            StoreClient::connect(LOOPBACK, address.port(), who.clone(), Instant::now() + limit)
        };
        thread::scope(|scope| {
            let stale = scope.spawn(|| {
                let joined = dial(&old, Duration::from_millis(500));
                // It may still have met the old server, which is its own.
                joined.map(|store| store.set("stale", b"").is_ok())
            });
            let fresh = scope.spawn(|| dial(&new, LONG));
            go.wait();
            drop(old_server);
            let server = StoreServer::start(address, new.clone()).unwrap();
            fresh.join().unwrap().unwrap().set("fresh", b"").unwrap();
            // Whatever it met in that moment: what the new store holds shows that it was not that one.
            drop(stale.join().unwrap());
            // Who comes after the change is always told.
            let error = StoreClient::connect(LOOPBACK, address.port(), old.clone(), soon());
            let error = error.map(drop).unwrap_err();
            assert!(matches!(error, RendezvousError::WrongGeneration { .. }), "{race}: {error}");
            let store = StoreClient::connect(LOOPBACK, address.port(), new.clone(), soon());
            assert_eq!(store.unwrap().list("").unwrap(), ["fresh"], "{race}");
            drop(server);
        });
    }
}

#[test]
fn a_join_returns_what_every_rank_put_down_in_rank_order() {
    let store = MemoryStore::new();
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..4_u8)
            .map(|rank| {
                let store = store.clone();
                scope.spawn(move || join(&store, "start", rank.into(), 4, &[rank], soon()))
            })
            .collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap().unwrap(), [[0], [1], [2], [3]]);
        }
    });
}

#[test]
fn a_join_names_the_ranks_that_did_not_come() {
    let server = serve(ours());
    let store = client(&server);
    for rank in [0, 2] {
        store.set(&format!("start/{rank:08}"), b"").unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(1);
    let error = join(&store, "start", 0, 4, b"", deadline).unwrap_err().to_string();
    assert!(error.contains("ranks 1,3") && error.contains("joined 2/4"), "{error}");
}

#[test]
fn rank_0_hosts_the_store_when_no_launcher_does() {
    let mut world = World::threads(0, 1);
    world.master_port = 0;
    assert_eq!(world.store_host, StoreHost::ThisRank);
    let store = connect(&world, soon()).unwrap();
    store.set("k", b"v").unwrap();
    assert_eq!(store.get("k", soon()).unwrap(), b"v");
}

#[test]
fn a_rank_that_hosts_the_store_does_not_take_it_from_under_the_others() {
    let port = free_port();
    let world = |rank| World { master_port: port, ..World::threads(rank, 4) };
    thread::scope(|scope| {
        for rank in 0..4_u8 {
            scope.spawn(move || {
                let store = connect(&world(rank.into()), soon()).unwrap();
                let all = join(&*store, "start", rank.into(), 4, &[rank], soon()).unwrap();
                assert_eq!(all, [[0], [1], [2], [3]]);
            });
        }
    });
}

#[test]
fn a_rank_that_hosts_the_store_waits_for_nobody_when_it_is_the_last() {
    let port = free_port();
    let world = World { master_port: port, ..World::threads(0, 1) };
    let store = connect(&world, soon()).unwrap();
    store.set("k", b"v").unwrap();
    let start = Instant::now();
    drop(store);
    // Others would be waited for, for five seconds.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
