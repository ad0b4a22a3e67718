//! What a rank checks of collectives on GPU memory: on a GPU by the example `gpu_check`, and without one
//! by this suite, on a stand-in for the libraries.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small whole numbers"
)]

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use phalanx_comm::{
    Avg, Element, Float, Group, Max, Min, Product, ReduceOp, Region, ScaledSum, Sum, Work,
};

/// What a rank checks; says what it saw.
pub(crate) type DeviceCheck = fn(&mut Group) -> Result<String>;

pub(crate) const CHECKS: [(&str, DeviceCheck); 15] = [
    ("f32 collectives", |group| floats::<f32>(group, |x| x as f32, |x| f64::from(*x), 24)),
    ("f64 collectives", |group| floats::<f64>(group, |x| x, |x| *x, 53)),
    ("f16 collectives", |group| floats(group, half::f16::from_f64, |x| x.to_f64(), 11)),
    ("bf16 collectives", |group| floats(group, half::bf16::from_f64, |x| x.to_f64(), 8)),
    ("i32 collectives", |group| integers::<i32>(group, |x| x as i32)),
    ("i64 collectives", |group| integers::<i64>(group, |x| x as i64)),
    ("u8 collectives", |group| integers::<u8>(group, |x| x as u8)),
    ("sizes", sizes),
    ("many in flight", many_in_flight),
    ("a message after a sum", message_after_sum),
    ("coalesced", coalesced),
    ("time of the GPU", marks),
    ("sub-groups", sub_groups),
    ("host memory beside it", host_memory),
    ("misuse", misuse),
];

const LEN: usize = 12 * 1024;

/// Rank `r`'s element `i`: small, so that sums are exact in every type.
fn value(rank: usize, index: usize) -> f64 {
    (rank + 1 + index % 5) as f64
}

/// A region of the group's GPU with this rank's values.
fn filled<T: Element>(group: &mut Group, of: impl Fn(f64) -> T) -> Result<Region<T>> {
    let region = group.allocate::<T>(LEN)?;
    ensure!(region.is_on_device(), "the group's memory is on the host");
    let rank = group.rank();
    region.write(0, &(0..LEN).map(|index| of(value(rank, index))).collect::<Vec<_>>());
    Ok(region)
}

fn expect<T: Element>(
    what: &str,
    region: &Region<T>,
    range: std::ops::Range<usize>,
    expected: impl Fn(usize) -> f64,
    to_f64: impl Fn(&T) -> f64,
    tolerance: f64,
) -> Result<()> {
    for (index, actual) in range.clone().zip(region.read(range)) {
        let (actual, expected) = (to_f64(&actual), expected(index));
        let wrong = (actual - expected).abs() > tolerance * expected.abs();
        ensure!(!wrong, "{what}: element {index} is {actual}, expected {expected}");
    }
    Ok(())
}

/// Of a type with `digits` binary digits.
fn floats<T: Float>(
    group: &mut Group,
    of: impl Fn(f64) -> T + Copy,
    to_f64: impl Fn(&T) -> f64 + Copy,
    digits: i32,
) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    // Terms are positive: each of the `ranks - 1` operations and of two for a factor is off by half a unit in its last digit.
    let tolerance = (ranks + 1) as f64 * 2.0_f64.powi(-digits);
    let all = |index: usize| (0..ranks).map(move |peer| value(peer, index));
    let sum = |index: usize| all(index).sum::<f64>();
    let segment = LEN / ranks;
    let own = rank * segment..(rank + 1) * segment;

    let region = filled(group, of)?;
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    expect("all_reduce sum", &region, 0..LEN, sum, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Avg)?.synchronize()?;
    expect("all_reduce avg", &region, 0..LEN, |i| sum(i) / ranks as f64, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), ScaledSum(0.25))?.synchronize()?;
    expect("all_reduce scaled", &region, 0..LEN, |i| sum(i) * 0.25, to_f64, tolerance)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Max)?.synchronize()?;
    let most = |index| all(index).fold(f64::MIN, f64::max);
    expect("all_reduce max", &region, 0..LEN, most, to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Min)?.synchronize()?;
    let least = |index| all(index).fold(f64::MAX, f64::min);
    expect("all_reduce min", &region, 0..LEN, least, to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Product)?.synchronize()?;
    let product = |index| all(index).product();
    expect("all_reduce product", &region, 0..LEN, product, to_f64, tolerance)?;

    let region = filled(group, of)?;
    let used = LEN / ranks * ranks;
    group.reduce_scatter_in_place(region.range(0..used), Sum)?.synchronize()?;
    expect("reduce_scatter", &region, own, sum, to_f64, tolerance)?;
    let (input, output) = (filled(group, of)?, filled(group, of)?);
    let (from, to) = (input.range(0..used), output.range(0..segment));
    group.reduce_scatter(from, to, Sum)?.synchronize()?;
    let mine = |index| sum(rank * segment + index);
    expect("reduce_scatter into another", &output, 0..segment, mine, to_f64, tolerance)?;
    let root = ranks - 1;
    let region = filled(group, of)?;
    group.reduce(region.full(), Sum, root)?.synchronize()?;
    if rank == root {
        expect("reduce", &region, 0..LEN, sum, to_f64, tolerance)?;
    }
    moves(group, of, to_f64)?;
    Ok(format!("{LEN} elements"))
}

