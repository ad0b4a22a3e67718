//! Many ranks that join through the engine of the store, in simulated time: messages take their time and overtake those of
//! others, and ranks die. The same seed gives the same run.
//!
//! * A rank that completes has the right value of every rank.
//! * Where a rank never put its value down, every other one that lives says so at its deadline, and names exactly those
//!   that are missing.
//!
//! Figures: `cargo test --release -p phalanx-comm --lib simulated_joins -- --ignored --nocapture`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use super::super::frame::{join_keys, KeyList, Reply, ReplyStatus, Request};
use super::engine::{Due, Engine};

/// How long a rank waits for the others.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a rank asks next.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Set,
    Get(usize),
    Check(usize),
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Request {
        rank: usize,
        ask: Ask,
    },
    Answer {
        rank: usize,
        ask: Ask,
        is_done: bool,
        number: i64,
    },
    Death {
        rank: usize,
    },
    /// The waits come to their end.
    Look,
}

/// How a rank ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Joined,
    Missing(Vec<usize>),
    Dead,
}

struct World {
    seed: u64,
    size: usize,
    base: Instant,
    now: Duration,
    engine: Engine,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    pending: BTreeMap<u64, Event>,
    next: u64,
    asked: Vec<Option<Ask>>,
    missing: Vec<Vec<usize>>,
    ends: Vec<Option<End>>,
    has_set: Vec<bool>,
    events: u64,
}

fn key(rank: usize) -> String {
    format!("join/{rank:08}")
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl World {
    /// Ranks that begin within half a second; one in `dying` of them dies within the first second.
    fn new(seed: u64, size: usize, dying: Option<u64>) -> Self {
        let mut world = Self {
            seed,
            size,
            base: Instant::now(),
            now: Duration::ZERO,
            engine: Engine::default(),
            queue: BinaryHeap::new(),
            pending: BTreeMap::new(),
            next: 0,
            asked: vec![None; size],
            missing: vec![Vec::new(); size],
            ends: vec![None; size],
            has_set: vec![false; size],
            events: 0,
        };
        // All waits end at the same time.
        world.at(DEADLINE, Event::Look);
        for rank in 0..size {
            let begins = Duration::from_micros(world.random(500_000));
            world.at(begins, Event::Request { rank, ask: Ask::Set });
            if dying.is_some_and(|one_in| world.random(one_in) == 0) {
                let dies = Duration::from_micros(world.random(1_000_000));
                world.at(dies, Event::Death { rank });
            }
        }
        world
    }

    fn random(&mut self, limit: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.seed) % limit
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.queue.push(Reverse((at, self.next)));
        self.pending.insert(self.next, event);
        self.next += 1;
    }

    /// A message: mostly a fraction of a millisecond, now and then half a second.
    fn send(&mut self, event: Event) {
        let slow = self.random(50) == 0;
        let delay = 50 + self.random(if slow { 500_000 } else { 500 });
        self.at(self.now + Duration::from_micros(delay), event);
    }

    fn run(mut self) -> (Vec<Option<End>>, Vec<bool>, u64) {
        while let Some(Reverse((at, which))) = self.queue.pop() {
            let Some(event) = self.pending.remove(&which) else { continue };
            self.now = at;
            self.events += 1;
            match event {
                Event::Request { rank, ask } => self.request(rank, ask),
                Event::Answer { rank, ask, is_done, number } => {
                    self.answer(rank, ask, is_done, number);
                }
                Event::Death { rank } => {
                    self.engine.forget(rank as u64);
                    self.ends[rank].get_or_insert(End::Dead);
                }
                Event::Look => {
                    let due = self.engine.expired(self.base + self.now);
                    self.reply(due);
                }
            }
        }
        (self.ends, self.has_set, self.events)
    }

    fn request(&mut self, rank: usize, ask: Ask) {
        if self.ends[rank].is_some() {
            return;
        }
        self.asked[rank] = Some(ask);
        let (now, connection) = (self.base + self.now, rank as u64);
        let due = match ask {
            Ask::Set => {
                self.has_set[rank] = true;
                let value = rank.to_le_bytes();
                self.engine.handle(
                    connection,
                    &Request::Set { key: &key(rank), value: &value },
                    now,
                )
            }
            Ask::Get(peer) => {
                let left = DEADLINE.saturating_sub(self.now);
                let wait_ms = i64::try_from(left.as_millis()).unwrap_or(0);
                self.engine.handle(connection, &Request::Get { key: &key(peer), wait_ms }, now)
            }
            Ask::Check(peer) => {
                let (name, keys);
                name = key(peer);
                keys = join_keys(&[&name]);
                let request = Request::Check { keys: KeyList::joined(&keys) };
                self.engine.handle(connection, &request, now)
            }
        };
        self.reply(due);
    }

    fn reply(&mut self, due: Due) {
        for (connection, Reply { status, number, value }) in due {
            let rank = usize::try_from(connection).unwrap_or(usize::MAX);
            let Some(ask) = self.asked[rank].take() else { continue };
            let is_done = status == ReplyStatus::Done;
            if let (Ask::Get(peer), true) = (ask, is_done) {
                assert_eq!(value, peer.to_le_bytes(), "rank {rank} was told another's value");
            }
            self.send(Event::Answer { rank, ask, is_done, number });
        }
    }

    fn answer(&mut self, rank: usize, ask: Ask, is_done: bool, number: i64) {
        if self.ends[rank].is_some() {
            return;
        }
        let next = match ask {
            Ask::Set => Ask::Get(0),
            Ask::Get(peer) if is_done && peer + 1 == self.size => {
                self.ends[rank] = Some(End::Joined);
                return;
            }
            Ask::Get(peer) if is_done => Ask::Get(peer + 1),
            Ask::Get(peer) => Ask::Check(peer),
            Ask::Check(peer) => {
                if number != 1 {
                    self.missing[rank].push(peer);
                }
                if peer + 1 == self.size {
                    self.ends[rank] = Some(End::Missing(std::mem::take(&mut self.missing[rank])));
                    return;
                }
                Ask::Check(peer + 1)
            }
        };
        self.send(Event::Request { rank, ask: next });
    }
}

