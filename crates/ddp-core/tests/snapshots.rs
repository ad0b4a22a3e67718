//! A training whose ranks die goes on from memory to the bits of the training whose ranks lived: ranks as threads, on nodes each of
//! which has memory of its own.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use phalanx_comm::slots::{memory, Slots, Spot};
use phalanx_comm::testing::{run_ranks, run_ranks_on};
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions, OnError, Origin};
use phalanx_ddp_core::{AdamW, Error, Optimizer, ParameterGroups, Sync, Zero};
use support::{options, wrapped};

/// What survives ranks: the memory of each node's launcher.
type Launchers = Arc<Vec<File>>;

/// A part of a run, on whatever ranks.
#[derive(Clone, Default)]
struct Leg {
    /// The step that it goes to.
    to: u64,
    memory_every: u64,
    /// Where it saves as well, and after how many steps.
    folder: Option<(PathBuf, u64)>,
}

/// Where a rank's part of a leg began, and the bits it ended with.
type Outcome = (Option<(Origin, u64)>, Vec<u32>);

fn launchers(nodes: usize) -> Launchers {
    Arc::new((0..nodes).map(|_| memory().unwrap()).collect())
}

fn quiet(leg: &Leg) -> CheckpointerOptions {
    CheckpointerOptions {
        memory_every_steps: leg.memory_every,
        every_steps: leg.folder.as_ref().map_or(0, |(_, every)| *every),
        heed_signals: false,
        on_error: OnError::Warn,
        ..Default::default()
    }
}

fn train(mut group: Group, slots: Slots, leg: &Leg) -> Outcome {
    let (model, ddp) = wrapped(&mut group, options(Zero::One));
    let rule = AdamW { lr: 0.01, ..AdamW::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
    let folder = leg.folder.as_ref().map(|(folder, _)| folder.clone());
    let mut checkpointer = Checkpointer::with_slots(folder, &ddp, quiet(leg), Some(slots)).unwrap();
    let resumed = checkpointer.resume(Some(&mut optimizer)).unwrap();
    let begun = resumed.map(|resumed| {
        assert_eq!(resumed.values::<u64>().unwrap(), resumed.step * 10);
        (resumed.origin, resumed.step)
    });
    let micro = 12 / group.world_size() as i64;
    for step in begun.map_or(0, |(_, step)| step) + 1..=leg.to {
        let start = step as i64 * 12 + group.rank() as i64 * micro;
        let loss = model.loss_sum(start..start + micro);
        ddp.backward(&loss, micro as f64, Sync::Reduce).unwrap();
        optimizer.step(Some(0.5)).unwrap();
        assert_eq!(
            checkpointer.step(step, Some(&mut optimizer), || step * 10).unwrap(),
            phalanx_ddp_core::checkpoint::Next::Continue
        );
    }
    checkpointer.finish().unwrap();
    (begun, model.bits())
}

/// A leg on ranks of these nodes. All ranks come to the same.
fn run(nodes: &[usize], launchers: &Launchers, leg: &Leg) -> Outcome {
    let (launchers, leg) = (Arc::clone(launchers), leg.clone());
    let outcomes = run_ranks_on(nodes, move |group| {
        let memory = launchers[group.node_rank()].try_clone().unwrap();
        let slots = Slots::new(memory, group.local_rank()).unwrap();
        train(group, slots, &leg)
    });
    assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "ranks are alike");
    outcomes[0].clone()
}

fn to(to: u64) -> Leg {
    Leg { to, memory_every: 2, folder: None }
}

/// The bits after step 7 of a run that nothing happens to.
fn unbroken(nodes: &[usize]) -> Vec<u32> {
    run(nodes, &launchers(3), &to(7)).1
}

/// Changes a byte of every snapshot of a place that `is_hit`, by its slot.
fn damage(memory: &File, place: usize, is_hit: impl Fn(usize) -> bool) {
    let slots = Slots::new(memory.try_clone().unwrap(), place).unwrap();
    for kept in slots.kept().unwrap().into_iter().filter(|kept| is_hit(kept.slot)) {
        slots.damage(&kept, kept.bytes / 2).unwrap();
    }
}

#[test]
fn all_ranks_die_and_their_launchers_live() {
    for nodes in [&[0][..], &[0, 0, 0], &[0, 1], &[0, 0, 1, 1], &[0, 0, 1], &[0, 1, 2]] {
        let launchers = launchers(3);
        assert_eq!(run(nodes, &launchers, &to(1)).0, None);
        assert_eq!(run(nodes, &launchers, &to(5)).0, None, "step 1 was not kept");
        assert_eq!(run(nodes, &launchers, &to(6)).0, Some((Origin::Memory, 4)), "{nodes:?}");
        let (begun, bits) = run(nodes, &launchers, &to(7));
        assert_eq!(begun, Some((Origin::Memory, 6)), "{nodes:?}");
        assert_eq!(bits, unbroken(nodes), "{nodes:?}");
        assert!(launchers.iter().all(has_no_guests), "{nodes:?}");
    }
}

/// Whether the shares that were brought to a machine are gone again.
fn has_no_guests(memory: &File) -> bool {
    let slots = Slots::new(memory.try_clone().unwrap(), 0).unwrap();
    let is_gone = |of_rank| {
        let mut first = [1; 64];
        slots.read(Spot::Guest(of_rank), 0, &mut first).unwrap();
        first == [0; 64]
    };
    (0..4).all(is_gone)
}

