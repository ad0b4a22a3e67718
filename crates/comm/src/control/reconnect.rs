//! Control connections between machines that were lost while both processes live: a new one takes their
//! place.
//!
//! The rank that had connected connects again, with growing pauses; the other one still listens at its
//! *door*. Both prove who they are (`resume`). Strangers at the door cost little: at most
//! [`STRANGERS_MAX`] at a time (the oldest goes first), two seconds and 64 bytes each, and one warning in
//! ten seconds for all of them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, Timespec};

use super::peers::Peers;
use super::resume::{self, PairKey, CLAIM_BYTES};

/// Connections at the door that have not proved who they are.
const STRANGERS_MAX: usize = 16;
/// How long a connection may take to say who it is.
const CLAIM_MAX: Duration = Duration::from_secs(2);
/// At most one warning about strangers in this time.
const WARNING_EVERY: Duration = Duration::from_secs(10);
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// An attempt to connect takes no longer.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(400);

/// Where a peer of another machine listens, and what proves who it is.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) address: SocketAddr,
    pub(crate) key: PairKey,
}

/// A peer on a new connection.
#[derive(Debug)]
pub(crate) struct Returned {
    pub(crate) peer: usize,
    pub(crate) socket: OwnedFd,
    /// How many of this rank's frames it has taken in.
    pub(crate) taken_in: u64,
}

/// Where peers come that lost their connection.
#[derive(Debug, Default)]
pub(crate) struct Door {
    /// `None`: every peer of another machine is one that this rank connects to.
    listener: Option<TcpListener>,
    strangers: Vec<Stranger>,
    warned: Option<Instant>,
    /// Accepting rests until then: the process has no file descriptors left.
    rests: Option<Instant>,
}

#[derive(Debug)]
struct Stranger {
    stream: TcpStream,
    address: SocketAddr,
    nonce: [u8; resume::ACCEPTOR_NONCE_BYTES],
    claim: [u8; CLAIM_BYTES],
    have: usize,
    deadline: Instant,
}

/// What a stranger turned out to be.
enum Verdict {
    Later,
    Gone,
    Wrong,
    Peer(usize, u64),
}

impl Door {
    pub(crate) fn new(listener: Option<TcpListener>) -> Self {
        Self { listener, ..Self::default() }
    }

    /// What to wait for.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let strangers = self.strangers.iter().map(|stranger| stranger.stream.as_fd());
        let listener = self.listener.iter().filter(|_| self.rests.is_none());
        listener.map(AsFd::as_fd).chain(strangers)
    }

    /// When the patience with a stranger ends, or accepting goes on.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.strangers.iter().map(|stranger| stranger.deadline).chain(self.rests).min()
    }

    /// Takes in what has come. A peer that is back gets the number of its frames that were taken in, by
    /// `taken_in`; `None` refuses it.
    pub(crate) fn serve(
        &mut self,
        peers: &Peers,
        taken_in: impl Fn(usize) -> Option<u64>,
    ) -> Vec<Returned> {
        let now = Instant::now();
        self.accept(now);
        let mut returned = Vec::new();
        let mut wrong = None;
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.look(peers) {
                Verdict::Later if now < stranger.deadline => self.strangers.push(stranger),
                Verdict::Peer(peer, they_have) => {
                    let welcome =
                        taken_in(peer).and_then(|count| stranger.welcome(peers, peer, count));
                    returned.extend(welcome.map(|socket| Returned {
                        peer,
                        socket,
                        taken_in: they_have,
                    }));
                }
                Verdict::Gone => {}
                Verdict::Later | Verdict::Wrong => wrong = Some(stranger.address),
            }
        }
        if let Some(address) = wrong {
            if self.warned.is_none_or(|warned| now.duration_since(warned) >= WARNING_EVERY) {
                self.warned = Some(now);
                tracing::warn!(%address, "a connection that is no rank of this group was closed");
            }
        }
        returned
    }

    fn accept(&mut self, now: Instant) {
        let Some(listener) = &self.listener else { return };
        self.rests = self.rests.filter(|until| *until > now);
        for _ in 0..STRANGERS_MAX {
            let (stream, address) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.rests = Some(now + ACCEPT_REST);
                    return;
                }
            };
            let Ok(nonce) = crate::rendezvous::random_bytes() else { return };
            let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
            let greeted = ready.and_then(|()| (&stream).write(&resume::greeting(&nonce)));
            if greeted.is_ok_and(|sent| sent == resume::GREETING_BYTES) {
                if self.strangers.len() >= STRANGERS_MAX {
                    drop(self.strangers.remove(0));
                }
                let deadline = now + CLAIM_MAX;
                let claim = [0; CLAIM_BYTES];
                let stranger = Stranger { stream, address, nonce, claim, have: 0, deadline };
                self.strangers.push(stranger);
            }
        }
    }
}

