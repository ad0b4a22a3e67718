//! The host backend: shared memory between ranks of one machine, TCP between machines.
//!
//! | file | what |
//! |---|---|
//! | `mesh`, `card` | connects the ranks, once |
//! | `control`, `wire`, `monitor`, `peers`, `liveness` | who lives; failures; memfds on their way |
//! | `absent` | who is waited for |
//! | `reconnect`, `resume` | control connections that come back |
//! | `mapping`, `board`, `region` | shared memory |
//! | `call` | a started collective |
//! | `core`, `waiting` | starting, waiting, finishing |
//! | `inline` | small collectives: everything in the slots |
//! | `executor`, `reduction`, `transfer`, `links` | large ones: the algorithms on memory and sockets |
//! | `exit` | groups that live when the process exits |
//! | `point` | `send` and `receive` |

mod absent;
pub(crate) mod board;
pub(crate) mod call;
mod callers;
pub(crate) mod card;
pub(crate) mod control;
pub(crate) mod core;
pub(crate) mod executor;
mod exit;
pub(crate) mod inline;
pub(crate) mod links;
pub(crate) mod liveness;
pub(crate) mod mapping;
pub(crate) mod mesh;
pub(crate) mod monitor;
pub(crate) mod peers;
pub(crate) mod point;
pub(crate) mod reconnect;
pub(crate) mod reduction;
pub(crate) mod region;
mod reminder;
pub(crate) mod resume;
pub(crate) mod setup;
pub(crate) mod transfer;
pub(crate) mod waiting;
pub(crate) mod wire;
