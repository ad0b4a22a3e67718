//! Random sequences of collectives, started without waiting and waited for in random order, against
//! a model.

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks_with;
use phalanx_comm::{Group, GroupOptions, Max, Sum};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

const WORLD: usize = 3;
/// How many sequences a world of processes runs.
const CASES: u32 = 6;

#[derive(Debug, Clone, Copy)]
enum Step {
    AllReduce { len: usize },
    AllReduceRegion { len: usize },
    MaxReduce { len: usize, root: usize },
    Broadcast { len: usize, root: usize },
    AllGather { segment: usize },
    Barrier,
}

fn step(world: usize) -> impl Strategy<Value = Step> {
    // Mostly small, some of several staging rounds, some between.
    let len = prop_oneof![6 => 0_usize..100, 2 => 1000_usize..5000, 1 => 100_000_usize..300_000];
    let root = 0..world;
    prop_oneof![
        len.clone().prop_map(|len| Step::AllReduce { len }),
        len.clone().prop_map(|len| Step::AllReduceRegion { len }),
        (len.clone(), root.clone()).prop_map(|(len, root)| Step::MaxReduce { len, root }),
        (len.clone(), root).prop_map(|(len, root)| Step::Broadcast { len, root }),
        len.prop_map(|segment| Step::AllGather { segment }),
        Just(Step::Barrier),
    ]
}

fn value(rank: usize, step: usize, index: usize) -> i32 {
    i32::try_from((rank * 7919 + step * 104_729 + index * 31) % 1_000_003).unwrap()
}

/// The same sequences on every rank: no seed but the fixed one.
pub(crate) fn fixed_sequences(mut group: Group) {
    let mut runner = TestRunner::deterministic();
    let cases = prop::collection::vec(step(group.world_size()), 1..60);
    for case in 0..CASES {
        let steps = cases.new_tree(&mut runner).unwrap().current();
        let twin = group.duplicate().unwrap();
        run(twin, &steps, case % 2 == 0);
    }
}

fn run(mut group: Group, steps: &[Step], backwards: bool) {
    let (rank, world) = (group.rank(), group.world_size());
    let buffer = |number: usize, len: usize| -> Vec<i32> {
        (0..len).map(|index| value(rank, number, index)).collect()
    };
    let mut buffers: Vec<Vec<i32>> = steps
        .iter()
        .enumerate()
        .map(|(number, step)| match *step {
            Step::AllReduce { len } | Step::MaxReduce { len, .. } => buffer(number, len),
            Step::Broadcast { len, .. } => buffer(number, len),
            Step::AllGather { segment } => vec![0; segment * world],
            Step::AllReduceRegion { .. } | Step::Barrier => Vec::new(),
        })
        .collect();
    let region = group.allocate::<i32>(300_000).unwrap();
    let mut works = Vec::new();
    for ((number, step), slice) in steps.iter().enumerate().zip(&mut buffers) {
        match *step {
            Step::AllReduce { .. } => works.push(group.all_reduce(&mut slice[..], Sum).unwrap()),
            Step::MaxReduce { root, .. } => {
                works.push(group.reduce(&mut slice[..], Max, root).unwrap());
            }
            Step::Broadcast { root, .. } => {
                works.push(group.broadcast(&mut slice[..], root).unwrap());
            }
            Step::AllGather { segment } => {
                let mine = buffer(number, segment);
                works.push(group.all_gather(&mine, &mut slice[..]).unwrap());
            }
            Step::Barrier => works.push(group.barrier().unwrap()),
            Step::AllReduceRegion { len } => {
                region.write(0, &buffer(number, len));
                group.all_reduce(region.range(0..len), Sum).unwrap().wait().unwrap();
                let sum = |index| (0..world).map(|peer| value(peer, number, index)).sum::<i32>();
                assert!(region.read(0..len).into_iter().eq((0..len).map(sum)));
                // Nobody may write the region again before all have read it.
                group.barrier().unwrap().wait().unwrap();
            }
        }
    }
    if backwards {
        works.reverse();
    }
    for work in works {
        work.wait().unwrap();
    }
    for ((number, step), got) in steps.iter().enumerate().zip(&buffers) {
        let at = |index: usize| match *step {
            Step::AllReduce { .. } => (0..world).map(|peer| value(peer, number, index)).sum(),
            Step::MaxReduce { root, .. } if root == rank => {
                (0..world).map(|peer| value(peer, number, index)).max().unwrap()
            }
            Step::Broadcast { root, .. } => value(root, number, index),
            Step::AllGather { segment } => value(index / segment, number, index % segment),
            _ => value(rank, number, index),
        };
        assert!(got.iter().copied().eq((0..got.len()).map(at)), "step {number}: {step:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn any_sequence_gives_what_the_model_gives(
        steps in prop::collection::vec(step(WORLD), 1..60),
        backwards: bool,
        sockets: bool,
    ) {
        let link = if sockets { HostLink::Tcp } else { HostLink::Auto };
        run_ranks_with(WORLD, link, GroupOptions::default(), move |group| {
            run(group, &steps, backwards);
        });
    }
}
