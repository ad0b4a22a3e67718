//! One connection of the server: handshake, then frames. Reads and writes what the socket takes without blocking.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::super::frame::{decode_request, encode_reply, Decoded, Reply, Request};
use super::super::handshake::{may_be_proof, Credentials, PROOF_BYTES, SERVER_NONCE_BYTES};

/// A stranger has this long to prove itself.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// A frame or a reply that stops moving for this long ends its connection.
const STALL_MAX: Duration = Duration::from_secs(60);
/// Read at a time: input buffers grow with what arrives, never with what is announced.
const CHUNK_BYTES: usize = 16 << 10;

#[derive(Debug)]
enum Phase {
    /// Not authenticated; the proof as far as it has come.
    Stranger { nonce: [u8; SERVER_NONCE_BYTES], proof: [u8; PROOF_BYTES], have: usize },
    /// Authenticated.
    Member { input: Vec<u8> },
    /// Refused: what is left is to send the verdict.
    Leaving,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    phase: Phase,
    output: Vec<u8>,
    written: usize,
    /// Last time that bytes moved; for a stranger, when it came.
    moved: Instant,
}

/// Why a connection is closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// The peer went away, or its socket failed: nothing to report.
    Gone,
    /// It did what no client of ours does.
    Suspicious(String),
}

impl From<io::Error> for Closed {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl Connection {
    /// Greets a new peer.
    pub(super) fn new(
        stream: TcpStream,
        peer: SocketAddr,
        credentials: &Credentials,
        nonce: [u8; SERVER_NONCE_BYTES],
        now: Instant,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let mut connection = Self {
            stream,
            peer,
            phase: Phase::Stranger { nonce, proof: [0; PROOF_BYTES], have: 0 },
            output: credentials.greeting(&nonce).to_vec(),
            written: 0,
            moved: now,
        };
        connection.flush(now)?;
        Ok(connection)
    }

    pub(super) const fn is_stranger(&self) -> bool {
        !matches!(self.phase, Phase::Member { .. })
    }

    pub(super) fn has_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// When this connection is closed if nothing happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Stranger { .. } | Phase::Leaving => Some(self.moved + HANDSHAKE_MAX),
            Phase::Member { input } if !input.is_empty() || self.has_output() => {
                Some(self.moved + STALL_MAX)
            }
            Phase::Member { .. } => None,
        }
    }

    /// What to say of a connection whose deadline has passed.
    pub(super) fn late(&self) -> Closed {
        match self.phase {
            Phase::Leaving => Closed::Gone,
            Phase::Stranger { .. } => {
                Closed::Suspicious(format!("did not finish the handshake within {HANDSHAKE_MAX:?}"))
            }
            Phase::Member { .. } => {
                Closed::Suspicious(format!("stopped in the middle of a message for {STALL_MAX:?}"))
            }
        }
    }

    /// Reads what has come. At most 64 bytes of a stranger are read.
    pub(super) fn receive(
        &mut self,
        credentials: &Credentials,
        now: Instant,
    ) -> Result<(), Closed> {
        match &mut self.phase {
            Phase::Leaving => Err(Closed::Gone),
            Phase::Stranger { nonce, proof, have } => {
                let got = match nonblocking(self.stream.read(&mut proof[*have..]))? {
                    None => return Ok(()),
                    Some(0) => return Err(Closed::Gone),
                    Some(got) => got,
                };
                *have += got;
                if !may_be_proof(&proof[..*have]) {
                    return Err(Closed::Suspicious("sent no handshake".to_owned()));
                }
                if *have < PROOF_BYTES {
                    return Ok(());
                }
                let (verdict, welcome) = credentials.verdict(nonce, proof);
                self.output.extend(verdict);
                if !welcome {
                    self.phase = Phase::Leaving;
                    self.flush(now)?;
                    return Err(Closed::Suspicious("has a wrong job token".to_owned()));
                }
                self.phase = Phase::Member { input: Vec::new() };
                self.flush(now)?;
                Ok(())
            }
            Phase::Member { input } => {
                let mut chunk = [0; CHUNK_BYTES];
                match nonblocking(self.stream.read(&mut chunk))? {
                    None => Ok(()),
                    Some(0) => Err(Closed::Gone),
                    Some(count) => {
                        input.extend_from_slice(&chunk[..count]);
                        self.moved = now;
                        Ok(())
                    }
                }
            }
        }
    }

    /// Hands the next whole request to `handle`; says whether there was one.
    pub(super) fn next_request<R>(
        &mut self,
        handle: impl FnOnce(&Request<'_>) -> R,
    ) -> Result<Option<R>, Closed> {
        let Phase::Member { input } = &mut self.phase else { return Ok(None) };
        match decode_request(input) {
            Ok(Decoded::More) => Ok(None),
            Ok(Decoded::Frame(request, used)) => {
                let result = handle(&request);
                input.drain(..used);
                if input.is_empty() {
                    // A large value should not keep its memory while the connection idles.
                    *input = Vec::new();
                }
                Ok(Some(result))
            }
            Err(error) => Err(Closed::Suspicious(format!("sent {error}"))),
        }
    }

    /// Queues a reply and sends what the socket takes.
    pub(super) fn reply(&mut self, reply: &Reply, now: Instant) -> Result<(), Closed> {
        self.output.extend(encode_reply(reply));
        self.flush(now)?;
        Ok(())
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, now: Instant) -> io::Result<()> {
        while self.has_output() {
            match nonblocking(self.stream.write(&self.output[self.written..]))? {
                None => return Ok(()),
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(count) => {
                    self.written += count;
                    if !self.is_stranger() {
                        self.moved = now;
                    }
                }
            }
        }
        self.output = Vec::new();
        self.written = 0;
        Ok(())
    }
}

/// `None` when the socket has nothing to give or no room.
fn nonblocking(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
