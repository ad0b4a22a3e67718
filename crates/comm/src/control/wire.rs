//! What travels on the control sockets: small frames, decoded with bounds. Pure.
//!
//! A frame is `kind: u8, check of kind and length: 24 bits, length: u32, checksum of the body: u32` and then a body of `length` bytes,
//! all little-endian; checks are CRC-32C. Nothing is deserialised generically and no length is believed before it is compared
//! with its check and a limit.

use std::time::Duration;

use crate::checksum;
use crate::error::{Absent, Error, LastCall};
use crate::fingerprint::{CallRecord, RECORD_BYTES};

/// No frame is longer: what `point.rs` sends at a time, and some.
pub(crate) const FRAME_BYTES_MAX: usize = (1 << 18) + 256;
pub(crate) const FRAME_HEAD_BYTES: usize = 12;
const TEXT_BYTES_MAX: usize = 4096;

/// A frame.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    /// The sender leaves in good order, having finished so many collectives.
    Goodbye { completed: u64, panicking: bool },
    /// The sender's group failed; so does yours.
    Failed(Error),
    /// A memfd comes with this frame: the sender's part of a region.
    Region { id: u64, bytes: u64 },
    /// The sender is ready to receive message `index` of yours.
    Ready { index: u64, record: CallRecord },
    /// The sender has called its side of the GPU message `index` between the two ranks.
    Announced { index: u64, record: CallRecord },
    /// The sender waits until what it has written into its channel to the receiver is read.
    Waits,
    /// The sender lives, has taken in so many frames (but for heartbeats) of the receiver's, and has started this
    /// collective last.
    Heartbeat { taken_in: u64, last: Option<CallRecord> },
}

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Bytes that are not those of a frame that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damaged {
    pub(crate) expected: u32,
    pub(crate) actual: u32,
}

/// What the head of a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHead {
    pub(crate) kind: u8,
    pub(crate) body_bytes: usize,
    checksum: u32,
}

impl FrameHead {
    pub(crate) fn decode(head: [u8; FRAME_HEAD_BYTES]) -> Result<Self, Damaged> {
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (expected, actual) = (word(0) >> 8, head_check(head[0], word(4)));
        if expected != actual {
            return Err(Damaged { expected, actual });
        }
        Ok(Self { kind: head[0], body_bytes: word(4) as usize, checksum: word(8) })
    }

    /// Whether no frame of ours is so long.
    pub(crate) const fn is_too_long(&self) -> bool {
        self.body_bytes > FRAME_BYTES_MAX
    }

    /// Whether this is the body that was sent.
    pub(crate) fn check(&self, body: &[u8]) -> Result<(), Damaged> {
        let (expected, actual) = (self.checksum, checksum::of(body));
        if expected == actual {
            Ok(())
        } else {
            Err(Damaged { expected, actual })
        }
    }
}

/// 24 bits that kind and length determine.
fn head_check(kind: u8, length: u32) -> u32 {
    checksum::append(checksum::of(&[kind]), &length.to_le_bytes()) >> 8
}

