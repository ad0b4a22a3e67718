//! Bits that flip on their way between machines: found before anybody goes on with them, named on every rank.
//!
//! The ranks' cards lead through a proxy, which flips one bit of one connection.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{mpsc, Arc, Barrier};
use std::time::{Duration, Instant};

use phalanx_comm::environment::{HostLink, World};
use phalanx_comm::rendezvous::{MemoryStore, Store, StoreError};
use phalanx_comm::testing::free_ports;
use phalanx_comm::{Error, Group, GroupOptions, Sum, Work};

const LIMIT: Duration = Duration::from_secs(60);
/// A greeting is as long: magic, kind (8), rank (12), secret. `control/callers.rs`.
const HELLO_BYTES: usize = 48;
/// Long enough for several pieces on a wire, in each rank's segment.
const LONG: usize = 100_000;
/// Travels with the header.
const SHORT: usize = 12;
/// Bytes of a header with its checksum, at least: what follows is data.
const HEADER_BYTES: i64 = 150;

/// The two connections of a pair of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Control = 1,
    Data = 2,
}

/// Which bytes get hurt: of one rank to another.
#[derive(Debug, Clone, Copy)]
struct Aim {
    kind: Kind,
    from: usize,
    to: usize,
    /// How many bytes after the shot was loaded.
    after: i64,
}

/// A flip that waits; negative: none does.
#[derive(Debug)]
struct Shot {
    aim: Aim,
    left: AtomicI64,
}

const UNLOADED: i64 = i64::MIN;
const FIRED: i64 = -1;

impl Shot {
    /// Flips a bit of `bytes` if it is their turn.
    fn pass(&self, kind: Kind, from: usize, to: usize, bytes: &mut [u8]) {
        let aim = self.aim;
        let left = self.left.load(Ordering::Acquire);
        if (kind, from, to) != (aim.kind, aim.from, aim.to) || left < 0 {
            return;
        }
        let at = usize::try_from(left).unwrap();
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 0x10;
            self.left.store(FIRED, Ordering::Release);
        } else {
            self.left.store(left - i64::try_from(bytes.len()).unwrap(), Ordering::Release);
        }
    }
}

/// A store that gives out addresses of proxies in the place of the ranks' own.
#[derive(Debug)]
struct Detour {
    store: MemoryStore,
    shot: Arc<Shot>,
}

impl Detour {
    /// The card, with the address of a proxy. Both addresses have as many characters.
    fn led_around(&self, owner: usize, card: &[u8]) -> Vec<u8> {
        const HOST: &[u8] = b"127.0.0.1:";
        let Some(at) = card.windows(HOST.len()).position(|part| part == HOST) else {
            return card.to_vec();
        };
        let digits = at + HOST.len()..at + HOST.len() + 5;
        let port: u16 = std::str::from_utf8(&card[digits.clone()]).unwrap().parse().unwrap();
        let proxy = free_ports(1);
        let listener = TcpListener::bind(("127.0.0.1", proxy)).unwrap();
        let mut card = card.to_vec();
        card[digits].copy_from_slice(proxy.to_string().as_bytes());
        let shot = Arc::clone(&self.shot);
        std::thread::spawn(move || {
            for caller in listener.incoming() {
                let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { return };
                carry(caller.unwrap(), far, owner, &shot);
            }
        });
        card
    }
}

/// Carries bytes both ways, until either end closes.
fn carry(mut near: TcpStream, mut far: TcpStream, called: usize, shot: &Arc<Shot>) {
    let shot = Arc::clone(shot);
    std::thread::spawn(move || {
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        let mut hello = [0; HELLO_BYTES];
        if near.read_exact(&mut hello).is_err() || far.write_all(&hello).is_err() {
            return;
        }
        let kind = if hello[8] == 1 { Kind::Control } else { Kind::Data };
        let caller = usize::from(hello[12]);
        let back = (near.try_clone().unwrap(), far.try_clone().unwrap(), Arc::clone(&shot));
        std::thread::spawn(move || {
            let (near, far, shot) = back;
            one_way(far, near, |bytes| shot.pass(kind, called, caller, bytes));
        });
        one_way(near, far, |bytes| shot.pass(kind, caller, called, bytes));
    });
}