/// Runs a join and checks how each rank ended; says how many joined.
fn check(seed: u64, size: usize, dying: Option<u64>) -> usize {
    let (ends, has_set, _) = World::new(seed, size, dying).run();
    let absent: Vec<usize> = (0..size).filter(|rank| !has_set[*rank]).collect();
    for (rank, end) in ends.iter().enumerate() {
        match end {
            Some(End::Dead) => {}
            Some(End::Joined) => assert!(absent.is_empty(), "seed {seed}: rank {rank} of {size}"),
            Some(End::Missing(missing)) => {
                assert_eq!(*missing, absent, "seed {seed}: rank {rank} of {size}");
                assert!(!absent.is_empty(), "seed {seed}: rank {rank} of {size} gave up");
            }
            None => panic!("seed {seed}: rank {rank} of {size} hangs"),
        }
    }
    ends.iter().filter(|end| **end == Some(End::Joined)).count()
}

#[test]
fn ranks_that_join_have_all_values_and_name_exactly_the_absent() {
    let (mut joined, mut ended) = (0, 0);
    for seed in 0..400 {
        let size = 1 + usize::try_from(seed % 16).expect("small");
        joined += check(seed, size, Some(8));
        ended += size;
    }
    assert!(joined > 400 && joined < ended, "{joined} of {ended} joined: the deaths do nothing");
    assert_eq!(check(1, 100, None), 100);
}

#[test]
#[ignore = "figures"]
fn simulated_joins() {
    let started = Instant::now();
    for seed in 0..5000 {
        check(seed, 1 + usize::try_from(seed % 16).expect("small"), Some(8));
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("5000 joins of 1 to 16 ranks with deaths: {:.0} a second", 5000.0 / seconds);
    for size in [128, 512, 1024, 2048] {
        let begun = Instant::now();
        let (ends, _, events) = World::new(1, size, None).run();
        let time = begun.elapsed();
        assert!(ends.iter().all(|end| *end == Some(End::Joined)));
        let status = std::fs::read_to_string("/proc/self/status").expect("of Linux");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        println!(
            "{size:>5} ranks: {events:>9} events, {time:>9.1?}, at most {} so far",
            peak.trim()
        );
    }
}
