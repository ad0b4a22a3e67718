//! The messages of the `TCPStore` protocol. Pure.
//!
//! A request is an operation's number and its fields, with nothing around them; integers are little-endian, strings
//! and lists follow their `u64` length. The tables of operations and replies are those of [`Request`].

use super::super::table::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

/// What a client must send first, or the server stays silent for ever.
pub(crate) const VALIDATION: u32 = 0x3C85_F7CE;
/// Keys that one request may name.
pub(crate) const KEYS_MAX: usize = 131_072;
/// The byte that answers WAIT and CHECK when all keys are there.
pub(crate) const READY: u8 = 0;
/// The byte that answers CHECK when some key is absent.
pub(crate) const NOT_READY: u8 = 1;
/// The byte that answers `CANCEL_WAIT`.
pub(crate) const CANCELLED: u8 = 1;

/// An operation and its fields. Keys are as on the wire (see [`wire_key`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// First of a connection; no reply.
    Validate { magic: u32 },
    /// No reply.
    Set { key: String, value: Vec<u8> },
    /// The value that the key holds afterwards. An absent key counts as empty; where it is absent and something else is
    /// expected, the expected value comes back and nothing is stored.
    CompareSet { key: String, expected: Vec<u8>, desired: Vec<u8> },
    /// The value; empty for an absent key.
    Get { key: String },
    /// `i64`, the new value; stored as decimal text.
    Add { key: String, delta: i64 },
    /// [`READY`] or [`NOT_READY`].
    Check { keys: Vec<String> },
    /// [`READY`], as soon as all keys are there.
    Wait { keys: Vec<String> },
    /// `i64`.
    CountKeys,
    /// `i64`, how many were there.
    Delete { key: String },
    /// No reply.
    Append { key: String, value: Vec<u8> },
    /// The values.
    MultiGet { keys: Vec<String> },
    /// No reply.
    MultiSet { entries: Vec<(String, Vec<u8>)> },
    /// [`CANCELLED`]; a late [`READY`] may come before it.
    CancelWait,
    /// The same number.
    Ping { nonce: u32 },
    /// No reply. Queues are apart from values; WAIT and CHECK take a queue that holds something for a key that is there.
    QueuePush { key: String, value: Vec<u8> },
    /// `i64`, how many values the queue held, and the first of them unless that is 0.
    QueuePop { key: String },
    /// `i64`, how many values the queue holds.
    QueueLen { key: String },
    /// `i64`, how many, and the keys.
    ListKeys,
}

/// Where processes that use a store together count themselves, as it travels: the one key without a slash.
pub(crate) const WORKERS_KEY: &str = "init/";

/// The key as it travels: torch puts a slash before each.
pub(crate) fn wire_key(key: &str) -> String {
    format!("/{key}")
}

/// The bytes of a request.
pub(crate) fn encode(request: &Request) -> Vec<u8> {
    let mut out = Vec::new();
    match request {
        Request::Validate { magic } => start(&mut out, 0).extend(magic.to_le_bytes()),
        Request::Set { key, value } => put_all(start(&mut out, 1), &[key.as_bytes(), value]),
        Request::CompareSet { key, expected, desired } => {
            put_all(start(&mut out, 2), &[key.as_bytes(), expected, desired]);
        }
        Request::Get { key } => put(start(&mut out, 3), key.as_bytes()),
        Request::Add { key, delta } => {
            put(start(&mut out, 4), key.as_bytes());
            out.extend(delta.to_le_bytes());
        }
        Request::Check { keys } => put_keys(start(&mut out, 5), keys),
        Request::Wait { keys } => put_keys(start(&mut out, 6), keys),
        Request::CountKeys => drop(start(&mut out, 7)),
        Request::Delete { key } => put(start(&mut out, 8), key.as_bytes()),
        Request::Append { key, value } => put_all(start(&mut out, 9), &[key.as_bytes(), value]),
        Request::MultiGet { keys } => put_keys(start(&mut out, 10), keys),
        Request::MultiSet { entries } => {
            put_length(start(&mut out, 11), entries.len());
            for (key, value) in entries {
                put_all(&mut out, &[key.as_bytes(), value]);
            }
        }
        Request::CancelWait => drop(start(&mut out, 12)),
        Request::Ping { nonce } => start(&mut out, 13).extend(nonce.to_le_bytes()),
        Request::QueuePush { key, value } => {
            put_all(start(&mut out, 14), &[key.as_bytes(), value]);
        }
        Request::QueuePop { key } => put(start(&mut out, 15), key.as_bytes()),
        Request::QueueLen { key } => put(start(&mut out, 16), key.as_bytes()),
        Request::ListKeys => drop(start(&mut out, 17)),
    }
    out
}

