//! Retention, back-pressure, ranks that fail, and what all ranks hear of it.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use phalanx_checkpoint::fs::{Failing, Failure, Fs, Output, Real, Source};
use phalanx_checkpoint::{
    Alone, Cause, Dtype, Error, Extent, Folder, Keep, OnBusy, OnError, Progress, Ranks, Saver,
    SaverOptions, Snapshot, Started, State,
};

use crate::support::{check, on_ranks, save, Memory, LONG};

fn names(folder: &Path) -> Vec<String> {
    Real.list(folder).expect("a list")
}

#[test]
fn the_last_and_every_nth_checkpoint_stay() {
    let folder = tempfile::tempdir().unwrap();
    let keep = Keep { last: 2, every: Some(30) };
    on_ranks(2, |ranks| {
        let options = SaverOptions { keep, ..SaverOptions::default() };
        let mut saver = Saver::new(folder.path().join("a/b"), options).unwrap();
        for step in [10, 20, 30, 40, 50] {
            save(&mut saver, ranks, step);
        }
    });
    let expected = ["step-00000030", "step-00000040", "step-00000050"];
    assert_eq!(names(&folder.path().join("a/b")), expected);
}

#[test]
fn leftovers_go_with_the_next_save_that_succeeds_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for left in ["step-00000007.tmp-00", "step-00000003.old-1", "step-00000004"] {
        std::fs::create_dir(root.join(left)).unwrap();
        std::fs::write(root.join(left).join("shard"), "half of it").unwrap();
    }
    std::fs::write(root.join("notes.txt"), "mine").unwrap();
    let states: Vec<_> = Folder::new(root).list().unwrap();
    assert!(matches!(states[0].state, State::Damaged(_)) && states[0].step == 3);
    assert!(matches!(states[2].state, State::Incomplete));
    assert!(Folder::new(root).newest().unwrap().is_none());
    assert_eq!(names(root).len(), 4, "looking removes nothing");

    let mut saver = Saver::new(root, SaverOptions::default()).unwrap();
    save(&mut saver, &mut Alone, 9);
    let expected = ["notes.txt", "step-00000003.old-1", "step-00000004", "step-00000009"];
    assert_eq!(names(root), expected, "what is damaged is left for people to look at");
}

#[test]
fn a_step_that_is_saved_again_takes_the_place_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
    save(&mut saver, &mut Alone, 9);
    let before = Folder::new(folder.path()).newest().unwrap().unwrap();
    let again = Memory::new(8, 0, 1);
    saver.save(&mut Alone, 9, &again.snapshot()).unwrap();
    saver.finish(&mut Alone).unwrap();
    let after = Folder::new(folder.path()).newest().unwrap().unwrap();
    check(&after, 8);
    check(&before, 9); // Its files are open.
    assert_eq!(names(folder.path()), ["step-00000009"]);
}

#[test]
fn a_checkpoint_that_lost_its_name_to_a_crash_counts_and_goes_like_others() {
    let folder = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
    save(&mut saver, &mut Alone, 9);
    // What a crash leaves between the two renames of a save that replaces step 9.
    let aside = folder.path().join("step-00000009.old-0000000000000007");
    std::fs::rename(folder.path().join("step-00000009"), &aside).unwrap();
    check(&Folder::new(folder.path()).newest().unwrap().unwrap(), 9);
    save(&mut saver, &mut Alone, 10);
    assert_eq!(names(folder.path()), ["step-00000009.old-0000000000000007", "step-00000010"]);
    save(&mut saver, &mut Alone, 11);
    assert_eq!(names(folder.path()), ["step-00000010", "step-00000011"]);
}

#[test]
fn a_rank_that_cannot_copy_fails_the_checkpoint_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let ended = on_ranks(3, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        save(&mut saver, ranks, 1);
        let mut snapshot = Snapshot::new();
        let whole = Extent::new(&[ranks.rank() as u64], &[1]);
        let is_bad = ranks.rank() == 1;
        let content = move |_: &Extent, out: &mut [u8]| -> Result<(), Cause> {
            out.fill(1);
            if is_bad {
                Err("the device is gone".into())
            } else {
                Ok(())
            }
        };
        snapshot.part("w", Dtype::U8, &[3], whole, content);
        assert_eq!(saver.save(ranks, 2, &snapshot).unwrap(), Started::Yes);
        let failed = saver.finish(ranks).unwrap();
        (failed, save(&mut saver, ranks, 3))
    });
    for (failed, saved) in &ended {
        let Progress::Failed { step: 2, rank: 1, reason } = failed else { panic!("{failed:?}") };
        assert_eq!(reason, "cannot copy [1:2] of tensor `w`: the device is gone");
        assert!(matches!(saved, Progress::Saved { step: 3, .. }), "{saved:?}");
    }
    assert_eq!(names(folder.path()), ["step-00000001", "step-00000003"]);
}

