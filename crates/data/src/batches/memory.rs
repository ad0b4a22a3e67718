//! Where batches live: memory that is allocated once and used again and again.

use std::any::Any;
use std::fmt::Debug;

use crate::error::Result;

/// A piece of memory that holds one column of a batch.
pub trait ColumnBuffer: Any + Debug + Send + Sync {
    /// Its bytes.
    fn bytes(&self) -> &[u8];

    /// Its bytes, to be filled.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Where a loader gets the memory of its batches: page-locked memory for copies to a GPU, for
/// example.
pub trait Allocator: Debug + Send + Sync + 'static {
    /// A block of at least `bytes` bytes, aligned to 64 bytes.
    ///
    /// # Errors
    /// When there is no memory.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn ColumnBuffer>>;
}

/// The process's own memory, aligned to cache lines.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostAllocator;

impl Allocator for HostAllocator {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn ColumnBuffer>> {
        let lines = bytes.div_ceil(size_of::<CacheLine>());
        Ok(Box::new(HostBuffer { lines: vec![CacheLine([0; 64]); lines] }))
    }
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

struct HostBuffer {
    lines: Vec<CacheLine>,
}

impl Debug for HostBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.lines.len() * size_of::<CacheLine>())
    }
}

impl ColumnBuffer for HostBuffer {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}
