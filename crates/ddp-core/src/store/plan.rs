//! Which gradient lies where: the bucket plan. Pure: a function of sizes, caps and the world size.
//!
//! Parameters are taken in the order in which backward makes them ready (reverse registration order at
//! first) and put into the open bucket of their storage, that is of their (dtype, device). A bucket closes
//! when its bytes reach the cap; that of a unit when the unit is complete. Buckets are launched in the order in which their last parameter comes. Each has a
//! flat storage of its own: memory that can be taken and given back by itself.
//!
//! Every parameter starts at a multiple of `PARAMETER_ALIGNMENT_LEN` elements, and every bucket's length
//! is a multiple of `world_size ×` `BLOCK_LEN`, so that each rank's segment is whole blocks. Where a
//! parameter lies inside its bucket does not depend on the world size; only the padding at the end does.
//!
//! Source: bucketing as `compute_bucket_assignment_by_size` of PyTorch's `reducer.cpp`; padding as
//! Megatron-LM's distributed optimizer.

use std::collections::BTreeMap;
use std::ops::Range;

/// Elements in a block: what norms are summed over, and what a rank's segment is a multiple of. One page
/// of f32.
pub(crate) const BLOCK_LEN: usize = 1024;

/// Elements that a parameter's start is a multiple of: the widest vector loop of libtorch's kernels, so
/// that cutting at a start never changes which elements a kernel's scalar tail computes.
pub(crate) const PARAMETER_ALIGNMENT_LEN: usize = 64;

/// Bytes after which a bucket closes (PyTorch's `bucket_cap_mb=25`).
pub(crate) const BUCKET_BYTES_MAX: usize = 25 << 20;

/// Bytes after which the first bucket closes: small, so that communication starts early.
pub(crate) const FIRST_BUCKET_BYTES_MAX: usize = 1 << 20;

/// What the plan needs to know of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Elements.
    pub len: usize,
    /// Bytes of one element.
    pub element_bytes: usize,
    /// Number of its kind: a bucket holds parameters of one.
    pub kind: usize,
    /// Number of its unit, if it has one: a unit's parameters of one kind are a bucket, whatever the caps.
    pub unit: Option<usize>,
}

/// Where a parameter lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterPlace {
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
    /// Which flat storage: its own.
    pub storage: usize,
    /// Number of its parameters' kind.
    pub kind: usize,
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
    pub places: Vec<ParameterPlace>,
    /// Elements of each flat storage.
    pub storage_lens: Vec<usize>,
}

/// The knobs of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Caps<'a> {
    /// Bytes after which the i-th bucket of a kind closes; the last cap holds for all that follow.
    pub bucket_bytes: &'a [usize],
    /// Ranks that share the buckets.
    pub world_size: usize,
}

struct Open {
    parameters: Vec<usize>,
    bytes: usize,
    kind: usize,
    until: Until,
}

/// When an open bucket closes.
enum Until {
    /// Its bytes reach a cap; how many of its kind have closed so.
    Cap { closed_count: usize },
    /// All of its unit are in it: so many are still to come.
    Whole { left: usize },
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
        let mut plan = Self {
            buckets: Vec::new(),
            places: vec![
                ParameterPlace { storage: 0, bucket: usize::MAX, range: 0..0 };
                extents.len()
            ],
            storage_lens: Vec::new(),
        };
        let mut open: BTreeMap<(usize, Option<usize>), Open> = BTreeMap::new();
        for extent in extents {
            let bucket = open.entry((extent.kind, extent.unit)).or_insert_with(|| Open {
                parameters: Vec::new(),
                bytes: 0,
                kind: extent.kind,
                until: match extent.unit {
                    None => Until::Cap { closed_count: 0 },
                    Some(_) => Until::Whole { left: 0 },
                },
            });
            if let Until::Whole { left } = &mut bucket.until {
                *left += 1;
            }
        }
        for &index in order {
            let extent = extents[index];
            let Some(bucket) = open.get_mut(&(extent.kind, extent.unit)) else { continue };
            bucket.parameters.push(index);
            bucket.bytes += extent.len * extent.element_bytes;
            let is_full = match &mut bucket.until {
                Until::Cap { closed_count } => {
                    let cap = caps.bucket_bytes[(*closed_count).min(caps.bucket_bytes.len() - 1)];
                    let is_full = bucket.bytes >= cap;
                    *closed_count += usize::from(is_full);
                    is_full
                }
                Until::Whole { left } => {
                    *left -= 1;
                    *left == 0
                }
            };
            if is_full {
                plan.close(bucket, extents, caps.world_size);
            }
        }
        for bucket in open.values_mut().filter(|bucket| !bucket.parameters.is_empty()) {
            plan.close(bucket, extents, caps.world_size);
        }
        assert!(plan.places.iter().all(|p| p.bucket != usize::MAX), "every parameter has a place");
        plan
    }

    fn close(&mut self, open: &mut Open, extents: &[Extent], world_size: usize) {
        let storage = self.buckets.len();
        let mut end = 0;
        for &index in &open.parameters {
            let range = end..end + extents[index].len;
            end = range.end.next_multiple_of(PARAMETER_ALIGNMENT_LEN);
            self.places[index] = ParameterPlace { storage, bucket: storage, range };
        }
        let len = end.max(1).next_multiple_of(world_size * BLOCK_LEN);
        let parameters = std::mem::take(&mut open.parameters);
        self.buckets.push(Bucket { storage, kind: open.kind, range: 0..len, parameters });
        self.storage_lens.push(len);
        open.bytes = 0;
    }
}

