//! Memory that a group's backend has registered, and the buffers that collectives take.
#![expect(unsafe_code, reason = "typed views of shared memory")]

use std::marker::PhantomData;
use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use crate::dtype::{Element, Sealed};
use crate::memory::region::RegionMemory;

/// Memory registered with the backend: page-aligned, zero at first, and read in place by the peers
/// of this machine during collectives. A clone is the same memory; it lives as long as any clone,
/// range or work.
///
/// The other ranks of the machine write into it during reductions, and the threads of this process
/// may too: that is why plain references to its elements are `unsafe`. [`Region::read`] and
/// [`Region::write`] copy. Collectives of one group that work in place on the same memory do so in the
/// order in which they were started, also when none was waited for; those with an input of their own
/// ([`Group::reduce_scatter`], [`Group::scatter`], [`Group::receive`]) bring their result when they are waited for.
///
/// [`Group::reduce_scatter`]: crate::Group::reduce_scatter
/// [`Group::scatter`]: crate::Group::scatter
/// [`Group::receive`]: crate::Group::receive
pub struct Region<T: Element> {
    memory: Arc<RegionMemory>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Clone for Region<T> {
    fn clone(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), len: self.len, element: PhantomData }
    }
}

impl<T: Element> std::fmt::Debug for Region<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region #{} of {} {}", self.memory.id, self.len, T::DTYPE)
    }
}

impl<T: Element> Region<T> {
    pub(crate) fn new(memory: RegionMemory, len: usize) -> Self {
        Self { memory: Arc::new(memory), len, element: PhantomData }
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element; valid for `len` elements while any clone lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut T {
        self.memory.base().cast()
    }

    /// The first element of the part that `rank` registered in the same call, where that rank is on this machine and
    /// shares memory; valid for `len` elements while any clone lives. `None` for the others, and of GPU memory.
    ///
    /// All ranks of a machine see the same bytes there: what one writes the others read, in whatever order the program makes
    /// sure of.
    #[must_use]
    pub fn part_of(&self, rank: usize) -> Option<*mut T> {
        Some(self.memory.part(rank)?.cast())
    }

    /// A handle to part of it, for collectives.
    ///
    /// # Panics
    ///
    /// When the range is not inside the region.
    #[must_use]
    pub fn range(&self, range: Range<usize>) -> RegionRange<T> {
        self.check(&range);
        RegionRange { region: self.clone(), range }
    }

    /// A handle to all of it, for collectives.
    #[must_use]
    pub fn full(&self) -> RegionRange<T> {
        self.range(0..self.len)
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} is not inside a region of {} elements",
            self.len
        );
    }

    /// Whether it is memory of a GPU, which the host cannot look at.
    #[must_use]
    pub fn is_on_device(&self) -> bool {
        self.memory.device.is_some()
    }

    /// Copies part of it out. No collective may be under way on that part. Of GPU memory it waits for
    /// all that the GPU was asked for before.
    ///
    /// # Panics
    ///
    /// When the range is not inside the region, or the GPU has failed.
    #[must_use]
    pub fn read(&self, range: Range<usize>) -> Vec<T> {
        self.check(&range);
        let mut elements = vec![T::zeroed(); range.len()];
        if let Some(device) = &self.memory.device {
            let at = range.start * size_of::<T>();
            let copied = device.read(self.memory.rank, at, bytemuck::cast_slice_mut(&mut elements));
            copied.unwrap_or_else(|error| panic!("{error}"));
            return elements;
        }
        let from = self.as_ptr().wrapping_add(range.start);
        // SAFETY: the range is inside the region, which the Vec does not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr(), range.len()) };
        elements
    }

    /// Copies elements in, from `at` on. No collective may be under way on that part.
    ///
    /// # Panics
    ///
    /// When they do not fit.
    pub fn write(&self, at: usize, elements: &[T]) {
        self.check(&(at..at.saturating_add(elements.len())));
        if let Some(device) = &self.memory.device {
            let at = at * size_of::<T>();
            let copied = device.write(self.memory.rank, at, bytemuck::cast_slice(elements));
            return copied.unwrap_or_else(|error| panic!("{error}"));
        }
        let to = self.as_ptr().wrapping_add(at);
        // SAFETY: the range is inside the region; a copy also works where they overlap.
        unsafe { std::ptr::copy(elements.as_ptr(), to, elements.len()) };
    }
}

/// Part of a [`Region`], for a collective to work on in place. Owns a share of the region.
#[derive(Debug)]
pub struct RegionRange<T: Element> {
    region: Region<T>,
    range: Range<usize>,
}

impl<T: Element> Clone for RegionRange<T> {
    fn clone(&self) -> Self {
        Self { region: self.region.clone(), range: self.range.clone() }
    }
}

/// A buffer without its element type.
#[doc(hidden)]
#[derive(Debug)]
#[expect(unnameable_types, reason = "part of a sealed trait")]
pub enum Bytes<'b> {
    /// Borrowed.
    Slice(&'b mut [u8]),
    /// Registered.
    Region { memory: Arc<RegionMemory>, offset: usize, bytes: usize },
    /// Somebody else's memory of a GPU.
    Device { at: u64, bytes: usize },
}

