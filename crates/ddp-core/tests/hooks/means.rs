//! One exchange of each hook beside the mean in f64.

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::GroupOptions;
use phalanx_ddp_core::plan::{Caps, Extent, Plan};
use phalanx_ddp_core::{Sync, Zero};

use super::{gradients, largest, options, values, Model, Which, ALL, CAPS, SHAPES};
use super::{Bf16, Fp16, Int8, U32, UBF16, UF16};

/// What a test needs of one exchange, of every rank.
struct Exchanged {
    /// By rank, by parameter.
    means: Vec<Vec<Vec<f32>>>,
    bytes: u64,
    bytes_sent: u64,
    /// Elements of each bucket.
    buckets: Vec<usize>,
}

fn plan(world_size: usize) -> Plan {
    let extent = |(_, shape): &(&str, &[i64])| {
        let len = usize::try_from(shape.iter().product::<i64>()).unwrap();
        Extent { len, element_bytes: 4, kind: 0, unit: None }
    };
    let extents: Vec<Extent> = SHAPES.iter().map(extent).collect();
    let order: Vec<usize> = (0..SHAPES.len()).rev().collect();
    Plan::new(&extents, &order, Caps { bucket_bytes: &CAPS, world_size })
}

/// Step `step` of each rank's gradients, weighed if there are weights.
fn exchange(world_size: usize, which: Which, weights: Option<fn(usize) -> f64>) -> Exchanged {
    exchange_over(HostLink::Auto, world_size, which, weights)
}

fn exchange_over(
    link: HostLink,
    world_size: usize,
    which: Which,
    weights: Option<fn(usize) -> f64>,
) -> Exchanged {
    let ranks = run_ranks_with(world_size, link, GroupOptions::default(), move |mut group| {
        assert_eq!(group.shares_memory(), link == HostLink::Auto || world_size == 1);
        let (rank, model) = (group.rank(), Model::new());
        // In this order already: nothing is laid anew.
        let order = SHAPES.iter().rev().map(|(name, _)| (*name).to_owned()).collect();
        let ready_order = Some(order);
        let ddp = model
            .wrap(&mut group, phalanx_ddp_core::DdpOptions { ready_order, ..options(Zero::Off) });
        which.set(&ddp).unwrap();
        let loss = model.loss(&gradients(rank, 0));
        match weights {
            None => loss.backward(),
            Some(weight) => ddp.backward(&loss, weight(rank), Sync::Reduce).unwrap(),
        }
        let statistics = ddp.statistics().unwrap();
        (model.gradients(), statistics)
    });
    let planned = plan(world_size);
    let statistics = &ranks[0].1;
    assert_eq!(statistics.bucket_count, planned.buckets.len(), "{which:?}");
    assert!(statistics.bucket_count >= 3);
    Exchanged {
        bytes: statistics.bytes,
        bytes_sent: statistics.bytes_sent,
        buckets: planned.buckets.iter().map(|bucket| bucket.range.len()).collect(),
        means: ranks.into_iter().map(|(means, _)| means).collect(),
    }
}

/// By parameter and element, each rank's gradient.
fn inputs(world_size: usize) -> Vec<Vec<Vec<f64>>> {
    let ranks: Vec<Vec<Vec<f32>>> =
        (0..world_size).map(|rank| gradients(rank, 0).iter().map(values).collect()).collect();
    let element = |parameter: usize, at: usize| {
        ranks.iter().map(|of_rank| f64::from(of_rank[parameter][at])).collect()
    };
    let of = |parameter: usize| {
        (0..ranks[0][parameter].len()).map(|at| element(parameter, at)).collect()
    };
    (0..SHAPES.len()).map(of).collect()
}

/// The largest that `bound` may let an element be off; it gets the ranks' gradients there and their mean.
fn check(world_size: usize, which: Which, bound: impl Fn(&[f64], f64) -> f64) {
    let exchanged = exchange(world_size, which, None);
    for (parameter, elements) in inputs(world_size).iter().enumerate() {
        for (at, of_ranks) in elements.iter().enumerate() {
            let mean = of_ranks.iter().sum::<f64>() / world_size as f64;
            let ours = f64::from(exchanged.means[0][parameter][at]);
            let (off, bound) = ((ours - mean).abs(), bound(of_ranks, mean));
            let name = SHAPES[parameter].0;
            assert!(
                off <= bound,
                "{which:?}, {world_size} ranks: {name}[{at}]: {ours} for {mean}, off {off:.2e} of {bound:.2e}"
            );
        }
    }
}

/// What a sum in f32 of numbers of these magnitudes, multiplied once by a factor that is itself rounded, may be off by.
fn of_sum(of_ranks: &[f64]) -> f64 {
    let ranks = of_ranks.len() as f64;
    (ranks + 2.0) * U32 * of_ranks.iter().map(|g| g.abs()).sum::<f64>() / ranks
}

