//! Which gradient lies where: the bucket plan. Pure: a function of sizes, caps and the world size.
//!
//! Parameters are taken in the order in which backward makes them ready (reverse registration order at
//! first) and put into the open bucket of their storage, that is of their (dtype, device). A bucket closes
//! when its bytes reach the cap. Buckets are launched in the order in which their last parameter comes.
//!
//! Every parameter starts at a multiple of [`PARAMETER_ALIGNMENT_LEN`] elements, and every bucket's length
//! is a multiple of `world_size ×` [`BLOCK_LEN`], so that each rank's segment is whole blocks. Where a
//! parameter lies inside its bucket does not depend on the world size; only the padding at the end does.
//!
//! Source: bucketing as `compute_bucket_assignment_by_size` of PyTorch's `reducer.cpp`; padding as
//! Megatron-LM's distributed optimizer.

use std::ops::Range;

/// Elements in a block: what norms are summed over, and what a rank's segment is a multiple of. One page
/// of f32.
pub const BLOCK_LEN: usize = 1024;

/// Elements that a parameter's start is a multiple of: the widest vector loop of libtorch's kernels, so
/// that cutting at a start never changes which elements a kernel's scalar tail computes.
pub const PARAMETER_ALIGNMENT_LEN: usize = 64;

/// Bytes after which a bucket closes (PyTorch's `bucket_cap_mb=25`).
pub const BUCKET_BYTES_MAX: usize = 25 << 20;

/// Bytes after which the first bucket closes: small, so that communication starts early.
pub const FIRST_BUCKET_BYTES_MAX: usize = 1 << 20;

/// What the plan needs to know of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Elements.
    pub len: usize,
    /// Bytes of one element.
    pub element_bytes: usize,
    /// Which flat storage it goes to: parameters of one dtype and device share one.
    pub storage: usize,
}

/// Where a parameter lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which flat storage.
    pub storage: usize,
    /// Which bucket.
    pub bucket: usize,
    /// Elements of the flat storage.
    pub range: Range<usize>,
}

/// Gradients that are reduced together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Which flat storage.
    pub storage: usize,
    /// Elements of the flat storage, padding included.
    pub range: Range<usize>,
    /// Parameters in it, by registration index, in ready order.
    pub parameters: Vec<usize>,
}

/// The plan: the same on every rank, because its inputs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In launch order.
    pub buckets: Vec<Bucket>,
    /// By registration index.
    pub places: Vec<Place>,
    /// Elements of each flat storage.
    pub storage_lens: Vec<usize>,
}

/// The knobs of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Caps<'a> {
    /// Bytes after which the i-th bucket of a storage closes; the last cap holds for all that follow.
    pub bucket_bytes: &'a [usize],
    /// Ranks that share the buckets.
    pub world_size: usize,
}

struct Open {
    parameters: Vec<usize>,
    bytes: usize,
    closed_count: usize,
}

impl Plan {
    /// Plans buckets for `extents` (by registration index), which become ready in `order`.
    ///
    /// # Panics
    /// If `order` is not a permutation of the indices of `extents`, or `caps.bucket_bytes` is empty: our bug.
    #[must_use]
    pub fn new(extents: &[Extent], order: &[usize], caps: Caps<'_>) -> Self {
        assert_eq!(order.len(), extents.len(), "every parameter once");
        assert!(!caps.bucket_bytes.is_empty(), "at least one cap");
        let storage_count = extents.iter().map(|e| e.storage + 1).max().unwrap_or(0);
        let mut plan = Self {
            buckets: Vec::new(),
            places: vec![Place { storage: 0, bucket: usize::MAX, range: 0..0 }; extents.len()],
            storage_lens: vec![0; storage_count],
        };
        let mut open: Vec<Open> = (0..storage_count).map(|_| Open::new()).collect();
        for &index in order {
            let extent = extents[index];
            let bucket = &mut open[extent.storage];
            bucket.parameters.push(index);
            bucket.bytes += extent.len * extent.element_bytes;
            let cap = caps.bucket_bytes[bucket.closed_count.min(caps.bucket_bytes.len() - 1)];
            if bucket.bytes >= cap {
                plan.close(bucket, extents, extent.storage, caps.world_size);
            }
        }
        for (storage, bucket) in open.iter_mut().enumerate() {
            if !bucket.parameters.is_empty() {
                plan.close(bucket, extents, storage, caps.world_size);
            }
        }
        assert!(plan.places.iter().all(|p| p.bucket != usize::MAX), "every parameter has a place");
        plan
    }