impl Stranger {
    fn look(&mut self, peers: &Peers) -> Verdict {
        while self.have < CLAIM_BYTES {
            match self.stream.read(&mut self.claim[self.have..]) {
                Ok(0) => return Verdict::Gone,
                Ok(count) => self.have += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Verdict::Gone,
            }
        }
        if !resume::may_be_claim(&self.claim[..self.have]) {
            return Verdict::Wrong;
        }
        if self.have < CLAIM_BYTES {
            return Verdict::Later;
        }
        let rank = resume::claimed_rank(&self.claim);
        // This rank connects to those before it, and they never to this one.
        let way = peers.ways.get(rank).and_then(Option::as_ref).filter(|_| rank > peers.rank);
        match way.and_then(|way| way.key.check_claim(&self.nonce, &self.claim)) {
            Some(they_have) => Verdict::Peer(rank, they_have),
            None => Verdict::Wrong,
        }
    }

    fn welcome(self, peers: &Peers, peer: usize, taken_in: u64) -> Option<OwnedFd> {
        let way = peers.ways[peer].as_ref()?;
        let answer = way.key.answer(&self.nonce, &self.claim, taken_in);
        let sent = (&self.stream).write(&answer).ok()?;
        (sent == answer.len()).then(|| self.stream.into())
    }
}

/// Connects again to `peer`, of which so many frames were taken in, from a thread of its own.
pub(crate) fn redial(peers: &Arc<Peers>, peer: usize, taken_in: u64) -> std::io::Result<()> {
    let ours = Arc::clone(peers);
    let name = format!("phalanx-dial-{}", peers.rank);
    // Not joined: it ends when it has succeeded, and with the silence that is allowed.
    drop(std::thread::Builder::new().name(name).spawn(move || dial(&ours, peer, taken_in))?);
    Ok(())
}

