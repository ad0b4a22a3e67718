//! Connecting every rank with every other: one control socket for each pair, and for pairs on two
//! machines a data socket.
//!
//! Every rank publishes a *card* (who and where it is, and a secret) through an exchange that is
//! already authenticated: the store, or the group that is being split. A rank connects to those
//! before it and accepts those after it; each side proves that it has the other's card by sending
//! the secret on it, in fixed-size messages, before anything else is read. Pairs on one machine use
//! unix sockets without a path (abstract, gone with the process) and check the peer's uid and pid;
//! others use TCP, bound to the address that leads to the master.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::callers::{Callers, Line, HELLO_BYTES};
use super::card::{Card, APART, SECRET_BYTES};
use crate::environment::{HostLink, World};
use crate::error::{Error, Result};
use crate::memory::mapping;
use crate::rendezvous::resolve;

const MAGIC: [u8; 8] = *b"phalanx\x03";
/// What connects this rank with one other.
#[derive(Debug)]
pub(crate) struct PeerSockets {
    pub(crate) control: OwnedFd,
    /// Only between machines.
    pub(crate) data: Option<TcpStream>,
}

/// The listening half, before the others are known.
#[derive(Debug)]
pub(crate) struct Listening {
    unix: UnixListener,
    tcp: TcpListener,
    pub(crate) card: Card,
}

impl Listening {
    /// The TCP listener, for peers that come back.
    pub(crate) fn into_tcp(self) -> TcpListener {
        self.tcp
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Control = 1,
    Data = 2,
}

/// Opens this rank's listeners and writes its card.
pub(crate) fn listen(world: &World, link: HostLink, deadline: Instant) -> Result<Listening> {
    let system = |call| move |source: std::io::Error| Error::system(world.rank, call, source);
    let secret: [u8; SECRET_BYTES] = crate::rendezvous::random_bytes()?;
    let mut unix_name = b"phalanx-".to_vec();
    let public: [u8; 8] = crate::rendezvous::random_bytes()?;
    unix_name.extend(public.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()));
    let name = std::os::unix::net::SocketAddr::from_abstract_name(&unix_name)
        .map_err(system("name a unix socket"))?;
    let unix = UnixListener::bind_addr(&name).map_err(system("bind a unix socket"))?;
    let ip = own_address(world, deadline)
        .map_err(system("find the address that leads to the master"))?;
    let tcp = TcpListener::bind((ip, 0)).map_err(system("bind a TCP socket"))?;
    let address = tcp.local_addr().map_err(system("getsockname"))?;
    unix.set_nonblocking(true).map_err(system("set a unix socket non-blocking"))?;
    tcp.set_nonblocking(true).map_err(system("set a TCP socket non-blocking"))?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let machine = match (link, machine_identity()) {
        // What is not shared need not be known.
        (HostLink::Tcp, known) => APART.to_owned() + &known.unwrap_or_default(),
        (HostLink::Auto, Err(error)) => {
            tracing::warn!(%error, "what this machine is cannot be read: ranks of this machine talk over TCP");
            APART.to_owned()
        }
        (HostLink::Auto, Ok(known)) if !can_share() => APART.to_owned() + &known,
        (_, known) => known.map_err(system("read what this machine is (/proc)"))?,
    };
    let (pid, checks) = (std::process::id(), world.data_checks);
    let card = Card { host, pid, machine, unix_name, address, secret, checks };
    Ok(Listening { unix, tcp, card })
}

/// Whether memory can be shared at all.
fn can_share() -> bool {
    let trial = mapping::create("phalanx-trial", mapping::PAGE_BYTES);
    if let Err(error) = &trial {
        tracing::warn!(%error, "no shared memory here: ranks of this machine talk over TCP");
    }
    trial.is_ok()
}

/// The boot, the network namespace (abstract sockets end there), that of processes (their numbers mean nothing elsewhere) and
/// the user.
fn machine_identity() -> std::io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = std::fs::read_link("/proc/self/ns/net")?;
    let processes = std::fs::read_link("/proc/self/ns/pid")?;
    let uid = rustix::process::getuid().as_raw();
    Ok(format!("{} {} {} {uid}", boot.trim(), namespace.display(), processes.display()))
}

