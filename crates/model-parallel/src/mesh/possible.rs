//! Shapes that fill a world, for those whose shape does not.

use super::{Axis, Shape};

/// As many as a message can show.
const SHOWN_MAX: usize = 6;

/// Shapes that fill the world, those nearest to the one that was asked for first: fewest axes changed, and of those the ones
/// that cost least to change; then by how much.
pub(super) fn shapes(asked: &Shape, world_size: usize) -> Vec<Shape> {
    let mut shapes = all(world_size);
    for shape in &mut shapes {
        shape.ep = asked.ep;
    }
    let experts: Vec<Shape> =
        shapes.iter().copied().filter(|shape| shape.check_experts().is_ok()).collect();
    if experts.is_empty() {
        shapes.iter_mut().for_each(|shape| shape.ep = 1);
    } else {
        shapes = experts;
    }
    shapes.sort_by_cached_key(|shape| (distance(asked, shape), *shape));
    shapes.truncate(SHOWN_MAX);
    shapes
}

/// Axes changed, the weight of these, and the sum of the changes.
fn distance(asked: &Shape, shape: &Shape) -> (usize, usize, usize) {
    let changed = Axis::DENSE.iter().filter(|axis| asked.size(**axis) != shape.size(**axis));
    changed.fold((0, 0, 0), |(count, weights, sum), axis| {
        let change = asked.size(*axis).abs_diff(shape.size(*axis));
        (count + 1, weights + weight(*axis), usize::saturating_add(sum, change))
    })
}

/// More data parallelism changes the batch; another `tp` or `pp` changes what fits into memory.
const fn weight(axis: Axis) -> usize {
    match axis {
        Axis::DpShard => 0,
        Axis::DpReplicate => 1,
        Axis::Cp => 2,
        Axis::Pp => 3,
        Axis::Tp | Axis::ExpertShard | Axis::Ep => 4,
    }
}

/// All ordered factorisations of the world into five axes.
fn all(world_size: usize) -> Vec<Shape> {
    let mut found = Vec::new();
    for pp in divisors(world_size) {
        for dp_replicate in divisors(world_size / pp) {
            let left = world_size / pp / dp_replicate;
            for dp_shard in divisors(left) {
                for cp in divisors(left / dp_shard) {
                    let tp = left / dp_shard / cp;
                    found.push(Shape { pp, dp_replicate, dp_shard, cp, tp, ep: 1 });
                }
            }
        }
    }
    found
}

fn divisors(number: usize) -> Vec<usize> {
    let low = (1..).take_while(|size| size * size <= number);
    let mut found: Vec<usize> = low.filter(|size| number.is_multiple_of(*size)).collect();
    let high: Vec<usize> = found.iter().rev().map(|size| number / size).collect();
    found.extend(high);
    found.dedup();
    found
}