fn dial(peers: &Peers, peer: usize, taken_in: u64) {
    let Some(way) = &peers.ways[peer] else { return };
    let deadline = Instant::now() + peers.liveness.dead_after;
    let mut pause = PAUSE_FIRST;
    while Instant::now() < deadline && !peers.is_closed() {
        match attempt(way, peers.rank, taken_in, deadline) {
            Ok((socket, they_have)) => {
                peers.give_back(Returned { peer, socket, taken_in: they_have });
                return;
            }
            Err(error) => tracing::debug!(peer, %error, "the control connection is not back yet"),
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: pause.subsec_nanos().into() };
        poll(&mut [], Some(&limit)).ok();
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn attempt(
    way: &Way,
    rank: usize,
    taken_in: u64,
    deadline: Instant,
) -> std::io::Result<(OwnedFd, u64)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let limit = left.clamp(Duration::from_millis(1), ATTEMPT_MAX);
    let mut stream = TcpStream::connect_timeout(&way.address, limit)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut greeting = [0; resume::GREETING_BYTES];
    stream.read_exact(&mut greeting)?;
    let foreign =
        || std::io::Error::new(ErrorKind::InvalidData, "what listens there is not that rank");
    let nonce = crate::rendezvous::random_bytes().map_err(std::io::Error::other)?;
    let claim = way.key.claim(&greeting, rank, taken_in, nonce).ok_or_else(foreign)?;
    stream.write_all(&claim)?;
    let mut answer = [0; resume::ANSWER_BYTES];
    stream.read_exact(&mut answer)?;
    let they_have = way.key.check_answer(&greeting, &claim, &answer).ok_or_else(foreign)?;
    Ok((stream.into(), they_have))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::card::Card;
    use crate::control::liveness::Liveness;
    use crate::control::peers::{Identity, Sockets};
    use crate::environment::{JobToken, World};

    fn key(token: &str) -> PairKey {
        let card = |secret| Card {
            host: "a".into(),
            pid: 1,
            machine: String::new(),
            unix_name: Vec::new(),
            address: ([127, 0, 0, 1], 4000).into(),
            secret: [secret; 32],
            checks: true,
        };
        let job_token = JobToken::derive(&[token]);
        let world = World { run_id: "run".into(), job_token, ..World::threads(0, 2) };
        PairKey::new(&world, &card(1), &card(2))
    }

    /// Rank 0 of two, whose peer has lost its connection, and its door.
    struct House {
        peers: Peers,
        door: Door,
        address: SocketAddr,
        returned: Vec<Returned>,
    }

    impl House {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let address = listener.local_addr().unwrap();
            let identity = Identity { host: "a".into(), pid: 1, local: false };
            let way = Way { address, key: key("ours") };
            let sockets = Sockets {
                controls: vec![None, None],
                data: vec![None, None],
                ways: vec![None, Some(way)],
            };
            let (heartbeat, dead_after) = (Duration::from_millis(500), Duration::from_secs(5));
            let liveness = Liveness { heartbeat, dead_after, remind_after: dead_after };
            let part = crate::recorder::GroupPart::whole(2);
            let peers =
                Peers::new(0, vec![identity.clone(), identity], sockets, liveness, part).unwrap();
            Self { peers, door: Door::new(Some(listener)), address, returned: Vec::new() }
        }

        /// Serves until something is true.
        fn serve_until(&mut self, mut is_true: impl FnMut(&mut Self) -> bool) {
            let start = Instant::now();
            while !is_true(self) {
                assert!(start.elapsed() < Duration::from_secs(60), "for ever");
                let more = self.door.serve(&self.peers, |_| Some(7));
                self.returned.extend(more);
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }

        /// Somebody at the door, and what was said to them.
        fn visitor(&mut self) -> (TcpStream, [u8; resume::GREETING_BYTES]) {
            let mut stream = TcpStream::connect(self.address).unwrap();
            stream.set_nonblocking(true).unwrap();
            let mut greeting = Vec::new();
            self.serve_until(|_| {
                read_all(&mut stream, &mut greeting);
                greeting.len() == resume::GREETING_BYTES
            });
            (stream, greeting.try_into().unwrap())
        }

        /// Serves until they are shown out, having heard nothing.
        fn show_out(&mut self, stream: &mut TcpStream) {
            let mut heard = Vec::new();
            self.serve_until(|_| read_all(stream, &mut heard));
            assert_eq!(heard, b"", "a stranger is told nothing");
            assert!(self.returned.is_empty(), "nobody is back");
        }
    }

    /// Reads what is there; whether it was the last.
    fn read_all(stream: &mut TcpStream, into: &mut Vec<u8>) -> bool {
        match stream.read_to_end(into) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    fn claim(key: &PairKey, greeting: &[u8; resume::GREETING_BYTES]) -> [u8; CLAIM_BYTES] {
        key.claim(greeting, 1, 5, [9; resume::CONNECTOR_NONCE_BYTES]).unwrap()
    }

    #[test]
    fn a_peer_comes_back_and_strangers_do_not_get_in() {
        let mut house = House::new();
        let greeting_of_another = [b"PHXr".to_vec(), vec![3; 32]].concat().try_into().unwrap();
        let huge_lengths = [&b"PHXc"[..], &[0xFF; 60]].concat();
        let (mut own_rank, mut no_rank) = (huge_lengths.clone(), huge_lengths.clone());
        own_rank[4..8].copy_from_slice(&0_u32.to_le_bytes());
        no_rank[4..8].copy_from_slice(&2_u32.to_le_bytes());
        let recorded = claim(&key("ours"), &greeting_of_another).to_vec();
        for words in [
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            vec![0xA5; 4096],
            vec![0; 64],
            huge_lengths,
            own_rank,
            no_rank,
            recorded,
        ] {
            let (mut stream, _) = house.visitor();
            stream.write_all(&words).unwrap();
            house.show_out(&mut stream);
        }
        // The right words in answer to this very greeting, with another job's secret.
        let (mut stream, greeting) = house.visitor();
        stream.write_all(&claim(&key("another"), &greeting)).unwrap();
        house.show_out(&mut stream);

        let (mut peer, its_greeting) = house.visitor();
        let right = claim(&key("ours"), &its_greeting);
        peer.write_all(&right).unwrap();
        house.serve_until(|house| !house.returned.is_empty());
        let back = house.returned.pop().unwrap();
        assert_eq!((back.peer, back.taken_in), (1, 5));
        let mut answer = Vec::new();
        read_all(&mut peer, &mut answer);
        let answer = answer.try_into().unwrap();
        assert_eq!(key("ours").check_answer(&its_greeting, &right, &answer), Some(7));

        // What the peer has just said, said again.
        let (mut replay, _) = house.visitor();
        replay.write_all(&right).unwrap();
        house.show_out(&mut replay);
    }

    #[test]
    fn the_silent_and_the_slow_are_shown_out_after_two_seconds() {
        let mut house = House::new();
        let (start, mut sent) = (Instant::now(), 0);
        let (mut silent, _) = house.visitor();
        let (mut slow, greeting) = house.visitor();
        let right = claim(&key("ours"), &greeting);
        let mut heard = Vec::new();
        house.serve_until(|_| {
            let due = usize::try_from(start.elapsed().as_millis() / 100).unwrap();
            if sent < due && sent < right.len() {
                // It may have been shown out already.
                drop(slow.write(&right[sent..=sent]));
                sent += 1;
            }
            read_all(&mut slow, &mut heard)
        });
        // However it trickles: its last byte would have come at 6.4 s.
        assert!(start.elapsed() >= CLAIM_MAX && sent < right.len(), "{sent} bytes");
        house.show_out(&mut silent);
        assert!(house.door.strangers.is_empty() && house.returned.is_empty() && heard.is_empty());
    }

    #[test]
    fn a_crowd_takes_no_more_than_its_places_and_the_peer_gets_in() {
        let mut house = House::new();
        let crowd: Vec<TcpStream> =
            (0..60).map(|_| TcpStream::connect(house.address).unwrap()).collect();
        house.serve_until(|house| house.door.strangers.len() == STRANGERS_MAX);
        let (mut stream, greeting) = house.visitor();
        stream.write_all(&claim(&key("ours"), &greeting)).unwrap();
        house.serve_until(|house| !house.returned.is_empty());
        assert!(house.door.strangers.len() <= STRANGERS_MAX);
        drop(crowd);
    }
}
