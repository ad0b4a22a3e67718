//! Every operation of a save fails once.

use std::path::Path;
use std::sync::Arc;

use phalanx_checkpoint::fs::{Failing, Failure, Fs, Recording};
use phalanx_checkpoint::{Alone, Folder, Keep, Progress, Ranks, Saver, SaverOptions};

use crate::support::{check, on_ranks, save};

const ROOT: &str = "/ckpt";

fn saver(fs: &Arc<dyn Fs>) -> Saver {
    let keep = Keep { last: 1, every: None };
    let options = SaverOptions { keep, ..SaverOptions::default() };
    Saver::with_fs(ROOT, options, Arc::clone(fs)).expect("a saver")
}

/// Saves step 20 beside step 10 with a failure at one operation; whether there was such an operation.
fn fails_at(failure: Failure, number: usize) -> bool {
    let disk: Arc<dyn Fs> = Arc::new(Recording::default());
    save(&mut saver(&disk), &mut Alone, 10);
    let failing = Failing::new(Arc::clone(&disk), failure, number);
    let broken: Arc<dyn Fs> = Arc::new(failing.clone());
    let progress = save(&mut saver(&broken), &mut Alone, 20);
    if !failing.has_failed() {
        return false;
    }
    let folder = Folder::with_fs(ROOT, Arc::clone(&disk));
    let newest = folder.newest().expect("a list").expect("one of the two");
    check(&newest, newest.step());
    assert!(newest.verify().damage.is_empty());
    match progress {
        Progress::Saved { step: 20, .. } => assert_eq!(newest.step(), 20, "operation {number}"),
        Progress::Failed { step: 20, rank: 0, reason } => {
            let expected = match failure {
                Failure::Full => "no space left on /ckpt: needs ",
                Failure::Broken => "Input/output error",
            };
            assert!(reason.contains(expected), "operation {number}: {reason}");
            let names = disk.list(Path::new(ROOT)).expect("a list");
            assert!(names.contains(&"step-00000010".to_owned()), "{names:?}");
            let is_left = |name: &String| name.contains(".tmp-");
            assert!(!names.iter().any(is_left), "operation {number}: {names:?}");
        }
        other => panic!("operation {number}: {other:?}"),
    }
    let after = save(&mut saver(&disk), &mut Alone, 30);
    assert!(matches!(after, Progress::Saved { step: 30, .. }), "{after:?}");
    assert_eq!(
        disk.list(Path::new(ROOT)).expect("a list"),
        ["step-00000030"],
        "operation {number}"
    );
    true
}

/// Two ranks save step 20 beside step 10, with a failure at one operation of one of them; whether there was such an operation.
fn rank_fails_at(rank: usize, number: usize) -> bool {
    let disk: Arc<dyn Fs> = Arc::new(Recording::default());
    let failing = Failing::new(Arc::clone(&disk), Failure::Broken, number);
    let ended = on_ranks(2, |ranks| {
        save(&mut saver(&disk), ranks, 10);
        let broken: Arc<dyn Fs> = Arc::new(failing.clone());
        let mine = if ranks.rank() == rank { &broken } else { &disk };
        save(&mut saver(mine), ranks, 20)
    });
    if !failing.has_failed() {
        return false;
    }
    assert_eq!(ended[0], ended[1], "operation {number} of rank {rank}");
    let newest = Folder::with_fs(ROOT, Arc::clone(&disk)).newest().expect("a list").expect("one");
    check(&newest, newest.step());
    match &ended[0] {
        Progress::Saved { step: 20, .. } => assert_eq!(newest.step(), 20),
        Progress::Failed { step: 20, rank: culprit, .. } => assert_eq!(*culprit, rank),
        other => panic!("operation {number} of rank {rank}: {other:?}"),
    }
    true
}

#[test]
fn all_ranks_hear_alike_of_a_failure_of_any_operation_of_one() {
    for (rank, least) in [(0, 10), (1, 3)] {
        let count = (0..).take_while(|number| rank_fails_at(rank, *number)).count();
        assert!(count >= least, "{count} operations of rank {rank}");
    }
}

#[test]
fn whichever_operation_fails_the_earlier_checkpoint_or_the_new_one_is_there() {
    for failure in [Failure::Full, Failure::Broken] {
        let count = (0..).take_while(|number| fails_at(failure, *number)).count();
        assert!(count > 15, "{count} operations");
    }
}
