//! Our client and PyTorch's server, PyTorch's client and our server.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use phalanx_comm::environment::{JobToken, StoreHost, World};
use phalanx_comm::rendezvous::{
    connect, join, RendezvousError, StoreError, TcpStoreClient, TcpStoreServer,
};

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
        operations(&mut store, libuv);
        waits(&mut store, port);
        if libuv {
            queues(&mut store, port);
        } else {
            // PyTorch's old server ends a connection that asks for what it does not have.
            let error = store.queue_len("q", soon()).expect_err("no queues");
            assert!(matches!(error, StoreError::Disconnected { .. }), "{error}");
        }
    }
}

/// First in, first out; a wait for a queue ends with a push, one push ends one wait, and a wait for a key afterwards
/// is not ended by the queue.
fn queues(store: &mut TcpStoreClient, port: u16) {
    let end = soon();
    assert_eq!(store.queue_len("q", end).expect("queue_len"), 0);
    assert_eq!(store.queue_try_pop("q", end).expect("queue_try_pop"), None);
    for value in [&b"one"[..], b"", b"three"] {
        store.queue_push("q", value, end).expect("queue_push");
    }
    assert_eq!(store.queue_len("q", end).expect("queue_len"), 3);
    assert!(store.check(&["q"], end).expect("check"), "a queue that holds something is there");
    assert_eq!(store.queue_try_pop("q", end).expect("queue_try_pop"), Some(b"one".to_vec()));
    assert_eq!(store.queue_pop("q", end).expect("queue_pop"), b"");
    assert_eq!(store.queue_pop("q", end).expect("queue_pop"), b"three");
    assert!(!store.check(&["q"], end).expect("check"));
    let error = store.queue_pop("q", Instant::now() + Duration::from_millis(200));
    assert!(matches!(error, Err(StoreError::Timeout { .. })), "{error:?}");
    let takers = ["a", "b"].map(|_| {
        thread::spawn(move || {
            let mut other = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
            let value = other.queue_pop("q", soon()).expect("queue_pop");
            // What comes into the queue must not end this wait.
            let waited = other.get("never", Instant::now() + Duration::from_millis(600));
            assert!(matches!(waited, Err(StoreError::Timeout { .. })), "{waited:?}");
            value
        })
    });
    for value in [&b"1"[..], b"2", b"3", b"4"] {
        thread::park_timeout(Duration::from_millis(100));
        store.queue_push("q", value, end).expect("queue_push");
    }
    let mut taken = takers.map(|taker| taker.join().expect("a taker"));
    taken.sort();
    assert_eq!(taken, [b"1", b"2"]);
    assert_eq!(store.queue_len("q", end).expect("queue_len"), 2);
    assert_eq!(store.queue_pop("q", end).expect("queue_pop"), b"3");
    assert_eq!(store.queue_pop("q", end).expect("queue_pop"), b"4");
}

