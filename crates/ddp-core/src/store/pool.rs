//! Buffers in which buckets are exchanged whose gradients stay only as segments: few, registered with the group, used in
//! turn.
//!
//! Which bucket is exchanged in which buffer is the same on every rank, because buckets are started in one order and a
//! buffer is taken again only when the oldest exchange in one of its size is over.

use std::collections::VecDeque;

use phalanx_comm::Group;
use tch::{Device, Kind};

use super::flat::Flat;
use crate::Result;

/// Buffers of the usual size: one is filled while one is exchanged, and one more so that a slow rank holds nobody up.
const BUFFER_COUNT: usize = 3;

/// A bucket this many times as long as the middle one has a buffer of its own size.
const LARGE: usize = 2;

/// A buffer in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    class: usize,
    buffer: usize,
}

/// Buffers of one kind and size.
#[derive(Debug)]
struct Class {
    kind: Kind,
    buffers: Vec<Flat>,
    free: VecDeque<usize>,
}

/// All buffers, and which bucket takes which.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    classes: Vec<Class>,
    /// By bucket.
    class_of: Vec<usize>,
}

impl Pool {
    /// Buffers for all buckets, of so many elements of a kind each. Collective.
    pub(crate) fn new(
        group: &mut Group,
        device: Device,
        buckets: &[(Kind, usize)],
    ) -> Result<Self> {
        let (sizes, class_of) = sizes(buckets);
        let mut pool = Self { classes: Vec::new(), class_of };
        for Size { kind, len, count } in sizes {
            let buffers = (0..count).map(|_| Flat::registered(group, kind, device, len));
            let buffers = buffers.collect::<Result<Vec<_>>>()?;
            pool.classes.push(Class { kind, free: (0..count).collect(), buffers });
        }
        Ok(pool)
    }

    /// All buffers are free, as at first.
    pub(crate) fn reset(&mut self) {
        for class in &mut self.classes {
            class.free = (0..class.buffers.len()).collect();
        }
    }

    /// A buffer for a bucket; none while all of its size are in use.
    pub(crate) fn take(&mut self, bucket: usize) -> Option<Taken> {
        let class = self.class_of[bucket];
        let buffer = self.classes[class].free.pop_front()?;
        Some(Taken { class, buffer })
    }

    /// Whether a bucket takes buffers of the size of `taken`.
    pub(crate) fn is_of(&self, bucket: usize, taken: Taken) -> bool {
        self.class_of[bucket] == taken.class
    }

    /// A buffer is free again.
    pub(crate) fn give_back(&mut self, taken: Taken) {
        self.classes[taken.class].free.push_back(taken.buffer);
    }

    /// The memory of a buffer.
    pub(crate) fn buffer(&self, taken: Taken) -> &Flat {
        &self.classes[taken.class].buffers[taken.buffer]
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> usize {
        let of = |class: &Class| {
            let len: usize = class.buffers.iter().map(Flat::len).sum();
            len * class.kind.elt_size_in_bytes()
        };
        self.classes.iter().map(of).sum()
    }
}

/// Buffers that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) kind: Kind,
    pub(crate) len: usize,
    pub(crate) count: usize,
}

/// Which buffers serve buckets of these kinds and lengths, and which of them serves which bucket. Pure.
pub(crate) fn sizes(buckets: &[(Kind, usize)]) -> (Vec<Size>, Vec<usize>) {
    let is_large = |kind: Kind, len: usize| len > LARGE * middle(buckets, kind);
    let mut sizes: Vec<Size> = Vec::new();
    let mut size_of = Vec::with_capacity(buckets.len());
    for &(kind, len) in buckets {
        let is_alike =
            |size: &Size| size.kind == kind && is_large(kind, size.len) == is_large(kind, len);
        let at = sizes.iter().position(is_alike).unwrap_or(sizes.len());
        match sizes.get_mut(at) {
            Some(size) => {
                size.len = size.len.max(len);
                size.count += 1;
            }
            None => sizes.push(Size { kind, len, count: 1 }),
        }
        size_of.push(at);
    }
    for size in &mut sizes {
        size.count = if is_large(size.kind, size.len) { 1 } else { size.count.min(BUFFER_COUNT) };
    }
    (sizes, size_of)
}

/// The middle length of a kind's buckets.
fn middle(buckets: &[(Kind, usize)], kind: Kind) -> usize {
    let mut lens: Vec<usize> =
        buckets.iter().filter(|(of, _)| *of == kind).map(|&(_, len)| len).collect();
    lens.sort_unstable();
    lens.get(lens.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use phalanx_comm::testing::run_ranks;

    use super::*;

    #[test]
    fn few_buffers_serve_many_buckets_and_a_large_one_has_its_own() {
        let (float, half) = (Kind::Float, Kind::Half);
        let lens = [(float, 2048), (float, 1024), (half, 1024), (float, 9216), (float, 2048)];
        run_ranks(2, move |mut group| {
            let mut pool = Pool::new(&mut group, Device::Cpu, &lens).unwrap();
            assert_eq!(pool.bytes(), (3 * 2048 + 9216) * 4 + 1024 * 2);
            let large = pool.take(3).unwrap();
            assert_eq!(pool.buffer(large).len(), 9216);
            assert_eq!(pool.take(3), None);
            let all: Vec<Taken> = [0, 1, 4].map(|bucket| pool.take(bucket).unwrap()).into();
            assert_eq!(pool.take(0), None);
            assert!(pool.is_of(1, all[0]) && !pool.is_of(3, all[0]) && !pool.is_of(2, all[0]));
            pool.give_back(all[1]);
            assert_eq!(pool.take(4), Some(all[1]));
            pool.reset();
            assert_eq!(pool.take(0), Some(all[0]));
        });
    }
}