/// A frame whose head is still to be written.
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn new(body_bytes: usize) -> Self {
        let mut frame = Vec::with_capacity(FRAME_HEAD_BYTES + body_bytes);
        frame.resize(FRAME_HEAD_BYTES, 0);
        Self(frame)
    }
    pub(super) fn frame(self, kind: u8) -> Vec<u8> {
        let Self(mut frame) = self;
        let (head, body) = frame.split_at_mut(FRAME_HEAD_BYTES);
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let words = [head_check(kind, length) << 8 | u32::from(kind), length, checksum::of(body)];
        for (place, word) in head.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        frame
    }
    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }
    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn size(&mut self, value: usize) -> &mut Self {
        self.u64(value as u64)
    }
    fn text(&mut self, text: &str) -> &mut Self {
        let mut bytes = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(bytes) {
            bytes -= 1;
        }
        self.size(bytes);
        self.0.extend_from_slice(&text.as_bytes()[..bytes]);
        self
    }
    fn record(&mut self, record: &CallRecord) -> &mut Self {
        self.0.extend_from_slice(&record.encode());
        self
    }
    fn last(&mut self, record: Option<&CallRecord>) -> &mut Self {
        self.u8(u8::from(record.is_some()));
        if let Some(record) = record {
            self.record(record);
        }
        self
    }
}

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(bytes).ok_or(Malformed)?;
        self.0 = tail;
        Ok(head)
    }
    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }
    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        let mut word = [0; 8];
        word.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(word))
    }
    fn size(&mut self) -> Result<usize, Malformed> {
        usize::try_from(self.u64()?).or(Err(Malformed))
    }
    fn u32(&mut self) -> Result<u32, Malformed> {
        u32::try_from(self.u64()?).or(Err(Malformed))
    }
    fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.size()?;
        if bytes > TEXT_BYTES_MAX {
            return Err(Malformed);
        }
        let text = std::str::from_utf8(self.take(bytes)?).or(Err(Malformed))?;
        Ok(text.to_owned())
    }
    fn record(&mut self) -> Result<CallRecord, Malformed> {
        CallRecord::decode(self.take(RECORD_BYTES)?).ok_or(Malformed)
    }
    fn last(&mut self) -> Result<Option<CallRecord>, Malformed> {
        Ok(if self.u8()? == 0 { None } else { Some(self.record()?) })
    }
    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Malformed)
        }
    }
}

impl Frame {
    /// The frame's bytes, head included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Writer::new(0);
        let kind = match self {
            Self::Goodbye { completed, panicking } => {
                body.u64(*completed).u8(u8::from(*panicking));
                1
            }
            Self::Failed(error) => {
                encode_error(&mut body, error);
                2
            }
            Self::Region { id, bytes } => {
                body.u64(*id).u64(*bytes);
                3
            }
            Self::Ready { index, record } => {
                body.u64(*index).record(record);
                4
            }
            Self::Heartbeat { taken_in, last } => {
                body.u64(*taken_in).last(last.as_ref());
                6
            }
            Self::Announced { index, record } => {
                body.u64(*index).record(record);
                7
            }
            Self::Waits => 8,
        };
        body.frame(kind)
    }

    /// Whether it is sent again when the connection is lost before it has come.
    pub(crate) const fn is_counted(&self) -> bool {
        !matches!(self, Self::Heartbeat { .. })
    }

    pub(crate) fn decode(kind: u8, body: &[u8]) -> Result<Self, Malformed> {
        let mut body = Reader(body);
        let frame = match kind {
            1 => Self::Goodbye { completed: body.u64()?, panicking: body.u8()? != 0 },
            2 => Self::Failed(decode_error(&mut body)?),
            3 => Self::Region { id: body.u64()?, bytes: body.u64()? },
            4 => Self::Ready { index: body.u64()?, record: body.record()? },
            6 => Self::Heartbeat { taken_in: body.u64()?, last: body.last()? },
            7 => Self::Announced { index: body.u64()?, record: body.record()? },
            8 => Self::Waits,
            _ => return Err(Malformed),
        };
        body.end()?;
        Ok(frame)
    }
}

