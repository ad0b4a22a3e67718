//! From a host name to a connection: resolve, connect, prove the token (or, to PyTorch's store, ping); again, with back-off, until the
//! deadline, with a line in the log every five seconds.
//!
//! What cannot get better by waiting (a wrong token, a newer generation) fails at once; what may (nobody listens yet,
//! an old job is still ending) is tried again.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::handshake::{Credentials, Mismatch, GREETING_BYTES, VERDICT_BYTES, VERSION};
use super::tcp_store::message;
use super::{random_bytes, RendezvousError};

const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// One address gets this long to accept, so that a dead one of several does not use up the deadline.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A server gets this long for its part of a handshake; a loaded machine may need some of it.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// A `TCPStore` gets this long to answer a ping; after that another connection may do better.
const PING_MAX: Duration = Duration::from_secs(2);
/// How long a server of another run may take to go away.
const STALE_GRACE: Duration = Duration::from_secs(3);
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Where to go and what to show there.
#[derive(Debug)]
pub(super) struct Dial<'d> {
    pub(super) host: &'d str,
    pub(super) port: u16,
    pub(super) greeting: Greeting<'d>,
    /// Added to "nobody listens": what this launcher's arrangement makes likely.
    pub(super) hint: &'d str,
}

/// What is said first to who listens.
#[derive(Debug)]
pub(super) enum Greeting<'d> {
    /// The proof of the job token, to a store of ours.
    Phalanx(&'d Credentials),
    /// PyTorch's: no proof of anything but the protocol.
    TcpStore,
}

/// Why one attempt failed, and what that means for the next.
struct Failure {
    error: RendezvousError,
    retry: Retry,
}

enum Retry {
    UntilDeadline,
    /// Only for a short while: [`STALE_GRACE`].
    Briefly,
    Never,
}

impl Dial<'_> {
    /// Connects and authenticates.
    pub(super) fn connect(&self, deadline: Instant) -> Result<TcpStream, RendezvousError> {
        let start = Instant::now();
        let mut backoff = BACKOFF_FIRST;
        let mut next_progress = start + PROGRESS_EVERY;
        loop {
            let failure = match self.attempt(start, deadline) {
                Ok(stream) => return Ok(stream),
                Err(failure) => failure,
            };
            let give_up_at = match failure.retry {
                Retry::UntilDeadline => deadline,
                Retry::Briefly => deadline.min(start + STALE_GRACE),
                Retry::Never => return Err(failure.error),
            };
            let now = Instant::now();
            if now + backoff >= give_up_at {
                return Err(failure.error);
            }
            if now >= next_progress {
                let left = deadline.duration_since(now).as_secs();
                tracing::warn!("still connecting to the store, {left} s left: {}", failure.error);
                next_progress = now + PROGRESS_EVERY;
            }
            pause(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    fn attempt(&self, start: Instant, deadline: Instant) -> Result<TcpStream, Failure> {
        let addresses = resolve(self.host, self.port, deadline).map_err(|source| Failure {
            error: RendezvousError::NameNotResolved {
                host: self.host.to_owned(),
                waited: start.elapsed(),
                source,
            },
            retry: Retry::UntilDeadline,
        })?;
        let mut last = None;
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            // The last attempt still gets a moment: connect_timeout refuses zero.
            let timeout = left.clamp(Duration::from_millis(1), CONNECT_MAX);
            match TcpStream::connect_timeout(&address, timeout) {
                Ok(stream) if is_self_connected(&stream) => {}
                Ok(stream) => {
                    return match self.greeting {
                        Greeting::Phalanx(ours) => authenticate(ours, stream, address, deadline),
                        Greeting::TcpStore => ping(stream, address, deadline),
                    }
                }
                Err(error) => last = Some(error),
            }
        }
        Err(self.not_connected(last, start))
    }

    fn not_connected(&self, last: Option<io::Error>, start: Instant) -> Failure {
        let address = format!("{}:{}", self.host, self.port);
        let waited = start.elapsed();
        let error = match last {
            Some(source) if source.kind() != io::ErrorKind::ConnectionRefused => {
                RendezvousError::Unreachable { address, waited, source }
            }
            _ => RendezvousError::NobodyListens { address, waited, hint: self.hint.to_owned() },
        };
        Failure { error, retry: Retry::UntilDeadline }
    }
}

fn authenticate(
    ours: &Credentials,
    mut stream: TcpStream,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TcpStream, Failure> {
    let until = deadline.min(Instant::now() + HANDSHAKE_MAX);
    let broken = |source: io::Error| {
        let what = match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "it accepts connections but does not greet".to_owned()
            }
            _ => format!("it ended the handshake: {source}"),
        };
        let error = RendezvousError::NotAStore { address: address.to_string(), what };
        Failure { error, retry: Retry::UntilDeadline }
    };
    let mut greeting = [0; GREETING_BYTES];
    read_until(&mut stream, &mut greeting, until).map_err(broken)?;
    let nonce = random_bytes().map_err(|error| Failure { error, retry: Retry::Never })?;
    let mismatch = |mismatch| mismatch_failure(ours, &mismatch, address);
    let proof = ours.answer(&greeting, &nonce).map_err(mismatch)?;
    stream.write_all(&proof).map_err(broken)?;
    let mut verdict = [0; VERDICT_BYTES];
    read_until(&mut stream, &mut verdict, until).map_err(broken)?;
    ours.check_verdict(&greeting, &nonce, &verdict).map_err(mismatch)?;
    stream.set_nodelay(true).map_err(broken)?;
    Ok(stream)
}

