//! Are gradients finite? Looked at where they are read anyway: block by block while they are copied to their
//! bucket, so that the second look finds them in the nearest cache.
#![expect(unsafe_code, reason = "gate: gradients as slices, and the processor's wider registers")]

use std::ffi::c_void;
use std::sync::OnceLock;

use rayon::prelude::*;
use tch::{Kind, Tensor};

use crate::shim::{self, GradientPlace};
use crate::{Error, Result};

/// Bytes that are looked at and copied at once: half of a level-one cache.
const BLOCK_BYTES: usize = 16 << 10;

/// Bytes of a thread's part.
const PART_BYTES: usize = 1 << 20;

/// Elements as unsigned numbers: all bits of the exponent are set where one is not finite.
trait Bits: Copy + Send + std::marker::Sync + 'static {
    fn is_non_finite(self) -> bool;
}

/// f32 and f64.
impl Bits for u32 {
    #[inline(always)]
    fn is_non_finite(self) -> bool {
        self & 0x7f80_0000 == 0x7f80_0000
    }
}

impl Bits for u64 {
    #[inline(always)]
    fn is_non_finite(self) -> bool {
        self & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16(u16);

impl Bits for F16 {
    #[inline(always)]
    fn is_non_finite(self) -> bool {
        self.0 & 0x7c00 == 0x7c00
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16(u16);

impl Bits for Bf16 {
    #[inline(always)]
    fn is_non_finite(self) -> bool {
        self.0 & 0x7f80 == 0x7f80
    }
}

/// Copies the gradient of `variable`, which lies elsewhere on the CPU with the kind and the strides of `view`, into
/// `view`, which becomes the gradient; says how many elements are not finite.
///
/// # Errors
/// The gradient is not like that.
pub(super) fn copy_gradient(variable: &Tensor, view: &Tensor) -> Result<usize> {
    let GradientPlace::Alike(data) = shim::gradient_place(variable, view)? else {
        let (setting, value) = ("a gradient's place", "another".to_owned());
        return Err(Error::BadSetting { setting, value, expected: "memory like its view's" });
    };
    // SAFETY: just looked at: as many elements, of the same kind, with the same dense strides as the view, which is on
    // the CPU like its gradient; the gradient lies elsewhere, and this thread's backward has just finished it.
    let count = unsafe { copy(data, view) }?;
    shim::gradient_set(variable, Some(view))?;
    Ok(count)
}

/// Copies the elements at `from`, as many and of the same kind as `to` has, into `to`; says how many of them
/// are not finite.
///
/// # Safety
/// `from` points to `to.numel()` elements of `to`'s kind, which nobody writes; `to` is dense and on the CPU,
/// and nobody else reads or writes it.
unsafe fn copy(from: *const c_void, to: &Tensor) -> Result<usize> {
    let copy = match to.kind() {
        Kind::Float => copy_as::<u32>,
        Kind::Double => copy_as::<u64>,
        Kind::Half => copy_as::<F16>,
        Kind::BFloat16 => copy_as::<Bf16>,
        kind => return Err(Error::UnsupportedKind { name: "a gradient".to_owned(), kind }),
    };
    // SAFETY: handed on from the caller, with a type of the kind's size.
    Ok(unsafe { copy(from, to.data_ptr(), to.numel()) })
}

/// How many elements of `tensor`, which is dense and on the CPU, are not finite.
pub(crate) fn count(tensor: &Tensor) -> Result<usize> {
    let count = match tensor.kind() {
        Kind::Float => count_as::<u32>,
        Kind::Double => count_as::<u64>,
        Kind::Half => count_as::<F16>,
        Kind::BFloat16 => count_as::<Bf16>,
        kind => return Err(Error::UnsupportedKind { name: "a gradient".to_owned(), kind }),
    };
    // SAFETY: a dense tensor on the CPU has as many elements of its kind from its data pointer on, and the
    // borrow keeps them.
    Ok(unsafe { count(tensor.data_ptr().cast_const(), tensor.numel()) })
}

unsafe fn copy_as<B: Bits>(from: *const c_void, to: *mut c_void, len: usize) -> usize {
    if len == 0 {
        return 0;
    }
    // SAFETY: the caller's promise.
    let source = unsafe { std::slice::from_raw_parts(from.cast::<B>(), len) };
    // SAFETY: as above; the two do not overlap, for nobody else uses `to`.
    let target = unsafe { std::slice::from_raw_parts_mut(to.cast::<B>(), len) };
    let part = PART_BYTES / size_of::<B>();
    match pool().filter(|_| len > part) {
        None => blocks_copied((source, target)),
        Some(pool) => pool.install(|| {
            source.par_chunks(part).zip(target.par_chunks_mut(part)).map(blocks_copied).sum()
        }),
    }
}

unsafe fn count_as<B: Bits>(from: *const c_void, len: usize) -> usize {
    if len == 0 {
        return 0;
    }
    // SAFETY: the caller's promise.
    let source = unsafe { std::slice::from_raw_parts(from.cast::<B>(), len) };
    let part = PART_BYTES / size_of::<B>();
    match pool().filter(|_| len > part) {
        None => looked_at(source),
        Some(pool) => pool.install(|| source.par_chunks(part).map(looked_at).sum()),
    }
}

fn blocks_copied<B: Bits>((source, target): (&[B], &mut [B])) -> usize {
    let len = BLOCK_BYTES / size_of::<B>();
    let mut found = 0;
    for (from, to) in source.chunks(len).zip(target.chunks_mut(len)) {
        found += looked_at(from);
        to.copy_from_slice(from);
    }
    found
}

/// How many elements are not finite.
fn looked_at<B: Bits>(values: &[B]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { looked_at_avx2(values) };
    }
    tally(values)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn looked_at_avx2<B: Bits>(values: &[B]) -> usize {
    tally(values)
}

/// A flag first, which is quick, and the count only where it is up.
#[inline(always)]
fn tally<B: Bits>(values: &[B]) -> usize {
    let mut any = false;
    for &value in values {
        any |= value.is_non_finite();
    }
    if !any {
        return 0;
    }
    values.iter().filter(|value| value.is_non_finite()).count()
}

/// As many threads as libtorch has for an operation of this rank; none of our own where that is one.
fn pool() -> Option<&'static rayon::ThreadPool> {
    static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();
    let made = || {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        let name = |index| format!("gradients-{index}");
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name);
        // Without threads the caller does it alone.
        (threads > 1).then(|| builder.build().ok()).flatten()
    };
    POOL.get_or_init(made).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn every_place_of_every_kind_is_seen() {
        for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
            for len in [1, 31, 64, 4097, 9000] {
                let clean = Tensor::full([len], 65504.0, (kind, Device::Cpu));
                assert_eq!(count(&clean).unwrap(), 0, "{kind:?}");
                for (at, value) in
                    [(0, f64::NAN), (len / 2, f64::INFINITY), (len - 1, -f64::INFINITY)]
                {
                    let bad = clean.copy();
                    drop(bad.narrow(0, at, 1).fill_(value));
                    let target = Tensor::zeros([len], (kind, Device::Cpu));
                    // SAFETY: two dense tensors of one length and kind on the CPU.
                    let found = unsafe { copy(bad.data_ptr().cast_const(), &target) }.unwrap();
                    assert_eq!((found, count(&bad).unwrap()), (1, 1), "{kind:?} {len} {at}");
                    assert_eq!(count(&target).unwrap(), 1);
                    let same = target.equal(&bad) || target.isnan().any().double_value(&[]) > 0.0;
                    assert!(same, "{kind:?}: copied");
                }
            }
        }
    }
}
