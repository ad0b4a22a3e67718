//! A safetensors header that somebody else wrote: every number is checked before it is used. Pure.
//!
//! The `safetensors` crate checks that tensors fill the data without holes and that shapes agree with sizes; here we check that the
//! file does, and that parsing it does not take many times its size.

use safetensors::tensor::Metadata;

use crate::cast::to_u64;
use crate::shard::LENGTH_BYTES;
use crate::Dtype;

/// A header that was checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    /// Sorted by name.
    pub(crate) tensors: Vec<Described>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// From the file's beginning.
    pub(crate) offset: u64,
}

/// What the safetensors crate takes for a value of a header on its way, at most: it looks at them twice.
const VALUE_BYTES: usize = 96;

/// What any header may take besides its file's size.
const SLACK_BYTES: u64 = 1 << 20;

impl Header {
    /// Parses the text of a header (without its length) of a file of so many bytes.
    pub(crate) fn parse(text: &[u8], file_bytes: u64) -> Result<Self, String> {
        let values = text.iter().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count();
        let taken = to_u64(values.saturating_mul(VALUE_BYTES));
        if taken > file_bytes.saturating_add(SLACK_BYTES) {
            return Err(format!("its header: {values} values are too many for its size"));
        }
        let metadata: Metadata =
            serde_json::from_slice(text).map_err(|error| format!("its header: {error}"))?;
        let start = to_u64(LENGTH_BYTES + text.len());
        let (described, found) = (to_u64(metadata.data_len()), file_bytes.saturating_sub(start));
        if described != found {
            return Err(format!(
                "its header describes {described} bytes of data, the file holds {found}"
            ));
        }
        let mut tensors = Vec::new();
        for (name, info) in metadata.tensors() {
            let theirs = info.dtype.to_string();
            let dtype = Dtype::from_name(&theirs)
                .ok_or_else(|| format!("`{name}` has dtype {theirs}, which is not supported"))?;
            let shape = info.shape.iter().map(|&len| to_u64(len)).collect();
            let offset = start + to_u64(info.data_offsets.0);
            tensors.push(Described { name, dtype, shape, offset });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Header { tensors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, data_bytes: u64) -> Result<Header, String> {
        Header::parse(text.as_bytes(), to_u64(LENGTH_BYTES + text.len()) + data_bytes)
    }

    #[test]
    fn hostile_headers_are_errors() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let good = parse(&one("F32", "[2,3]", "[0,24]"), 24).unwrap();
        assert_eq!(
            (good.tensors[0].shape.as_slice(), good.tensors[0].name.as_str()),
            (&[2, 3][..], "w")
        );
        let cases = [
            (one("F32", "[2,3]", "[0,24]"), 23, "describes 24 bytes of data, the file holds 23"),
            (one("F32", "[2,3]", "[0,25]"), 25, "header"),
            (one("F32", "[2,3]", "[1,25]"), 25, "header"),
            (one("F32", "[4611686018427387904,4]", "[0,0]"), 0, "header"),
            (one("F32", "[-1]", "[0,4]"), 4, "header"),
            (one("F8_E4M3", "[4]", "[0,4]"), 4, "F8_E4M3, which is not supported"),
            (one("F99", "[4]", "[0,4]"), 4, "header"),
            ("[".repeat(1 << 16), 0, "too many for its size"),
            ("{\"w\":".repeat(1000), 0, "header"),
            (String::new(), 0, "header"),
        ];
        for (text, data_bytes, expected) in cases {
            let error = parse(&text, data_bytes).unwrap_err();
            assert!(error.contains(expected), "{expected} in {error}");
        }
    }
}