fn integers<T>(group: &mut Group, of: impl Fn(f64) -> T + Copy) -> Result<String>
where
    Sum: ReduceOp<T>,
    T: Element + TryInto<i64>,
{
    let ranks = group.world_size();
    let to_f64 = |x: &T| (*x).try_into().map_or(f64::NAN, |x: i64| x as f64);
    let region = filled(group, of)?;
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    let sum = |index| (0..ranks).map(|peer| value(peer, index)).sum();
    expect("all_reduce sum", &region, 0..LEN, sum, to_f64, 0.0)?;
    moves(group, of, to_f64)?;
    Ok(format!("{LEN} elements"))
}

/// The collectives that only move data.
fn moves<T: Element>(
    group: &mut Group,
    of: impl Fn(f64) -> T + Copy,
    to_f64: impl Fn(&T) -> f64 + Copy,
) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let segment = LEN / ranks;
    let used = segment * ranks;
    let root = ranks - 1;

    let region = filled(group, of)?;
    group.broadcast(region.full(), root)?.synchronize()?;
    expect("broadcast", &region, 0..LEN, |index| value(root, index), to_f64, 0.0)?;
    let region = filled(group, of)?;
    group.all_gather_in_place(region.range(0..used))?.synchronize()?;
    let gathered = |index| value(index / segment, index);
    expect("all_gather", &region, 0..used, gathered, to_f64, 0.0)?;
    let (input, output) = (filled(group, of)?, filled(group, of)?);
    let (from, to) = (input.range(0..used), output.range(0..used));
    group.all_to_all(from, to)?.synchronize()?;
    let exchanged = |index| value(index / segment, rank * segment + index % segment);
    expect("all_to_all", &output, 0..used, exchanged, to_f64, 0.0)?;
    let (input, output) = (filled(group, of)?, filled(group, of)?);
    let (from, to) = (input.range(0..segment), output.range(0..used));
    group.all_gather(from, to)?.synchronize()?;
    let gathered = |index| value(index / segment, index % segment);
    expect("all_gather into another", &output, 0..used, gathered, to_f64, 0.0)?;
    for root in [0, ranks - 1] {
        let (input, output) = (filled(group, of)?, filled(group, of)?);
        let at_root = (rank == root).then(|| output.range(0..used));
        group.gather(input.range(0..segment), at_root, root)?.synchronize()?;
        if rank == root {
            expect("gather", &output, 0..used, gathered, to_f64, 0.0)?;
        }
        let (input, output) = (filled(group, of)?, filled(group, of)?);
        let at_root = (rank == root).then(|| input.range(0..used));
        group.scatter(at_root, output.range(0..segment), root)?.synchronize()?;
        let scattered = |index| value(root, rank * segment + index);
        expect("scatter", &output, 0..segment, scattered, to_f64, 0.0)?;
    }
    if ranks > 1 {
        let (message, received) = (filled(group, of)?, filled(group, of)?);
        let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        // Even ranks send first: NCCL's send waits for its receiver.
        if rank % 2 == 0 {
            group.send(message.full(), next)?.synchronize()?;
            group.receive(received.full(), previous)?.synchronize()?;
        } else {
            group.receive(received.full(), previous)?.synchronize()?;
            group.send(message.full(), next)?.synchronize()?;
        }
        let sent = |index| value(previous, index);
        expect("send and receive", &received, 0..LEN, sent, to_f64, 0.0)?;
    }
    group.barrier()?.wait()?;
    Ok(())
}

