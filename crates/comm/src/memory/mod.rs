//! Memory of ranks: what they share on a machine, and what they register.
//!
//! | file | what |
//! |---|---|
//! | `mapping` | a memfd that processes map; private memory in huge pages |
//! | `region` | registered memory: one mapping of each rank of a machine, or memory of a GPU |
//! | `board` | the page that a rank owns and all ranks of its machine map |

pub(crate) mod board;
pub(crate) mod channel;
pub(crate) mod mapping;
pub(crate) mod patience;
pub(crate) mod region;
pub(crate) mod signal;
