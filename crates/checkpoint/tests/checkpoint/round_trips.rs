//! What one world saves, another reads.

use std::num::NonZeroUsize;
use std::sync::Arc;

use phalanx_checkpoint::fs::{Fs, Real};
use phalanx_checkpoint::{
    scatter, Alone, Checkpoint, Content, Dtype, Extent, Folder, Plain, Progress, Ranks, Saver,
    SaverOptions, Snapshot, Tensors,
};
use serde_json::json;

use crate::support::{check, model, on_ranks, save, Memory};

const WORLDS: [usize; 5] = [1, 2, 3, 4, 7];

#[test]
fn what_any_world_saves_any_other_reads() {
    for saved in WORLDS {
        let folder = tempfile::tempdir().unwrap();
        on_ranks(saved, |ranks| {
            let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
            let progress = save(&mut saver, ranks, 120);
            assert!(matches!(progress, Progress::Saved { step: 120, .. }), "{progress:?}");
        });
        let checkpoint = Checkpoint::open(folder.path().join("step-00000120")).unwrap();
        assert_eq!((checkpoint.step(), checkpoint.world_size()), (120, saved));
        check(&checkpoint, 120);
        assert!(checkpoint.verify().damage.is_empty());
        assert_eq!(checkpoint.values().unwrap(), json!({ "step": 120, "name": "model" }));
        for rank in 0..saved {
            assert_eq!(checkpoint.rank_values(rank).unwrap(), Some(json!([rank, 120])));
        }
        assert_eq!(checkpoint.rank_values(saved).unwrap(), None);
        WORLDS.into_iter().for_each(|read| check_world(&checkpoint, read));
    }
}

/// Whether the ranks of a world get the memory that they would have had.
fn check_world(checkpoint: &Checkpoint, world_size: usize) {
    for tensor in model() {
        let memory = tensor.memory(120);
        let width = tensor.dtype.bytes();
        for rank in 0..world_size {
            let range = tensor.range(rank, world_size);
            let bytes = range.start as usize * width..range.end as usize * width;
            let mut mine = vec![0; bytes.len()];
            for extent in tensor.boxes(rank, world_size) {
                let mut plain = vec![0; extent.elements() as usize * width];
                checkpoint.read(tensor.name, &extent, &mut plain).expect("read");
                scatter(&extent, &plain, &mut mine, (tensor.strides(), range.start), width)
                    .expect("dense");
            }
            assert_eq!(mine, memory[bytes], "{} on rank {rank} of {world_size}", tensor.name);
        }
    }
}

#[test]
fn shards_are_safetensors_files_with_all_bytes_once() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(3, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        save(&mut saver, ranks, 1);
    });
    let (mut bytes, mut names) = (0, Vec::new());
    for rank in 0..3 {
        let shard = format!("step-00000001/shard-{rank:05}-of-00003.safetensors");
        let file = std::fs::read(folder.path().join(shard)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (name, view) in tensors.tensors() {
            bytes += view.data().len() as u64;
            if name == "model/w" {
                assert_eq!((view.shape(), view.data().len()), (&[17, 9][..], 306));
            }
            names.push(name);
        }
    }
    let expected: u64 =
        model().iter().map(|tensor| tensor.len() * tensor.dtype.bytes() as u64).sum();
    assert_eq!(bytes, expected, "{names:?}");
    for part in ["model/w", "model/empty", "optimizer/bias.m[0:1]", "optimizer/bias.m[5:13]"] {
        assert!(names.iter().any(|name| name == part), "{part} in {names:?}");
    }
}

#[test]
fn a_large_replica_is_written_by_all_in_equal_parts() {
    let folder = tempfile::tempdir().unwrap();
    let (shape, width) = ([3, 1000, 1000], 2);
    let bytes: Vec<u8> =
        (0..6_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    on_ranks(3, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let mut snapshot = Snapshot::new();
        snapshot.whole("w", Dtype::F16, &shape, &bytes);
        saver.save(ranks, 1, &snapshot).unwrap();
        saver.finish(ranks).unwrap();
    });
    let checkpoint = Folder::new(folder.path()).newest().unwrap().unwrap();
    assert_eq!(checkpoint.pieces("w").len(), 3);
    assert!(checkpoint.files().all(|(_, size)| size == 2_000_000 + 4096));
    assert_eq!(checkpoint.verify().blocks, 6);
    assert_eq!(checkpoint.read_whole("w").unwrap(), bytes);
    // Across all pieces and blocks, in short runs.
    let part = Extent::new(&[0, 100, 990], &[3, 800, 7]);
    let mut out = vec![0; part.elements() as usize * width];
    checkpoint.read("w", &part, &mut out).unwrap();
    let mut expected = vec![0; out.len()];
    Plain::new(&bytes, &Extent::whole(&shape), width).copy(&part, &mut expected).unwrap();
    assert_eq!(out, expected);
}

