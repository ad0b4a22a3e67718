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

/// Numbers that look random and are the same on each run.
fn random(seed: &mut u64, below: usize) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize % below
}

/// Changes a text in one place: a digit, a byte, a part that is gone or comes twice, a number without end.
fn change(text: &mut Vec<u8>, seed: &mut u64) {
    let at = random(seed, text.len());
    let end = (at + 1 + random(seed, 12)).min(text.len());
    let digit = text[at..].iter().position(u8::is_ascii_digit).map_or(at, |n| at + n);
    match random(seed, 5) {
        0 => text[digit] = b'0' + random(seed, 10) as u8,
        1 => text[at] = b"[]{},:\"0-9"[random(seed, 10)],
        2 => drop(text.drain(at..end)),
        3 => drop(text.splice(at..at, text[at..end].to_vec())),
        _ => drop(text.splice(digit..=digit, *b"9223372036854775807")),
    }
}

#[test]
fn a_manifest_with_a_right_seal_and_anything_in_it_never_panics() {
    let (folder, mut files) = saved();
    let step = folder.path().join("step-00000020");
    let path = step.join("manifest.json");
    let good = Arc::clone(&files.0[&path]);
    let seal = b",\"manifest_crc32c\":\"00000000\"}\n".len();
    let (mut seed, mut opened) = (7, 0);
    for _ in 0..4000 {
        let mut text = good[..good.len() - seal].to_vec();
        for _ in 0..=random(&mut seed, 3) {
            change(&mut text, &mut seed);
        }
        let sum = crc32c::crc32c(&text);
        text.extend(format!(",\"manifest_crc32c\":\"{sum:08x}\"}}\n").bytes());
        files.0.insert(path.clone(), text.into());
        if let Ok(checkpoint) = Checkpoint::open_with(&step, &files) {
            opened += 1;
            drop(checkpoint.verify());
            drop(read_all(&checkpoint));
            drop((checkpoint.values(), checkpoint.rank_values(0)));
        }
    }
    assert!(opened > 50, "{opened} of them could be opened");
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