fn start(out: &mut Vec<u8>, code: u8) -> &mut Vec<u8> {
    out.push(code);
    out
}

/// A length and the bytes: how replies carry values, too.
pub(crate) fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend_from_slice(&(length as u64).to_le_bytes());
}

fn put_all(out: &mut Vec<u8>, fields: &[&[u8]]) {
    for field in fields {
        put(out, field);
    }
}

fn put_keys(out: &mut Vec<u8>, keys: &[String]) {
    put_length(out, keys.len());
    for key in keys {
        put(out, key.as_bytes());
    }
}

/// Why bytes are no request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("operation {0}, which this server does not have")]
    Operation(u8),
    #[error("a {what} of {length}, more than {max}")]
    TooLong { what: &'static str, length: u64, max: usize },
    #[error("a key that is no text")]
    Key,
}

/// What stands at the start of the bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// Not yet a whole request.
    More,
    /// A request, and how many bytes it took.
    Whole(Request, usize),
}

/// The first request of `bytes`. Lengths are checked before the bytes that they announce have come.
pub(crate) fn decode(bytes: &[u8]) -> Result<Decoded, Malformed> {
    let mut reader = Reader { bytes, at: 0 };
    match reader.request() {
        Ok(request) => Ok(Decoded::Whole(request, reader.at)),
        Err(Stop::More) => Ok(Decoded::More),
        Err(Stop::Malformed(malformed)) => Err(malformed),
    }
}

enum Stop {
    More,
    Malformed(Malformed),
}

impl From<Malformed> for Stop {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl Reader<'_> {
    fn request(&mut self) -> Result<Request, Stop> {
        let code = self.array::<1>()?[0];
        Ok(match code {
            0 => Request::Validate { magic: u32::from_le_bytes(self.array()?) },
            1 => Request::Set { key: self.key()?, value: self.value()? },
            2 => Request::CompareSet {
                key: self.key()?,
                expected: self.value()?,
                desired: self.value()?,
            },
            3 => Request::Get { key: self.key()? },
            4 => Request::Add { key: self.key()?, delta: i64::from_le_bytes(self.array()?) },
            5 => Request::Check { keys: self.keys()? },
            6 => Request::Wait { keys: self.keys()? },
            7 => Request::CountKeys,
            8 => Request::Delete { key: self.key()? },
            9 => Request::Append { key: self.key()?, value: self.value()? },
            10 => Request::MultiGet { keys: self.keys()? },
            11 => {
                let count = self.count()?;
                let entries = (0..count).map(|_| Ok((self.key()?, self.value()?)));
                Request::MultiSet { entries: entries.collect::<Result<_, Stop>>()? }
            }
            12 => Request::CancelWait,
            13 => Request::Ping { nonce: u32::from_le_bytes(self.array()?) },
            14 => Request::QueuePush { key: self.key()?, value: self.value()? },
            15 => Request::QueuePop { key: self.key()? },
            16 => Request::QueueLen { key: self.key()? },
            17 => Request::ListKeys,
            other => return Err(Malformed::Operation(other).into()),
        })
    }

    fn take(&mut self, length: usize) -> Result<&[u8], Stop> {
        let bytes = self.bytes.get(self.at..self.at + length).ok_or(Stop::More)?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        self.take(N)?.first_chunk().copied().ok_or(Stop::More)
    }

