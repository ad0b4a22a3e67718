//! Everything that a crash may leave, after every operation of several saves.

use std::sync::Arc;

use phalanx_checkpoint::fs::Recording;
use phalanx_checkpoint::{Alone, Checkpoint, Folder, Keep, Saver, SaverOptions, State, Tensors};

use crate::support::{check, on_ranks, save, Memory};

const ROOT: &str = "/ckpt";

fn saver(disk: &Recording) -> Saver {
    let keep = Keep { last: 1, every: None };
    let options = SaverOptions { keep, ..SaverOptions::default() };
    Saver::with_fs(ROOT, options, Arc::new(disk.clone())).expect("a saver")
}

fn newest(state: Recording) -> Option<Checkpoint> {
    Folder::with_fs(ROOT, Arc::new(state)).newest().expect("a list")
}

/// What has the name of a checkpoint and is none.
fn damaged(state: &Recording) -> Option<String> {
    let listed = Folder::with_fs(ROOT, Arc::new(state.clone())).list().expect("a list");
    listed.into_iter().find_map(|one| match one.state {
        State::Damaged(error) => Some(format!("{}: {error}", one.path.display())),
        _ => None,
    })
}

/// When a step was renamed to its name, and when that was made durable.
fn commits(operations: &[String]) -> Vec<(u64, usize, usize)> {
    let mut commits = Vec::new();
    for (at, what) in operations.iter().enumerate() {
        let Some((_, to)) = what.split_once(" to /ckpt/step-") else { continue };
        let Ok(step) = to.parse() else { continue };
        let synced = (at..operations.len()).find(|n| operations[*n] == "sync folder /ckpt");
        commits.push((step, at, synced.expect("a rename is made durable")));
    }
    commits
}

/// Goes through all states; the number of them, or the first in which something else is found than should be.
fn check_all(disk: &Recording, is_right: impl Fn(&Checkpoint)) -> Result<usize, String> {
    let operations = disk.operations();
    let commits = commits(&operations);
    let mut count = 0;
    for (at, what) in operations.iter().enumerate() {
        let durable =
            commits.iter().filter(|(_, _, synced)| *synced <= at).map(|(step, ..)| *step).max();
        let renamed =
            commits.iter().filter(|(_, renamed, _)| *renamed <= at).map(|(step, ..)| *step).max();
        for state in disk.crash_states(at) {
            count += 1;
            if let Some(damaged) = damaged(&state) {
                return Err(format!("after `{what}`: {damaged}"));
            }
            let found = newest(state);
            let step = found.as_ref().map(Checkpoint::step);
            if step != durable && step != renamed {
                return Err(format!(
                    "after `{what}`: {step:?}, expected {durable:?} or {renamed:?}"
                ));
            }
            if let Some(checkpoint) = found {
                let damage = checkpoint.verify().damage;
                if !damage.is_empty() {
                    return Err(format!("after `{what}`: {damage:?}"));
                }
                is_right(&checkpoint);
            }
        }
    }
    Ok(count)
}

#[test]
fn after_every_crash_the_newest_complete_checkpoint_is_found_bit_for_bit() {
    let disk = Recording::default();
    let mut saver = saver(&disk);
    for step in [10, 20, 30] {
        save(&mut saver, &mut Alone, step);
    }
    let operations = disk.operations();
    assert!(operations.iter().any(|what| what.starts_with("remove ")), "old ones were removed");
    assert_eq!(commits(&operations).len(), 3);
    let count = check_all(&disk, |found| check(found, found.step())).unwrap();
    assert!(count > 400, "{count} states");
}

#[test]
fn two_ranks_that_write_at_once_are_as_safe_as_one() {
    let disk = Recording::default();
    on_ranks(2, |ranks| {
        let mut saver = saver(&disk);
        save(&mut saver, ranks, 10);
        save(&mut saver, ranks, 20);
    });
    let count = check_all(&disk, |found| check(found, found.step())).unwrap();
    assert!(count > 100, "{count} states");
}

#[test]
fn a_step_that_is_saved_again_is_there_all_the_time() {
    let disk = Recording::default();
    let mut saver = saver(&disk);
    save(&mut saver, &mut Alone, 10);
    let again = Memory::new(11, 0, 1);
    saver.save(&mut Alone, 10, &again.snapshot()).unwrap();
    saver.finish(&mut Alone).unwrap();
    let either = |found: &Checkpoint| {
        let step = found.values().unwrap()["step"].as_u64().unwrap();
        assert!(step == 10 || step == 11);
        check(found, step);
    };
    check_all(&disk, either).unwrap();
    let last = disk.crash_states(disk.operations().len() - 1).next().unwrap();
    assert_eq!(newest(last).unwrap().values().unwrap()["step"], 11);
}

#[test]
fn the_enumeration_finds_a_sync_that_is_left_out() {
    for forget in [Recording::forget_file_syncs, Recording::forget_folder_syncs] {
        let disk = Recording::default();
        forget(&disk);
        let mut saver = saver(&disk);
        save(&mut saver, &mut Alone, 10);
        assert_eq!(newest(disk.clone()).unwrap().names().len(), 9, "without a crash all is well");
        let found = check_all(&disk, |_| {}).unwrap_err();
        assert!(found.contains("after `"), "{found}");
    }
}
