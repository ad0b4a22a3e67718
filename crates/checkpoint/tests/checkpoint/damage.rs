//! Bits that flip, files that are cut off, and files in the wrong place: all of it is noticed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use phalanx_checkpoint::{Checkpoint, Folder, Result, Saver, SaverOptions, Tensors};

use crate::support::{check, on_ranks, save, Files};

/// A folder with the checkpoints of two steps, saved by two ranks.
fn saved() -> (tempfile::TempDir, Files) {
    let folder = tempfile::tempdir().expect("a folder");
    on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).expect("a saver");
        save(&mut saver, ranks, 10);
        save(&mut saver, ranks, 20);
    });
    let files = Files::load(folder.path());
    (folder, files)
}

/// Reads every tensor.
fn read_all(checkpoint: &Checkpoint) -> Result<()> {
    checkpoint.names().into_iter().try_for_each(|name| checkpoint.read_whole(name).map(drop))
}

/// Whether a checkpoint is found damaged, both by comparing everything and by reading everything.
fn is_noticed(step: &Path, files: &Files) -> bool {
    match Checkpoint::open_with(step, files) {
        Err(error) => error.is_damage(),
        Ok(checkpoint) => {
            let verified = checkpoint.verify();
            let read = read_all(&checkpoint);
            !verified.damage.is_empty()
                && verified.damage.iter().all(phalanx_checkpoint::Error::is_damage)
                && read.is_err_and(|error| error.is_damage())
        }
    }
}

fn of_step(files: &Files, step: &Path) -> Vec<PathBuf> {
    files.0.keys().filter(|path| path.starts_with(step)).cloned().collect()
}

#[test]
fn ten_thousand_flipped_bits_are_all_noticed() {
    let (folder, mut files) = saved();
    let step = folder.path().join("step-00000020");
    let paths = of_step(&files, &step);
    assert_eq!(paths.len(), 3);
    let bits: usize = paths.iter().map(|path| files.0[path].len() * 8).sum();
    let count = 10_000;
    for n in 0..count {
        // Evenly spread over all files, not on the same bit of each byte.
        let mut bit = n * bits / count + n % 7;
        let path = paths.iter().find(|path| {
            let len = files.0[*path].len() * 8;
            let is_here = bit < len;
            bit -= if is_here { 0 } else { len };
            is_here
        });
        let Some(path) = path else { continue };
        let good = Arc::clone(&files.0[path]);
        let mut bad = good.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        files.0.insert(path.clone(), bad.into());
        assert!(is_noticed(&step, &files), "bit {bit} of {}", path.display());
        files.0.insert(path.clone(), good);
    }
    check(&Checkpoint::open_with(&step, &files).unwrap(), 20);
}

#[test]
fn a_file_cut_off_anywhere_is_noticed_and_the_checkpoint_before_is_found() {
    let (folder, mut files) = saved();
    let step = folder.path().join("step-00000020");
    for path in of_step(&files, &step) {
        let good = Arc::clone(&files.0[&path]);
        for len in (0..good.len()).step_by(512).chain([good.len() - 1]) {
            files.0.insert(path.clone(), good[..len].into());
            assert!(is_noticed(&step, &files), "{} cut at {len}", path.display());
            let newest = Folder::with_fs(folder.path(), Arc::new(files.clone())).newest().unwrap();
            assert_eq!(newest.unwrap().step(), 10);
        }
        files.0.insert(path.clone(), [&good[..], &[0; 512]].concat().into());
        assert!(is_noticed(&step, &files), "{} with bytes behind it", path.display());
        files.0.remove(&path);
        assert!(Checkpoint::open_with(&step, &files).is_err(), "{} lost", path.display());
        files.0.insert(path, good);
    }
}

#[test]
fn zeros_in_a_page_swapped_shards_and_shards_of_another_step_are_noticed() {
    let (folder, files) = saved();
    let step = folder.path().join("step-00000020");
    let shard = |name: &str, rank: usize| {
        folder.path().join(name).join(format!("shard-{rank:05}-of-00002.safetensors"))
    };
    let (first, second) = (shard("step-00000020", 0), shard("step-00000020", 1));
    let mut swapped = files.clone();
    swapped.0.insert(first.clone(), Arc::clone(&files.0[&second]));
    swapped.0.insert(second.clone(), Arc::clone(&files.0[&first]));
    assert!(is_noticed(&step, &swapped));
    let mut old = files.clone();
    old.0.insert(first.clone(), Arc::clone(&files.0[&shard("step-00000010", 0)]));
    assert!(is_noticed(&step, &old), "sizes are the same");
    let mut zeroed = files.clone();
    let mut bytes = files.0[&second].to_vec();
    bytes[4096..].fill(0);
    zeroed.0.insert(second.clone(), bytes.into());
    assert!(is_noticed(&step, &zeroed));

    let checkpoint = Checkpoint::open_with(&step, &zeroed).unwrap();
    let error = checkpoint.read_whole("optimizer/w.m").unwrap_err().to_string();
    for part in
        ["shard-00001-of-00002.safetensors is damaged in block 0", "`optimizer/w.m`", "expected "]
    {
        assert!(error.contains(part), "{part} in {error}");
    }
    let before =
        Folder::with_fs(folder.path(), Arc::new(zeroed)).newest_before(20).unwrap().unwrap();
    check(&before, 10);
}
