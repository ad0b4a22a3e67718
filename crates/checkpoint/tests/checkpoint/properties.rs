//! Boxes, ranges and strides against an element by element account of them.

use phalanx_checkpoint::{flat_range, scatter, Alone, Content, Dtype, Extent, Folder, Plain};
use phalanx_checkpoint::{Saver, SaverOptions, Snapshot, Strided, Tensors};
use proptest::prelude::*;

/// A shape, a permutation of its dimensions, and the strides that this makes.
fn shapes() -> impl Strategy<Value = (Vec<u64>, Vec<u64>)> {
    prop::collection::vec(0_u64..6, 0..5).prop_flat_map(|shape| {
        let order: Vec<usize> = (0..shape.len()).collect();
        (Just(shape), Just(order).prop_shuffle()).prop_map(|(shape, order)| {
            let mut strides = vec![1; shape.len()];
            let mut next = 1;
            for at in order {
                strides[at] = next;
                next *= shape[at].max(1);
            }
            (shape, strides)
        })
    })
}

/// A box of a shape, by two numbers for each dimension.
fn extent(shape: &[u64], cuts: &[(u64, u64)]) -> Extent {
    let ranges = shape.iter().zip(cuts).map(|(&len, &(a, b))| {
        let (a, b) = (a % (len + 1), b % (len + 1));
        (a.min(b), a.max(b) - a.min(b))
    });
    let (start, len): (Vec<_>, Vec<_>) = ranges.unzip();
    Extent::new(&start, &len)
}

/// All indices of a box, the last dimension fastest.
fn indices(extent: &Extent) -> Vec<Vec<u64>> {
    let mut all = vec![Vec::new()];
    for (start, len) in extent.start().iter().zip(extent.len()) {
        let more = |index: Vec<u64>| {
            (*start..start + len).map(move |at| [index.clone(), vec![at]].concat())
        };
        all = all.into_iter().flat_map(more).collect();
    }
    all
}

fn place(index: &[u64], strides: &[u64]) -> u64 {
    index.iter().zip(strides).map(|(at, stride)| at * stride).sum()
}

fn row_major(shape: &[u64]) -> Vec<u64> {
    (0..shape.len()).map(|at| shape[at + 1..].iter().product()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_range_of_memory_is_its_boxes((shape, strides) in shapes(), a in any::<u64>(), b in any::<u64>()) {
        let all: u64 = shape.iter().product();
        let (a, b) = (a % (all + 1), b % (all + 1));
        let range = a.min(b)..a.max(b);
        let boxes = flat_range(&shape, &strides, range.clone()).unwrap();
        let mut found: Vec<u64> =
            boxes.iter().flat_map(indices).map(|index| place(&index, &strides)).collect();
        found.sort_unstable();
        prop_assert_eq!(found, range.collect::<Vec<_>>());
        prop_assert!(boxes.len() < 2 * shape.len().max(1));
    }

    #[test]
    fn a_box_is_copied_from_any_memory_and_back(
        (shape, strides) in shapes(),
        cuts in prop::collection::vec(any::<(u64, u64)>(), 4),
    ) {
        let all: u64 = shape.iter().product();
        let memory: Vec<u8> = (0..all as u16).flat_map(u16::to_le_bytes).collect();
        let part = extent(&shape, &cuts);
        let expected: Vec<u8> =
            indices(&part).iter().flat_map(|index| (place(index, &strides) as u16).to_le_bytes()).collect();
        let mut out = vec![0; expected.len()];
        Strided::new(&memory, &strides, 0, 2).copy(&part, &mut out).unwrap();
        prop_assert_eq!(&out, &expected);

        let mut back = vec![0xff; memory.len()];
        scatter(&part, &out, &mut back, (&strides, 0), 2).unwrap();
        for index in indices(&part) {
            let at = place(&index, &strides) as usize * 2;
            prop_assert_eq!(&back[at..at + 2], &memory[at..at + 2]);
        }
        let touched = back.chunks(2).zip(memory.chunks(2)).filter(|(a, b)| a == b).count();
        prop_assert_eq!(touched as u64, part.elements());
    }

    #[test]
    fn boxes_in_common_are_those_of_their_elements(
        shape in prop::collection::vec(0_u64..6, 0..4),
        left in prop::collection::vec(any::<(u64, u64)>(), 4),
        right in prop::collection::vec(any::<(u64, u64)>(), 4),
    ) {
        let (left, right) = (extent(&shape, &left), extent(&shape, &right));
        let common = left.intersection(&right);
        let found = common.as_ref().map(indices).unwrap_or_default();
        let expected: Vec<_> =
            indices(&left).into_iter().filter(|index| indices(&right).contains(index)).collect();
        prop_assert_eq!(found, expected);
        let strides = row_major(&shape);
        let bytes: Vec<u8> = indices(&left).iter().map(|index| place(index, &strides) as u8).collect();
        if let Some(common) = common {
            let mut out = vec![0; common.elements() as usize];
            Plain::new(&bytes, &left, 1).copy(&common, &mut out).unwrap();
            let wanted: Vec<u8> =
                indices(&common).iter().map(|index| place(index, &strides) as u8).collect();
            prop_assert_eq!(out, wanted);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_box_of_a_tensor_in_any_pieces_is_read(
        (shape, strides) in shapes(),
        mut cuts in prop::collection::vec(any::<u64>(), 0..5),
        wanted in prop::collection::vec(prop::collection::vec(any::<(u64, u64)>(), 4), 8),
    ) {
        let all: u64 = shape.iter().product();
        let memory: Vec<u8> = (0..all as u16).flat_map(u16::to_le_bytes).collect();
        cuts.iter_mut().for_each(|cut| *cut %= all + 1);
        cuts.extend([0, all]);
        cuts.sort_unstable();
        let mut snapshot = Snapshot::new();
        for pair in cuts.windows(2) {
            for extent in flat_range(&shape, &strides, pair[0]..pair[1]).unwrap() {
                let content = Strided::new(&memory, &strides, 0, 2);
                snapshot.part("t", Dtype::I16, &shape, extent, content);
            }
        }
        if all == 0 {
            snapshot.whole("t", Dtype::I16, &shape, &[]);
        }
        let folder = tempfile::tempdir().unwrap();
        let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
        saver.save(&mut Alone, 1, &snapshot).unwrap();
        saver.finish(&mut Alone).unwrap();
        let checkpoint = Folder::new(folder.path()).newest().unwrap().unwrap();
        for numbers in wanted {
            let part = extent(&shape, &numbers);
            let mut out = vec![0; part.elements() as usize * 2];
            checkpoint.read("t", &part, &mut out).unwrap();
            let expected: Vec<u8> =
                indices(&part).iter().flat_map(|at| (place(at, &strides) as u16).to_le_bytes()).collect();
            prop_assert_eq!(out, expected);
        }
    }
}
