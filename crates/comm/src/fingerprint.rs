//! What a rank called, small enough to send with every collective. Pure.
//!
//! Ranks compare 64-bit fingerprints before any memory of the caller changes; where they differ, the
//! records say how. The hash is FNV-1a over the record's fields (Fowler, Noll, Vo), finished with the
//! mixer of `SplitMix64`: collisions between honest mistakes are what matters here, not attackers.

use crate::dtype::DType;

/// Which collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum Op {
    /// Every rank gets the reduction of all buffers.
    AllReduce = 1,
    /// Rank r gets segment r of the reduction.
    ReduceScatter = 2,
    /// Every rank gets every rank's segment.
    AllGather = 3,
    /// Every rank gets the root's buffer.
    Broadcast = 4,
    /// The root gets the reduction of all buffers.
    Reduce = 5,
    /// The root gets every rank's segment.
    Gather = 6,
    /// Every rank gets its segment of the root's buffer.
    Scatter = 7,
    /// Rank r gets segment r of every rank's buffer.
    AllToAll = 8,
    /// Nobody passes before all have come.
    Barrier = 9,
    /// Memory is registered.
    Allocate = 10,
    /// A message to one peer.
    Send = 11,
    /// A message from one peer.
    Receive = 12,
    /// The group is divided.
    Split = 13,
}

impl Op {
    /// The name, as the methods of [`Group`](crate::Group) have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::AllToAll => "all_to_all",
            Self::Barrier => "barrier",
            Self::Allocate => "allocate",
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Split => "split",
        }
    }

    const ALL: [Self; 13] = [
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Broadcast,
        Self::Reduce,
        Self::Gather,
        Self::Scatter,
        Self::AllToAll,
        Self::Barrier,
        Self::Allocate,
        Self::Send,
        Self::Receive,
        Self::Split,
    ];

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|op| *op as u8 == code)
    }
}

/// Tags longer than this travel without their middle: what tells similar names apart is at their ends. The fingerprint covers all.
pub(crate) const TAG_BYTES_MAX: usize = 47;

/// One call of a collective, as errors show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRecord {
    /// Which collective.
    pub op: Op,
    /// How many collectives this rank had started on the group before.
    pub seq: u64,
    /// The element type; `None` where there are no elements.
    pub dtype: Option<DType>,
    /// Elements in the buffer.
    pub len: u64,
    /// The reduction, or empty.
    pub reduction: &'static str,
    /// The root or the peer, where there is one.
    pub root: Option<usize>,
    /// The caller's name for it, or empty.
    pub tag: String,
}

impl std::fmt::Display for CallRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} #{}", self.op.name(), self.seq)?;
        if !self.tag.is_empty() {
            write!(f, " {:?}", self.tag)?;
        }
        if let Some(dtype) = self.dtype {
            write!(f, " ({} × {dtype}", self.len)?;
            if !self.reduction.is_empty() {
                write!(f, ", {}", self.reduction)?;
            }
            if let Some(root) = self.root {
                let what = if matches!(self.op, Op::Send | Op::Receive) { "peer" } else { "root" };
                write!(f, ", {what} {root}")?;
            }
            write!(f, ")")?;
        }
        Ok(())
    }
}

/// The names of the reductions, by the code that travels; 0 is none.
const REDUCTIONS: [&str; 7] = ["", "sum", "min", "max", "product", "avg", "scaled sum"];

/// A comparison of constants, several times as quick as a search.
fn reduction_code(name: &str) -> u8 {
    match name {
        "sum" => 1,
        "min" => 2,
        "max" => 3,
        "product" => 4,
        "avg" => 5,
        "scaled sum" => 6,
        _ => 0,
    }
}

/// The record's fixed form: 16 bytes of head, then the tag. Little-endian.
pub(crate) const RECORD_BYTES: usize = 32 + 1 + TAG_BYTES_MAX;

/// A tag in [`TAG_BYTES_MAX`] bytes: whole, or both its ends.
fn short(tag: &str) -> [&str; 3] {
    const MIDDLE: &str = "…";
    if tag.len() <= TAG_BYTES_MAX {
        return [tag, "", ""];
    }
    let end_bytes = (TAG_BYTES_MAX - MIDDLE.len()) / 2;
    let (mut head, mut tail) = (end_bytes, tag.len() - end_bytes);
    while !tag.is_char_boundary(head) {
        head -= 1;
    }
    while !tag.is_char_boundary(tail) {
        tail += 1;
    }
    [&tag[..head], MIDDLE, &tag[tail..]]
}

