//! What lies where in a shard: a safetensors file with one rank's pieces. Pure.
//!
//! A file is: u64 length of the header, the header (JSON: name → dtype, shape, `data_offsets`), the data without holes. Pieces are sorted by
//! the size of their elements, largest first, so that each is aligned, and the header is filled up with spaces to a page. A piece that is a
//! whole tensor has its name; a part has its box behind the name: `model/w[0:4,0:1024]`.
//! Source: <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;

use serde_json::{json, Map, Value};

use crate::cast::{to_u64, to_usize};
use crate::extent::Extent;
use crate::plan::{byte_count, Plan, Planned};
use crate::{Dtype, Error, Result};

/// Where the data of files that we write start, or a multiple of it.
const PAGE_BYTES: usize = 4096;

/// The length field before the header.
pub(crate) const LENGTH_BYTES: usize = 8;

/// The limit of the safetensors crate.
pub(crate) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One rank's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// With its length, filled up.
    pub(crate) header: Vec<u8>,
    pub(crate) pieces: Vec<Placed>,
    /// Of the whole file.
    pub(crate) bytes: u64,
}

/// A piece in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) tensor: String,
    pub(crate) extent: Extent,
    /// From the file's beginning.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// A tensor in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

/// The name of a shard's file.
pub(crate) fn file_name(index: usize, count: usize) -> String {
    format!("shard-{index:05}-of-{count:05}.safetensors")
}

/// A piece's name in its file.
pub(crate) fn piece_name(tensor: &str, shape: &[u64], extent: &Extent) -> String {
    if extent.is_whole(shape) {
        tensor.to_owned()
    } else {
        format!("{tensor}{extent}")
    }
}

/// The file of a rank.
pub(crate) fn lay_out(plan: &Plan, rank: usize) -> Result<Layout> {
    let mut pieces: Vec<(&Planned, &Extent)> = plan.of_rank(rank).collect();
    // Stable: by name and box among equals.
    pieces.sort_by_key(|(tensor, _)| std::cmp::Reverse(tensor.dtype.bytes()));
    let entries = pieces.iter().map(|(tensor, extent)| Entry {
        name: piece_name(&tensor.name, &tensor.shape, extent),
        dtype: tensor.dtype,
        shape: extent.len().to_vec(),
    });
    let about = format!("checkpoint, shard {rank} of {}", plan.world_size);
    let header = header(&entries.collect::<Vec<_>>(), &[("phalanx", &about)])?;
    let mut at = to_u64(header.len());
    let placed = pieces.into_iter().map(|(tensor, extent)| {
        let (offset, bytes) = (at, byte_count(extent, tensor.dtype));
        at += bytes;
        Placed { tensor: tensor.name.clone(), extent: extent.clone(), offset, bytes }
    });
    Ok(Layout { header, pieces: placed.collect(), bytes: at })
}

/// A header for tensors whose data lie one after the other.
pub(crate) fn header(entries: &[Entry], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let about: BTreeMap<_, _> = metadata.iter().copied().collect();
    let mut fields = Map::new();
    fields.insert("__metadata__".to_owned(), json!(about));
    let mut at = 0;
    for Entry { name, dtype, shape } in entries {
        let end = at + byte_count(&Extent::whole(shape), *dtype);
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
        if fields.insert(name.clone(), info).is_some() {
            let reason = "two tensors of one file would have this name".to_owned();
            return Err(Error::Mismatch { tensor: name.clone(), reason });
        }
        at = end;
    }
    let mut json = Value::Object(fields).to_string().into_bytes();
    let filled = (LENGTH_BYTES + json.len()).next_multiple_of(PAGE_BYTES) - LENGTH_BYTES;
    json.resize(filled, b' ');
    if to_u64(filled) > HEADER_BYTES_MAX {
        let (what, reason) =
            ("the names of tensors".to_owned(), "too long for one file".to_owned());
        return Err(Error::BadValue { what, reason });
    }
    let mut header = to_u64(filled).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Where a header ends and data begin, by the length field of a file of so many bytes.
pub(crate) fn data_start(length: [u8; LENGTH_BYTES], file_bytes: u64) -> Option<u64> {
    let length = u64::from_le_bytes(length);
    let start = length.checked_add(to_u64(LENGTH_BYTES))?;
    (length <= HEADER_BYTES_MAX && start <= file_bytes).then_some(start)
}

impl Layout {
    /// The part of the file's bytes that a piece is.
    pub(crate) fn range(piece: &Placed) -> std::ops::Range<usize> {
        let start = to_usize(piece.offset);
        start..start + to_usize(piece.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Held;

    fn held(name: &str, dtype: Dtype, shape: &[u64], extents: Vec<Extent>) -> Held {
        Held { name: name.to_owned(), dtype, shape: shape.to_vec(), extents }
    }

    #[test]
    fn a_shard_is_a_safetensors_file_with_aligned_pieces() {
        let tensors = vec![
            held("a", Dtype::Bool, &[3], vec![Extent::whole(&[3])]),
            held("b", Dtype::F64, &[], vec![Extent::whole(&[])]),
            held("c", Dtype::BF16, &[4, 2], vec![Extent::new(&[0, 0], &[1, 2])]),
            held("e", Dtype::F32, &[0, 2], vec![]),
        ];
        let other = vec![held("c", Dtype::BF16, &[4, 2], vec![Extent::new(&[1, 0], &[3, 2])])];
        let plan = Plan::new(&[tensors, other]).unwrap();
        let layout = lay_out(&plan, 0).unwrap();
        let mut file = layout.header.clone();
        file.resize(to_usize(layout.bytes), 0);
        let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
        let mut names = parsed.names();
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c[0:1,0:2]", "e"]);
        assert_eq!(parsed.tensor("c[0:1,0:2]").unwrap().shape(), [1, 2]);
        assert!(layout.pieces.iter().all(|piece| {
            let dtype =
                plan.tensors.iter().find(|tensor| tensor.name == piece.tensor).unwrap().dtype;
            piece.offset.is_multiple_of(to_u64(dtype.bytes()))
        }));
        assert_eq!(layout.header.len() % PAGE_BYTES, 0);
        assert_eq!(lay_out(&plan, 1).unwrap().pieces.len(), 1);
    }

    #[test]
    fn a_name_that_looks_like_a_part_is_refused_only_beside_that_part() {
        let part =
            held("w", Dtype::U8, &[4], vec![Extent::new(&[0], &[2]), Extent::new(&[2], &[2])]);
        let alike = held("w[0:2]", Dtype::U8, &[1], vec![Extent::whole(&[1])]);
        let plan = Plan::new(&[vec![part, alike]]).unwrap();
        let error = lay_out(&plan, 0).unwrap_err().to_string();
        assert!(error.contains("`w[0:2]`: two tensors"), "{error}");
    }
}