#[test]
fn version_1_of_the_format_is_these_bytes() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let rank = ranks.rank();
        let bytes = [[1, 2, 3], [4, 5, 6]][rank];
        let mut snapshot = Snapshot::new();
        let part = Extent::new(&[rank as u64, 0], &[1, 3]);
        snapshot.part("m", Dtype::U8, &[2, 3], part.clone(), Plain::new(&bytes, &part, 1));
        snapshot.whole("w", Dtype::BF16, &[], &[0x80, 0x3f]);
        snapshot.values(json!({ "lr": 0.1 }));
        snapshot.rank_values(json!(rank));
        saver.save(ranks, 7, &snapshot).unwrap();
        saver.finish(ranks).unwrap();
    });
    let step = folder.path().join("step-00000007");
    let manifest = std::fs::read_to_string(step.join("manifest.json")).unwrap();
    assert_eq!(manifest, include_str!("version_1.json"));
    let shard = std::fs::read(step.join("shard-00000-of-00002.safetensors")).unwrap();
    let header = concat!(
        r#"{"__metadata__":{"phalanx":"checkpoint, shard 0 of 2"},"#,
        r#""m[0:1,0:3]":{"data_offsets":[2,5],"dtype":"U8","shape":[1,3]},"#,
        r#""w":{"data_offsets":[0,2],"dtype":"BF16","shape":[]}}"#
    );
    assert_eq!(shard[..8], 4088_u64.to_le_bytes());
    assert_eq!(std::str::from_utf8(&shard[8..4096]).unwrap().trim_end(), header);
    assert_eq!(shard[4096..], [0x80, 0x3f, 1, 2, 3]);
}

#[test]
fn boxes_across_pieces_and_wrong_ones() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(4, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        save(&mut saver, ranks, 5);
    });
    let checkpoint = Folder::new(folder.path()).newest().unwrap().unwrap();
    let whole = checkpoint.read_whole("optimizer/w.m").unwrap();
    let mut column = vec![0; 17 * 8];
    checkpoint.read("optimizer/w.m", &Extent::new(&[0, 4], &[17, 1]), &mut column).unwrap();
    let expected: Vec<u8> =
        (0..17).flat_map(|row| whole[(row * 9 + 4) * 8..(row * 9 + 5) * 8].to_vec()).collect();
    assert_eq!(column, expected);
    let cases = [
        ("optimizer/w.m", Extent::new(&[0, 4], &[18, 1]), "[0:18,4:5] of tensor `optimizer/w.m`"),
        ("optimizer/w.m", Extent::new(&[0, 4], &[16, 1]), "has 128 bytes, the buffer 136"),
        ("optimizer/v", Extent::whole(&[17]), "has no tensor `optimizer/v`"),
    ];
    for (name, extent, part) in cases {
        let error = checkpoint.read(name, &extent, &mut column).unwrap_err().to_string();
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_checkpoint_written_anew_with_other_shards_is_the_same() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    on_ranks(3, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        save(&mut saver, ranks, 8);
    });
    let checkpoint = Folder::new(folder.path()).newest().unwrap().unwrap();
    let fs: Arc<dyn Fs> = Arc::new(Real);
    for shards in [1, 5] {
        let target = other.path().join(shards.to_string());
        let shards = NonZeroUsize::new(shards).unwrap();
        let written = checkpoint.rewrite(&target, shards, &fs).unwrap();
        let again = Checkpoint::open(&written).unwrap();
        assert_eq!(again.files().count(), shards.get());
        check(&again, 8);
        assert_eq!(again.rank_values(2).unwrap(), checkpoint.rank_values(2).unwrap());
        assert!(checkpoint.rewrite(&target, shards, &fs).is_err(), "it is there already");
    }
}

#[test]
fn all_ranks_open_what_rank_0_finds() {
    let folder = tempfile::tempdir().unwrap();
    let newest = |step: Option<u64>| {
        on_ranks(3, |ranks| {
            let found = Folder::new(folder.path()).newest_on_all(ranks, step).unwrap();
            found.map(|checkpoint| checkpoint.step())
        })
    };
    assert_eq!(newest(None), [None; 3]);
    let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
    for step in [10, 20] {
        save(&mut saver, &mut Alone, step);
    }
    assert_eq!(newest(None), [Some(20); 3]);
    assert_eq!(newest(Some(20)), [Some(10); 3]);
    assert_eq!(newest(Some(10)), [None; 3]);
    save(&mut saver, &mut Alone, 0);
    assert_eq!(newest(Some(10)), [Some(0); 3]);
    assert_eq!(newest(Some(0)), [None; 3]);

    // Rank 2 looks into another folder.
    let errors = on_ranks(3, |ranks| {
        let elsewhere = folder.path().join("elsewhere");
        let root = if ranks.rank() == 2 { &elsewhere } else { folder.path() };
        Folder::new(root).newest_on_all(ranks, None).unwrap_err().to_string()
    });
    assert!(errors[0].contains("rank 2: ") && errors[1] == errors[0], "{errors:?}");
}

#[test]
fn a_plan_is_made_once_and_again_when_tensors_change() {
    let folder = tempfile::tempdir().unwrap();
    let talks = on_ranks(2, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        let (mut talks, more) = (Vec::new(), [7; 3]);
        for step in 1..=4 {
            let memory = Memory::new(step, ranks.rank(), 2);
            let mut snapshot = memory.snapshot();
            if step > 2 {
                snapshot.whole("more", Dtype::U8, &[3], &more);
            }
            let before = ranks.gathered;
            saver.save(ranks, step, &snapshot).unwrap();
            talks.push(ranks.gathered - before);
            saver.finish(ranks).unwrap();
        }
        talks
    });
    assert_eq!(talks, [[2, 1, 2, 1]; 2]);
}