    fn close(&mut self, open: &mut Open, extents: &[Extent], storage: usize, world_size: usize) {
        let start = self.storage_lens[storage];
        let mut end = start;
        for &index in &open.parameters {
            let range = end..end + extents[index].len;
            end = range.end.next_multiple_of(PARAMETER_ALIGNMENT_LEN);
            self.places[index] = Place { storage, bucket: self.buckets.len(), range };
        }
        let len = (end - start).max(1).next_multiple_of(world_size * BLOCK_LEN);
        let parameters = std::mem::take(&mut open.parameters);
        self.buckets.push(Bucket { storage, range: start..start + len, parameters });
        self.storage_lens[storage] = start + len;
        *open = Open { closed_count: open.closed_count + 1, ..Open::new() };
    }
}

impl Plan {
    /// Adds the buckets of parameters that came later, planned by themselves: they follow in storages of
    /// their own.
    pub fn append(&mut self, later: Self) {
        let (parameters, storages) = (self.places.len(), self.storage_lens.len());
        let buckets = self.buckets.len();
        self.buckets.extend(later.buckets.into_iter().map(|bucket| Bucket {
            storage: bucket.storage + storages,
            range: bucket.range,
            parameters: bucket.parameters.into_iter().map(|index| index + parameters).collect(),
        }));
        self.places.extend(later.places.into_iter().map(|place| Place {
            storage: place.storage + storages,
            bucket: place.bucket + buckets,
            range: place.range,
        }));
        self.storage_lens.extend(later.storage_lens);
    }

    /// How late buckets start when gradients become ready in `order`: the share of all elements that are
    /// ready by then, averaged over the elements. 0.5 is as good as it gets, 1.0 is at the end.
    ///
    /// # Panics
    /// If `order` names a parameter that the plan does not have: our bug.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of elements are far below 2^53")]
    pub fn lateness(&self, order: &[usize]) -> f64 {
        let mut ready_at = vec![0; self.places.len()];
        let mut elements = 0;
        for &index in order {
            elements += self.places[index].range.len();
            ready_at[index] = elements;
        }
        let (mut start, mut weighted, mut total) = (0, 0.0, 0.0);
        for bucket in &self.buckets {
            let len = bucket.range.len() as f64;
            let full = bucket.parameters.iter().map(|&index| ready_at[index]).max().unwrap_or(0);
            start = start.max(full);
            weighted += len * (start as f64);
            total += len;
        }
        if elements == 0 {
            return 0.0;
        }
        weighted / (total * (elements as f64))
    }
}

impl Open {
    fn new() -> Self {
        Self { parameters: Vec::new(), bytes: 0, closed_count: 0 }
    }
}

