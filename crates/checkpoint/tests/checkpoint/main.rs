//! Checkpoints from the outside: what is saved by ranks is read by others, whatever happens to disks and files in between.

mod crashes;
mod damage;
mod faults;
mod properties;
mod round_trips;
mod saving;
mod snapshots;
mod support;
mod weights;
