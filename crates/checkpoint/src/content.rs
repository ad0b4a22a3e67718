//! Where a tensor's bytes come from when it is saved: memory that can give any box of itself.

use crate::cast::{to_u64, to_usize};
use crate::error::Cause;
use crate::extent::{strides, Extent, Runs};

/// Memory of a tensor, or of a box of it.
///
/// Who saves asks for the boxes that the rank is to write: those that it holds, or parts of them. A closure
/// `Fn(&Extent, &mut [u8]) -> Result<(), Cause>` is one, for memory of a GPU or of a library's tensors.
pub trait Content {
    /// Copies a box, in the tensor's own indices, with the last dimension fastest; `out` is exactly as long.
    ///
    /// # Errors
    /// Whatever keeps the bytes from being copied. It fails the checkpoint on all ranks.
    fn copy(&self, extent: &Extent, out: &mut [u8]) -> Result<(), Cause>;
}

impl<F: Fn(&Extent, &mut [u8]) -> Result<(), Cause>> Content for F {
    fn copy(&self, extent: &Extent, out: &mut [u8]) -> Result<(), Cause> {
        self(extent, out)
    }
}

/// Bytes of a box with the last dimension fastest.
#[derive(Clone, Debug)]
pub struct Plain<'a> {
    bytes: &'a [u8],
    extent: Extent,
    element_bytes: usize,
}

impl<'a> Plain<'a> {
    /// The bytes of this box of a tensor.
    pub fn new(bytes: &'a [u8], extent: &Extent, element_bytes: usize) -> Self {
        Plain { bytes, extent: extent.clone(), element_bytes }
    }
}

impl Content for Plain<'_> {
    fn copy(&self, extent: &Extent, out: &mut [u8]) -> Result<(), Cause> {
        if extent.is_empty() {
            return Ok(());
        }
        if self.extent.intersection(extent).as_ref() != Some(extent) {
            return Err(format!("{extent} does not lie in {}", self.extent).into());
        }
        let runs = Extent::runs(extent, &self.extent, extent);
        copy_runs(runs, self.element_bytes, self.bytes, out).ok_or_else(outside)
    }
}

/// Memory in which a tensor's elements lie with any strides, or a part of such memory.
///
/// The element with index `i` lies at `Σ i × stride − base`, so that memory which begins with element `base` of the whole (a shard of
/// ZeRO-1) is described by the whole tensor's strides. Copied by runs that are contiguous on both sides; where the memory's fastest dimension is
/// not the tensor's last (channels-last), these are single elements, some nanoseconds each.
#[derive(Clone, Debug)]
pub struct Strided<'a> {
    bytes: &'a [u8],
    strides: Vec<u64>,
    base: u64,
    element_bytes: usize,
}

impl<'a> Strided<'a> {
    /// Memory with the strides of the whole tensor, from its element `base` in the order of memory.
    pub fn new(bytes: &'a [u8], strides: &[u64], base: u64, element_bytes: usize) -> Self {
        Strided { bytes, strides: strides.to_vec(), base, element_bytes }
    }
}

impl Content for Strided<'_> {
    fn copy(&self, extent: &Extent, out: &mut [u8]) -> Result<(), Cause> {
        let Some(at) = offset(extent, &self.strides, self.base) else {
            return Err(format!("{extent} begins before this memory").into());
        };
        let runs = Runs::new(extent.len(), &self.strides, &strides(extent.len()), (at, 0));
        copy_runs(runs, self.element_bytes, self.bytes, out).ok_or_else(outside)
    }
}

/// The way back: copies a box that lies in `bytes` with the last dimension fastest to memory as [`Strided`] describes it.
///
/// # Errors
/// [`Error::OutOfBounds`](crate::Error::OutOfBounds) when the box does not lie in that memory, or has more bytes than there are.
pub fn scatter(
    extent: &Extent,
    bytes: &[u8],
    memory: &mut [u8],
    strides_and_base: (&[u64], u64),
    element_bytes: usize,
) -> crate::Result<()> {
    let (memory_strides, base) = strides_and_base;
    let what = || format!("{extent} in memory of {} bytes", memory.len());
    let out_of_bounds = crate::Error::OutOfBounds { what: what() };
    let Some(at) = offset(extent, memory_strides, base) else { return Err(out_of_bounds) };
    let runs = Runs::new(extent.len(), &strides(extent.len()), memory_strides, (0, at));
    copy_runs(runs, element_bytes, bytes, memory).ok_or(out_of_bounds)
}