/// Loopback when the job is on one node, else the address this machine uses towards the master.
fn own_address(world: &World, deadline: Instant) -> std::io::Result<IpAddr> {
    if world.node_count <= 1 {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    // Connecting a datagram socket sends nothing; it only looks up the route.
    let (host, port) = world.store_address();
    let addresses = resolve(host, port.max(1), deadline)?;
    let master = addresses.first().copied().ok_or(ErrorKind::NotFound)?;
    let any: SocketAddr = match master {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(master)?;
    Ok(socket.local_addr()?.ip())
}

/// A connection of either family, blocking with a time-out.
trait Stream: Read + Write {
    fn timeouts(&self, limit: Duration) -> std::io::Result<()>;
}
impl Stream for UnixStream {
    fn timeouts(&self, limit: Duration) -> std::io::Result<()> {
        self.set_nonblocking(false)?;
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}
impl Stream for TcpStream {
    fn timeouts(&self, limit: Duration) -> std::io::Result<()> {
        self.set_nonblocking(false)?;
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

struct Builder<'a> {
    rank: usize,
    cards: &'a [Card],
    secret: [u8; SECRET_BYTES],
    deadline: Instant,
    controls: Vec<Option<OwnedFd>>,
    data: Vec<Option<TcpStream>>,
}

/// Connects this rank with all others. Every rank calls it with the same cards.
pub(crate) fn connect(
    listening: &Listening,
    rank: usize,
    cards: &[Card],
    deadline: Instant,
) -> Result<Vec<Option<PeerSockets>>> {
    let mut builder = Builder {
        rank,
        cards,
        secret: listening.card.secret,
        deadline,
        controls: cards.iter().map(|_| None).collect(),
        data: cards.iter().map(|_| None).collect(),
    };
    // All connects come before any accept: a connect needs only the other's backlog, so no rank
    // waits for a rank that waits for it.
    let mut unix_replies = Vec::new();
    let mut tcp_replies = Vec::new();
    for peer in 0..rank {
        if cards[rank].shares_memory_with(&cards[peer]) {
            unix_replies.push((peer, builder.connect_unix(peer)?));
        } else {
            tcp_replies.push((peer, Kind::Control, builder.connect_tcp(peer, Kind::Control)?));
            tcp_replies.push((peer, Kind::Data, builder.connect_tcp(peer, Kind::Data)?));
        }
    }
    builder.accept_all(listening)?;
    for (peer, mut stream) in unix_replies {
        builder.read_reply(peer, &mut stream)?;
        builder.controls[peer] = Some(stream.into());
    }
    for (peer, kind, mut stream) in tcp_replies {
        builder.read_reply(peer, &mut stream)?;
        builder.keep_tcp(peer, kind, stream);
    }
    let sockets = builder.controls.into_iter().zip(builder.data);
    Ok(sockets
        .map(|(control, data)| control.map(|control| PeerSockets { control, data }))
        .collect())
}

impl Builder<'_> {
    fn failure(&self, peer: usize, what: impl std::fmt::Display) -> Error {
        let card = &self.cards[peer];
        let address = if self.cards[self.rank].shares_memory_with(card) {
            format!("unix socket of pid {}", card.pid)
        } else {
            card.address.to_string()
        };
        Error::Connect { rank: self.rank, peer, address, what: what.to_string() }
    }

    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    fn hello(&self, peer: usize, kind: Kind) -> [u8; HELLO_BYTES] {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8] = kind as u8;
        let rank = u32::try_from(self.rank).unwrap_or(u32::MAX);
        hello[12..16].copy_from_slice(&rank.to_le_bytes());
        hello[16..].copy_from_slice(&self.cards[peer].secret);
        hello
    }

    fn connect_unix(&self, peer: usize) -> Result<UnixStream> {
        let name = &self.cards[peer].unix_name;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)
            .map_err(|error| self.failure(peer, error))?;
        let mut stream = UnixStream::connect_addr(&address).map_err(|error| {
            self.failure(peer, format_args!("{error}; has that process ended?"))
        })?;
        self.check_credentials(peer, &stream)?;
        stream.timeouts(self.remaining()).map_err(|error| self.failure(peer, error))?;
        let hello = self.hello(peer, Kind::Control);
        stream.write_all(&hello).map_err(|error| self.failure(peer, error))?;
        Ok(stream)
    }

    fn connect_tcp(&self, peer: usize, kind: Kind) -> Result<TcpStream> {
        let address = self.cards[peer].address;
        let mut stream =
            TcpStream::connect_timeout(&address, self.remaining()).map_err(|error| {
                let what =
                    "is a firewall between the machines? All TCP ports must be open to each other";
                self.failure(peer, format_args!("{error}; {what}"))
            })?;
        stream.timeouts(self.remaining()).map_err(|error| self.failure(peer, error))?;
        let hello = self.hello(peer, kind);
        stream.write_all(&hello).map_err(|error| self.failure(peer, error))?;
        Ok(stream)
    }

    /// The process at the other end is the one on the card, and of our user.
    fn check_credentials(&self, peer: usize, stream: &UnixStream) -> Result<()> {
        let credentials = rustix::net::sockopt::socket_peercred(stream)
            .map_err(|error| self.failure(peer, format_args!("SO_PEERCRED: {error}")))?;
        let pid = credentials.pid.as_raw_nonzero().get().unsigned_abs();
        if credentials.uid != rustix::process::getuid() || pid != self.cards[peer].pid {
            let what = format_args!(
                "the socket belongs to pid {pid} of user {}, not to that rank",
                credentials.uid.as_raw()
            );
            return Err(self.failure(peer, what));
        }
        Ok(())
    }

    fn read_reply(&self, peer: usize, stream: &mut impl Stream) -> Result<()> {
        let mut reply = [0; SECRET_BYTES];
        let read = read_until(stream, &mut reply, self.deadline);
        read.map_err(|error| {
            self.failure(
                peer,
                format_args!("no answer to the greeting ({error}); look at its output"),
            )
        })?;
        if !equal(&reply, &self.secret) {
            return Err(self.failure(peer, "what listens there is not that rank"));
        }
        Ok(())
    }

    fn keep_tcp(&mut self, peer: usize, kind: Kind, stream: TcpStream) {
        match kind {
            Kind::Control => self.controls[peer] = Some(stream.into()),
            Kind::Data => self.data[peer] = Some(stream),
        }
    }

    fn is_complete(&self, peer: usize) -> bool {
        let local = self.cards[self.rank].shares_memory_with(&self.cards[peer]);
        self.controls[peer].is_some() && (local || self.data[peer].is_some())
    }

    fn accept_all(&mut self, listening: &Listening) -> Result<()> {
        let mut callers = Callers::new(self.cards.len());
        loop {
            let later = self.rank + 1..self.cards.len();
            let missing: Vec<usize> = later.filter(|peer| !self.is_complete(*peer)).collect();
            let Some(first) = missing.first() else { return Ok(()) };
            let now = Instant::now();
            if now >= self.deadline {
                let what = format_args!(
                    "ranks {missing:?} did not connect in time; look at their output for why"
                );
                return Err(self.failure(*first, what));
            }
            self.wait_for_connection(listening, &callers)?;
            while let Ok((stream, _)) = listening.unix.accept() {
                callers.add(Line::Unix(stream));
            }
            while let Ok((stream, _)) = listening.tcp.accept() {
                callers.add(Line::Tcp(stream));
            }
            for (line, hello) in callers.heard() {
                if !self.admit(line, &hello) {
                    callers.warn("a connection is no rank of this group");
                }
            }
        }
    }

    fn wait_for_connection(&self, listening: &Listening, callers: &Callers) -> Result<()> {
        let listeners = [listening.unix.as_fd(), listening.tcp.as_fd()].into_iter();
        let fds = listeners.chain(callers.fds());
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let limit = self.remaining().min(Duration::from_millis(200));
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::system(self.rank, "poll", error)),
        }
    }

    /// Who a greeting is from; whoever does not know our secret is turned away without an answer.
    fn who(&self, hello: &[u8; HELLO_BYTES]) -> Option<(usize, Kind)> {
        let rank = u32::from_le_bytes([hello[12], hello[13], hello[14], hello[15]]) as usize;
        let kind = match hello[8] {
            1 => Kind::Control,
            2 => Kind::Data,
            _ => return None,
        };
        let known = hello[..8] == MAGIC && equal(&hello[16..], &self.secret);
        (known && rank > self.rank && rank < self.cards.len()).then_some((rank, kind))
    }

    /// Takes the connection of a rank and answers; whether it is one.
    fn admit(&mut self, line: Line, hello: &[u8; HELLO_BYTES]) -> bool {
        let Some((peer, kind)) = self.who(hello) else { return false };
        let local = self.cards[self.rank].shares_memory_with(&self.cards[peer]);
        let limit = self.remaining();
        match line {
            Line::Unix(mut stream) => {
                let is_it = kind == Kind::Control && local;
                if !is_it || self.check_credentials(peer, &stream).is_err() {
                    return false;
                }
                let answer = stream.timeouts(limit);
                let answer = answer.and_then(|()| stream.write_all(&self.cards[peer].secret));
                // One that is gone by now comes again, or is missed.
                if answer.is_ok() {
                    self.controls[peer] = Some(stream.into());
                }
            }
            Line::Tcp(mut stream) => {
                let answer = stream.timeouts(limit);
                let answer = answer.and_then(|()| stream.write_all(&self.cards[peer].secret));
                if answer.is_ok() {
                    self.keep_tcp(peer, kind, stream);
                }
            }
        }
        true
    }
}

/// Fills `buffer` or fails at `deadline`, however slowly bytes trickle in.
fn read_until(
    stream: &mut impl Stream,
    buffer: &mut [u8],
    deadline: Instant,
) -> std::io::Result<()> {
    let mut have = 0;
    while have < buffer.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.timeouts(left.max(Duration::from_millis(1)))?;
        match stream.read(&mut buffer[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if have < buffer.len() && left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Compares without telling by its duration where the difference is.
fn equal(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}
