//! What `gpu_check` asks of models on a GPU is asked of models on the processor here: a check that fails there tells of the GPU.

#[path = "../examples/gpu_check/training.rs"]
mod training;

use phalanx_comm::testing::run_ranks;
use tch::Device;

#[test]
fn the_checks_of_training_hold_on_the_processor() {
    for world_size in [1, 2, 3] {
        for (what, check) in training::CHECKS {
            let of_ranks = run_ranks(world_size, move |mut group| {
                check(&mut group, Device::Cpu).map_err(|error| format!("{error:#}"))
            });
            for (rank, said) in of_ranks.iter().enumerate() {
                let said =
                    said.as_ref().unwrap_or_else(|error| panic!("{what}: rank {rank}: {error}"));
                if rank == 0 {
                    println!("{world_size} ranks: {what:<24} {said}");
                }
            }
        }
    }
}
