//! What is in order with what: calls on the same memory, messages and collectives; and what waits for nothing.

use phalanx_comm::testing::run_ranks;
use phalanx_comm::{Group, Max, Sum};

use crate::matrix::inputs;

/// Calls on the same part of a region, of which only the last is waited for.
pub(crate) fn in_order_on_one_region(mut group: Group) {
    let ranks = group.world_size();
    for len in [3, 2_000, 60_000] {
        let region = group.allocate_on_host::<f64>(len + 1).unwrap();
        region.write(0, &vec![1.0; len + 1]);
        let mut works: Vec<_> =
            (0..6).map(|_| group.all_reduce(region.range(1..len + 1), Sum).unwrap()).collect();
        works.push(group.broadcast(region.range(0..2), ranks - 1).unwrap());
        works.push(group.all_reduce(region.range(0..1), Sum).unwrap());
        for work in works.into_iter().rev() {
            work.wait().unwrap();
        }
        let ranks = ranks as f64;
        let mut expected = vec![ranks.powi(6); len + 1];
        expected[0] = ranks;
        assert_eq!(region.read(0..len + 1), expected, "{len}");
    }
}

#[test]
fn calls_on_one_region_are_in_order() {
    run_ranks(3, in_order_on_one_region);
}

/// What the caller writes into a region comes after what was started on it before.
pub(crate) fn gathers_after_sums(mut group: Group) {
    let (rank, ranks) = (group.rank(), group.world_size());
    for len in [4, 40_000] {
        let region = group.allocate_on_host::<i32>(len * ranks).unwrap();
        region.write(0, &vec![1; len * ranks]);
        let sum = group.all_reduce(region.full(), Sum).unwrap();
        let gathered = group.all_gather(&vec![rank as i32; len], region.full()).unwrap();
        gathered.wait().unwrap();
        sum.wait().unwrap();
        let expected: Vec<i32> = (0..ranks).flat_map(|r| vec![r as i32; len]).collect();
        assert_eq!(region.read(0..len * ranks), expected, "{len}");
    }
}

#[test]
fn a_gather_into_a_region_comes_after_earlier_calls_on_it() {
    run_ranks(3, gathers_after_sums);
}

/// A call is started whatever else is under way: the last rank begins only when the others have started all of theirs, which cannot
/// end before. A start that waited for another call would wait until its time is over.
pub(crate) fn starts_at_once(mut group: Group) {
    let is_last = group.rank() + 1 == group.world_size();
    let region = group.allocate_on_host::<f32>(2_000_000).unwrap();
    let mut started = group.duplicate().unwrap();
    group.barrier().unwrap().wait().unwrap();
    if is_last {
        started.barrier().unwrap().wait().unwrap();
    }
    let mut works = vec![group.all_reduce(region.range(0..900_000), Sum).unwrap()];
    // Somebody else than this thread may carry it out by now.
    std::thread::yield_now();
    for part in 0..4 {
        let from = 1_000_000 + part * 200_000;
        works.push(group.all_reduce(region.range(from..from + 150_000), Sum).unwrap());
    }
    if !is_last {
        started.barrier().unwrap().wait().unwrap();
    }
    works.into_iter().for_each(|work| work.wait().unwrap());
}

#[test]
fn a_start_waits_for_no_other_call() {
    run_ranks(3, starts_at_once);
}

/// Messages are in no order with collectives, and large ones wait for their receivers.
pub(crate) fn messages_beside_collectives(mut group: Group) {
    let (rank, ranks) = (group.rank(), group.world_size());
    if ranks == 1 {
        return;
    }
    let len = 300_000;
    let mut sum = vec![1_i64; len];
    let mut output = vec![0; len];
    let mine = inputs::<i64>(rank, len);
    let mut small = vec![vec![0_u8; 3]; 12];
    match rank {
        0 => {
            let sent = group.send(&mine, 1).unwrap();
            group.all_reduce(&mut sum[..], Sum).unwrap().wait().unwrap();
            group.receive(&mut output[..], 1).unwrap().wait().unwrap();
            assert_eq!(output, inputs::<i64>(1, len));
            sent.wait().unwrap();
            // More of them than are looked at in one go, sent after a collective that comes later here.
            let mut works: Vec<_> =
                small.iter_mut().map(|one| group.receive(&mut one[..], 1).unwrap()).collect();
            group.all_reduce(&mut output[..], Max).unwrap().wait().unwrap();
            works.drain(..).for_each(|work| work.wait().unwrap());
            assert!(small.iter().enumerate().all(|(k, one)| *one == [k as u8; 3]));
        }
        1 => {
            group.all_reduce(&mut sum[..], Sum).unwrap().wait().unwrap();
            let sent = group.send(&mine, 0).unwrap();
            group.receive(&mut output[..], 0).unwrap().wait().unwrap();
            assert_eq!(output, inputs::<i64>(0, len));
            sent.wait().unwrap();
            group.all_reduce(&mut output[..], Max).unwrap().wait().unwrap();
            for k in 0..small.len() {
                group.send(&[k as u8; 3], 0).unwrap().wait().unwrap();
            }
        }
        _ => {
            group.all_reduce(&mut sum[..], Sum).unwrap().wait().unwrap();
            group.all_reduce(&mut output[..], Max).unwrap().wait().unwrap();
        }
    }
    assert!(sum.iter().all(|sum| *sum == ranks as i64));
}

#[test]
fn a_message_need_not_be_received_before_the_next_collective() {
    run_ranks(3, messages_beside_collectives);
}