/// Python hosts the store and its constructor waits for two: a process of ours is the second.
#[test]
fn a_python_host_that_waits_for_workers_counts_us() {
    let Some(bin) = torch() else { return };
    let port = phalanx_comm::testing::free_port();
    let program = format!(
        "import torch.distributed as d\n\
         from datetime import timedelta\n\
         s = d.TCPStore('127.0.0.1', {port}, 2, is_master=True, timeout=timedelta(seconds=60))\n\
         print('all are here:', s.get('rust').decode())"
    );
    let mut command = Command::new(bin.join("python"));
    let host = Owned::start(command.args(["-W", "ignore", "-c", &program]));
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut store = TcpStoreClient::connect(LOOPBACK, port, deadline).expect("a connection");
    store.set("rust", b"hello", soon()).expect("set");
    let count = store.count_as_worker(soon()).expect("count_as_worker");
    assert!((1..=2).contains(&count), "{count}");
    let (status, text) = host.finish(Duration::from_secs(120));
    assert!(status.success() && text.contains("all are here: hello"), "{status}\n{text}");
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

fn operations(store: &mut TcpStoreClient, libuv: bool) {
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
    assert_eq!(store.compare_set("c", b"x", b"a", end).expect("compare_set"), b"x");
    assert!(!store.check(&["c"], end).expect("check"));
    assert_eq!(store.compare_set("c", b"", b"a", end).expect("compare_set"), b"a");
    assert_eq!(store.compare_set("c", b"z", b"b", end).expect("compare_set"), b"a");
    assert_eq!(store.compare_set("c", b"a", b"b", end).expect("compare_set"), b"b");
    store.append("k", b"w", end).expect("append");
    store.multi_set(&[("m1", b"1"), ("m2", b"22")], end).expect("multi_set");
    let values = store.multi_get(&["m2", "k", "m1"], end).expect("multi_get");
    assert_eq!(values, [&b"22"[..], b"vw", b"1"]);
    let count = store.count_keys(end).expect("count_keys");
    assert!(store.delete("k", end).expect("delete") && !store.delete("k", end).expect("delete"));
    assert_eq!(store.count_keys(end).expect("count_keys"), count - 1);
    let large = vec![7; 1 << 20];
    store.set("large", &large, end).expect("set");
    assert!(store.get("large", end).expect("get") == large);
    if libuv {
        let keys = store.list_keys(end).expect("list_keys");
        assert!(keys.iter().any(|key| key == "/m1"), "{keys:?}");
    }
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

#[test]
fn our_server_serves_our_client() {
    let server = TcpStoreServer::start(([127, 0, 0, 1], 0).into()).expect("a free port");
    let port = server.address().port();
    let mut store = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
    operations(&mut store, true);
    waits(&mut store, port);
    queues(&mut store, port);
    assert_eq!(store.count_as_worker(soon()).expect("count_as_worker"), 1);
    // A client that waits does not keep the server from ending.
    let waiting = thread::spawn(move || store.get("never", soon()).expect_err("no server"));
    thread::park_timeout(Duration::from_millis(100));
    drop(server);
    // Not that its time is over.
    let error = waiting.join().expect("the client");
    assert!(matches!(error, StoreError::Disconnected { .. }), "{error}");
}

/// Everything that a Python client can do with a store.
const PYTHON: &str = r"
import sys
from datetime import timedelta
import torch.distributed as d
s = d.TCPStore('127.0.0.1', int(sys.argv[1]), 3, is_master=False, wait_for_workers=True, timeout=timedelta(seconds=60))
s.set('k', 'v')
assert s.get('k') == b'v'
assert s.add('n', 5) == 5 and s.add('n', -6) == -1 and s.get('n') == b'-1'
s.wait(['k', 'n'])
try:
    # The client gives the server as long again to take note of its going.
    s.wait(['never'], timedelta(seconds=4))
    raise SystemExit('waited for nothing')
except d.DistStoreError as error:
    assert 'never' in str(error) or 'timeout' in str(error).lower(), error
assert s.check(['k', 'n']) and not s.check(['k', 'never'])
assert s.compare_set('c', 'x', 'a') == b'x' and not s.check(['c'])
assert s.compare_set('c', '', 'a') == b'a'
assert s.compare_set('c', 'z', 'b') == b'a'
assert s.compare_set('c', 'a', 'b') == b'b'
s.append('k', 'w')
s.multi_set(['m1', 'm2'], ['1', '22'])
assert s.multi_get(['m2', 'k', 'm1']) == [b'22', b'vw', b'1']
count = s.num_keys()
assert s.delete_key('k') and not s.delete_key('k') and s.num_keys() == count - 1
s.set('large', 'x' * (1 << 20))
assert len(s.get('large')) == 1 << 20
p = d.PrefixStore('group', s)
p.set('k', 'prefixed')
assert p.get('k') == b'prefixed' and s.get('group/k') == b'prefixed'
assert s.queue_len('q') == 0
s.queue_push('q', b'one')
s.queue_push('q', b'two')
assert s.queue_len('q') == 2 and s.check(['q'])
assert s.queue_pop('q') == b'one' and s.queue_pop('q', False) == b'two'
try:
    s.queue_pop('q', False)
    raise SystemExit('took from an empty queue')
except d.QueueEmptyError:
    pass
# Two takers wait, and two values come: one for each.
import threading, time
taken = []
def take():
    own = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=60))
    taken.append(own.queue_pop('q'))
takers = [threading.Thread(target=take) for _ in range(2)]
for taker in takers:
    taker.start()
for value in (b'1', b'2'):
    time.sleep(0.3)
    s.queue_push('q', value)
for taker in takers:
    taker.join()
assert sorted(taken) == [b'1', b'2'], taken
s.queue_push('q', b'for rust')
print('all of it', s.get('from rust'))
";

#[test]
fn our_server_serves_torchs_client() {
    let Some(bin) = torch() else { return };
    let server = TcpStoreServer::start(([127, 0, 0, 1], 0).into()).expect("a free port");
    let port = server.address().port();
    let mut store = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
    store.set("from rust", b"hello", soon()).expect("set");
    let mut python = Command::new(bin.join("python"));
    python.args(["-W", "ignore", "-c", PYTHON, &port.to_string()]);
    let (status, text) = Owned::start(&mut python).finish(Duration::from_secs(180));
    assert!(status.success() && text.contains("all of it b'hello'"), "{status}\n{text}");
    assert_eq!(store.get("group/k", soon()).expect("get"), b"prefixed");
    assert_eq!(store.queue_pop("q", soon()).expect("queue_pop"), b"for rust");
    assert_eq!(store.count_as_worker(soon()).expect("count_as_worker"), 2, "Python was the first");
}

#[test]
fn strangers_do_not_hold_our_server_up() {
    use std::io::{Read as _, Write as _};
    let server = TcpStoreServer::start(([127, 0, 0, 1], 0).into()).expect("a free port");
    let port = server.address().port();
    // No validation, a wrong one, and lengths that no client sends.
    let huge = [&[0, 0xCE, 0xF7, 0x85, 0x3C, 1][..], &u64::MAX.to_le_bytes()].concat();
    for bytes in [&b"GET / HTTP/1.1"[..], &[0, 1, 2, 3, 4], &huge] {
        let mut stranger = std::net::TcpStream::connect((LOOPBACK, port)).expect("a connection");
        stranger.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        stranger.write_all(bytes).expect("sent");
        let mut rest = Vec::new();
        let end = stranger.read_to_end(&mut rest);
        // Reset is an end as well.
        let is_end = end.is_ok()
            || end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(is_end && rest.is_empty(), "{bytes:?}: {rest:?}");
    }
    let mut store = TcpStoreClient::connect(LOOPBACK, port, soon()).expect("a connection");
    assert_eq!(store.add("n", 1, soon()).expect("add"), 1);
}
