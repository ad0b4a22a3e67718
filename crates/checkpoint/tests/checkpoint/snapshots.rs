//! Snapshots in memory, which a neighbour keeps.

use std::sync::Arc;

use phalanx_checkpoint::fs::Source;
use phalanx_checkpoint::{Checkpoint, Result, Saver, SaverOptions, SnapshotShare, Tensors};
use serde_json::json;

use crate::support::{check, on_ranks, Memory};

fn opened(buffers: Vec<Vec<u8>>) -> Result<Checkpoint> {
    let source = |buffer| -> Arc<dyn Source> { Arc::<Vec<u8>>::new(buffer) };
    Checkpoint::from_snapshots(buffers.into_iter().map(source).collect())
}

fn verified(buffer: &[u8]) -> Result<SnapshotShare> {
    SnapshotShare::verify(Arc::new(buffer.to_vec()))
}

fn captured(world_size: usize, step: u64) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    on_ranks(world_size, |ranks| {
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).expect("a saver");
        let rank = phalanx_checkpoint::Ranks::rank(ranks);
        let memory = Memory::new(step, rank, world_size);
        let mut buffer = vec![7; 5];
        let share = saver.capture(ranks, step, &memory.snapshot(), &mut buffer).expect("a share");
        assert_eq!(verified(&buffer).expect("whole"), share);
        assert_eq!((share.step, share.rank, share.world_size), (step, rank, world_size));
        buffer
    })
}

#[test]
fn all_ranks_buffers_are_a_checkpoint_in_any_order() {
    for world_size in [1, 3, 7] {
        let mut buffers = captured(world_size, 40);
        buffers.reverse();
        buffers.push(buffers[0].clone());
        let checkpoint = opened(buffers).unwrap();
        check(&checkpoint, 40);
        assert_eq!((checkpoint.step(), checkpoint.world_size()), (40, world_size));
        assert_eq!(
            checkpoint.rank_values(world_size - 1).unwrap(),
            Some(json!([world_size - 1, 40]))
        );
        assert!(checkpoint.verify().damage.is_empty());
    }
}

#[test]
fn buffers_that_are_missing_of_another_snapshot_or_damaged_are_refused() {
    let (buffers, others) = (captured(3, 40), captured(3, 40));
    let refused = |some: Vec<Vec<u8>>| opened(some).unwrap_err().to_string();
    assert!(refused(buffers[1..].to_vec()).contains("share of rank 0 is missing"));
    assert!(refused(buffers[..2].to_vec()).contains("2 of 3 ranks' shares"));
    assert!(refused(Vec::new()).contains("there is none"));
    let mixed = vec![buffers[0].clone(), others[1].clone(), buffers[2].clone()];
    assert!(refused(mixed).contains("of another snapshot"));

    let (first, rest) = (&buffers[0], &buffers[1..]);
    for bit in (0..first.len() * 8).step_by(61) {
        let mut bad = first.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(verified(&bad).is_err(), "bit {bit}");
        let of_bad = opened([vec![bad], rest.to_vec()].concat());
        let is_damaged = |checkpoint: Checkpoint| {
            let mut names = checkpoint.names().into_iter();
            names.any(|name| checkpoint.read_whole(name).is_err())
                && !checkpoint.verify().damage.is_empty()
        };
        assert!(of_bad.map_or(true, is_damaged), "bit {bit}");
    }
    for len in (0..first.len()).step_by(97) {
        assert!(verified(&first[..len]).is_err(), "cut at {len}");
        let cut = [vec![first[..len].to_vec()], rest.to_vec()].concat();
        assert!(opened(cut).is_err(), "cut at {len}");
    }
}
