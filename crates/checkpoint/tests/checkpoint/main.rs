//! Checkpoints from the outside: what is saved by ranks is read by others, whatever happens to disks and files in between.

#![expect(clippy::cast_possible_truncation, reason = "the tensors of these tests are small")]

mod crashes;
mod damage;
mod faults;
mod kills;
mod properties;
mod round_trips;
mod saving;
mod snapshots;
mod support;
mod weights;
