//! The matrix: world sizes × lengths × element types × operations × slice or region × link.
//!
//! Every result is compared bit by bit with one process that adds in rank order (in `f32` for
//! halves), which makes it equal on all ranks and over all links too; floats also with an `f64`
//! oracle.
use half::{bf16, f16};
use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::{
    Avg, Bf16Sum, Element, Float, Group, GroupOptions, Max, Min, Product, ReduceOp, ScaledSum, Sum,
};

const WORLDS: [usize; 5] = [1, 2, 3, 4, 7];

/// An element with the arithmetic of one process.
pub(crate) trait Model: Element + PartialEq + std::fmt::Debug {
    type Wide: Copy;
    fn value(rank: usize, index: usize) -> Self;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn add(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn mul(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn least(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn most(a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

fn noise(rank: usize, index: usize) -> u64 {
    let mut x = (rank as u64) << 40 ^ index as u64 ^ 0x9e37_79b9_7f4a_7c15;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Between −2 and 2, with all the bits that a float can have.
fn fraction(rank: usize, index: usize) -> f64 {
    (noise(rank, index) >> 11) as f64 / (1_u64 << 51) as f64 - 2.0
}

macro_rules! float_model {
    ($($type:ty, $wide:ty, $from:expr, $to:expr;)*) => {$(
        impl Model for $type {
            type Wide = $wide;
            fn value(rank: usize, index: usize) -> Self { ($from)(fraction(rank, index) as $wide) }
            fn widen(self) -> $wide { ($to)(self) }
            fn narrow(wide: $wide) -> Self { ($from)(wide) }
            fn add(a: $wide, b: $wide) -> $wide { a + b }
            fn mul(a: $wide, b: $wide) -> $wide { a * b }
            fn least(a: $wide, b: $wide) -> $wide { if b < a { b } else { a } }
            fn most(a: $wide, b: $wide) -> $wide { if b > a { b } else { a } }
        }
    )*};
}
float_model! {
    f64, f64, |x| x, |x| x;
    f32, f32, |x| x, |x| x;
    f16, f32, f16::from_f32, f16::to_f32;
    bf16, f32, bf16::from_f32, bf16::to_f32;
}

macro_rules! integer_model {
    ($($type:ty),*) => {$(
        impl Model for $type {
            type Wide = $type;
            fn value(rank: usize, index: usize) -> Self { noise(rank, index) as $type }
            fn widen(self) -> $type { self }
            fn narrow(wide: $type) -> Self { wide }
            fn add(a: $type, b: $type) -> $type { a.wrapping_add(b) }
            fn mul(a: $type, b: $type) -> $type { a.wrapping_mul(b) }
            fn least(a: $type, b: $type) -> $type { a.min(b) }
            fn most(a: $type, b: $type) -> $type { a.max(b) }
        }
    )*};
}
integer_model!(i64, i32, u8);

pub(crate) fn inputs<T: Model>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|index| T::value(rank, index)).collect()
}

/// What one process gets that folds in rank order.
fn folded<T: Model>(
    world: usize,
    len: usize,
    fold: fn(T::Wide, T::Wide) -> T::Wide,
) -> Vec<T::Wide> {
    let at = |index| {
        let first = T::value(0, index).widen();
        (1..world).fold(first, |sum, rank| fold(sum, T::value(rank, index).widen()))
    };
    (0..len).map(at).collect()
}

/// Slice and region, all-reduce, reduce-scatter and reduce, with one operation.
fn check<T: Model>(group: &mut Group, len: usize, op: impl ReduceOp<T>, expected: &[T]) {
    let (rank, world) = (group.rank(), group.world_size());
    let mut slice = inputs::<T>(rank, len);
    group.all_reduce(&mut slice[..], op).unwrap().wait().unwrap();
    assert_eq!(slice, expected, "slice, {world} ranks, {len} × {}", T::DTYPE);
    let region = group.allocate::<T>(len).unwrap();
    region.write(0, &inputs::<T>(rank, len));
    group.all_reduce(region.full(), op).unwrap().wait().unwrap();
    assert_eq!(region.read(0..len), expected, "region, {world} ranks, {len} × {}", T::DTYPE);
    let root = len % world;
    let mut slice = inputs::<T>(rank, len);
    group.reduce(&mut slice[..], op, root).unwrap().wait().unwrap();
    assert_eq!(slice, if rank == root { expected.to_vec() } else { inputs::<T>(rank, len) });
    if len.is_multiple_of(world) {
        let segment = len / world;
        let mine = &expected[rank * segment..(rank + 1) * segment];
        region.write(0, &inputs::<T>(rank, len));
        group.reduce_scatter_in_place(region.full(), op).unwrap().wait().unwrap();
        assert_eq!(region.read(rank * segment..(rank + 1) * segment), mine);
        let mut output = vec![T::zeroed(); segment];
        let input = inputs::<T>(rank, len);
        group.reduce_scatter(&input, &mut output[..], op).unwrap().wait().unwrap();
        assert_eq!(output, mine);
    }
}

fn check_every_op<T: Model>(group: &mut Group, len: usize) {
    let world = group.world_size();
    let narrow = |wide: Vec<T::Wide>| wide.into_iter().map(T::narrow).collect::<Vec<T>>();
    check(group, len, Sum, &narrow(folded::<T>(world, len, T::add)));
    check(group, len, Min, &narrow(folded::<T>(world, len, T::least)));
    check(group, len, Max, &narrow(folded::<T>(world, len, T::most)));
    check(group, len, Product, &narrow(folded::<T>(world, len, T::mul)));
}

fn check_averages<T: Model + Float>(group: &mut Group, len: usize, wide: impl Fn(f64) -> T::Wide)
where
    T::Wide: std::ops::Div<Output = T::Wide> + std::ops::Mul<Output = T::Wide>,
{
    let world = group.world_size();
    let sums = folded::<T>(world, len, T::add);
    let average = |sum: &T::Wide| T::narrow(*sum / wide(world as f64));
    check(group, len, Avg, &sums.iter().map(average).collect::<Vec<T>>());
    let scaled = |sum: &T::Wide| T::narrow(*sum * wide(0.3));
    check(group, len, ScaledSum(0.3), &sums.iter().map(scaled).collect::<Vec<T>>());
}

fn check_bf16_sums(group: &mut Group, len: usize) {
    let rounded = |rank, index| bf16::from_f32(f32::value(rank, index)).to_f32();
    let scaled = |index| {
        let sum =
            (1..group.world_size()).fold(rounded(0, index), |sum, rank| sum + rounded(rank, index));
        bf16::from_f32(sum * 0.3).to_f32()
    };
    let expected: Vec<f32> = (0..len).map(scaled).collect();
    check(group, len, Bf16Sum(0.3), &expected);
}

fn lengths(world: usize) -> Vec<usize> {
    // The last takes several rounds of staging and several pieces on a wire.
    vec![0, 1, world - 1, world, world + 1, 1000, 10_007, 2310 * 130]
}

pub(crate) fn every_type(mut group: Group) {
    for len in lengths(group.world_size()) {
        check_every_op::<f32>(&mut group, len);
        check_averages::<f32>(&mut group, len, |x| x as f32);
        check_bf16_sums(&mut group, len);
        if len > 20_000 {
            continue;
        }
        check_every_op::<f64>(&mut group, len);
        check_every_op::<f16>(&mut group, len);
        check_every_op::<bf16>(&mut group, len);
        check_every_op::<i64>(&mut group, len);
        check_every_op::<i32>(&mut group, len);
        check_every_op::<u8>(&mut group, len);
        check_averages::<f64>(&mut group, len, |x| x);
        check_averages::<f16>(&mut group, len, |x| x as f32);
        check_averages::<bf16>(&mut group, len, |x| x as f32);
    }
}

#[test]
fn reductions_over_shared_memory_have_the_bits_of_one_process() {
    for world in WORLDS {
        run_ranks(world, every_type);
    }
}

#[test]
fn reductions_over_sockets_have_the_bits_of_one_process() {
    for world in [2, 3, 4, 7] {
        run_ranks_with(world, HostLink::Tcp, GroupOptions::default(), every_type);
    }
}

pub(crate) fn near_the_oracle(mut group: Group) {
    let ranks = group.world_size();
    let mut values = inputs::<f32>(group.rank(), 10_007);
    group.all_reduce(&mut values[..], Sum).unwrap().wait().unwrap();
    for (index, value) in values.iter().enumerate() {
        let terms = (0..ranks).map(|rank| f64::from(f32::value(rank, index)));
        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), x| (s + x, a + x.abs()));
        // Each addition is off by half a unit in the last place of at most the sum of sizes.
        let tolerance = ranks as f64 * f64::from(f32::EPSILON) / 2.0 * size;
        assert!((f64::from(*value) - sum).abs() <= tolerance, "{value} {sum}");
    }
}

#[test]
fn sums_are_near_the_f64_oracle() {
    run_ranks(4, near_the_oracle);
}

/// The collectives that only move, with lengths from nothing to several rounds.
pub(crate) fn movement(mut group: Group) {
    let (world, rank) = (group.world_size(), group.rank());
    for segment in [0, 1, 7, 1000, 150_001] {
        let len = segment * world;
        let mine = inputs::<i64>(rank, len);
        let all: Vec<i64> = (0..world).flat_map(|peer| inputs::<i64>(peer, segment)).collect();
        for root in 0..world {
            let mut values = mine.clone();
            group.broadcast(&mut values[..], root).unwrap().wait().unwrap();
            assert_eq!(values, inputs::<i64>(root, len));
            let mut output = vec![0; len];
            let at_root = (rank == root).then_some(&mut output[..]);
            group.gather(&mine[..segment], at_root, root).unwrap().wait().unwrap();
            assert!(rank != root || output == all);
            let mut output = vec![0; segment];
            let input = (rank == root).then_some(&mine[..]);
            group.scatter(input, &mut output[..], root).unwrap().wait().unwrap();
            assert_eq!(output, inputs::<i64>(root, len)[rank * segment..(rank + 1) * segment]);
        }
        let mut output = vec![0; len];
        group.all_gather(&mine[..segment], &mut output[..]).unwrap().wait().unwrap();
        assert_eq!(output, all);
        let region = group.allocate::<i64>(len).unwrap();
        region.write(rank * segment, &mine[..segment]);
        group.all_gather_in_place(region.full()).unwrap().wait().unwrap();
        assert_eq!(region.read(0..len), all);
        group.barrier().unwrap().wait().unwrap();
        region.write(0, &mine);
        group.broadcast(region.full(), world - 1).unwrap().wait().unwrap();
        assert_eq!(region.read(0..len), inputs::<i64>(world - 1, len));
        group.all_to_all(&mine, &mut output[..]).unwrap().wait().unwrap();
        for peer in 0..world {
            let theirs = &inputs::<i64>(peer, len)[rank * segment..(rank + 1) * segment];
            assert_eq!(&output[peer * segment..(peer + 1) * segment], theirs);
        }
        let expected = output.clone();
        region.write(0, &mine);
        group.all_to_all_in_place(region.full()).unwrap().wait().unwrap();
        assert_eq!(region.read(0..len), expected);
        if world > 1 {
            let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
            let sent = group.send(&mine, next).unwrap();
            let received = group.receive(&mut output[..], previous).unwrap();
            received.wait().unwrap_or_else(|error| panic!("{len} from {previous}: {error}"));
            sent.wait().unwrap_or_else(|error| panic!("{len} to {next}: {error}"));
            assert_eq!(output, inputs::<i64>(previous, len));
        }
    }
}

/// All ranks wait for what they have sent before they ask for what has come: more than the sockets hold.
pub(crate) fn large_messages_cross(mut group: Group) {
    let (world, rank) = (group.world_size(), group.rank());
    if world == 1 {
        return;
    }
    let mine = inputs::<i64>(rank, 3 << 20);
    let mut output = vec![0; mine.len()];
    let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
    let received = group.receive(&mut output[..], previous).unwrap();
    let sent = group.send(&mine, next).unwrap();
    sent.wait().unwrap_or_else(|error| panic!("to {next}: {error}"));
    received.wait().unwrap_or_else(|error| panic!("from {previous}: {error}"));
    assert_eq!(output, inputs::<i64>(previous, mine.len()));
}

#[test]
fn large_messages_in_both_directions_do_not_wait_for_each_other() {
    for link in [HostLink::Auto, HostLink::Tcp] {
        for world in [2, 3] {
            run_ranks_with(world, link, GroupOptions::default(), large_messages_cross);
        }
    }
}

#[test]
fn movement_over_shared_memory() {
    for world in WORLDS {
        run_ranks(world, movement);
    }
}

#[test]
fn movement_over_sockets() {
    for world in [2, 3, 4] {
        run_ranks_with(world, HostLink::Tcp, GroupOptions::default(), movement);
    }
}

pub(crate) fn slices_meet_regions(mut group: Group) {
    for len in [10, 100_000] {
        let region = group.allocate::<f32>(len).unwrap();
        let mut values = inputs::<f32>(group.rank(), len);
        region.write(0, &values);
        let expected: Vec<f32> = folded::<f32>(group.world_size(), len, f32::add);
        if group.rank() == 1 {
            group.all_reduce(&mut values[..], Sum).unwrap().wait().unwrap();
        } else {
            group.all_reduce(region.full(), Sum).unwrap().wait().unwrap();
            values = region.read(0..len);
        }
        assert_eq!(values, expected);
    }
}

#[test]
fn slices_and_regions_may_meet_in_one_collective() {
    for link in [HostLink::Auto, HostLink::Tcp] {
        run_ranks_with(3, link, GroupOptions::default(), slices_meet_regions);
    }
}

pub(crate) fn ranges(mut group: Group) {
    let ranks = group.world_size() as f32;
    let region = group.allocate::<f32>(100_000).unwrap();
    region.write(0, &vec![1.0; 100_000]);
    let works = [
        group.all_reduce(region.range(10..20), Sum).unwrap(),
        group.all_reduce(region.range(1000..90_000), Sum).unwrap(),
    ];
    for work in works {
        work.wait().unwrap();
    }
    let values = region.read(0..100_000);
    for (index, value) in values.iter().enumerate() {
        let inside = (10..20).contains(&index) || (1000..90_000).contains(&index);
        assert_eq!(*value, if inside { ranks } else { 1.0 }, "{index}");
    }
}

#[test]
fn ranges_of_a_region_leave_the_rest_alone() {
    run_ranks(3, ranges);
}

pub(crate) fn many_in_flight(mut group: Group) {
    let ranks = group.world_size();
    let len = |k: usize| if k.is_multiple_of(5) { 20_000 } else { k % 7 };
    let mut buffers: Vec<Vec<i32>> =
        (0..200).map(|k| inputs::<i32>(group.rank(), len(k))).collect();
    let mut works: Vec<_> =
        buffers.iter_mut().map(|b| group.all_reduce(&mut b[..], Sum).unwrap()).collect();
    while let Some(work) = works.pop() {
        work.wait().unwrap();
    }
    for (k, buffer) in buffers.iter().enumerate() {
        assert_eq!(*buffer, folded::<i32>(ranks, len(k), i32::add), "{k}");
    }
}

#[test]
fn any_number_of_works_in_flight_waited_for_in_any_order() {
    run_ranks(3, many_in_flight);
}

/// The receiver has everything and leaves, often before the sender's own thread has noted the end.
#[test]
fn a_receiver_may_leave_as_soon_as_it_has_its_message() {
    for _ in 0..300 {
        run_ranks(4, |mut group| {
            let (rank, mut message) = (group.rank(), vec![1_u8; 3]);
            match rank {
                0 | 1 => group.send(&message, rank + 2).unwrap().wait().unwrap(),
                _ => group.receive(&mut message[..], rank - 2).unwrap().wait().unwrap(),
            }
        });
    }
}

pub(crate) fn parts(mut group: Group) {
    let (rank, ranks) = (group.rank(), group.world_size());
    let color = if rank == 3 { None } else { Some((rank % 2) as u32) };
    let part = group.split(color, -(rank as i32)).unwrap();
    assert_eq!(part.is_none(), rank == 3);
    if let Some(mut part) = part {
        // Ordered by key: the higher old rank comes first.
        let members: Vec<usize> =
            (0..ranks.min(3)).rev().filter(|other| other % 2 == rank % 2).collect();
        let place = members.iter().position(|member| *member == rank).unwrap();
        assert_eq!((part.rank(), part.world_size()), (place, members.len()));
        let mut sum = [rank as i64];
        part.all_reduce(&mut sum[..], Sum).unwrap().wait().unwrap();
        assert_eq!(sum, [members.iter().sum::<usize>() as i64]);
    }
    let mut twin = group.duplicate().unwrap();
    drop(group);
    let mut sum = [1_i64];
    twin.all_reduce(&mut sum[..], Sum).unwrap().wait().unwrap();
    assert_eq!(sum, [ranks as i64]);
}

#[test]
fn parts_and_duplicates_are_groups_of_their_own() {
    run_ranks(4, parts);
}