fn mismatch_failure(ours: &Credentials, mismatch: &Mismatch, address: SocketAddr) -> Failure {
    let address = address.to_string();
    let (error, retry) = match *mismatch {
        Mismatch::NotAStore => {
            let what = "its first bytes are no greeting".to_owned();
            (RendezvousError::NotAStore { address, what }, Retry::Briefly)
        }
        Mismatch::Version(theirs) => {
            let error = RendezvousError::WrongVersion { address, theirs, ours: VERSION };
            (error, Retry::Never)
        }
        Mismatch::Run(theirs) => {
            let error = RendezvousError::WrongRun {
                address,
                theirs: hex(&theirs),
                ours: ours.run_id.clone(),
                ours_mark: hex(&ours.mark()),
            };
            (error, Retry::Briefly)
        }
        Mismatch::Generation(theirs) => {
            let error = RendezvousError::WrongGeneration {
                address,
                run_id: ours.run_id.clone(),
                theirs,
                ours: ours.restart_count,
            };
            // An older server will give way to ours; a newer one means that we are the left-over.
            let older = theirs < ours.restart_count;
            (error, if older { Retry::UntilDeadline } else { Retry::Never })
        }
        Mismatch::Token => (RendezvousError::WrongToken { address }, Retry::Never),
    };
    Failure { error, retry }
}

/// Makes sure that a `TCPStore` answers: it stays silent towards what it does not understand.
fn ping(
    mut stream: TcpStream,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TcpStream, Failure> {
    let until = deadline.min(Instant::now() + PING_MAX);
    let failure = |what: String| Failure {
        error: RendezvousError::NotATcpStore { address: address.to_string(), what },
        retry: Retry::UntilDeadline,
    };
    let broken = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            failure("it accepts connections but does not answer a ping".to_owned())
        }
        // So does a server of PyTorch 2.1, which wants its magic number before every request.
        _ => failure(format!("it ended the connection at the first word: {source}")),
    };
    let nonce = std::process::id();
    let hello = [
        message::encode(&message::TcpStoreRequest::Validate { magic: message::VALIDATION }),
        message::encode(&message::TcpStoreRequest::Ping { nonce }),
    ];
    stream.set_nodelay(true).map_err(broken)?;
    stream.write_all(&hello.concat()).map_err(broken)?;
    let mut answer = [0; 4];
    read_until(&mut stream, &mut answer, until).map_err(broken)?;
    if u32::from_le_bytes(answer) != nonce {
        return Err(failure("it answers a ping with another number".to_owned()));
    }
    Ok(stream)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// On loopback a client can meet itself: the kernel may choose the very port it dials as its own.
fn is_self_connected(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(local), Ok(peer)) => local == peer,
        _ => false,
    }
}

/// Waits; `park_timeout` may return early, which only makes the next attempt earlier.
fn pause(time: Duration) {
    thread::park_timeout(time);
}

/// Addresses of `host`. The resolver has no deadline of its own, so it runs on a thread that may outlive this call.
///
/// # Errors
///
/// What the resolver said, or a time-out at `deadline`.
pub fn resolve(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (sender, receiver) = mpsc::channel();
    let name = host.to_owned();
    thread::Builder::new().name("resolver".to_owned()).spawn(move || {
        let result = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        // Nobody listens any more when the deadline has passed: then the answer is of no use.
        drop(sender.send(result));
    })?;
    match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(addresses)) if addresses.is_empty() => {
            Err(io::Error::new(io::ErrorKind::NotFound, "the name has no addresses"))
        }
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the resolver did not answer")),
    }
}

/// Fills `buffer` or fails at `deadline`, however slowly bytes trickle in.
pub(super) fn read_until(
    stream: &mut TcpStream,
    buffer: &mut [u8],
    deadline: Instant,
) -> io::Result<()> {
    let mut have = 0;
    while have < buffer.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut buffer[have..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if left.is_zero() || !would_block(&error) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

pub(super) fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
