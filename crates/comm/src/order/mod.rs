//! Calls in their order: every call's header is compared by all ranks before anything moves, whoever moves it.
//!
//! | file | what |
//! |---|---|
//! | `setup` | connects a group's ranks, registers memory |
//! | `core`, `waiting` | starting, waiting, finishing |
//! | `inline`, `compute` | small collectives: everything in the slots of the boards |
//! | `executor` | the others, one after the other: the ranks meet, then the data moves |
//! | `links` | data connections between machines |
//! | `exit` | groups that live when the process exits |

pub(crate) mod compute;
pub(crate) mod core;
pub(crate) mod executor;
pub(crate) mod exit;
pub(crate) mod inline;
pub(crate) mod links;
pub(crate) mod setup;
mod waiting;
