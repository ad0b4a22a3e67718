//! PyTorch itself on the other side: its `TCPStore`, and torchrun with its rendezvous and restarts.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    reason = "ranks report on their output, and end as ranks end"
)]

mod support;
mod tcp_store;
mod torchrun;

/// What a rank's process runs; torchrun starts it for the other tests.
#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process() {
    torchrun::rank();
}
