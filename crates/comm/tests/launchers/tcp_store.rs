//! Our client and PyTorch's servers.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use phalanx_comm::environment::{JobToken, StoreHost, World};
use phalanx_comm::rendezvous::{connect, join, RendezvousError, StoreError, TcpStoreClient};

use super::support::{torch, Owned};

const LOOPBACK: &str = "127.0.0.1";

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// PyTorch's server, and its port.
fn serve(bin: &Path, libuv: bool) -> (Owned, u16) {
    let libuv = if libuv { "True" } else { "False" };
    let program = format!(
        "import sys, torch.distributed as d\n\
         s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False, use_libuv={libuv})\n\
         s.set('from python', 'hello')\n\
         print(s.port, flush=True)\n\
         sys.stdin.read()"
    );
    let mut command = Command::new(bin.join("python"));
    let mut server =
        Owned::start(command.args(["-W", "ignore", "-c", &program]).stdin(Stdio::piped()));
    let port = server.first_line(Duration::from_secs(60)).parse().expect("a port");
    (server, port)
}

#[test]
fn the_client_agrees_with_torchs_servers() {
    let Some(bin) = torch() else { return };
    for libuv in [true, false] {
        let (_server, port) = serve(&bin, libuv);
        let mut store = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
        assert_eq!(store.get("from python", soon()).expect("get"), b"hello");
        operations(&mut store);
        waits(&mut store, port);
    }
}