impl Plan {
    /// Adds the buckets of parameters that came later, planned by themselves: they follow in storages of
    /// their own.
    pub(crate) fn append(&mut self, later: Self) {
        let (parameters, storages) = (self.places.len(), self.storage_lens.len());
        let buckets = self.buckets.len();
        self.buckets.extend(later.buckets.into_iter().map(|bucket| Bucket {
            storage: bucket.storage + storages,
            kind: bucket.kind,
            range: bucket.range,
            parameters: bucket.parameters.into_iter().map(|index| index + parameters).collect(),
        }));
        self.places.extend(later.places.into_iter().map(|place| ParameterPlace {
            storage: place.storage + storages,
            bucket: place.bucket + buckets,
            range: place.range,
        }));
        self.storage_lens.extend(later.storage_lens);
    }

    /// Turns the order of buckets around.
    pub(crate) fn reverse(&mut self) {
        self.buckets.reverse();
        self.storage_lens.reverse();
        let count = self.buckets.len();
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            bucket.storage = index;
        }
        for place in &mut self.places {
            place.bucket = count - 1 - place.bucket;
            place.storage = place.bucket;
        }
    }

    /// How late buckets start when gradients become ready in `order`: the share of all elements that are
    /// ready by then, averaged over the elements. 0.5 is as good as it gets, 1.0 is at the end.
    ///
    /// # Panics
    /// If `order` names a parameter that the plan does not have: our bug.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of elements are far below 2^53")]
    pub(crate) fn lateness(&self, order: &[usize]) -> f64 {
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

impl Bucket {
    /// The elements of the flat storage that `rank` reduces and, under ZeRO, owns.
    #[must_use]
    pub(crate) fn segment(&self, rank: usize, world_size: usize) -> Range<usize> {
        let len = self.range.len() / world_size;
        let start = self.range.start + rank * len;
        start..start + len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(lens: &[usize]) -> Vec<Extent> {
        lens.iter().map(|&len| Extent { len, element_bytes: 4, kind: 0, unit: None }).collect()
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
        for (index, bucket) in plan.buckets.iter().enumerate() {
            assert_eq!((bucket.storage, &bucket.range), (index, &(0..plan.storage_lens[index])));
        }
        let mut taken: Vec<_> =
            plan.places.iter().map(|p| (p.storage, p.range.start, p.range.end)).collect();
        taken.sort_unstable();
        assert!(taken.windows(2).all(|w| w[0].0 != w[1].0 || w[0].2 <= w[1].1), "no overlap");
        plan
    }

    #[test]
    fn every_small_plan_has_room_for_every_parameter() {
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
    fn each_kind_has_its_own_buckets() {
        let mut mixed = extents(&[100, 100, 100, 100]);
        mixed[1].kind = 1;
        mixed[1].element_bytes = 2;
        mixed[3].kind = 1;
        mixed[3].element_bytes = 2;
        let plan = check(&mixed, &[1 << 20], 3);
        assert_eq!(plan.buckets.len(), 2);
        assert_eq!(plan.buckets[0].parameters, [2, 0]);
        assert_eq!(plan.buckets[1].parameters, [3, 1]);
    }

    #[test]
    fn a_unit_is_a_bucket_of_its_own_whatever_the_caps_and_the_order() {
        let mut sizes = extents(&[100, 5000, 100, 9000, 100, 100]);
        for (index, unit) in [(1, 0), (3, 0), (4, 1), (2, 1)] {
            sizes[index].unit = Some(unit);
        }
        for world_size in [1, 2, 3] {
            let caps = Caps { bucket_bytes: &[1 << 20], world_size };
            let plan = Plan::new(&sizes, &reverse(6), caps);
            let parameters: Vec<_> =
                plan.buckets.iter().map(|bucket| bucket.parameters.clone()).collect();
            assert_eq!(parameters, [vec![4, 2], vec![3, 1], vec![5, 0]]);
        }
    }

    #[test]
    fn where_a_parameter_lies_in_its_bucket_does_not_depend_on_the_world_size() {
        let sizes = extents(&[7, 5000, 64, 1, 900]);
        let offsets = |world_size| {
            let plan = check(&sizes, &[2000], world_size);
            let offset =
                |p: &ParameterPlace| (p.bucket, p.range.start - plan.buckets[p.bucket].range.start);
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
