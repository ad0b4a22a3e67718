//! Named tensors that can be read, wherever they lie: a checkpoint, files of weights, a snapshot in memory.

use crate::extent::{self, Extent};
use crate::flat::flat_range;
use crate::plan::byte_count;
use crate::{Dtype, Error, Result};

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec<'a> {
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape; of a sharded tensor that of the whole.
    pub shape: &'a [u64],
}

impl Spec<'_> {
    /// The bytes of the whole tensor.
    pub fn bytes(&self) -> u64 {
        extent::bytes(self.shape, self.dtype.bytes()).unwrap_or(u64::MAX)
    }
}

/// Named tensors, of which any box can be read.
pub trait Tensors {
    /// All names, sorted.
    fn names(&self) -> Vec<&str>;

    /// What a tensor is, if there is one of this name.
    fn spec(&self, name: &str) -> Option<Spec<'_>>;

    /// Reads a box with the last dimension fastest; `out` has exactly its bytes.
    ///
    /// # Errors
    /// When there is no such tensor or box, or its bytes cannot be read or are not what was written. What is in `out` is then undefined.
    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> Result<()>;

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    fn read_whole(&self, name: &str) -> Result<Vec<u8>> {
        let Some(spec) = self.spec(name) else {
            // Gives the error that says where the tensor is not.
            self.read(name, &Extent::whole(&[]), &mut [])?;
            return Ok(Vec::new());
        };
        let mut out = vec![0; crate::cast::to_usize(spec.bytes())];
        self.read(name, &Extent::whole(spec.shape), &mut out)?;
        Ok(out)
    }
}

/// A box of a tensor, if it is one and `out` has its bytes.
pub(crate) fn check_read(name: &str, spec: Spec<'_>, extent: &Extent, out: &[u8]) -> Result<()> {
    if !extent.fits(spec.shape) {
        let what = format!("{extent} of tensor `{name}` of shape {:?}", spec.shape);
        return Err(Error::OutOfBounds { what });
    }
    let bytes = byte_count(extent, spec.dtype);
    if bytes != crate::cast::to_u64(out.len()) {
        let what =
            format!("{extent} of tensor `{name}` has {bytes} bytes, the buffer {}", out.len());
        return Err(Error::OutOfBounds { what });
    }
    Ok(())
}

/// A tensor's boxes in the order of its bytes, each of so many bytes at most (but at least one element).
pub(crate) fn portions(spec: Spec<'_>, bytes_max: u64) -> Vec<Extent> {
    let elements = extent::elements(spec.shape).unwrap_or(0);
    let step = (bytes_max / crate::cast::to_u64(spec.dtype.bytes())).max(1);
    let strides = extent::strides(spec.shape);
    let starts = (0..elements.div_ceil(step)).map(|at| at * step);
    let range = |start: u64| start..elements.min(start + step);
    // A tensor with the last dimension fastest is dense.
    starts
        .flat_map(|start| flat_range(spec.shape, &strides, range(start)).unwrap_or_default())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portions_are_the_tensor_in_order() {
        let spec = Spec { dtype: Dtype::F32, shape: &[3, 5] };
        let boxes = portions(spec, 28);
        let text: Vec<_> = boxes.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["[0:1,0:5]", "[1:2,0:2]", "[1:2,2:5]", "[2:3,0:4]", "[2:3,4:5]"]);
        assert_eq!(portions(Spec { dtype: Dtype::F32, shape: &[] }, 1), [Extent::whole(&[])]);
        assert_eq!(portions(Spec { dtype: Dtype::F32, shape: &[0, 2] }, 8), []);
    }
}
