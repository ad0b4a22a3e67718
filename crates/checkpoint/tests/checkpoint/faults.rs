//! Every operation of a save fails once.

use std::path::Path;
use std::sync::Arc;

use phalanx_checkpoint::fs::{Failing, Failure, Fs, Recording};
use phalanx_checkpoint::{Alone, Folder, Keep, Progress, Saver, SaverOptions};

use crate::support::{check, save};

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

#[test]
fn whichever_operation_fails_the_earlier_checkpoint_or_the_new_one_is_there() {
    for failure in [Failure::Full, Failure::Broken] {
        let count = (0..).take_while(|number| fails_at(failure, *number)).count();
        assert!(count > 15, "{count} operations");
    }
}
