//! What a crash may leave of a disk.
//!
//! Names: of the changes of each folder since it was synced, any may have happened, whatever the order in which they were made.
//! Bytes: of a file with bytes that were not synced there may be what was synced before, all of it, or a part (a quarter, a half, three
//! quarters, all but one byte), cut off there or zero from there on. All combinations are gone through.

use std::sync::Arc;

use super::recording::{Disk, Node};
use super::Recording;

/// Parts of a file that may be left, each cut off or filled up.
const PARTS: usize = 4;

/// What may be left of a file: see above.
const FILE_STATES: usize = 2 + 2 * PARTS;

/// All that a crash may leave, one after the other.
#[derive(Debug)]
pub struct CrashStates {
    disk: Disk,
    /// How many states each node can be in.
    radix: Vec<usize>,
    /// The state of each node that comes next; none after the last.
    next: Option<Vec<usize>>,
}

impl CrashStates {
    pub(super) fn of(disk: Disk) -> Self {
        let states = |node: &Node| match node {
            Node::File { synced, current } if synced == current => 1,
            Node::File { .. } => FILE_STATES,
            Node::Folder { changes, .. } => 1 << changes.len(),
        };
        let radix: Vec<usize> = disk.nodes.iter().map(states).collect();
        CrashStates { next: Some(vec![0; radix.len()]), disk, radix }
    }
}

impl Iterator for CrashStates {
    type Item = Recording;

    fn next(&mut self) -> Option<Recording> {
        let mut states = self.next.take()?;
        let nodes = self.disk.nodes.iter().zip(&states);
        let left = Disk { nodes: nodes.map(|(node, &state)| survived(node, state)).collect() };
        for (state, radix) in states.iter_mut().zip(&self.radix) {
            *state += 1;
            if *state < *radix {
                self.next = Some(states);
                break;
            }
            *state = 0;
        }
        Some(Recording::from_disk(left))
    }
}

/// A node after a crash.
fn survived(node: &Node, state: usize) -> Node {
    match node {
        Node::Folder { synced, changes } => {
            let mut names = synced.clone();
            for (at, change) in changes.iter().enumerate() {
                if state >> at & 1 == 1 {
                    change.apply(&mut names);
                }
            }
            Node::Folder { synced: names, changes: Vec::new() }
        }
        Node::File { synced, current } => {
            let content = match state {
                0 => Arc::clone(synced),
                1 => Arc::clone(current),
                torn => part(synced.len(), current, torn - 2).into(),
            };
            Node::File { synced: Arc::clone(&content), current: content }
        }
    }
}

/// A part of what was written behind the bytes that were synced.
fn part(synced: usize, current: &[u8], number: usize) -> Vec<u8> {
    let (part, is_filled) = (number / 2 + 1, number % 2 == 1);
    let written = (current.len() - synced) * part / PARTS;
    let kept = synced + written.saturating_sub(usize::from(part == PARTS));
    let mut bytes = current[..kept].to_vec();
    if is_filled {
        bytes.resize(current.len(), 0);
    }
    bytes
}