#[test]
fn a_full_disk_of_one_rank_is_an_error_that_says_what_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let errors = on_ranks(3, |ranks| {
        let real: Arc<dyn Fs> = Arc::new(Real);
        let mut first =
            Saver::with_fs(folder.path(), SaverOptions::default(), Arc::clone(&real)).unwrap();
        save(&mut first, ranks, 200);
        let full: Arc<dyn Fs> = Arc::new(Failing::new(Arc::clone(&real), Failure::Full, 2));
        let fs = if ranks.rank() == 2 { full } else { real };
        let options = SaverOptions { on_error: OnError::Fail, ..SaverOptions::default() };
        let mut saver = Saver::with_fs(folder.path(), options, fs).unwrap();
        let memory = Memory::new(300, ranks.rank(), 3);
        saver.save(ranks, 300, &memory.snapshot()).unwrap();
        saver.finish(ranks).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    for part in
        ["checkpoint of step 300: no space left on ", ": needs ", " KiB, ", " free (rank 2)"]
    {
        assert!(errors[0].contains(part), "{part} in {}", errors[0]);
    }
    assert_eq!(names(folder.path()), ["step-00000200"]);
    check(&Folder::new(folder.path()).newest().unwrap().unwrap(), 200);
}

#[test]
fn ranks_that_do_not_fit_together_are_told_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let steps = on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let step = 5 + ranks.rank() as u64;
        saver.save(ranks, step, &Snapshot::new()).unwrap_err().to_string()
    });
    assert_eq!(steps, ["ranks do not save alike: rank 1 saves step 6, rank 0 step 5"; 2]);
    let shapes = on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let bytes = [0; 4];
        let mut snapshot = Snapshot::new();
        snapshot.whole("w", Dtype::U8, if ranks.rank() == 0 { &[4] } else { &[2, 2] }, &bytes);
        let error = saver.save(ranks, 5, &snapshot).unwrap_err().to_string();
        assert!(!saver.is_pending());
        save(&mut saver, ranks, 6);
        error
    });
    assert_eq!(shapes, ["tensor `w`: rank 0 has U8 [4], rank 1 has U8 [2, 2]"; 2]);
    let deep = on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let mut snapshot = Snapshot::new();
        let mut values = serde_json::Value::Null;
        for _ in 0..200 * ranks.rank() {
            values = serde_json::json!([values]);
        }
        snapshot.rank_values(values);
        saver.save(ranks, 7, &snapshot).unwrap_err().to_string()
    });
    assert!(deep[0].contains("(rank 1)") && deep[0] == deep[1], "{deep:?}");
    assert_eq!(names(folder.path()), ["step-00000006"]);
}

/// A file system on which nothing is created while its gate is closed.
#[derive(Clone, Debug, Default)]
struct Gated(Arc<(Mutex<bool>, Condvar)>);

impl Gated {
    fn open_gate(&self) {
        *self.0 .0.lock().expect("nobody panicked") = true;
        self.0 .1.notify_all();
    }
}

