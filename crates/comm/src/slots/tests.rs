//! Slots as two processes have them: one dies, the next one looks.

use std::os::unix::fs::MetadataExt as _;

use super::*;

fn stamp(step: u64) -> Stamp {
    Stamp { step, nonce: step * 31 }
}

/// Writes a whole snapshot, as one process does.
fn keep(
    memory: &File,
    place: usize,
    pair: usize,
    (step, former): (u64, Option<u64>),
    share: &[u8],
) {
    let slots = Slots::new(memory.try_clone().unwrap(), place).unwrap();
    let mut writing = slots.begin(pair, stamp(step), former.map(stamp)).unwrap();
    share.chunks(1000).for_each(|chunk| writing.write(chunk).unwrap());
    writing.finish().unwrap();
}

/// Step and bytes of everything that a new process finds.
fn found(memory: &File, place: usize) -> Vec<(u64, Vec<u8>)> {
    let slots = Slots::new(memory.try_clone().unwrap(), place).unwrap();
    let read = |kept: Kept| {
        let mut bytes = vec![0; usize::try_from(kept.bytes).unwrap()];
        slots.read(Spot::Kept { place, slot: kept.slot }, 0, &mut bytes).unwrap();
        (kept.stamp.step, bytes)
    };
    slots.kept().unwrap().into_iter().map(read).collect()
}

#[test]
fn a_write_that_is_torn_leaves_the_former_snapshot() {
    let share = |of: u8| vec![of; 12_345];
    for torn_at in [0, 1, 999, 12_345] {
        let memory = memory().unwrap();
        keep(&memory, 3, 0, (2, None), &share(2));
        keep(&memory, 3, 0, (4, Some(2)), &share(4));
        let slots = Slots::new(memory.try_clone().unwrap(), 3).unwrap();
        let mut writing = slots.begin(0, stamp(6), Some(stamp(4))).unwrap();
        writing.write(&share(6)[..torn_at]).unwrap();
        drop(writing); // as a death here does
        assert_eq!(found(&memory, 3), [(4, share(4))], "{torn_at}");
        // One that did not count everywhere is written over, and the one that counts stays.
        keep(&memory, 3, 0, (6, Some(4)), &share(6));
        keep(&memory, 3, 0, (8, Some(4)), &share(8));
        let mut steps: Vec<_> = found(&memory, 3).into_iter().map(|(step, _)| step).collect();
        steps.sort_unstable();
        assert_eq!(steps, [4, 8]);
    }
}

#[test]
fn places_and_pairs_do_not_touch_each_other() {
    let memory = memory().unwrap();
    let all = [(0, 0), (0, 1), (0, PAIRS_MAX - 1), (1, 0), (PLACES_MAX - 1, PAIRS_MAX - 1)];
    for (number, (place, pair)) in (1..).zip(all) {
        keep(&memory, place, pair, (number, None), &number.to_le_bytes());
    }
    let in_first = [1_u64, 2, 3].map(|number| (number, number.to_le_bytes().to_vec()));
    assert_eq!(found(&memory, 0), in_first);
    assert_eq!(found(&memory, 1), [(4, 4_u64.to_le_bytes().to_vec())]);
    assert_eq!(found(&memory, 2), []);
    assert_eq!(found(&memory, PLACES_MAX - 1), [(5, 5_u64.to_le_bytes().to_vec())]);
    Slots::new(memory.try_clone().unwrap(), 0).unwrap().lose().unwrap();
    assert_eq!(found(&memory, 0), []);
    assert_eq!(found(&memory, 1).len(), 1);
    assert!(Slots::new(memory.try_clone().unwrap(), PLACES_MAX).is_err());
    let slots = Slots::new(memory, 0).unwrap();
    assert!(slots.begin(PAIRS_MAX, stamp(1), None).is_err());
}

#[test]
fn memory_is_what_the_snapshots_need_and_no_more() {
    let memory = memory().unwrap();
    keep(&memory, 0, 0, (2, None), &vec![1; 3 << 20]);
    keep(&memory, 0, 0, (4, Some(2)), &vec![1; 3 << 20]);
    let used = || memory.metadata().unwrap().blocks() * 512;
    let full = used();
    assert!((6 << 20..7 << 20).contains(&full), "{full}");
    keep(&memory, 0, 0, (6, Some(4)), &[1; 5]);
    let less = used();
    assert!((3 << 20..4 << 20).contains(&less), "{less}");
}

#[test]
fn a_process_without_a_launcher_of_ours_has_no_slots() {
    assert!(Slots::from_environment().unwrap().is_none());
}

#[test]
fn guests_are_every_ranks_until_they_are_seen_out() {
    let (here, elsewhere) = (memory().unwrap(), memory().unwrap());
    let slots = |memory: &File, place| Slots::new(memory.try_clone().unwrap(), place).unwrap();
    let (one, other) = (slots(&here, 0), slots(&here, 1));
    assert_eq!(one.number().unwrap(), other.number().unwrap());
    assert_ne!(one.number().unwrap(), slots(&elsewhere, 0).number().unwrap());
    keep(&here, 0, 0, (2, None), b"kept");
    one.admit(7, 0, b"a gu").unwrap();
    one.admit(7, 4, b"est").unwrap();
    let mut bytes = [0; 7];
    other.read(Spot::Guest(7), 0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"a guest");
    let used = here.metadata().unwrap().blocks();
    other.see_guests_out().unwrap();
    assert!(here.metadata().unwrap().blocks() < used);
    let mut kept = [0; 4];
    other.read(Spot::Kept { place: 0, slot: 0 }, 0, &mut kept).unwrap();
    assert_eq!(&kept, b"kept");
    assert_eq!(one.number().unwrap(), other.number().unwrap());
    assert!(one.admit(GUESTS_MAX, 0, b"x").is_err());
    assert!(one.read(Spot::Kept { place: PLACES_MAX, slot: 0 }, 0, &mut kept).is_err());
}