fn one_way(mut from: TcpStream, mut to: TcpStream, pass: impl Fn(&mut [u8])) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count) = from.read(&mut bytes) {
        pass(&mut bytes[..count]);
        if count == 0 || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    to.shutdown(std::net::Shutdown::Both).ok();
    from.shutdown(std::net::Shutdown::Both).ok();
}

impl Store for Detour {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        if !key.contains("/card/") {
            return self.store.set(key, value);
        }
        let rank = key.rsplit('/').next().unwrap().parse().unwrap();
        self.store.set(key, &self.led_around(rank, value))
    }
    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        self.store.get(key, deadline)
    }
    fn add(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        self.store.add(key, delta)
    }
    fn compare_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.compare_set(key, expected, desired)
    }
    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        self.store.delete(key)
    }
    fn check(&self, keys: &[&str]) -> Result<bool, StoreError> {
        self.store.check(keys)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.store.list(prefix)
    }
    fn cancel(&self) {
        self.store.cancel();
    }
}

/// What is called, in segments of `len` elements, and whether this rank has got what it should. Every value says where it comes
/// from, and which call it belongs to.
type Call = fn(&mut Group, usize, i64) -> Result<bool, Error>;

fn value(rank: usize, segment: usize, step: i64) -> i64 {
    i64::try_from(rank * 100 + segment).unwrap() + step * 10_000
}

fn segments(rank: usize, ranks: usize, len: usize, step: i64) -> Vec<i64> {
    (0..ranks).flat_map(|segment| vec![value(rank, segment, step); len]).collect()
}

fn sum(ranks: usize, segment: usize, step: i64) -> i64 {
    (0..ranks).map(|rank| value(rank, segment, step)).sum()
}

fn all_reduce(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let ranks = group.world_size();
    let mut values = segments(group.rank(), ranks, len, step);
    group.all_reduce(&mut values[..], Sum)?.wait()?;
    let right = |(at, got): (usize, &i64)| *got == sum(ranks, at / len, step);
    Ok(values.iter().enumerate().all(right))
}

fn all_reduce_region(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let ranks = group.world_size();
    let region = group.allocate::<i64>(len * ranks)?;
    region.write(0, &segments(group.rank(), ranks, len, step));
    group.all_reduce(region.full(), Sum)?.wait()?;
    let values = region.read(0..len * ranks);
    let right = |(at, got): (usize, &i64)| *got == sum(ranks, at / len, step);
    Ok(values.iter().enumerate().all(right))
}

fn reduce(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let ranks = group.world_size();
    let mut values = segments(group.rank(), ranks, len, step);
    group.reduce(&mut values[..], Sum, 0)?.wait()?;
    let right = |(at, got): (usize, &i64)| *got == sum(ranks, at / len, step);
    Ok(group.rank() != 0 || values.iter().enumerate().all(right))
}

fn reduce_scatter(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let mut own = vec![0; len];
    let values = segments(rank, ranks, len, step);
    group.reduce_scatter(&values, &mut own[..], Sum)?.wait()?;
    Ok(own.iter().all(|got| *got == sum(ranks, rank, step)))
}

fn all_gather(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let ranks = group.world_size();
    let mut all = vec![0; len * ranks];
    group.all_gather(&vec![value(group.rank(), 0, step); len], &mut all[..])?.wait()?;
    Ok(all.iter().enumerate().all(|(at, got)| *got == value(at / len, 0, step)))
}

fn broadcast(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let mut values = vec![value(group.rank(), 0, step); len];
    group.broadcast(&mut values[..], 0)?.wait()?;
    Ok(values.iter().all(|got| *got == value(0, 0, step)))
}

fn gather(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let mut all = vec![value(0, 0, step); if rank == 0 { len * ranks } else { 0 }];
    let output = (rank == 0).then_some(&mut all[..]);
    group.gather(&vec![value(rank, 0, step); len], output, 0)?.wait()?;
    Ok(all.iter().enumerate().all(|(at, got)| *got == value(at / len, 0, step)))
}