/// Nothing, one element, odd lengths, parts that do not begin at the beginning.
fn sizes(group: &mut Group) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    for len in [0, 1, 2, 3, 255, 1021, 70_001] {
        let region = group.allocate::<f32>(len + 7)?;
        let start = len.min(5);
        let inputs: Vec<f32> = (0..len).map(|index| value(rank, index) as f32).collect();
        region.write(start, &inputs);
        group.all_reduce(region.range(start..start + len), Sum)?.synchronize()?;
        let sum = |index: usize| (0..ranks).map(|peer| value(peer, index - start)).sum();
        expect("a part", &region, start..start + len, sum, |x| f64::from(*x), 0.0)?;
        let rest = region.read(start + len..len + 7);
        ensure!(rest.iter().all(|x| *x == 0.0), "{len}: wrote behind the range: {rest:?}");
    }
    Ok("0 to 70001 elements".to_owned())
}

/// Calls on one region, one after the other, of which only the last is waited for.
fn many_in_flight(group: &mut Group) -> Result<String> {
    let ranks = group.world_size();
    let region = group.allocate::<f64>(513)?;
    region.write(0, &[1.0; 513]);
    let rounds = 8;
    let works: Vec<Work<'_>> =
        (0..rounds).map(|_| group.all_reduce(region.full(), Sum)).collect::<Result<_, _>>()?;
    works.into_iter().try_for_each(Work::synchronize)?;
    let expected = (ranks as f64).powi(rounds);
    ensure!(region.read(0..513) == vec![expected; 513], "not {ranks}^{rounds}");
    Ok(format!("{rounds} calls"))
}

/// What is sent is what the call before has left there.
fn message_after_sum(group: &mut Group) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    if ranks == 1 {
        return Ok("one rank sends nothing".to_owned());
    }
    for round in 1..6 {
        let (a, b) = (filled(group, |x| x)?, filled(group, |x| x)?);
        let sum = group.all_reduce(a.full(), Sum)?;
        let message = match rank {
            0 => Some(group.send(a.full(), 1)?),
            1 => Some(group.receive(b.full(), 0)?),
            _ => None,
        };
        message.into_iter().chain([sum]).try_for_each(Work::synchronize)?;
        let all = |index: usize| (0..ranks).map(|peer| value(peer, index)).sum();
        if rank == 1 {
            expect(&format!("round {round}"), &b, 0..LEN, all, |x| *x, 0.0)?;
        }
    }
    Ok(format!("{LEN} elements"))
}

/// Several calls as one; messages in a circle that would wait for each other one by one.
fn coalesced(group: &mut Group) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
    for round in 0..3_usize {
        let (a, b) = (filled(group, |x| x as f32)?, filled(group, |x| x)?);
        let (message, received) = (filled(group, |x| x as f32)?, filled(group, |x| x as f32)?);
        let works = group.coalesced(|group| {
            let mut works =
                vec![group.all_reduce(a.full(), Sum)?, group.all_reduce(b.full(), ScaledSum(0.5))?];
            if ranks > 1 {
                works.push(group.send(message.full(), next)?);
                works.push(group.receive(received.full(), previous)?);
            }
            if round == 1 {
                // Whoever waits inside gets what was called so far.
                works.drain(..).try_for_each(Work::synchronize)?;
            }
            Ok(works)
        })?;
        works.into_iter().try_for_each(Work::synchronize)?;
        let sum = |index: usize| (0..ranks).map(|peer| value(peer, index)).sum::<f64>();
        expect("the first", &a, 0..LEN, sum, |x| f64::from(*x), 0.0)?;
        expect("the second", &b, 0..LEN, |index| sum(index) * 0.5, |x| *x, 0.0)?;
        if ranks > 1 {
            let sent = |index| value(previous, index);
            expect("a message", &received, 0..LEN, sent, |x| f64::from(*x), 0.0)?;
        }
    }
    Ok("two reductions and two messages".to_owned())
}

/// The GPU's time of a collective is more than nothing, and less than the host's.
fn marks(group: &mut Group) -> Result<String> {
    let limit = Duration::from_secs(10);
    let region = group.allocate::<f32>(1 << 20)?;
    let began = Instant::now();
    let start = group.mark()?.context("a group with a GPU")?;
    group.all_reduce(region.full(), Sum)?.wait()?;
    let end = group.mark()?.context("a group with a GPU")?;
    let took = start.time_until(&end, limit)?;
    let whole = began.elapsed();
    ensure!(!took.is_zero() && took <= whole, "{took:?} of {whole:?}");
    ensure!(end.time_until(&start, limit)?.is_zero(), "time goes backwards");
    Ok(format!("{took:.1?} of 4 MiB"))
}