    fn length(&mut self, what: &'static str, max: usize) -> Result<usize, Stop> {
        let length = u64::from_le_bytes(self.array()?);
        usize::try_from(length)
            .ok()
            .filter(|length| *length <= max)
            .ok_or_else(|| Malformed::TooLong { what, length, max }.into())
    }

    fn count(&mut self) -> Result<usize, Stop> {
        self.length("list of keys", KEYS_MAX)
    }

    fn key(&mut self) -> Result<String, Stop> {
        let length = self.length("key", KEY_BYTES_MAX)?;
        let text = std::str::from_utf8(self.take(length)?).ok();
        text.map(str::to_owned).ok_or_else(|| Malformed::Key.into())
    }

    fn keys(&mut self) -> Result<Vec<String>, Stop> {
        let count = self.count()?;
        (0..count).map(|_| self.key()).collect()
    }

    fn value(&mut self) -> Result<Vec<u8>, Stop> {
        let length = self.length("value", VALUE_BYTES_MAX)?;
        Ok(self.take(length)?.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Request> {
        let key = || "/k".to_owned();
        let keys = || vec![key(), String::new(), "/schlüssel".to_owned()];
        let value = || vec![0, 255, 7];
        vec![
            Request::Validate { magic: VALIDATION },
            Request::Set { key: key(), value: value() },
            Request::CompareSet { key: key(), expected: vec![], desired: value() },
            Request::Get { key: key() },
            Request::Add { key: key(), delta: -3 },
            Request::Check { keys: keys() },
            Request::Wait { keys: vec![] },
            Request::CountKeys,
            Request::Delete { key: key() },
            Request::Append { key: key(), value: value() },
            Request::MultiGet { keys: keys() },
            Request::MultiSet { entries: vec![(key(), value()), (String::new(), vec![])] },
            Request::CancelWait,
            Request::Ping { nonce: 77 },
            Request::QueuePush { key: key(), value: value() },
            Request::QueuePop { key: key() },
            Request::QueueLen { key: String::new() },
            Request::ListKeys,
        ]
    }

    #[test]
    fn every_request_is_read_as_it_was_written_and_not_before_it_is_whole() {
        for request in all() {
            let bytes = encode(&request);
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut]), Ok(Decoded::More), "{request:?} cut at {cut}");
            }
            let with_next = [&bytes[..], &[13]].concat();
            assert_eq!(decode(&with_next), Ok(Decoded::Whole(request, bytes.len())));
        }
    }

    #[test]
    fn the_bytes_are_those_of_torch() {
        assert_eq!(encode(&Request::Validate { magic: VALIDATION }), [0, 0xCE, 0xF7, 0x85, 0x3C]);
        let add = Request::Add { key: wire_key("n"), delta: 1 };
        assert_eq!(encode(&add), [4, 2, 0, 0, 0, 0, 0, 0, 0, b'/', b'n', 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&Request::CountKeys), [7]);
    }

    #[test]
    fn announced_lengths_are_refused_before_their_bytes_come() {
        let huge = |code: u8| [&[code][..], &u64::MAX.to_le_bytes()].concat();
        for code in [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 14, 15, 16] {
            assert!(matches!(decode(&huge(code)), Err(Malformed::TooLong { .. })), "{code}");
        }
        for code in [18, 19, 200] {
            assert_eq!(decode(&[code]), Err(Malformed::Operation(code)));
        }
        let mut no_text = vec![3];
        put(&mut no_text, &[0xFF]);
        assert_eq!(decode(&no_text), Err(Malformed::Key));
    }

    #[test]
    fn no_short_input_makes_the_reader_panic() {
        for code in 0..=255 {
            for fill in [0, 1, 127, 255] {
                for length in 0..24 {
                    let bytes = [vec![code], vec![fill; length]].concat();
                    drop(decode(&bytes));
                }
            }
        }
    }
}