impl Bytes<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Slice(slice) => slice.len(),
            Self::Region { bytes, .. } | Self::Device { bytes, .. } => *bytes,
        }
    }

    /// Whether the host cannot look at it.
    pub(crate) fn is_on_device(&self) -> bool {
        match self {
            Self::Slice(_) => false,
            Self::Region { memory, .. } => memory.device.is_some(),
            Self::Device { .. } => true,
        }
    }

    /// Copies `from` into it, from byte `at` on.
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        match self {
            Self::Slice(slice) => slice[at..at + from.len()].copy_from_slice(from),
            Self::Region { memory, offset, bytes } => {
                assert!(at + from.len() <= *bytes, "the result is longer than the range");
                let to = memory.base().wrapping_add(*offset + at);
                // SAFETY: inside the range, which is inside the region; a copy may overlap.
                unsafe { std::ptr::copy(from.as_ptr(), to, from.len()) };
            }
            Self::Device { .. } => unreachable!("results on a GPU are made there"),
        }
    }
}

/// GPU memory of somebody else's (a tensor's, say), for collectives over NCCL.
#[derive(Debug)]
pub struct DeviceSlice<'b, T: Element> {
    at: u64,
    len: usize,
    borrow: PhantomData<&'b mut [T]>,
}

impl<T: Element> DeviceSlice<'_, T> {
    /// `len` elements at an address of the group's GPU.
    ///
    /// # Safety
    ///
    /// The memory is valid on that GPU until what the group was asked to do with it is done *on the
    /// GPU*: freeing or writing it must be ordered after the work's wait on the same stream.
    #[must_use]
    pub unsafe fn from_raw(at: u64, len: usize) -> Self {
        Self { at, len, borrow: PhantomData }
    }
}

impl<T: Element> Sealed for DeviceSlice<'_, T> {}
impl<'b, T: Element> IntoBytes<'b, T> for DeviceSlice<'b, T> {
    fn into_bytes(self) -> Bytes<'b> {
        Bytes::Device { at: self.at, bytes: self.len * size_of::<T>() }
    }
}
impl<'b, T: Element> Buffer<'b, T> for DeviceSlice<'b, T> {}

/// What only this crate may ask of a buffer.
#[expect(unnameable_types, reason = "sealed: nobody outside may name it")]
pub trait IntoBytes<'b, T: Element> {
    #[doc(hidden)]
    fn into_bytes(self) -> Bytes<'b>;
}

/// What a collective works on: `&mut [T]` (staged: copied when it starts and when it is waited for)
/// or a [`RegionRange`] (in place).
pub trait Buffer<'b, T: Element>: Sealed + IntoBytes<'b, T> {}

impl<T: Element> Sealed for &mut [T] {}
impl<'b, T: Element> IntoBytes<'b, T> for &'b mut [T] {
    fn into_bytes(self) -> Bytes<'b> {
        Bytes::Slice(bytemuck::cast_slice_mut(self))
    }
}
impl<'b, T: Element> Buffer<'b, T> for &'b mut [T] {}

impl<T: Element> Sealed for &mut Vec<T> {}
impl<'b, T: Element> IntoBytes<'b, T> for &'b mut Vec<T> {
    fn into_bytes(self) -> Bytes<'b> {
        Bytes::Slice(bytemuck::cast_slice_mut(self))
    }
}
impl<'b, T: Element> Buffer<'b, T> for &'b mut Vec<T> {}

impl<T: Element> Sealed for RegionRange<T> {}
impl<'b, T: Element> IntoBytes<'b, T> for RegionRange<T> {
    fn into_bytes(self) -> Bytes<'b> {
        Bytes::Region {
            offset: self.range.start * size_of::<T>(),
            bytes: self.range.len() * size_of::<T>(),
            memory: self.region.memory,
        }
    }
}
impl<T: Element> Buffer<'_, T> for RegionRange<T> {}

/// What a collective with two buffers reads: a slice of the host's, of which it makes a copy when it starts, or memory of
/// the GPU where its output is there too.
pub trait Input<'a, 'b, T: Element>: Sealed {
    #[doc(hidden)]
    fn source(self) -> InputBytes<'a>;
}

/// An input without its element type.
#[doc(hidden)]
#[derive(Debug)]
#[expect(unnameable_types, reason = "part of a sealed trait")]
pub enum InputBytes<'a> {
    /// Borrowed.
    Slice(&'a [u8]),
    /// Registered, or a GPU's.
    CallMemory(Bytes<'a>),
}

impl InputBytes<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Slice(slice) => slice.len(),
            Self::CallMemory(bytes) => bytes.len(),
        }
    }
}

impl<T: Element> Sealed for &[T] {}
impl<'a, T: Element> Input<'a, '_, T> for &'a [T] {
    fn source(self) -> InputBytes<'a> {
        InputBytes::Slice(bytemuck::cast_slice(self))
    }
}

impl<T: Element, const N: usize> Sealed for &[T; N] {}
impl<'a, T: Element, const N: usize> Input<'a, '_, T> for &'a [T; N] {
    fn source(self) -> InputBytes<'a> {
        InputBytes::Slice(bytemuck::cast_slice(&self[..]))
    }
}

impl<T: Element> Sealed for &Vec<T> {}
impl<'a, T: Element> Input<'a, '_, T> for &'a Vec<T> {
    fn source(self) -> InputBytes<'a> {
        InputBytes::Slice(bytemuck::cast_slice(self))
    }
}

impl<'a, T: Element> Input<'a, '_, T> for RegionRange<T> {
    fn source(self) -> InputBytes<'a> {
        InputBytes::CallMemory(self.into_bytes())
    }
}

impl<'a, 'b, T: Element> Input<'a, 'b, T> for DeviceSlice<'b, T> {
    fn source(self) -> InputBytes<'a> {
        InputBytes::CallMemory(Bytes::Device { at: self.at, bytes: self.len * size_of::<T>() })
    }
}
