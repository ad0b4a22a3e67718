//! One suite for every backend: what a rank checks, run on threads, in processes over both links, and
//! under `mpirun` over MPI. What concerns GPUs runs on a stand-in for their libraries.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::float_cmp,
    clippy::shadow_unrelated,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "tests: exact values, small numbers, and a failure is a panic"
)]

mod damage;
mod device;
mod faults;
mod gpu_faults;
mod gpu_links;
mod gpu_messages;
mod gpu_permutations;
mod gpu_settings;
mod launched;
mod matrix;
mod messages;
mod misuse;
mod mpi_bootstrap;
mod mpi_faults;
mod mpi_permutations;
#[cfg(feature = "mpi")]
mod mpi_refuses;
mod mpirun;
#[path = "../support/namespaces.rs"]
mod namespaces;
mod order;
#[path = "../support/permutation_cases.rs"]
mod permutation_cases;
mod sequences;
mod without_gpu;

use phalanx_comm::Group;

/// What a rank checks with a group of its own.
type Check = fn(Group);

const CHECKS: [(&str, Check); 24] = [
    ("reductions of every type", matrix::every_type),
    ("near the oracle", matrix::near_the_oracle),
    ("movement", matrix::movement),
    ("large messages cross", matrix::large_messages_cross),
    ("slices meet regions", matrix::slices_meet_regions),
    ("ranges", matrix::ranges),
    ("many in flight", matrix::many_in_flight),
    ("in order on one region", order::in_order_on_one_region),
    ("gathers after sums", order::gathers_after_sums),
    ("starts at once", order::starts_at_once),
    ("messages beside collectives", order::messages_beside_collectives),
    ("more messages than there is room for", messages::more_than_there_is_room_for),
    ("messages to everybody", messages::everybody_to_everybody),
    ("taken in elsewhere", messages::taken_in_elsewhere),
    ("messages let go", messages::let_go),
    ("parts", matrix::parts),
    ("sequences", sequences::fixed_sequences),
    ("all differ", misuse::all_differ),
    ("absent", misuse::absent_is_named),
    ("abort", misuse::abort_is_heard),
    ("leaver", misuse::leaver_is_named),
    ("message of another length", misuse::message_of_another_length),
    ("message of a long name", misuse::message_of_a_long_name),
    ("forgotten work", misuse::forgotten_work),
];
