//! Data that is not as it was written: comparing every block, and listing what is damaged or lost.
//!
//! Here belongs what a person does about damage. How a list of it is read is with the files it lies
//! beside (`format/damage_list.rs`); what a loader does about it is an option of the loader
//! ([`OnDamage`](crate::OnDamage)).

mod record;
mod verify;

pub use record::record_damage;
pub use verify::{verify, verify_from, Verified};

pub use crate::format::damage_list::DamagedBlock;
