//! Part of phalanx.

pub mod environment;
pub mod rendezvous;
