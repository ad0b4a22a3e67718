//! Collectives over MPI in different orders on different ranks: what `gpu_permutations` looks at, on slices and on regions
//! of the host.

use std::time::{Duration, Instant};

use phalanx_comm::Group;

use crate::gpu_permutations::{asked, judge, run, CASES};
use crate::launched::Running;
use crate::mpirun::{mpirun, program};
use crate::permutation_cases::{self, case, common, WORLD};

/// All cases, each on a duplicate of its own, which one that fails takes with it.
pub(crate) fn rank(mut group: Group) {
    let rank = group.rank();
    let cases = asked();
    let mut failed = 0;
    for number in cases.clone() {
        let orders = case(number);
        let order = &orders[rank];
        let mut twin = group.duplicate().expect("a duplicate");
        let run = || {
            if number.is_multiple_of(2) {
                permutation_cases::run(&mut twin, order)
            } else {
                run(twin, order, common(&orders))
            }
        };
        failed += usize::from(judge(number, &orders, order, run));
    }
    println!("never wrong: {failed} of {} failed as they must", cases.count());
}

fn check(first: u64, count: u64) {
    let Some(mut command) = mpirun(WORLD, "mpi permutations") else { return };
    command.env(CASES, format!("{first}+{count}"));
    let (status, output) = Running::start(program(&mut command)).finish(Duration::from_secs(240));
    assert!(status.success(), "{status}\n{output}");
    assert_eq!(output.matches("never wrong").count(), WORLD, "{output}");
    assert!(!output.contains("never wrong: 0 of"), "most cases are to differ:\n{output}");
}

#[test]
fn collectives_over_mpi_in_different_orders_never_hang_and_never_get_wrong_results() {
    check(0, 300);
}

#[test]
#[ignore = "takes minutes: the same ten thousand times"]
fn ten_thousand_permutations_over_mpi() {
    let start = Instant::now();
    for first in (0..10_000).step_by(1000) {
        check(first, 1000);
    }
    println!("10000 permutations in {:.1?}", start.elapsed());
}