#[test]
fn plain_and_cast_means_are_off_by_their_roundings_alone() {
    for world_size in 1..=4 {
        check(world_size, Which::Plain, |of_ranks, _| of_sum(of_ranks));
        for (which, unit, smallest) in [(Bf16, UBF16, 0.0), (Fp16, UF16, 2.0_f64.powi(-25))] {
            check(world_size, which, |of_ranks, mean| {
                // Each gradient is rounded, their sum is made in f32, and the mean is rounded. Below 2^-14 f16 has steps of 2^-24.
                let ranks = of_ranks.len() as f64;
                let each = of_ranks.iter().map(|g| (g.abs() * unit).max(smallest)).sum::<f64>();
                let inside = each / ranks + of_sum(of_ranks) * (1.0 + unit);
                inside + ((mean.abs() + inside) * unit).max(smallest)
            });
        }
    }
}

#[test]
fn int8_means_are_off_by_half_a_step_of_each_block_twice() {
    for world_size in 1..=4 {
        let all = inputs(world_size);
        let most = largest(all.iter().flatten().flatten().copied());
        let whole = 1.0 + 256.0 * f64::from(f32::EPSILON);
        check(world_size, Int8, |of_ranks, _| {
            // A block's largest value is at most the largest of all, and a mean's at most that and what it is off by.
            let first = most / 254.0 * whole;
            first + (most + first) / 254.0 * whole + of_sum(of_ranks)
        });
    }
}

#[test]
fn topk_means_are_those_of_the_largest_of_each_rank() {
    for world_size in 1..=4 {
        for fraction in [0.1, 1.0] {
            let exchanged = exchange(world_size, Which::TopK(fraction), None);
            let oracle = top_k(world_size, fraction);
            for (parameter, elements) in inputs(world_size).iter().enumerate() {
                for (at, of_ranks) in elements.iter().enumerate() {
                    let ours = f64::from(exchanged.means[0][parameter][at]);
                    let off = (ours - oracle[parameter][at]).abs();
                    assert!(off <= of_sum(of_ranks), "{}[{at}]: {ours}", SHAPES[parameter].0);
                }
            }
        }
    }
}

/// By parameter: the mean of what each rank sends, by sorting.
fn top_k(world_size: usize, fraction: f64) -> Vec<Vec<f64>> {
    let plan = plan(world_size);
    let ranks: Vec<Vec<tch::Tensor>> = (0..world_size).map(|rank| gradients(rank, 0)).collect();
    let mut means: Vec<Vec<f64>> =
        inputs(world_size).iter().map(|elements| vec![0.0; elements.len()]).collect();
    for bucket in &plan.buckets {
        for of_rank in &ranks {
            let mut sorted = Vec::new();
            for &parameter in &bucket.parameters {
                // In the order of memory ties would be told; there are none.
                let values = values(&of_rank[parameter]);
                sorted.extend(values.into_iter().enumerate().map(|(at, v)| (v, parameter, at)));
            }
            let count = (sorted.len() as f64 * fraction).ceil() as usize;
            sorted.sort_by(|left, right| right.0.abs().total_cmp(&left.0.abs()));
            for (value, parameter, at) in sorted.into_iter().take(count) {
                means[parameter][at] += f64::from(value) / world_size as f64;
            }
        }
    }
    means
}

/// A mean of low rank is what it is, whatever the matrices of single ranks are: those here have their own parts that cancel.
#[test]
fn powersgd_keeps_what_has_its_rank() {
    for world_size in 1..=4 {
        let all = run_ranks(world_size, move |mut group| {
            let (rank, ranks) = (group.rank(), group.world_size());
            let model = Model::new();
            let ddp = model.wrap(&mut group, options(Zero::Off));
            Which::PowerSgd(2).set(&ddp).unwrap();
            let column = |len: i64, seed: f64| -> tch::Tensor {
                ((tch::Tensor::arange(len, (tch::Kind::Double, tch::Device::Cpu)) + seed) * 1.7)
                    .sin()
            };
            let wanted = gradients(0, 0).into_iter().zip(gradients(1, 1)).map(|(like, noise)| {
                let (rows, len) = (like.size()[0], like.numel() as i64);
                // As memory has it: the kernel's columns are in another order, which changes no rank.
                let outer = |seed: f64| column(rows, seed).outer(&column(len / rows, seed + 0.3));
                let common = (outer(1.0) + outer(5.0) * 0.5).reshape(like.size());
                // 1, −1, 0 … on the ranks.
                let own = match rank {
                    0 if ranks > 1 => 1.0,
                    1 => -1.0,
                    _ => 0.0,
                };
                common.to_kind(tch::Kind::Float) + noise * own
            });
            let wanted: Vec<tch::Tensor> = wanted.collect();
            // In the second exchange Q spans the rows of the mean already, so nothing is amplified.
            for _ in 0..2 {
                ddp.release_gradients().unwrap();
                model.loss(&wanted).backward();
            }
            let inputs: Vec<Vec<f32>> = wanted.iter().map(values).collect();
            (inputs, model.gradients())
        });
        for parameter in 0..SHAPES.len() {
            let len = all[0].0[parameter].len();
            let mean = |at: usize| {
                all.iter().map(|(g, _)| f64::from(g[parameter][at])).sum::<f64>()
                    / world_size as f64
            };
            let means: Vec<f64> = (0..len).map(mean).collect();
            let norm =
                |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let off = norm(&mut (0..len).map(|at| means[at] - f64::from(all[0].1[parameter][at])));
            // With u the roundoff and M the ranks' matrices: P is off by columns · u · Σ |M| |Q|, which W with M = P W passes on, |W| ≤ 2 as Q spans
            // the rows; Q by rows · u · Σ |M| |P|; |P|, |Q| ≤ √2; and a few roundings of the result.
            let inputs: f64 = all
                .iter()
                .map(|(g, _)| norm(&mut g[parameter].iter().map(|&v| f64::from(v))))
                .sum();
            let rows = SHAPES[parameter].1[0] as f64;
            let terms = 2.0 * len as f64 / rows + rows + 16.0;
            let bound = 2.0_f64.sqrt() * terms * U32 * inputs;
            let name = SHAPES[parameter].0;
            assert!(off <= bound, "{world_size} ranks, {name}: off by {off:.2e} of {bound:.2e}");
        }
    }
}

