//! The control plane: who the ranks are, whether they live, and what ended the group. Every backend needs it.
//!
//! Its protocol is in the README beside this file.
//!
//! | file | what |
//! |---|---|
//! | `card`, `mesh`, `callers` | connects the ranks, once |
//! | `connection`, `wire` | a control connection, and the frames on it |
//! | `monitor`, `intake`, `liveness` | the thread that reads them all, and what it has read; who has been silent |
//! | `peers`, `absent`, `reminder` | what is known of the ranks; who is waited for, and what the log says of it |
//! | `reconnect`, `resume` | control connections that come back |
//! | `point`, `part` | `send` and `receive`; a message between machines |
//! | `outbox`, `inbox` | messages to and from a rank of this machine |

mod absent;
mod callers;
pub(crate) mod card;
pub(crate) mod connection;
mod inbox;
mod intake;
pub(crate) mod liveness;
pub(crate) mod mesh;
pub(crate) mod monitor;
mod outbox;
mod part;
pub(crate) mod peers;
pub(crate) mod point;
pub(crate) mod reconnect;
mod reminder;
pub(crate) mod resume;
pub(crate) mod wire;
