//! The messages of the `TCPStore` protocol that a client here sends. Pure.
//!
//! A request is an operation's number and its fields, with nothing around them; integers are little-endian, strings
//! and lists follow their `u64` length. The tables of operations and replies are those of [`TcpStoreRequest`].

/// What a client must send first, or the server stays silent for ever.
pub(crate) const VALIDATION: u32 = 0x3C85_F7CE;
/// The byte that answers WAIT and CHECK when all keys are there.
pub(crate) const READY: u8 = 0;
/// The byte that answers CHECK when some key is absent.
pub(crate) const NOT_READY: u8 = 1;
/// The byte that answers `CANCEL_WAIT`.
pub(crate) const CANCELLED: u8 = 1;

/// An operation and its fields. Keys are as on the wire (see [`wire_key`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TcpStoreRequest {
    /// First of a connection; no reply.
    Validate { magic: u32 },
    /// No reply.
    Set { key: String, value: Vec<u8> },
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
    /// [`CANCELLED`]; a late [`READY`] may come before it.
    CancelWait,
    /// The same number.
    Ping { nonce: u32 },
}

/// The key as it travels: torch puts a slash before each.
pub(crate) fn wire_key(key: &str) -> String {
    format!("/{key}")
}

/// The bytes of a request.
pub(crate) fn encode(request: &TcpStoreRequest) -> Vec<u8> {
    let mut out = Vec::new();
    match request {
        TcpStoreRequest::Validate { magic } => start(&mut out, 0).extend(magic.to_le_bytes()),
        TcpStoreRequest::Set { key, value } => {
            put_all(start(&mut out, 1), &[key.as_bytes(), value]);
        }
        TcpStoreRequest::Get { key } => put(start(&mut out, 3), key.as_bytes()),
        TcpStoreRequest::Add { key, delta } => {
            put(start(&mut out, 4), key.as_bytes());
            out.extend(delta.to_le_bytes());
        }
        TcpStoreRequest::Check { keys } => put_keys(start(&mut out, 5), keys),
        TcpStoreRequest::Wait { keys } => put_keys(start(&mut out, 6), keys),
        TcpStoreRequest::CountKeys => drop(start(&mut out, 7)),
        TcpStoreRequest::Delete { key } => put(start(&mut out, 8), key.as_bytes()),
        TcpStoreRequest::CancelWait => drop(start(&mut out, 12)),
        TcpStoreRequest::Ping { nonce } => start(&mut out, 13).extend(nonce.to_le_bytes()),
    }
    out
}

fn start(out: &mut Vec<u8>, code: u8) -> &mut Vec<u8> {
    out.push(code);
    out
}

/// A length and the bytes: how replies carry values, too.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_torch() {
        assert_eq!(
            encode(&TcpStoreRequest::Validate { magic: VALIDATION }),
            [0, 0xCE, 0xF7, 0x85, 0x3C]
        );
        let add = TcpStoreRequest::Add { key: wire_key("n"), delta: 1 };
        assert_eq!(encode(&add), [4, 2, 0, 0, 0, 0, 0, 0, 0, b'/', b'n', 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&TcpStoreRequest::CountKeys), [7]);
    }
}