#[test]
fn every_rank_comes_to_the_same_bits() {
    for world_size in 2..=4 {
        for which in ALL {
            let exchanged = exchange(world_size, which, Some(|rank| 1.0 + rank as f64));
            let bits = |means: &Vec<Vec<f32>>| -> Vec<u32> {
                means.iter().flatten().map(|value| value.to_bits()).collect()
            };
            for means in &exchanged.means[1..] {
                assert!(bits(means) == bits(&exchanged.means[0]), "{which:?} on {world_size}");
            }
        }
    }
}

/// Between machines other collectives move them.
#[test]
fn the_bits_do_not_depend_on_where_the_ranks_are() {
    for world_size in [2, 3] {
        for which in ALL {
            let near = exchange(world_size, which, None);
            let far = exchange_over(HostLink::Tcp, world_size, which, None);
            assert!(near.means == far.means, "{which:?} on {world_size} ranks");
            assert_eq!(near.bytes_sent, far.bytes_sent, "{which:?}");
        }
    }
}

#[test]
fn weights_count_in_every_hook() {
    let world_size = 3;
    // Σ weights is 6: as if every rank's gradients were twice as large.
    let weights: fn(usize) -> f64 = |rank| 0.25 + 0.25 * rank as f64;
    for which in [Which::Plain, Bf16, Fp16, Int8, Which::TopK(1.0), super::Fed(&Int8)] {
        let weighed = exchange(world_size, which, Some(weights));
        let all = inputs(world_size);
        let most = largest(all.iter().flatten().flatten().copied());
        for (parameter, elements) in all.iter().enumerate() {
            for (at, of_ranks) in elements.iter().enumerate() {
                let mean = of_ranks.iter().sum::<f64>() / 1.5;
                let ours = f64::from(weighed.means[0][parameter][at]);
                // The coarsest of them: int8, twice, of values twice as large.
                let bound = 2.0 * most / 254.0 * 2.02 + 2.0 * UBF16 * 2.0 * most;
                assert!((ours - mean).abs() <= bound, "{which:?}: {ours} for {mean}");
            }
        }
    }
}

#[test]
fn bytes_sent_are_what_the_table_says() {
    for world_size in 1..=4_usize {
        let share = |bytes: usize| (bytes - bytes / world_size) as u64;
        let of = |which: Which, bytes: &dyn Fn(usize) -> u64| {
            let exchanged = exchange(world_size, which, None);
            let expected: u64 = exchanged.buckets.iter().map(|&len| bytes(len)).sum();
            assert_eq!(exchanged.bytes_sent, expected, "{which:?} on {world_size} ranks");
            assert_eq!(exchanged.bytes, 4 * exchanged.buckets.iter().sum::<usize>() as u64);
        };
        of(Which::Plain, &|len| 2 * share(4 * len));
        of(Bf16, &|len| 2 * share(2 * len));
        of(Int8, &|len| 2 * share(len + len / 64 * 4));
        of(Which::Noop, &|_| 0);
        let sent = exchange(world_size, Which::PowerSgd(2), None).bytes_sent;
        // one 40·30, kernel 16·54, two 9·200 and three 64·33; the rest is 70 + 6 + 5.
        let numbers = 2 * (40 + 30 + 16 + 54 + 9 + 200 + 64 + 33) + 81;
        let bound = 2 * share(4 * numbers);
        // Halves of odd lengths are rounded by bucket.
        assert!(sent.abs_diff(bound) <= 16, "{sent} for {bound}");
    }
}