/// Where a box begins in memory, if not before it.
fn offset(extent: &Extent, strides: &[u64], base: u64) -> Option<u64> {
    if extent.is_empty() {
        return Some(0);
    }
    let steps = extent.start().iter().zip(strides);
    let at = steps.map(|(start, stride)| start.saturating_mul(*stride)).sum::<u64>();
    at.checked_sub(base)
}

/// Copies all runs, or nothing more from the first that lies outside.
fn copy_runs(runs: Runs, element_bytes: usize, from: &[u8], to: &mut [u8]) -> Option<()> {
    let bytes = to_u64(element_bytes);
    // Runs of one element are many: they are worth a copy whose length the compiler knows.
    match runs.run_len().checked_mul(bytes)? {
        1 => copy_each::<1>(runs, bytes, from, to),
        2 => copy_each::<2>(runs, bytes, from, to),
        4 => copy_each::<4>(runs, bytes, from, to),
        8 => copy_each::<8>(runs, bytes, from, to),
        run => copy_all(runs, bytes, to_usize(run), (from, to)),
    }
}

fn copy_each<const RUN: usize>(runs: Runs, bytes: u64, from: &[u8], to: &mut [u8]) -> Option<()> {
    for (left, right) in runs {
        let (left, right) = (left.checked_mul(bytes)?, right.checked_mul(bytes)?);
        let source = from.get(to_usize(left)..)?.first_chunk::<RUN>()?;
        *to.get_mut(to_usize(right)..)?.first_chunk_mut::<RUN>()? = *source;
    }
    Some(())
}

fn copy_all(runs: Runs, bytes: u64, run: usize, (from, to): (&[u8], &mut [u8])) -> Option<()> {
    for (left, right) in runs {
        let (left, right) = (left.checked_mul(bytes)?, right.checked_mul(bytes)?);
        let source = from.get(to_usize(left)..)?.get(..run)?;
        to.get_mut(to_usize(right)..)?.get_mut(..run)?.copy_from_slice(source);
    }
    Some(())
}

fn outside() -> Cause {
    "the box does not lie in the memory that was given for it".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_with_strides_gives_boxes_and_takes_them_back() {
        // Shape [2, 3, 2], memory with the middle dimension fastest; element (a, b, c) has the value 100a + 10b + c.
        let (shape, memory_strides) = ([2, 3, 2], [6, 1, 3]);
        let mut memory = vec![0; 12];
        for (at, value) in memory.iter_mut().enumerate() {
            *value = u8::try_from(100 * (at / 6) + 10 * (at % 3) + at / 3 % 2).unwrap();
        }
        let tail = Strided::new(&memory[3..], &memory_strides, 3, 1);
        let part = Extent::new(&[1, 1, 0], &[1, 2, 2]);
        let mut out = vec![0; 4];
        tail.copy(&part, &mut out).unwrap();
        assert_eq!(out, [110, 111, 120, 121]);
        let first = Extent::new(&[0, 0, 0], &[1, 1, 1]);
        assert!(tail.copy(&first, &mut out[..1]).unwrap_err().to_string().contains("before"));

        let mut copy = vec![0; 12];
        for start in 0..2 {
            let half = Extent::new(&[start, 0, 0], &[1, 3, 2]);
            let mut bytes = vec![0; 6];
            Strided::new(&memory, &memory_strides, 0, 1).copy(&half, &mut bytes).unwrap();
            scatter(&half, &bytes, &mut copy, (&memory_strides, 0), 1).unwrap();
        }
        assert_eq!(copy, memory);
        let all = Extent::whole(&shape);
        assert!(scatter(&all, &[0; 12], &mut copy[..11], (&memory_strides, 0), 1).is_err());
    }

    #[test]
    fn plain_bytes_give_parts_of_their_box_alone() {
        let bytes: Vec<u8> = (0..12).collect();
        let held = Extent::new(&[4, 0], &[2, 3]);
        let plain = Plain::new(&bytes, &held, 2);
        let mut out = [0; 4];
        plain.copy(&Extent::new(&[4, 1], &[2, 1]), &mut out).unwrap();
        assert_eq!(out, [2, 3, 8, 9]);
        assert!(plain.copy(&Extent::new(&[3, 1], &[2, 1]), &mut out).is_err());
        let short = Plain::new(&bytes[..8], &held, 2);
        assert!(short.copy(&held, &mut [0; 12]).is_err());
    }
}