fn encode_error(body: &mut Writer, error: &Error) {
    match error {
        Error::OutOfStep { seq, rank, ours, peer, theirs } => {
            body.u8(1).u64(*seq).size(*rank).record(ours).size(*peer).record(theirs);
        }
        Error::PeerGone { peer, host, pid, cause, during } => {
            body.u8(2).size(*peer).text(host).u64((*pid).into());
            body.text(cause.as_deref().unwrap_or("")).text(during);
        }
        Error::PeerLeft { peer, host, pid, completed, panicking, rank, during } => {
            body.u8(3).size(*peer).text(host).u64((*pid).into()).u64(*completed);
            body.u8(u8::from(*panicking)).size(*rank).text(during);
        }
        Error::Timeout { rank, call, timeout, absent } => {
            let nanos = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
            // A frame has room for the first few; they are who everybody waits for.
            let named = &absent[..absent.len().min(64)];
            body.u8(4).size(*rank).record(call).u64(nanos).size(named.len());
            for one in named {
                body.size(one.rank).text(&one.host).u64(one.pid.into());
                match &one.last {
                    LastCall::Unknown => body.u8(2),
                    LastCall::Nothing => body.u8(0),
                    LastCall::Call(last) => body.u8(1).record(last),
                };
            }
        }
        Error::Aborted { rank, reason } => {
            body.u8(5).size(*rank).text(reason);
        }
        Error::PeerFailed { rank, message } => {
            body.u8(6).size(*rank).text(message);
        }
        Error::NotResponding { peer, host, pid, silent, state, during } => {
            let nanos = u64::try_from(silent.as_nanos()).unwrap_or(u64::MAX);
            body.u8(7).size(*peer).text(host).u64((*pid).into()).u64(nanos);
            body.text(state).text(during);
        }
        Error::DataDamaged { peer, host, pid, rank, receiver, during, expected, actual } => {
            body.u8(8).size(*peer).text(host).u64((*pid).into()).size(*rank).text(receiver);
            body.text(during).u64((*expected).into()).u64((*actual).into());
        }
        other => {
            body.u8(6).u64(u64::MAX).text(&other.to_string());
        }
    }
}

