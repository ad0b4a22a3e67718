//! safetensors headers: read with every number checked before it is used, and written so that data
//! start on a page.
//!
//! A file is: u64 length of the header, the header (JSON: name → dtype, shape, `data_offsets`), the
//! data. The `safetensors` crate checks that the tensors fill the data without holes and that
//! shapes agree with sizes; here we check that the file does.
//! Source: <https://github.com/huggingface/safetensors#format>.

use std::path::PathBuf;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::bytes::SizedSource;
use super::json;
use super::layout::{BlockLayout, CHECKSUMS};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

/// Where the data of files we write start: a page, so that maps and direct reads are aligned.
pub(crate) const DATA_START: usize = 4096;

/// The length field before the header.
const LENGTH_BYTES: usize = 8;

/// The limit of the safetensors crate.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The header of an open file.
#[derive(Debug)]
pub(crate) struct SafetensorsHeader {
    path: PathBuf,
    data_start: u64,
    metadata: Metadata,
    bytes: Vec<u8>,
}

/// Memory that the safetensors crate takes for a value of a header while it parses, at most: it
/// goes through them twice.
const VALUE_BYTES: usize = 96;

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// From the file's beginning.
    pub(crate) start: u64,
}

impl SafetensorsHeader {
    pub(crate) fn read(bytes: &SizedSource) -> Result<Self> {
        let path = bytes.path().to_path_buf();
        let bad = |reason: String| Error::BadHeader { path: path.clone(), reason };
        let mut scratch = Vec::new();
        if bytes.len() < to_u64(LENGTH_BYTES) {
            return Err(bad(format!("it has {} bytes, too few for a header", bytes.len())));
        }
        let length = u64::from_le_bytes(bytes.array(0)?);
        let available = bytes.len() - to_u64(LENGTH_BYTES);
        if length > available.min(HEADER_BYTES_MAX) {
            return Err(bad(format!("its header claims {length} bytes of {available}")));
        }
        let header = match bytes.mapped(to_u64(LENGTH_BYTES), to_usize(length)) {
            Some(mapped) => mapped.to_vec(),
            None => {
                bytes.read(to_u64(LENGTH_BYTES), to_usize(length), &mut scratch)?;
                scratch
            }
        };
        bytes.check(0..to_u64(LENGTH_BYTES) + length)?;
        json::check(&header, VALUE_BYTES, to_usize(bytes.len()))
            .map_err(|error| bad(format!("its header: {error}")))?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| bad(format!("its header: {error}")))?;
        let data_bytes = data_bytes(&metadata);
        if data_bytes != available - length {
            let found = available - length;
            return Err(bad(format!(
                "its header describes {data_bytes} bytes of data, the file holds {found}"
            )));
        }
        Ok(SafetensorsHeader {
            path,
            data_start: to_u64(LENGTH_BYTES) + length,
            metadata,
            bytes: header,
        })
    }

    /// The tensor `name`, or an error that lists what is there.
    pub(crate) fn tensor(&self, name: &str) -> Result<Span> {
        let info = self.metadata.info(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            present: self.names(),
        })?;
        Ok(Span {
            dtype: info.dtype,
            shape: info.shape.clone(),
            start: self.data_start + to_u64(info.data_offsets.0),
        })
    }

    /// The tensor `name`, which must have this element type and a shape that `fits`; `expected`
    /// says in words which.
    pub(crate) fn expect(
        &self,
        name: &str,
        dtype: &'static str,
        fits: impl FnOnce(&[usize]) -> bool,
        expected: impl FnOnce() -> String,
    ) -> Result<Span> {
        let span = self.tensor(name)?;
        let (path, name) = (self.path.clone(), name.to_owned());
        let actual = format!("{:?}", span.dtype);
        if actual != dtype {
            return Err(Error::WrongDType { path, name, expected: dtype, actual });
        }
        if !fits(&span.shape) {
            let expected = expected();
            return Err(Error::WrongShape { path, name, expected, actual: span.shape });
        }
        Ok(span)
    }

    /// As [`expect`](Self::expect), of one dimension with so many elements.
    pub(crate) fn vector(&self, name: &str, dtype: &'static str, len: u64) -> Result<Span> {
        self.expect(name, dtype, |shape| shape == [to_usize(len)], || format!("[{len}]"))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The header as it stands in the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }
}

/// How many bytes of data the tensors fill; the crate has checked that there are no holes.
fn data_bytes(metadata: &Metadata) -> u64 {
    let end = |info: &TensorInfo| to_u64(info.data_offsets.1);
    metadata.tensors().values().map(|info| end(info)).max().unwrap_or(0)
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) element_bytes: usize,
}

/// As [`encode`], for a file whose tensors of `data_bytes` are followed by the checksums of its
/// blocks. Their number depends on the length of the header and the header on their number: it
/// grows until they agree.
pub(crate) fn encode_sealed(
    tensors: &mut Vec<Tensor>,
    metadata: &[(&str, String)],
    data_bytes: u64,
) -> Vec<u8> {
    let mut start = DATA_START;
    loop {
        tensors.push(checksum_tensor(to_u64(start) + data_bytes));
        let header = encode(tensors, metadata);
        if header.len() <= start {
            return padded(header, start);
        }
        tensors.pop();
        start = header.len();
    }
}

/// The header's entry for the checksums of a file of `content_bytes`.
fn checksum_tensor(content_bytes: u64) -> Tensor {
    let blocks = to_usize(BlockLayout::for_content(content_bytes).blocks);
    Tensor { name: CHECKSUMS.to_owned(), dtype: "U32", shape: vec![blocks], element_bytes: 4 }
}

/// The header with more spaces at its end, so that data start at `start`.
fn padded(mut header: Vec<u8>, start: usize) -> Vec<u8> {
    header.resize(start, b' ');
    header[..LENGTH_BYTES].copy_from_slice(&to_u64(start - LENGTH_BYTES).to_le_bytes());
    header
}

/// A header for tensors in the order of their data, padded with spaces so that data start at a
/// multiple of [`DATA_START`].
pub(crate) fn encode(tensors: &[Tensor], metadata: &[(&str, String)]) -> Vec<u8> {
    let mut fields = serde_json::Map::new();
    let about: serde_json::Map<String, serde_json::Value> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), value.as_str().into())).collect();
    fields.insert("__metadata__".to_owned(), about.into());
    let mut at = 0;
    for Tensor { name, dtype, shape, element_bytes } in tensors {
        let end = at + shape.iter().product::<usize>() * element_bytes;
        let info = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
        fields.insert(name.clone(), info);
        at = end;
    }
    let mut json = serde_json::Value::Object(fields).to_string().into_bytes();
    let padded = (LENGTH_BYTES + json.len()).next_multiple_of(DATA_START) - LENGTH_BYTES;
    json.resize(padded, b' ');
    let mut header = to_u64(json.len()).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}