#[test]
fn a_node_that_is_lost_with_its_memory_is_no_loss() {
    let nodes = [0, 0, 1, 1];
    for lost in [0, 1] {
        let before = launchers(2);
        run(&nodes, &before, &to(5));
        // Another machine takes its place, and its memory is empty.
        let anew = |node: usize| {
            if node == lost {
                memory().unwrap()
            } else {
                before[node].try_clone().unwrap()
            }
        };
        let after: Launchers = Arc::new((0..2).map(anew).collect());
        let (begun, bits) = run(&nodes, &after, &to(7));
        assert_eq!(begun, Some((Origin::Memory, 4)), "node {lost}");
        assert_eq!(bits, unbroken(&nodes), "node {lost}");
        // None does, and what is left goes on by itself.
        let left = Arc::new(vec![before[1 - lost].try_clone().unwrap()]);
        assert_eq!(run(&[0, 0], &left, &to(9)).0, Some((Origin::Memory, 6)), "node {lost}");
        assert_eq!(run(&[0, 0], &left, &to(9)).0, Some((Origin::Memory, 8)), "node {lost}");
    }
}

#[test]
fn a_damaged_share_is_taken_from_the_neighbour() {
    let (nodes, launchers) = ([0, 0, 1, 1], launchers(2));
    run(&nodes, &launchers, &to(5));
    damage(&launchers[0], 1, |slot| slot < 2);
    let (begun, bits) = run(&nodes, &launchers, &to(7));
    assert_eq!((begun, bits), (Some((Origin::Memory, 4)), unbroken(&nodes)));
}

#[test]
fn what_is_damaged_everywhere_leaves_the_former_and_then_the_disk() {
    let (nodes, launchers) = ([0, 0, 1, 1], launchers(2));
    let folder = tempfile::tempdir().unwrap();
    let at =
        |to, every| Leg { to, memory_every: 2, folder: Some((folder.path().to_owned(), every)) };
    run(&nodes, &launchers, &at(3, 3));
    run(&nodes, &launchers, &at(7, 0)); // from 3: memory has 4 and 6
    let newest = |place: usize, pair: usize, node: usize| {
        let slots = Slots::new(launchers[node].try_clone().unwrap(), place).unwrap();
        let kept = slots.kept().unwrap().into_iter().filter(|kept| kept.slot / 2 == pair);
        kept.max_by_key(|kept| kept.stamp.step).unwrap().slot
    };
    let (own, copy) = (newest(1, 0, 0), newest(1, 1, 1));
    damage(&launchers[0], 1, |slot| slot == own);
    damage(&launchers[1], 1, |slot| slot == copy);
    assert_eq!(run(&nodes, &launchers, &at(4, 0)).0, Some((Origin::Memory, 4)));
    damage(&launchers[0], 1, |slot| slot != own);
    damage(&launchers[1], 1, |slot| slot != copy);
    let (begun, bits) = run(&nodes, &launchers, &at(7, 0));
    assert_eq!((begun, bits), (Some((Origin::Disk, 3)), unbroken(&nodes)));
}

#[test]
fn the_newest_of_disk_and_memory_is_taken() {
    let (nodes, launchers) = ([0, 0], launchers(1));
    let folder = tempfile::tempdir().unwrap();
    let leg = |to| Leg { to, memory_every: 2, folder: Some((folder.path().to_owned(), 3)) };
    run(&nodes, &launchers, &leg(3));
    assert_eq!(run(&nodes, &launchers, &leg(5)).0, Some((Origin::Disk, 3)));
    assert_eq!(run(&nodes, &launchers, &leg(6)).0, Some((Origin::Memory, 4)));
    // Both have step 6.
    let (begun, bits) = run(&nodes, &launchers, &leg(7));
    assert_eq!((begun, bits), (Some((Origin::Disk, 6)), unbroken(&nodes)));
}

#[test]
fn a_snapshot_that_ranks_cannot_keep_leaves_the_former() {
    let nodes = [0, 1];
    // Rank 0 has a copy of rank 1's share, unless it cannot keep it either.
    for (full, step) in [(&[1][..], 6), (&[0, 1], 2)] {
        let launchers = launchers(2);
        run(&nodes, &launchers, &to(3));
        let of_node = |(node, memory): (usize, &File)| match full.contains(&node) {
            true => refusing(memory),
            false => memory.try_clone().unwrap(),
        };
        let some_full: Launchers = Arc::new(launchers.iter().enumerate().map(of_node).collect());
        assert_eq!(run(&nodes, &some_full, &to(7)).0, Some((Origin::Memory, 2)));
        let (begun, bits) = run(&nodes, &launchers, &to(7));
        assert_eq!((begun, bits), (Some((Origin::Memory, step)), unbroken(&nodes)));
        for memory in launchers.iter() {
            // Own and neighbour's, two halves each: no more is ever kept.
            let slots = Slots::new(memory.try_clone().unwrap(), 0).unwrap();
            assert!(slots.kept().unwrap().len() <= 4);
        }
    }
}

/// The same memory, which takes nothing: as one that is full does.
fn refusing(memory: &File) -> File {
    File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap()
}

#[test]
fn a_rank_without_a_launcher_of_ours_is_refused_on_all_ranks() {
    let refused = run_ranks(3, |mut group| {
        let rank = group.rank();
        let (_model, ddp) = wrapped(&mut group, options(Zero::Off));
        let slots = (rank != 1).then(|| Slots::new(memory().unwrap(), 0).unwrap());
        let options = quiet(&to(1));
        let error = Checkpointer::with_slots(None, &ddp, options, slots).unwrap_err();
        assert!(matches!(error, Error::NoSnapshotMemory { rank: 1, .. }));
        error.to_string()
    });
    assert!(refused
        .iter()
        .all(|text| text.starts_with("rank 1 has no memory for snapshots: only")));
}