fn scatter(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let all = segments(0, ranks, len, step);
    let mut own = vec![0; len];
    group.scatter((rank == 0).then_some(&all[..]), &mut own[..], 0)?.wait()?;
    Ok(own.iter().all(|got| *got == value(0, rank, step)))
}

fn all_to_all(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let mut all = vec![0; len * ranks];
    group.all_to_all(&segments(rank, ranks, len, step), &mut all)?.wait()?;
    Ok(all.iter().enumerate().all(|(at, got)| *got == value(at / len, rank, step)))
}

fn barrier(group: &mut Group, _: usize, _: i64) -> Result<bool, Error> {
    group.barrier()?.wait()?;
    Ok(true)
}

/// Round the ranks.
fn messages(group: &mut Group, len: usize, step: i64) -> Result<bool, Error> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let before = (rank + ranks - 1) % ranks;
    let sent = group.send(&vec![value(rank, 0, step); len], (rank + 1) % ranks)?;
    let mut theirs = vec![0; len];
    group.receive(&mut theirs[..], before)?.wait()?;
    sent.wait()?;
    Ok(theirs.iter().all(|got| *got == value(before, 0, step)))
}

/// Runs a call until it fails, with the shot loaded after the second time; what each rank has said at last.
fn errors(ranks: usize, aim: Aim, len: usize, call: Call) -> Vec<Error> {
    let shot = Arc::new(Shot { aim, left: AtomicI64::new(UNLOADED) });
    let store: Arc<dyn Store> =
        Arc::new(Detour { store: MemoryStore::new(), shot: Arc::clone(&shot) });
    let quiet = Arc::new(Barrier::new(ranks));
    let (sender, receiver) = mpsc::channel();
    for rank in 0..ranks {
        let (store, sender) = (Arc::clone(&store), sender.clone());
        let (quiet, shot) = (Arc::clone(&quiet), Arc::clone(&shot));
        std::thread::spawn(move || {
            let world = World { host_link: HostLink::Tcp, ..World::threads(rank, ranks) };
            let options = GroupOptions { timeout: LIMIT, ..GroupOptions::default() };
            let mut group = Group::new(world, store, options).unwrap();
            for step in 0..2 {
                assert!(call(&mut group, len, step).unwrap(), "rank {rank}, step {step}");
            }
            // A call's last bytes may have been sent, and not yet been read.
            group.barrier().and_then(Work::wait).unwrap();
            quiet.wait();
            if rank == 0 {
                shot.left.store(aim.after, Ordering::Release);
            }
            quiet.wait();
            let error = (2..100).find_map(|step| {
                let ended = call(&mut group, len, step);
                let ended = ended.and_then(|right| group.barrier()?.wait().map(|()| right));
                ended.map(|right| assert!(right, "rank {rank} went on with damaged data")).err()
            });
            // Nobody leaves before all have seen it.
            quiet.wait();
            sender.send((rank, error)).unwrap();
        });
    }
    let mut errors: Vec<_> = (0..ranks).map(|_| receiver.recv_timeout(LIMIT).unwrap()).collect();
    errors.sort_by_key(|(rank, _)| *rank);
    assert_eq!(shot.left.load(Ordering::Acquire), FIRED, "{aim:?}");
    errors.into_iter().map(|(rank, error)| error.unwrap_or_else(|| panic!("rank {rank}"))).collect()
}

fn named(ranks: usize, aim: Aim, len: usize, call: Call, name: &str) {
    for (rank, error) in errors(ranks, aim, len, call).into_iter().enumerate() {
        let Error::DataDamaged { peer, rank: receiver, ref during, .. } = error else {
            panic!("{name}, {aim:?}: rank {rank} said {error}")
        };
        assert_eq!((peer, receiver), (aim.from, aim.to), "{name}: {error}");
        assert!(during.contains(name), "{name}: {error}");
        assert!(error.to_string().contains("start again from the last checkpoint"), "{error}");
        assert!(error.help().is_some());
    }
}