/// PyTorch 2.1's server reads its magic number before every request, and ends a connection that has another.
#[test]
fn a_store_of_an_older_protocol_is_named_as_such() {
    use std::io::Read as _;
    let listener = std::net::TcpListener::bind((LOOPBACK, 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let old = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut magic = [0; 4];
        stream.read_exact(&mut magic).expect("four bytes");
        assert_ne!(u32::from_le_bytes(magic), 0x3C85_F7CE, "ours is not of that protocol");
        listener // so that nobody else gets the port
    });
    // One attempt: before the next it would pause for longer.
    let deadline = Instant::now() + Duration::from_millis(5);
    let error = TcpStoreClient::connect(LOOPBACK, port, deadline).expect_err("another protocol");
    drop(old.join().expect("the old server"));
    assert!(matches!(error, RendezvousError::NotATcpStore { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("PyTorch 2.2 or newer"), "{text}");
}

fn operations(store: &mut TcpStoreClient) {
    let end = soon();
    store.set("k", b"v", end).expect("set");
    assert_eq!(store.get("k", end).expect("get"), b"v");
    store.set("empty", b"", end).expect("set");
    assert_eq!(store.get("empty", end).expect("get"), b"");
    assert_eq!(store.add("n", 5, end).expect("add"), 5);
    assert_eq!(store.add("n", -6, end).expect("add"), -1);
    assert_eq!(store.get("n", end).expect("get"), b"-1");
    assert!(store.check(&["k", "n"], end).expect("check"));
    assert!(!store.check(&["k", "absent"], end).expect("check"));
    let count = store.count_keys(end).expect("count_keys");
    assert!(store.delete("k", end).expect("delete") && !store.delete("k", end).expect("delete"));
    assert_eq!(store.count_keys(end).expect("count_keys"), count - 1);
    let large = vec![7; 1 << 20];
    store.set("large", &large, end).expect("set");
    assert!(store.get("large", end).expect("get") == large);
}

/// A wait ends with the key or at its deadline, and the connection is good afterwards.
fn waits(store: &mut TcpStoreClient, port: u16) {
    let start = Instant::now();
    let limit = Duration::from_millis(200);
    let error = store.get("never", start + limit).expect_err("nobody sets it");
    assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    assert!(start.elapsed() >= limit, "{:?}", start.elapsed());
    assert_eq!(store.add("n", 1, soon()).expect("add"), 0);
    let late = thread::spawn(move || {
        let mut other = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
        thread::park_timeout(Duration::from_millis(100));
        other.set("late", b"x", soon()).expect("set");
        // The next reply shows that it has arrived.
        other.check(&["late"], soon()).expect("check")
    });
    assert_eq!(store.get("late", soon()).expect("get"), b"x");
    assert!(late.join().expect("the other client"));
}

#[test]
fn what_is_no_tcp_store_is_told_apart() {
    // It accepts by itself: nobody needs to call accept.
    let silent = std::net::TcpListener::bind((LOOPBACK, 0)).expect("a free port");
    let port = silent.local_addr().expect("bound").port();
    let deadline = Instant::now() + Duration::from_secs(1);
    let error = TcpStoreClient::connect(LOOPBACK, port, deadline).expect_err("no answer");
    assert!(matches!(error, RendezvousError::NotATcpStore { .. }), "{error}");
    assert!(error.to_string().contains("PHALANX_STORE_PORT"), "{error}");
}

fn world(rank: usize, world_size: usize, port: u16) -> World {
    World {
        master_port: port,
        run_id: "meeting".to_owned(),
        store_host: StoreHost::Agent,
        ..World::threads(rank, world_size)
    }
}

/// All ranks meet by the agent's store and exchange their ranks.
fn meet(world_of: &(dyn Fn(usize) -> World + Sync), world_size: usize) {
    thread::scope(|scope| {
        for rank in 0..world_size {
            scope.spawn(move || {
                let store = connect(&world_of(rank), soon()).expect("a store");
                let own = [u8::try_from(rank).expect("small")];
                let all = join(&*store, "all", rank, world_size, &own, soon()).expect("all");
                assert!(all.iter().enumerate().all(|(peer, value)| usize::from(value[0]) == peer));
            });
        }
    });
}

#[test]
fn ranks_meet_through_the_agents_store_whatever_an_earlier_attempt_left_there() {
    let Some(bin) = torch() else { return };
    let (_server, port) = serve(&bin, true);
    let mut agent = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
    let empty = agent.count_keys(soon()).expect("count");
    meet(&|rank| world(rank, 4, port), 4);
    assert_eq!(agent.count_keys(soon()).expect("count"), empty, "keys are left");
    // An attempt that died half-way: nonces whose ranks are gone, and garbage.
    let stale = "0123456789abcdef0123456789abcdef";
    agent.set("phalanx/meeting/hello/1", stale.as_bytes(), soon()).expect("set");
    agent.set("phalanx/meeting/hello/2", &[255; 5000], soon()).expect("set");
    let lie = format!("phalanx-1 127.0.0.1:1 0123456789abcdef {stale}{stale}");
    let key = format!("phalanx/meeting/welcome/1/{stale}");
    agent.set(&key, lie.as_bytes(), soon()).expect("set");
    meet(&|rank| world(rank, 4, port), 4);
    // Two jobs in one store, told apart by their names.
    let named =
        |name: &'static str| move |rank| World { run_id: name.to_owned(), ..world(rank, 3, port) };
    thread::scope(|scope| {
        scope.spawn(move || meet(&named("one"), 3));
        scope.spawn(move || meet(&named("two"), 3));
    });
}

#[test]
fn a_secret_of_the_users_own_does_not_travel_and_is_needed() {
    let Some(bin) = torch() else { return };
    let (_server, port) = serve(&bin, true);
    let given = |secret: u8| JobToken::from_bytes([secret; 32]);
    let with = |rank, token| World { job_token: token, ..world(rank, 2, port) };
    meet(&|rank| with(rank, given(5)), 2);
    // Rank 1 has another one, or none: what rank 0 says in the open store must not help it.
    for wrong in [given(6), JobToken::derive(&["meeting"])] {
        thread::scope(|scope| {
            let host = scope
                .spawn(|| connect(&with(0, given(5)), Instant::now() + Duration::from_secs(6)));
            let error = connect(&with(1, wrong), soon()).expect_err("another secret");
            assert!(matches!(error, RendezvousError::WrongToken { .. }), "{error}");
            let absent = host.join().expect("rank 0").expect_err("rank 1 did not come");
            assert!(absent.to_string().contains("ranks 1 did not come"), "{absent}");
        });
    }
}

#[test]
fn a_rank_0_that_does_not_come_is_named_at_the_deadline() {
    let Some(bin) = torch() else { return };
    let (_server, port) = serve(&bin, true);
    let deadline = Instant::now() + Duration::from_secs(1);
    let error = connect(&world(1, 2, port), deadline).expect_err("nobody answers");
    assert!(error.to_string().contains("ranks 0 did not come"), "{error}");
}
