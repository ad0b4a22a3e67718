//! Collectives in different orders on different ranks: never a hang, never a result that is not that of the order
//! which all ranks have in common. Every case is made anew from its number, so a failure names its case.

#[path = "support/permutation_cases.rs"]
mod permutation_cases;

use std::time::Instant;

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Error, GroupOptions};

use permutation_cases::{case, common, longest, run, WORLD};

fn check(number: u64) {
    let orders = case(number);
    let link = if number.is_multiple_of(8) { HostLink::Tcp } else { HostLink::Auto };
    let ranks = orders.clone();
    let ended = run_ranks_with(WORLD, link, GroupOptions::default(), move |mut group| {
        let order = &ranks[group.rank()];
        run(&mut group, order)
    });
    let (longest, common) = (longest(&orders), common(&orders));
    for (rank, (done, error)) in ended.iter().enumerate() {
        // Whoever has nothing left to call when the others differ ends well.
        let all = orders[rank].len();
        assert!(*done <= common.min(all), "case {number}: rank {rank} went too far: {orders:?}");
        assert_eq!(error.is_none(), *done == all, "case {number}: rank {rank}: {error:?}");
        // A difference is seen: no time runs out.
        let known = matches!(error, None | Some(Error::OutOfStep { .. } | Error::PeerLeft { .. }));
        assert!(known, "case {number}: rank {rank}: {error:?}");
    }
    let differ = common < longest;
    let failed = ended.iter().any(|(_, error)| error.is_some());
    assert_eq!(failed, differ, "case {number}: {orders:?}");
}

fn check_all(cases: std::ops::Range<u64>) {
    let differ = |number: &u64| case(*number).windows(2).any(|pair| pair[0] != pair[1]);
    assert!(cases.clone().filter(differ).count() > 10, "most cases are to differ");
    cases.for_each(check);
}

#[test]
fn ranks_in_different_orders_never_hang_and_never_get_wrong_results() {
    check_all(0..300);
}

#[test]
#[ignore = "takes minutes: the same ten thousand times"]
fn ten_thousand_permutations() {
    let start = Instant::now();
    check_all(0..10_000);
    eprintln!("10000 permutations in {:.1?}", start.elapsed());
}
