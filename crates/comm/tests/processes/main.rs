//! Ranks as processes: faults, and two machines in network namespaces.
#![expect(
    clippy::cast_precision_loss,
    clippy::float_cmp,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::needless_pass_by_value,
    clippy::shadow_unrelated,
    reason = "ranks report on their output; sums of small integers are exact"
)]

mod faults;
mod figures;
mod machines;
#[path = "../support/namespaces.rs"]
mod namespaces;
mod netns;
mod quota;
mod resets;
mod sandbox;
mod silence;
mod support;

/// What a rank's process runs; started by the other tests.
#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process() {
    let role = std::env::var(support::ROLE).expect("only the other tests start this one");
    match &role[..] {
        "mixed" => netns::rank(),
        "messages" => resets::rank(),
        "sandbox" => sandbox::rank(),
        "aborts" => resets::aborting_rank(),
        "counts" => silence::rank(false),
        "counts patiently" => silence::rank(true),
        "knocks" => resets::stranger(),
        "leaves" => silence::leaving_rank(),
        _ => faults::rank(&role),
    }
}
