//! PyTorch's `TCPStore`: a client of it, and as much of its protocol as that needs.
//!
//! torchrun's agent serves one to its workers. We use it for one thing only: to learn where rank 0 hosts *our* store
//! (`advertise.rs`).
//!
//! # Security
//!
//! The protocol has no authentication and no encryption: whoever reaches the port reads and writes everything.
//!
//! # Source
//!
//! `torch/csrc/distributed/c10d/TCPStore.cpp` and `TCPStoreLibUvBackend.cpp` of torch 2.11. The protocol is internal
//! to PyTorch and has no version field; before 2.2 it began in another way, which is not spoken here.

mod client;
pub(super) mod message;

pub use client::TcpStoreClient;