impl Fs for Gated {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let (is_open, changed) = &*self.0;
        let is_open = is_open.lock().map_err(|error| io::Error::other(error.to_string()))?;
        let waited = changed.wait_timeout_while(is_open, LONG, |is_open| !*is_open);
        match waited {
            Ok((_, limit)) if !limit.timed_out() => Real.create(path),
            _ => Err(io::Error::other("nobody opened the gate")),
        }
    }

    fn create_folder(&self, path: &Path) -> io::Result<()> {
        Real.create_folder(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn Source>> {
        Real.open(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        Real.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Real.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Real.remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        Real.remove_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        Real.sync_folder(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        Real.free_bytes(path)
    }
}

#[test]
fn a_save_that_comes_too_early_is_left_out_if_it_may_not_wait() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Gated::default();
    let memory = Memory::new(1, 0, 1);
    let options = SaverOptions { on_busy: OnBusy::Skip, ..SaverOptions::default() };
    let mut saver = Saver::with_fs(folder.path(), options, Arc::new(gate.clone())).unwrap();
    assert_eq!(saver.save(&mut Alone, 1, &memory.snapshot()).unwrap(), Started::Yes);
    assert_eq!(saver.save(&mut Alone, 2, &memory.snapshot()).unwrap(), Started::Skipped);
    assert_eq!(saver.poll(&mut Alone).unwrap(), Progress::Pending { step: 1 });
    gate.open_gate();
    assert!(matches!(saver.finish(&mut Alone).unwrap(), Progress::Saved { step: 1, .. }));
    assert_eq!(saver.poll(&mut Alone).unwrap(), Progress::Idle);
}

#[test]
fn a_save_that_comes_too_early_waits_for_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Memory::new(1, 0, 1);
    let gate = Gated::default();
    let mut saver =
        Saver::with_fs(folder.path(), SaverOptions::default(), Arc::new(gate.clone())).unwrap();
    saver.save(&mut Alone, 3, &memory.snapshot()).unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| saver.save(&mut Alone, 4, &memory.snapshot()).unwrap());
        gate.open_gate();
        assert_eq!(second.join().unwrap(), Started::Yes);
    });
    assert!(
        matches!(saver.poll(&mut Alone).unwrap(), Progress::Saved { step: 3, .. }),
        "told later"
    );
    assert!(matches!(saver.finish(&mut Alone).unwrap(), Progress::Saved { step: 4, .. }));
}

#[test]
fn who_is_late_is_named_and_can_still_finish() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Gated::default();
    let errors = on_ranks(2, |ranks| {
        let fs: Arc<dyn Fs> =
            if ranks.rank() == 1 { Arc::new(gate.clone()) } else { Arc::new(Real) };
        let options = SaverOptions { finish_timeout: Duration::ZERO, ..SaverOptions::default() };
        let mut saver = Saver::with_fs(folder.path(), options, fs).unwrap();
        let memory = Memory::new(1, ranks.rank(), 2);
        saver.save(ranks, 1, &memory.snapshot()).unwrap();
        let error = saver.finish(ranks).unwrap_err();
        let Error::Late { step: 1, late, .. } = &error else { panic!("{error}") };
        assert!(late.contains(&1), "{error}");
        gate.open_gate();
        loop {
            match saver.poll(ranks).unwrap() {
                Progress::Pending { .. } => std::thread::yield_now(),
                progress => break progress,
            }
        }
    });
    assert!(
        errors.iter().all(|ended| matches!(ended, Progress::Saved { step: 1, .. })),
        "{errors:?}"
    );
}

#[test]
fn numbers_of_a_program_come_back_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
    // Bits of all exponents, of which a parser that rounds twice gets some wrong.
    let seeds = (1..3000_u64).map(|n| n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let numbers: Vec<f64> = seeds.map(f64::from_bits).filter(|x| x.is_finite()).collect();
    let values = serde_json::json!({ "numbers": numbers, "seed": u64::MAX, "low": i64::MIN });
    let mut snapshot = Snapshot::new();
    snapshot.values(values.clone());
    snapshot.rank_values(values.clone());
    saver.save(&mut Alone, 1, &snapshot).unwrap();
    saver.finish(&mut Alone).unwrap();
    let saved = Folder::new(folder.path()).newest().unwrap().unwrap();
    assert_eq!(saved.values().unwrap(), values);
    assert_eq!(saved.rank_values(0).unwrap(), Some(values));
}

#[test]
fn memory_may_change_while_its_copy_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Gated::default();
    let mut saver =
        Saver::with_fs(folder.path(), SaverOptions::default(), Arc::new(gate.clone())).unwrap();
    let mut weights = vec![1; 3 << 20];
    let mut snapshot = Snapshot::new();
    snapshot.whole("w", Dtype::U8, &[3 << 20], &weights);
    saver.save(&mut Alone, 1, &snapshot).unwrap();
    drop(snapshot);
    weights.fill(2);
    gate.open_gate();
    saver.finish(&mut Alone).unwrap();
    let saved = Folder::new(folder.path()).newest().unwrap().unwrap();
    let bytes = phalanx_checkpoint::Tensors::read_whole(&saved, "w").unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1) && weights[0] == 2);
}
