//! The collective algorithms, without sockets, clocks or shared memory. Steps and bytes of each are
//! in `README.md` in this folder.

pub(crate) mod chain;
pub(crate) mod movement;
pub(crate) mod segment;
pub(crate) mod topology;