impl CallRecord {
    /// A hash of everything that must agree. `reduction_code` tells apart what the record's name
    /// does not (the factor of a scaled sum).
    pub(crate) fn fingerprint(&self, reduction_code: u64) -> u64 {
        const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let mut hash = OFFSET;
        let mut mix = |word: u64| hash = (hash ^ word).wrapping_mul(PRIME).rotate_left(23);
        mix(self.op as u64);
        mix(self.seq);
        mix(self.dtype.map_or(0, |dtype| dtype as u64));
        mix(self.len);
        mix(reduction_code);
        mix(self.root.map_or(u64::MAX, |root| root as u64));
        for byte in self.tag.bytes() {
            mix(u64::from(byte));
        }
        let mut mixed = hash;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0] = self.op as u8;
        bytes[1] = self.dtype.map_or(0, |dtype| dtype as u8);
        bytes[2] = reduction_code(self.reduction);
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        let root = self.root.map_or(u64::MAX, |root| root as u64);
        bytes[24..32].copy_from_slice(&root.to_le_bytes());
        let (tag_bytes, tag) = bytes[32..].split_at_mut(1);
        let mut at = 0;
        for piece in short(&self.tag) {
            tag[at..at + piece.len()].copy_from_slice(piece.as_bytes());
            at += piece.len();
        }
        tag_bytes[0] = u8::try_from(at).unwrap_or(0);
        bytes
    }

    /// The record as other ranks have it: with a long tag cut. Two ranks' records are compared, and shown, like that.
    pub(crate) fn travelled(&self) -> Self {
        Self::decode(&self.encode()).unwrap_or_else(|| self.clone())
    }

    /// `None` for bytes that no version of [`CallRecord::encode`] writes.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let root = word(24);
        let tag = bytes.get(33..33 + usize::from(bytes[32]))?;
        Some(Self {
            op: Op::from_code(bytes[0])?,
            seq: word(8),
            dtype: if bytes[1] == 0 { None } else { Some(DType::from_code(bytes[1])?) },
            len: word(16),
            reduction: REDUCTIONS.get(usize::from(bytes[2]))?,
            root: if root == u64::MAX { None } else { Some(usize::try_from(root).ok()?) },
            tag: std::str::from_utf8(tag).ok()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> CallRecord {
        CallRecord {
            op: Op::Reduce,
            seq: 411,
            dtype: Some(DType::BF16),
            len: 10_007,
            reduction: "avg",
            root: Some(3),
            tag: "bucket 3".to_owned(),
        }
    }

    #[test]
    fn a_record_survives_the_wire() {
        assert_eq!(CallRecord::decode(&record().encode()), Some(record()));
        let long = CallRecord { tag: "é".repeat(40), root: None, dtype: None, ..record() };
        let back = CallRecord::decode(&long.encode()).unwrap();
        assert_eq!(back.tag, format!("{0}…{0}", "é".repeat(11)));
        assert_eq!(back.root, None);
        assert_eq!(back, long.travelled());
        assert_eq!(back.travelled(), back);
    }

    #[test]
    fn a_long_tag_keeps_both_its_ends_and_the_fingerprint_sees_all_of_it() {
        let tagged = |tag: String| CallRecord { tag, ..record() };
        let travelled = |tag: &str| tagged(tag.to_owned()).travelled().tag;
        for bytes in 0..=TAG_BYTES_MAX {
            let tag = "x".repeat(bytes);
            assert_eq!(travelled(&tag), tag);
        }
        let tag = |step: u32, bucket: u32| {
            format!("step {step}, the gradients of the encoder's layers, bucket {bucket}")
        };
        assert_eq!(travelled(&tag(57, 12)), "step 57, the gradients…er's layers, bucket 12");
        for wide in ["é", "→", "𝄞"] {
            let cut = travelled(&wide.repeat(40));
            assert!(cut.len() <= TAG_BYTES_MAX && cut.contains('…'), "{cut}");
        }
        let middle = |word: &str| tagged(format!("{0}{word}{0}", "x".repeat(30))).fingerprint(1);
        assert_ne!(middle("a"), middle("b"));
    }

    #[test]
    fn every_reduction_has_the_code_of_its_place() {
        for (code, name) in (0..).zip(REDUCTIONS) {
            assert_eq!(reduction_code(name), code, "{name}");
        }
    }

    #[test]
    fn garbage_is_no_record() {
        assert_eq!(CallRecord::decode(&[]), None);
        assert_eq!(CallRecord::decode(&[0; RECORD_BYTES]), None);
        let mut bytes = record().encode();
        bytes[32] = 255;
        assert_eq!(CallRecord::decode(&bytes), None);
    }

    #[test]
    fn every_field_changes_the_fingerprint() {
        let base = record().fingerprint(1);
        let others = [
            CallRecord { op: Op::AllReduce, ..record() }.fingerprint(1),
            CallRecord { seq: 412, ..record() }.fingerprint(1),
            CallRecord { dtype: Some(DType::F16), ..record() }.fingerprint(1),
            CallRecord { len: 10_008, ..record() }.fingerprint(1),
            CallRecord { root: Some(2), ..record() }.fingerprint(1),
            CallRecord { tag: "bucket 4".to_owned(), ..record() }.fingerprint(1),
            record().fingerprint(2),
        ];
        assert!(others.iter().all(|other| *other != base), "{base} {others:?}");
    }
}
