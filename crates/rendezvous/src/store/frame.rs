//! Requests and replies on the wire: a header of fixed size, then at most three byte strings of bounded length.
//!
//! Pure: bytes in, values out. Lengths are checked when the header is complete, before anything is allocated for the
//! body, and nothing is deserialised generically.
//!
//! ```text
//! request   magic u32 · operation u16 · flags u16 · key u32 · value u32 · expected u32 · number i64 · zero u32 · bodies
//! reply     magic u32 · status u16 · zero u16 · value u32 · zero u32 · number i64 · body          all little-endian
//! ```

use super::table::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

/// Bytes of a request before its key.
pub(super) const REQUEST_HEADER_BYTES: usize = 32;
/// Bytes of a reply before its value.
pub(super) const REPLY_HEADER_BYTES: usize = 24;
/// Most keys of one `check`.
pub(super) const CHECK_KEYS_MAX: usize = 131_072;

const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"PHXq");
const REPLY_MAGIC: u32 = u32::from_le_bytes(*b"PHXr");
const FLAG_EXPECTED: u16 = 1;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request<'b> {
    Set { key: &'b str, value: &'b [u8] },
    Get { key: &'b str, wait_ms: i64 },
    Add { key: &'b str, delta: i64 },
    CompareSet { key: &'b str, expected: Option<&'b [u8]>, desired: &'b [u8] },
    Delete { key: &'b str },
    Check { keys: KeyList<'b> },
    List { prefix: &'b str },
}

/// The keys of a `check`, still in their encoding (u32 length, bytes, …), which was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyList<'b>(&'b [u8]);

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplyStatus {
    /// Done; value and number as the operation says.
    Done,
    /// The key is absent.
    Absent,
    /// The wait of a `get` ended without a value.
    TimedOut,
    /// `add` on something else than a counter.
    NotACounter,
    /// The store is full.
    Full,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: ReplyStatus,
    pub(super) number: i64,
    pub(super) value: Vec<u8>,
}

/// Bytes that are no frame. After one the connection is closed: there is no way back into step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a frame with a wrong magic number")]
    Magic,
    #[error("an unknown operation or status {0}")]
    Unknown(u16),
    #[error("a frame that announces {0} bytes, more than allowed")]
    TooLong(u32),
    #[error("a frame whose reserved or unused fields are not zero")]
    Reserved,
    #[error("a key that is not UTF-8")]
    KeyText,
    #[error("a malformed list of keys")]
    KeyList,
}

/// A frame that was found at the start of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded<T> {
    /// Too few bytes so far.
    More,
    /// A frame, and how many bytes it took.
    Frame(T, usize),
}

impl<'b> KeyList<'b> {
    /// A list that [`join_keys`] made.
    pub(super) const fn joined(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    fn parse(bytes: &'b [u8]) -> Result<Self, FrameError> {
        let mut rest = bytes;
        let mut count = 0;
        while !rest.is_empty() {
            let (key, tail) = split_key(rest).ok_or(FrameError::KeyList)?;
            if key.len() > KEY_BYTES_MAX || count == CHECK_KEYS_MAX {
                return Err(FrameError::KeyList);
            }
            std::str::from_utf8(key).map_err(|_not_text| FrameError::KeyText)?;
            count += 1;
            rest = tail;
        }
        Ok(Self(bytes))
    }

    /// The keys, in the order they were sent.
    pub(super) fn to_vec(self) -> Vec<&'b str> {
        let mut keys = Vec::new();
        let mut rest = self.0;
        while let Some((key, tail)) = split_key(rest) {
            keys.extend(std::str::from_utf8(key));
            rest = tail;
        }
        keys
    }
}

fn split_key(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
}

/// Joins keys as [`Request::Check`] carries them.
pub(super) fn join_keys(keys: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for key in keys {
        bytes.extend(length_u32(key.len()).to_le_bytes());
        bytes.extend(key.as_bytes());
    }
    bytes
}

/// Splits a list that [`join_keys`] made; `None` when it is malformed.
pub(super) fn split_keys(bytes: &[u8]) -> Option<Vec<String>> {
    let list = KeyList::parse(bytes).ok()?;
    Some(list.to_vec().into_iter().map(str::to_owned).collect())
}

/// Lengths are checked against limits far below 2³² before they get here.
fn length_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Writes a request.
pub(super) fn encode_request(request: &Request<'_>) -> Vec<u8> {
    let empty: &[u8] = &[];
    let (operation, key, value, expected, number): (u16, &str, &[u8], Option<&[u8]>, i64) =
        match *request {
            Request::Set { key, value } => (1, key, value, None, 0),
            Request::Get { key, wait_ms } => (2, key, empty, None, wait_ms),
            Request::Add { key, delta } => (3, key, empty, None, delta),
            Request::CompareSet { key, expected, desired } => (4, key, desired, expected, 0),
            Request::Delete { key } => (5, key, empty, None, 0),
            Request::Check { keys } => (6, "", keys.0, None, 0),
            Request::List { prefix } => (7, prefix, empty, None, 0),
        };
    let flags = if expected.is_some() { FLAG_EXPECTED } else { 0 };
    let expected = expected.unwrap_or_default();
    let body = key.len() + value.len() + expected.len();
    let mut bytes = Vec::with_capacity(REQUEST_HEADER_BYTES + body);
    bytes.extend(REQUEST_MAGIC.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(length_u32(key.len()).to_le_bytes());
    bytes.extend(length_u32(value.len()).to_le_bytes());
    bytes.extend(length_u32(expected.len()).to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes.extend(value);
    bytes.extend(expected);
    bytes
}

/// Reads the request at the start of `bytes`.
pub(super) fn decode_request(bytes: &[u8]) -> Result<Decoded<Request<'_>>, FrameError> {
    let Some((header, body)) = bytes.split_first_chunk::<REQUEST_HEADER_BYTES>() else {
        return Ok(Decoded::More);
    };
    let mut fields = Fields(header);
    if fields.u32() != REQUEST_MAGIC {
        return Err(FrameError::Magic);
    }
    let (operation, flags) = (fields.u16(), fields.u16());
    let key_bytes = bounded(fields.u32(), KEY_BYTES_MAX)?;
    let value_bytes = bounded(fields.u32(), VALUE_BYTES_MAX)?;
    let expected_bytes = bounded(fields.u32(), VALUE_BYTES_MAX)?;
    let number = fields.i64();
    let has_expected = flags == FLAG_EXPECTED;
    if fields.u32() != 0 || flags > FLAG_EXPECTED || (!has_expected && expected_bytes > 0) {
        return Err(FrameError::Reserved);
    }
    if !(1..=7).contains(&operation) {
        return Err(FrameError::Unknown(operation));
    }
    let body_bytes = key_bytes + value_bytes + expected_bytes;
    let Some(body) = body.get(..body_bytes) else { return Ok(Decoded::More) };
    let (key, rest) = body.split_at(key_bytes);
    let (value, expected) = rest.split_at(value_bytes);
    let key = std::str::from_utf8(key).map_err(|_not_text| FrameError::KeyText)?;
    let has_value = matches!(operation, 1 | 4 | 6);
    let used = [
        has_value || value.is_empty(),
        operation == 4 || !has_expected,
        matches!(operation, 2 | 3) || number == 0,
        operation != 6 || key.is_empty(),
    ];
    if used.contains(&false) {
        return Err(FrameError::Reserved);
    }
    let request = match operation {
        1 => Request::Set { key, value },
        2 => Request::Get { key, wait_ms: number },
        3 => Request::Add { key, delta: number },
        4 => {
            Request::CompareSet { key, expected: has_expected.then_some(expected), desired: value }
        }
        5 => Request::Delete { key },
        6 => Request::Check { keys: KeyList::parse(value)? },
        _ => Request::List { prefix: key },
    };
    Ok(Decoded::Frame(request, REQUEST_HEADER_BYTES + body_bytes))
}

/// Writes a reply.
pub(super) fn encode_reply(reply: &Reply) -> Vec<u8> {
    let status: u16 = match reply.status {
        ReplyStatus::Done => 0,
        ReplyStatus::Absent => 1,
        ReplyStatus::TimedOut => 2,
        ReplyStatus::NotACounter => 3,
        ReplyStatus::Full => 4,
    };
    let mut bytes = Vec::with_capacity(REPLY_HEADER_BYTES + reply.value.len());
    bytes.extend(REPLY_MAGIC.to_le_bytes());
    bytes.extend(status.to_le_bytes());
    bytes.extend(0_u16.to_le_bytes());
    bytes.extend(length_u32(reply.value.len()).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(reply.number.to_le_bytes());
    bytes.extend(&reply.value);
    bytes
}

/// Reads a reply's header: status, number, and how many bytes of value follow.
pub(super) fn decode_reply_header(
    header: &[u8; REPLY_HEADER_BYTES],
) -> Result<(ReplyStatus, i64, usize), FrameError> {
    let mut fields = Fields(header);
    if fields.u32() != REPLY_MAGIC {
        return Err(FrameError::Magic);
    }
    let status = match fields.u16() {
        0 => ReplyStatus::Done,
        1 => ReplyStatus::Absent,
        2 => ReplyStatus::TimedOut,
        3 => ReplyStatus::NotACounter,
        4 => ReplyStatus::Full,
        other => return Err(FrameError::Unknown(other)),
    };
    if fields.u16() != 0 {
        return Err(FrameError::Reserved);
    }
    let value_bytes = bounded(fields.u32(), VALUE_BYTES_MAX)?;
    if fields.u32() != 0 {
        return Err(FrameError::Reserved);
    }
    Ok((status, fields.i64(), value_bytes))
}

fn bounded(length: u32, max: usize) -> Result<usize, FrameError> {
    match usize::try_from(length) {
        Ok(bytes) if bytes <= max => Ok(bytes),
        _ => Err(FrameError::TooLong(length)),
    }
}

/// Reads little-endian fields from the front of a header; a header that is too short reads as zeros, which the
/// callers' array types rule out.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn i64(&mut self) -> i64 {
        i64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(request: &Request<'_>) {
        let bytes = encode_request(request);
        assert_eq!(decode_request(&bytes), Ok(Decoded::Frame(*request, bytes.len())));
        for end in 0..bytes.len() {
            assert_eq!(
                decode_request(&bytes[..end]),
                Ok(Decoded::More),
                "{request:?} cut at {end}"
            );
        }
    }

    fn drop_frame(_: Decoded<Request<'_>>) {}

    #[test]
    fn every_request_reads_back_and_every_prefix_asks_for_more() {
        let keys = join_keys(&["a", "", "längst"]);
        for request in [
            Request::Set { key: "k", value: b"value" },
            Request::Get { key: "k", wait_ms: 1234 },
            Request::Add { key: "k", delta: -5 },
            Request::CompareSet { key: "k", expected: None, desired: b"d" },
            Request::CompareSet { key: "k", expected: Some(b""), desired: b"d" },
            Request::Delete { key: "" },
            Request::Check { keys: KeyList(&keys) },
            Request::List { prefix: "ranks/" },
        ] {
            round_trip(&request);
        }
        assert_eq!(KeyList::parse(&keys).unwrap().to_vec(), ["a", "", "längst"]);
    }

    #[test]
    fn lengths_over_the_limits_are_refused_by_the_header_alone() {
        let bytes = encode_request(&Request::Set { key: "k", value: b"v" });
        for (at, max) in [(8, KEY_BYTES_MAX), (12, VALUE_BYTES_MAX), (16, VALUE_BYTES_MAX)] {
            for length in [u32::try_from(max).unwrap() + 1, 1 << 31, u32::MAX] {
                let mut header = bytes[..REQUEST_HEADER_BYTES].to_vec();
                header[at..at + 4].copy_from_slice(&length.to_le_bytes());
                assert_eq!(decode_request(&header), Err(FrameError::TooLong(length)));
            }
        }
    }

    #[test]
    fn fields_that_an_operation_does_not_use_must_be_empty() {
        let changed = |request: &Request<'_>, at: usize, byte| {
            let mut bytes = encode_request(request);
            bytes[at] = byte;
            decode_request(&bytes).map(drop_frame)
        };
        let delete = Request::Delete { key: "k" };
        assert_eq!(changed(&delete, 20, 1), Err(FrameError::Reserved));
        let set = Request::Set { key: "k", value: b"v" };
        assert_eq!(changed(&set, 4, 99), Err(FrameError::Unknown(99)));
        assert_eq!(changed(&set, 4, 5), Err(FrameError::Reserved));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic_or_read_past_their_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Decoded::Frame(_, used)) = decode_request(&bytes) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn no_valid_header_with_any_field_changed_makes_the_decoder_panic(
            key in ".{0,40}", value in prop::collection::vec(any::<u8>(), 0..100), at in 4_usize..28, byte in any::<u8>()
        ) {
            let mut bytes = encode_request(&Request::CompareSet { key: &key, expected: Some(&value), desired: &value });
            bytes[at] = byte;
            if let Ok(Decoded::Frame(_, used)) = decode_request(&bytes) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn any_set_reads_back(key in ".{0,40}", value in prop::collection::vec(any::<u8>(), 0..300)) {
            let request = Request::Set { key: &key, value: &value };
            let bytes = encode_request(&request);
            prop_assert_eq!(decode_request(&bytes), Ok(Decoded::Frame(request, bytes.len())));
        }

        #[test]
        fn any_reply_header_reads_back(number in any::<i64>(), value in prop::collection::vec(any::<u8>(), 0..100)) {
            let bytes = encode_reply(&Reply { status: ReplyStatus::Absent, number, value: value.clone() });
            let header = bytes.first_chunk().unwrap();
            prop_assert_eq!(decode_reply_header(header), Ok((ReplyStatus::Absent, number, value.len())));
        }

        #[test]
        fn no_key_list_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(list) = KeyList::parse(&bytes) {
                let keys = list.to_vec();
                prop_assert_eq!(join_keys(&keys), bytes);
            }
        }
    }
}
