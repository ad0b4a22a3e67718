//! How a launcher keeps a living rank for the next generation: two pipes that the rank opens through `/proc/<launcher>/fd`, as it opens
//! the memory of its record, so that nobody comes in whom the launcher has not started.
//!
//! | from | message | meaning |
//! |---|---|---|
//! | the rank | `S` | it would stay |
//! | the rank | `W` | its group is gone, and it waits for what comes next |
//! | the launcher | a length, and so many bytes of variables | the rank's place in the next generation |
//! | the launcher | the length 0 | there is none |
//!
//! A message is one write of at most `PIPE_BUF` bytes: whole, or not there.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use phalanx_rendezvous::environment::StayOffer;
use rustix::pipe::{pipe_with, PipeFlags};

use crate::flight;

/// Linux's `PIPE_BUF`.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4096;
pub(crate) const STAYS: u8 = b'S';
pub(crate) const WAITS: u8 = b'W';
const HEAD_BYTES: usize = 4;

/// Both pipes of a rank, with both ends: the rank opens the others.
#[derive(Debug)]
pub(crate) struct Channel {
    orders: Pipe,
    news: Pipe,
}

#[derive(Debug)]
struct Pipe {
    reader: File,
    writer: File,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (reader, writer): (OwnedFd, OwnedFd) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { reader: reader.into(), writer: writer.into() })
    }
}

impl Channel {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { orders: Pipe::new()?, news: Pipe::new()? })
    }

    /// What the rank is told of it.
    pub(crate) fn offer(&self, patience: Duration) -> StayOffer {
        let [orders, news] = [&self.orders.reader, &self.news.writer].map(flight::path);
        StayOffer { orders: orders.into(), news: news.into(), patience }
    }

    /// Readable when the rank has said something.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.news.reader.as_fd()
    }

    /// What the rank has said since the last call.
    pub(crate) fn hear(&self) -> Vec<u8> {
        let mut said = vec![0; 64];
        let count = (&self.news.reader).read(&mut said).unwrap_or(0);
        said.truncate(count);
        said
    }

    /// Gives the rank its next place.
    pub(crate) fn call(&self, variables: &[(&str, String)]) -> io::Result<()> {
        let message = encode(variables).ok_or(io::ErrorKind::FileTooLarge)?;
        (&self.orders.writer).write_all(&message)
    }

    /// Tells the rank that there is nothing to wait for.
    pub(crate) fn dismiss(&self) -> io::Result<()> {
        (&self.orders.writer).write_all(&[0; HEAD_BYTES])
    }
}

/// `None`: too long for one write.
fn encode(variables: &[(&str, String)]) -> Option<Vec<u8>> {
    let mut message = vec![0; HEAD_BYTES];
    for (name, value) in variables {
        message.extend_from_slice(name.as_bytes());
        message.push(b'=');
        message.extend_from_slice(value.as_bytes());
        message.push(0);
    }
    let length = u32::try_from(message.len() - HEAD_BYTES).ok()?;
    message[..HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
    (message.len() <= MESSAGE_BYTES_MAX).then_some(message)
}

/// What a message says; `None`: that there is no next place, or nothing that anybody understands.
pub(crate) fn decode(message: &[u8]) -> Option<Vec<(String, String)>> {
    let (head, rest) = message.split_first_chunk::<HEAD_BYTES>()?;
    let length = usize::try_from(u32::from_le_bytes(*head)).ok()?;
    if length == 0 || rest.len() != length {
        return None;
    }
    let text = std::str::from_utf8(rest.strip_suffix(&[0])?).ok()?;
    let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.into(), value.into()));
    text.split('\0').map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_was_written() {
        let variables = [("RANK", "3".to_owned()), ("PHALANX_RUN_ID", "a=b\nc".to_owned())];
        let message = encode(&variables).unwrap();
        let owned = variables.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(decode(&message), Some(owned.to_vec()));
    }

    #[test]
    fn what_is_no_place_is_none() {
        let message = encode(&[("RANK", "3".to_owned())]).unwrap();
        for length in 0..message.len() {
            assert_eq!(decode(&message[..length]), None, "{length} bytes");
        }
        assert_eq!(decode(&[0; HEAD_BYTES]), None, "dismissed");
        assert_eq!(decode(&[&message[..], &[0]].concat()), None, "longer than it says");
        assert_eq!(encode(&[("RANK", "3".repeat(MESSAGE_BYTES_MAX))]), None);
    }

    #[test]
    fn both_sides_hear_each_other() {
        let channel = Channel::new().unwrap();
        let offer = channel.offer(Duration::from_secs(1));
        let mut news = File::options().write(true).open(offer.news).unwrap();
        let mut orders = File::open(offer.orders).unwrap();
        assert!(channel.hear().is_empty());
        news.write_all(&[STAYS]).unwrap();
        news.write_all(&[WAITS]).unwrap();
        assert_eq!(channel.hear(), [STAYS, WAITS]);
        channel.call(&[("RANK", "3".to_owned())]).unwrap();
        let mut message = vec![0; MESSAGE_BYTES_MAX];
        let count = orders.read(&mut message).unwrap();
        assert_eq!(decode(&message[..count]), Some(vec![("RANK".into(), "3".into())]));
    }
}