fn decode_error(body: &mut Reader<'_>) -> Result<Error, Malformed> {
    Ok(match body.u8()? {
        1 => Error::OutOfStep {
            seq: body.u64()?,
            rank: body.size()?,
            ours: Box::new(body.record()?),
            peer: body.size()?,
            theirs: Box::new(body.record()?),
        },
        2 => Error::PeerGone {
            peer: body.size()?,
            host: body.text()?,
            pid: body.u32()?,
            cause: Some(body.text()?).filter(|cause| !cause.is_empty()),
            during: body.text()?,
        },
        3 => Error::PeerLeft {
            peer: body.size()?,
            host: body.text()?,
            pid: body.u32()?,
            completed: body.u64()?,
            panicking: body.u8()? != 0,
            rank: body.size()?,
            during: body.text()?,
        },
        4 => {
            let (rank, call) = (body.size()?, Box::new(body.record()?));
            let timeout = Duration::from_nanos(body.u64()?);
            let count = body.size()?;
            let mut absent = Vec::new();
            for _ in 0..count {
                let (who, host, pid) = (body.size()?, body.text()?, body.u32()?);
                let last = match body.u8()? {
                    0 => LastCall::Nothing,
                    1 => LastCall::Call(body.record()?),
                    _ => LastCall::Unknown,
                };
                absent.push(Absent { rank: who, host, pid, last });
            }
            Error::Timeout { rank, call, timeout, absent }
        }
        5 => Error::Aborted { rank: body.size()?, reason: body.text()? },
        6 => Error::PeerFailed { rank: body.size()?, message: body.text()? },
        7 => Error::NotResponding {
            peer: body.size()?,
            host: body.text()?,
            pid: body.u32()?,
            silent: Duration::from_nanos(body.u64()?),
            state: body.text()?,
            during: body.text()?,
        },
        8 => Error::DataDamaged {
            peer: body.size()?,
            host: body.text()?,
            pid: body.u32()?,
            rank: body.size()?,
            receiver: body.text()?,
            during: body.text()?,
            expected: body.u32()?,
            actual: body.u32()?,
        },
        _ => return Err(Malformed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::part::Part;
    use crate::dtype::DType;
    use crate::fingerprint::Op;

    fn record(seq: u64) -> Box<CallRecord> {
        Box::new(CallRecord {
            op: Op::AllReduce,
            seq,
            dtype: Some(DType::F32),
            len: 5,
            reduction: "sum",
            root: None,
            tag: "x".to_owned(),
        })
    }

    fn errors() -> Vec<Error> {
        let absent = vec![
            Absent { rank: 1, host: "b".into(), pid: 4, last: LastCall::Nothing },
            Absent { rank: 3, host: "d".into(), pid: 6, last: LastCall::Unknown },
            Absent { rank: 2, host: "c".into(), pid: 5, last: LastCall::Call(*record(3)) },
        ];
        let timeout = Duration::from_millis(1500);
        vec![
            Error::OutOfStep { seq: 7, rank: 0, ours: record(7), peer: 2, theirs: record(7) },
            Error::PeerGone {
                peer: 1,
                host: "a".into(),
                pid: 3,
                cause: Some("signal 9".into()),
                during: "x".into(),
            },
            Error::PeerLeft {
                peer: 1,
                host: "a".into(),
                pid: 3,
                completed: 9,
                panicking: true,
                rank: 0,
                during: "y".into(),
            },
            Error::Timeout { rank: 0, call: record(4), timeout, absent },
            Error::Aborted { rank: 3, reason: "because".into() },
            Error::PeerFailed { rank: 3, message: "m".into() },
            Error::NotResponding {
                peer: 2,
                host: "a".into(),
                pid: 3,
                silent: Duration::from_millis(5500),
                state: "process state T (stopped)".into(),
                during: "z".into(),
            },
            Error::DataDamaged {
                peer: 2,
                host: "a".into(),
                pid: 3,
                rank: 1,
                receiver: "b".into(),
                during: "z".into(),
                expected: 0xffff_ffff,
                actual: 7,
            },
        ]
    }

    #[test]
    fn errors_travel_with_their_data() {
        for error in errors() {
            let bytes = Frame::Failed(error.clone()).encode();
            let (head, body) = bytes.split_at(FRAME_HEAD_BYTES);
            let head = FrameHead::decode(head.try_into().unwrap()).unwrap();
            assert_eq!((head.kind, head.body_bytes), (2, body.len()));
            assert_eq!(head.check(body), Ok(()));
            let Ok(Frame::Failed(back)) = Frame::decode(bytes[0], body) else {
                panic!("not decoded: {error}")
            };
            assert_eq!(format!("{back:?}"), format!("{error:?}"));
        }
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_survived() {
        for error in errors() {
            let bytes = Frame::Failed(error).encode();
            let body = &bytes[FRAME_HEAD_BYTES..];
            for cut in 0..body.len() {
                assert!(Frame::decode(2, &body[..cut]).is_err());
            }
            for at in 0..body.len() {
                let mut flipped = body.to_vec();
                flipped[at] ^= 0xff;
                for kind in 0..9 {
                    drop(Frame::decode(kind, &flipped));
                }
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_a_frame_is_found() {
        let message = Part { index: 3, bytes: &[0x5a; 3000] };
        assert_eq!(Part::decode(&message.encode()[FRAME_HEAD_BYTES..]), Ok(message));
        let mut frames = vec![message.encode(), Frame::Failed(errors().remove(0)).encode()];
        frames.push(Frame::Heartbeat { taken_in: 7, last: Some(*record(8)) }.encode());
        let is_whole = |bytes: &[u8]| {
            let (head, body) = bytes.split_at(FRAME_HEAD_BYTES);
            FrameHead::decode(head.try_into().unwrap()).and_then(|head| head.check(body)).is_ok()
        };
        for mut frame in frames {
            assert!(is_whole(&frame));
            for bit in 0..frame.len() * 8 {
                frame[bit / 8] ^= 1 << (bit % 8);
                assert!(!is_whole(&frame), "bit {bit}");
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn a_length_above_the_limit_is_seen() {
        let limit = u32::try_from(FRAME_BYTES_MAX).unwrap();
        for (length, is_too_long) in [(limit, false), (limit + 1, true), (u32::MAX, true)] {
            let first = head_check(1, length) << 8 | 1;
            let mut head = [0; FRAME_HEAD_BYTES];
            head[..4].copy_from_slice(&first.to_le_bytes());
            head[4..8].copy_from_slice(&length.to_le_bytes());
            assert_eq!(FrameHead::decode(head).unwrap().is_too_long(), is_too_long);
        }
    }
}