impl Bucket {
    /// The elements of the flat storage that `rank` reduces and, under ZeRO, owns.
    #[must_use]
    pub fn segment(&self, rank: usize, world_size: usize) -> Range<usize> {
        let len = self.range.len() / world_size;
        let start = self.range.start + rank * len;
        start..start + len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(lens: &[usize]) -> Vec<Extent> {
        lens.iter().map(|&len| Extent { len, element_bytes: 4, storage: 0 }).collect()
    }

    fn reverse(count: usize) -> Vec<usize> {
        (0..count).rev().collect()
    }

    fn check(extents: &[Extent], caps: &[usize], world_size: usize) -> Plan {
        let order = reverse(extents.len());
        let plan = Plan::new(extents, &order, Caps { bucket_bytes: caps, world_size });
        let mut seen = vec![0; extents.len()];
        for (index, bucket) in plan.buckets.iter().enumerate() {
            assert_eq!(bucket.range.len() % (world_size * BLOCK_LEN), 0, "whole blocks a rank");
            for &parameter in &bucket.parameters {
                seen[parameter] += 1;
                let place = &plan.places[parameter];
                assert_eq!(place.bucket, index);
                assert_eq!(place.range.len(), extents[parameter].len);
                assert_eq!(place.range.start % PARAMETER_ALIGNMENT_LEN, 0);
                assert!(bucket.range.start <= place.range.start);
                assert!(place.range.end <= bucket.range.end);
            }
        }
        assert!(seen.iter().all(|&count| count == 1), "every parameter once");
        for (storage, &len) in plan.storage_lens.iter().enumerate() {
            let mut at = 0;
            for bucket in plan.buckets.iter().filter(|b| b.storage == storage) {
                assert_eq!(bucket.range.start, at, "buckets tile the storage");
                at = bucket.range.end;
            }
            assert_eq!(at, len);
        }
        let mut taken: Vec<_> =
            plan.places.iter().map(|p| (p.storage, p.range.start, p.range.end)).collect();
        taken.sort_unstable();
        assert!(taken.windows(2).all(|w| w[0].0 != w[1].0 || w[0].2 <= w[1].1), "no overlap");
        plan
    }

    #[test]
    fn every_small_plan_tiles_its_storage() {
        let lens = [0, 1, 63, 64, 65, 1000, 1024, 5000];
        for world_size in [1, 2, 3, 4, 7] {
            for caps in [&[1][..], &[256, 4096], &[1 << 20]] {
                for a in lens {
                    for b in lens {
                        for c in lens {
                            check(&extents(&[a, b, c]), caps, world_size);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_registered_parameter_is_in_the_first_bucket() {
        let plan = check(&extents(&[100, 200, 300, 400]), &[1000, 2000], 2);
        assert_eq!(plan.buckets[0].parameters, [3]);
        assert_eq!(plan.buckets[1].parameters, [2, 1]);
        assert_eq!(plan.buckets[2].parameters, [0]);
    }

    #[test]
    fn each_storage_has_its_own_buckets() {
        let mut mixed = extents(&[100, 100, 100, 100]);
        mixed[1].storage = 1;
        mixed[1].element_bytes = 2;
        mixed[3].storage = 1;
        mixed[3].element_bytes = 2;
        let plan = check(&mixed, &[1 << 20], 3);
        assert_eq!(plan.buckets.len(), 2);
        assert_eq!(plan.buckets[0].parameters, [2, 0]);
        assert_eq!(plan.buckets[1].parameters, [3, 1]);
    }

    #[test]
    fn where_a_parameter_lies_in_its_bucket_does_not_depend_on_the_world_size() {
        let sizes = extents(&[7, 5000, 64, 1, 900]);
        let offsets = |world_size| {
            let plan = check(&sizes, &[2000], world_size);
            let offset = |p: &Place| (p.bucket, p.range.start - plan.buckets[p.bucket].range.start);
            plan.places.iter().map(offset).collect::<Vec<_>>()
        };
        assert_eq!(offsets(1), offsets(4));
        assert_eq!(offsets(1), offsets(7));
    }

    #[test]
    fn later_parameters_follow_in_storages_of_their_own() {
        let mut plan = check(&extents(&[100, 5000]), &[4000], 2);
        let (buckets, storages) = (plan.buckets.len(), plan.storage_lens.len());
        plan.append(check(&extents(&[70, 9]), &[4000], 2));
        assert_eq!(plan.places.len(), 4);
        assert_eq!(plan.places[2].storage, storages);
        assert_eq!(plan.places[2].bucket, buckets);
        assert_eq!(plan.buckets[buckets].parameters, [3, 2]);
        assert_eq!(plan.storage_lens.len(), storages + 1);
    }

    #[test]
    fn a_plan_in_the_order_of_backward_starts_early_and_one_against_it_at_the_end() {
        let sizes = extents(&[1024; 16]);
        let backward: Vec<usize> = (0..16).collect();
        let caps = Caps { bucket_bytes: &[4096], world_size: 1 };
        let along = Plan::new(&sizes, &backward, caps).lateness(&backward);
        let against = Plan::new(&sizes, &reverse(16), caps).lateness(&backward);
        assert!((along - 17.0 / 32.0).abs() < 1e-12, "{along}");
        assert!((against - 1.0).abs() < 1e-12, "{against}");
    }

    #[test]
    fn segments_tile_a_bucket() {
        let plan = check(&extents(&[5000, 70]), &[1 << 20], 3);
        let bucket = &plan.buckets[0];
        assert_eq!(bucket.segment(0, 3).start, bucket.range.start);
        assert_eq!(bucket.segment(0, 3).end, bucket.segment(1, 3).start);
        assert_eq!(bucket.segment(2, 3).end, bucket.range.end);
    }
}