/// Name, call, and who sends data to whom in it.
const CALLS: [(&str, Call, usize, usize); 11] = [
    ("all_reduce", all_reduce, 0, 1),
    ("all_reduce", all_reduce, 1, 0),
    ("all_reduce", all_reduce_region, 1, 0),
    ("reduce", reduce, 1, 0),
    ("reduce_scatter", reduce_scatter, 0, 1),
    ("all_gather", all_gather, 0, 1),
    ("broadcast", broadcast, 0, 1),
    ("gather", gather, 1, 0),
    ("scatter", scatter, 0, 1),
    ("all_to_all", all_to_all, 1, 0),
    ("barrier", barrier, 1, 0),
];

#[test]
fn a_bit_that_flips_in_long_data_is_named_on_every_rank() {
    for (name, call, from, to) in CALLS.into_iter().filter(|call| call.0 != "barrier") {
        for ranks in [2, 3] {
            // In the first piece after the header, and in a later one.
            for after in [HEADER_BYTES + 5000, 500_000] {
                named(ranks, Aim { kind: Kind::Data, from, to, after }, LONG, call, name);
            }
        }
    }
}

#[test]
fn a_bit_that_flips_between_the_later_stages_of_a_chain_is_named_on_every_rank() {
    for (from, to) in [(1, 2), (2, 1)] {
        let aim = Aim { kind: Kind::Data, from, to, after: 400_000 };
        named(3, aim, LONG, all_reduce, "all_reduce");
        named(4, aim, LONG, all_reduce_region, "all_reduce");
    }
}

#[test]
fn a_bit_that_flips_in_a_header_or_in_short_data_is_named_on_every_rank() {
    // A region is allocated by a collective of its own.
    for (name, call, from, to) in
        CALLS.into_iter().filter(|one| !std::ptr::fn_addr_eq(one.1, all_reduce_region as Call))
    {
        // The fingerprint, the length of the data, the names of the call.
        for after in [0, 9, 60] {
            named(3, Aim { kind: Kind::Data, from, to, after }, SHORT, call, name);
        }
        if name != "barrier" {
            let aim = Aim { kind: Kind::Data, from, to, after: HEADER_BYTES };
            named(2, aim, SHORT, call, name);
        }
    }
}

#[test]
fn a_bit_that_flips_in_a_message_is_named_on_every_rank() {
    // In the head of a frame, in its body, and in a later part.
    for (len, after) in [(SHORT, 3), (SHORT, 30), (LONG, 5000), (LONG, 600_000)] {
        for ranks in [2, 3] {
            let aim = Aim { kind: Kind::Control, from: 0, to: 1, after };
            named(ranks, aim, len, messages, "a message or a word");
        }
    }
}

/// What the checks are for: it goes wrong without them. And the ranks agree on them.
#[test]
fn without_checks_damage_is_not_found_and_one_rank_that_wants_them_is_enough() {
    for (wanted, is_found) in
        [([false, false], false), ([false, true], true), ([true, false], true)]
    {
        let aim = Aim { kind: Kind::Data, from: 0, to: 1, after: HEADER_BYTES + 5000 };
        let shot = Arc::new(Shot { aim, left: AtomicI64::new(aim.after) });
        let store: Arc<dyn Store> = Arc::new(Detour { store: MemoryStore::new(), shot });
        let (sender, receiver) = mpsc::channel();
        for (rank, data_checks) in wanted.into_iter().enumerate() {
            let (store, sender) = (Arc::clone(&store), sender.clone());
            std::thread::spawn(move || {
                let host_link = HostLink::Tcp;
                let world = World { host_link, data_checks, ..World::threads(rank, 2) };
                let options = GroupOptions { timeout: LIMIT, ..GroupOptions::default() };
                let mut group = Group::new(world, store, options).unwrap();
                let right = all_gather(&mut group, LONG, 0);
                let right = right.and_then(|right| group.barrier()?.wait().map(|()| right));
                sender.send((rank, right)).unwrap();
            });
        }
        for _ in 0..2 {
            let (rank, right) = receiver.recv_timeout(LIMIT).unwrap();
            match right {
                Ok(right) => assert_eq!((is_found, right), (false, rank == 0), "{wanted:?}"),
                Err(error) => assert!(is_found && error.to_string().contains("damaged"), "{error}"),
            }
        }
    }
}
