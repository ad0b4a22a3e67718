//! Two machines of two ranks: shared memory inside, TCP between.

use std::time::Duration;

use crate::machines::machines;
use phalanx_comm::{Group, GroupOptions, Sum, Work};

/// What a rank does.
pub(crate) fn rank() {
    let options = GroupOptions { timeout: Duration::from_secs(20), ..GroupOptions::default() };
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let (rank, world) = (group.rank(), group.world_size());
    // Values whose sum depends on the order: only ((g0 + g1) + g2) + g3 gives these bits.
    let value = |of: usize, i: usize| ((i * 7919 + of * 104_729) % 1_000_003) as f32 / 977.0;
    let expected = |i: usize| (1..world).fold(value(0, i), |sum, of| sum + value(of, i));
    for len in [0, 1, 5, 1000, 10_007, 1_000_004, 4_000_000] {
        let mine: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
        let right = |values: &[f32]| values.iter().enumerate().all(|(i, v)| *v == expected(i));
        let mut slice = mine.clone();
        group.all_reduce(&mut slice[..], Sum).and_then(Work::wait).expect("slice");
        assert!(right(&slice), "slice of {len}");
        let region = group.allocate::<f32>(len).expect("memory");
        region.write(0, &mine);
        group.all_reduce(region.full(), Sum).and_then(Work::wait).expect("region");
        assert!(right(&region.read(0..len)), "region of {len}");
        if len % world == 0 {
            let segment = len / world;
            let own = rank * segment..(rank + 1) * segment;
            region.write(0, &mine);
            group.reduce_scatter_in_place(region.full(), Sum).and_then(Work::wait).expect("rs");
            let got = region.read(own.clone());
            assert!(got.iter().zip(own.clone()).all(|(v, i)| *v == expected(i)));
            group.all_gather_in_place(region.full()).and_then(Work::wait).expect("ag");
            assert!(right(&region.read(0..len)), "gathered {len}");
        }
        group.broadcast(&mut slice[..], 3).and_then(Work::wait).expect("broadcast");
    }
    println!("all right: {} of {} here", group.local_rank(), group.local_world_size());
}

#[test]
fn two_machines_of_two_ranks_give_the_bits_of_one_process() {
    let Some(machines) = machines() else { return };
    // In blocks, and round robin: a stage of two ranks each, and four of one.
    for place in [[0, 0, 1, 1], [0, 1, 0, 1]] {
        for ended in machines.start(&place, "mixed").finish(Duration::from_secs(60)) {
            assert!(ended.status.success(), "{}", ended.output);
            assert!(ended.output.contains("all right"), "{}", ended.output);
        }
    }
}
