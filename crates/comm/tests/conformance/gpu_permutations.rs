//! Collectives on GPU memory in different orders on different ranks, on the stand-in for NCCL: never a hang, never a
//! result that is not that of the order which all ranks have in common, and no memory changed by a call that fails.

use std::ops::Range;
use std::time::{Duration, Instant};

use phalanx_comm::environment::World;
use phalanx_comm::rendezvous::connect;
use phalanx_comm::{Backend, Error, Group, GroupOptions, Max, Sum, Work};

use crate::permutation_cases::{case, common, expected, value, Call, Kind, LEN_MAX, WORLD};
use crate::without_gpu::world_with;

/// What a case may take: a mismatch is seen at once, and cores are few.
const MEET_MAX: Duration = Duration::from_secs(60);
pub(crate) const CASES: &str = "PHALANX_CASES";

/// All cases, each in a group of its own: one that fails takes with it what else its process has of NCCL.
pub(crate) fn rank(options: &GroupOptions) {
    let world = World::from_env().expect("of the test");
    let cases = asked();
    let mut failed = 0;
    for number in cases.clone() {
        let orders = case(number);
        // The ranks meet anew, as if the job had been restarted.
        let attempt = u32::try_from(number).expect("small");
        let world = World { restart_count: attempt, ..world.clone() };
        let order = &orders[world.rank];
        let store = connect(&world, Instant::now() + MEET_MAX).expect("a store");
        let group = Group::new(world, store, options.clone()).expect("they meet");
        failed += usize::from(judge(number, &orders, order, || run(group, order, common(&orders))));
    }
    println!("never wrong: {failed} of {} failed as they must", cases.count());
}

/// The cases that a rank is asked for.
pub(crate) fn asked() -> Range<u64> {
    let asked = std::env::var(CASES).expect("of the test");
    let (first, count): (u64, u64) = asked
        .split_once('+')
        .and_then(|(first, count)| Some((first.parse().ok()?, count.parse().ok()?)))
        .expect("FIRST+COUNT");
    first..first + count
}

/// Runs a case and looks at how far a rank came, and why not farther; whether it failed, as it must.
pub(crate) fn judge(
    number: u64,
    orders: &[Vec<Call>],
    order: &[Call],
    run: impl FnOnce() -> (usize, Option<Error>),
) -> bool {
    let (done, error) = run();
    assert!(done <= common(orders).min(order.len()), "case {number} went too far: {orders:?}");
    // Whoever has nothing left to call when the others differ ends well.
    assert_eq!(error.is_none(), done == order.len(), "case {number}: {error:?}: {orders:?}");
    // A difference is seen: no time runs out.
    let known = matches!(error, None | Some(Error::OutOfStep { .. } | Error::PeerLeft { .. }));
    assert!(known, "case {number}: {error:?}");
    error.is_some()
}

/// Runs a rank's order, of which all have the first `common` calls; how many calls ended well, and what the first other one said.
/// In memory that was allocated: the GPU's where the group has one.
pub(crate) fn run(mut group: Group, order: &[Call], common: usize) -> (usize, Option<Error>) {
    let rank = group.rank();
    // Allocating is a collective, too: once, for the longest.
    let input = group.allocate::<i32>(LEN_MAX).expect("memory");
    let output = group.allocate::<i32>(LEN_MAX * WORLD).expect("memory");
    for (done, call) in order.iter().enumerate() {
        let mine: Vec<i32> = (0..call.len).map(|index| value(rank, *call, index)).collect();
        let mut before = vec![-1; call.len * WORLD];
        let in_place = call.kind == Kind::Gather && group.backend() == Backend::Mpi;
        if in_place {
            before[rank * call.len..][..call.len].copy_from_slice(&mine);
        }
        input.write(0, &mine);
        output.write(0, &before);
        let into = output.range(0..before.len());
        let own = input.range(0..call.len);
        group.tagged(&format!("call {}", call.number));
        let work = match call.kind {
            Kind::Sum => group.all_reduce(own, Sum),
            Kind::Max => group.all_reduce(own, Max),
            Kind::Broadcast => group.broadcast(own, 0),
            Kind::Gather if in_place => group.all_gather_in_place(into),
            Kind::Gather => group.all_gather(own, into),
            Kind::Barrier => group.barrier(),
        };
        let ended = work.and_then(Work::synchronize);
        let (own, all) = (input.read(0..call.len), output.read(0..before.len()));
        if let Err(error) = ended {
            // One that all ranks have called may be under way when a later one differs, and is aborted with its group.
            let is_whole = own == mine && all == before;
            assert!(done < common || is_whole, "{call:?}: memory changed though it differs");
            return (done, Some(error));
        }
        let into = if call.kind == Kind::Gather { all } else { own };
        let right = (0..into.len()).map(|index| expected(rank, *call, index));
        assert!(into.iter().copied().eq(right), "{call:?}: a wrong result that nobody noticed");
    }
    (order.len(), None)
}

fn check(first: u64, count: u64) {
    let cases = format!("{first}+{count}");
    let world = world_with(WORLD, "nccl permutations", |command, _| {
        command.env(CASES, &cases);
    });
    // All of them: the first that fails often tells only of another one.
    let is_good = |(code, said): &(_, String)| *code == Some(0) && said.contains("never wrong");
    assert!(world.iter().all(is_good), "{world:#?}");
    let failed = |output: &String| !output.contains("never wrong: 0 of");
    assert!(world.iter().any(|(_, output)| failed(output)), "most cases are to differ: {world:?}");
}

#[test]
fn gpu_collectives_in_different_orders_never_hang_and_never_get_wrong_results() {
    check(0, 60);
}

#[test]
#[ignore = "takes minutes: the same a thousand times"]
fn a_thousand_permutations_on_gpu_memory() {
    let start = Instant::now();
    for first in (0..1000).step_by(100) {
        check(first, 100);
    }
    println!("1000 permutations in {:.1?}", start.elapsed());
}