/// What is refused leaves the group alive.
fn misuse(group: &mut Group) -> Result<String> {
    let region = group.allocate::<f32>(LEN)?;
    let on_host = vec![0_f32; LEN * group.world_size()];
    let error = group.all_gather(&on_host[..LEN], region.range(0..0)).err();
    let said = error.context("mixed memory was taken")?.to_string();
    ensure!(said.contains("GPU"), "{said}");
    let here = group.allocate_on_host::<f32>(LEN)?;
    let error = group.send(here.full(), 0).err();
    let said = error.context("a region of the host was sent as the device's")?.to_string();
    ensure!(said.contains("GPU"), "{said}");
    let longer = region.range(0..LEN);
    let error = group.all_gather(region.range(0..LEN - 1), longer).err();
    ensure!(group.world_size() == 1 || error.is_some(), "lengths that do not fit");
    group.all_reduce(region.full(), Sum)?.synchronize()?;
    Ok("refused, and the group lives".to_owned())
}

/// Parts in reversed order, parts of parts, ranks in no part; all beside the undivided group.
fn sub_groups(group: &mut Group) -> Result<String> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let sum_of_ranks = |part: &mut Group| -> Result<f32> {
        let region = part.allocate::<f32>(1000)?;
        region.write(0, &[rank as f32; 1000]);
        part.all_reduce(region.full(), Sum)?.synchronize()?;
        let sums = region.read(0..1000);
        ensure!(sums == vec![sums[0]; 1000], "not one sum");
        Ok(sums[0])
    };
    let expect = |sum: f32, is_in: &dyn Fn(usize) -> bool| {
        let expected: f32 = (0..ranks).filter(|peer| is_in(*peer)).map(|peer| peer as f32).sum();
        ensure!(sum.to_bits() == expected.to_bits(), "{sum} is not the sum of {expected}");
        Ok(())
    };
    let color = u32::MAX - u32::try_from(rank % 2)?;
    let backwards = i32::try_from(ranks - rank)?;
    let mut half = group.split(Some(color), backwards)?.context("this rank has a color")?;
    let members = (0..ranks).filter(|peer| peer % 2 == rank % 2);
    ensure!(half.rank() == members.filter(|peer| *peer > rank).count(), "not backwards");
    expect(sum_of_ranks(&mut half)?, &|peer| peer % 2 == rank % 2)?;
    let mut twin = half.duplicate()?;
    expect(sum_of_ranks(&mut twin)?, &|peer| peer % 2 == rank % 2)?;
    let but_one = group.split((rank != 0).then_some(3), 0)?;
    ensure!(but_one.is_some() == (rank != 0), "rank 0 is in no part");
    if let Some(mut but_one) = but_one {
        expect(sum_of_ranks(&mut but_one)?, &|peer| peer != 0)?;
    }
    drop(half);
    expect(sum_of_ranks(&mut twin)?, &|peer| peer % 2 == rank % 2)?;
    expect(sum_of_ranks(group)?, &|_| true)?;
    Ok(format!("of {} rank(s)", twin.world_size()))
}

fn host_memory(group: &mut Group) -> Result<String> {
    let mut values = vec![group.rank() as f64; 100];
    group.all_reduce(&mut values[..], Sum)?.wait()?;
    let ranks = group.world_size();
    ensure!(values == vec![(ranks * (ranks - 1) / 2) as f64; 100], "a wrong sum");
    Ok("over the host backend".to_owned())
}

/// Last: it ends the group. Ranks that call different things hear of it, and nothing hangs.
pub(crate) fn out_of_step(group: &mut Group) -> Result<String> {
    if group.world_size() == 1 {
        return Ok("one rank cannot be".to_owned());
    }
    let region = group.allocate::<f32>(1024)?;
    let start = Instant::now();
    let work = if group.rank() == 0 {
        group.all_reduce(region.full(), Sum)?
    } else {
        group.broadcast(region.full(), 0)?
    };
    match work.synchronize() {
        Ok(()) => bail!("different calls went through"),
        Err(error) => {
            ensure!(!matches!(error, phalanx_comm::Error::Timeout { .. }), "not heard: {error}");
            ensure!(error.to_string().contains("all_reduce"), "{error}");
            Ok(format!("heard after {:.3} s", start.elapsed().as_secs_f64()))
        }
    }
}
