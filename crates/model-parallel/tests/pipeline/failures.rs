//! What all ranks hear when one fails.

use std::process::{Command, Stdio};

use phalanx_comm::testing::{free_port, run_ranks};
use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::{autograd, Zero};
use phalanx_model_parallel::layer::Builder;
use phalanx_model_parallel::pipeline::partition::partition_into_chunks;
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::Pipeline;
use phalanx_model_parallel::{Error, Result};
use tch::{nn, Device, Tensor};

use super::model::{compute_once, ddp, groups, weights, Part, LAYERS};

/// A step of a pipeline of `pp` ranks, `dp` times, in which `spoil` has a word after every forward: rank of the world, micro-batch, output.
fn step(
    mut world: Group,
    (pp, dp): (usize, usize),
    spoil: impl Fn(usize, usize, Tensor) -> Result<Tensor>,
) -> Result<Vec<f64>> {
    let (mesh, group, mut data) = groups(&mut world, pp, dp);
    let schedule = Schedule::new(ScheduleKind::OneFOneB, pp, 4)?;
    let range = partition_into_chunks(&[1.0; LAYERS], &schedule, group.rank())?.remove(0);
    let vs = nn::VarStore::new(Device::Cpu);
    let part = Part::new(&Builder::new(vs.root(), 1), range);
    let (dp_rank, rank) = (data.rank(), world.rank());
    let (ddp, _optimizer) = ddp(&vs, &mut data, Zero::Off);
    let pipeline = Pipeline::new(TensorGroup::new(group), schedule, Device::Cpu)?;
    let mut pipeline = pipeline.on_mesh(&mesh, rank)?;
    let mut whole =
        |_: usize, at: usize, input: Option<Tensor>| part.forward(&[dp_rank, 0, at], input, false);
    pipeline.step(&mut whole, &ddp, &weights(4, dp_rank))?;
    ddp.release_gradients()?;
    let mut spoiled = |_: usize, at: usize, input: Option<Tensor>| {
        spoil(rank, at, part.forward(&[dp_rank, 1, at], input, false)?)
    };
    Ok(pipeline.step(&mut spoiled, &ddp, &weights(4, dp_rank))?.losses)
}

/// What all ranks of a mesh of 3 × 2 hear, of which rank 3, of stage 1, is spoiled.
fn heard(
    spoil: impl Fn(usize, usize, Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Vec<String> {
    compute_once();
    run_ranks(6, move |world| {
        let error = step(world, (3, 2), &spoil).unwrap_err();
        assert!(matches!(error, Error::Pipeline { .. }), "{error}");
        error.to_string()
    })
}

#[test]
fn an_error_of_a_stage_is_heard_on_every_rank_of_the_mesh() {
    let heard = heard(|rank, micro_batch, output| match (rank, micro_batch) {
        (3, 2) => Err(phalanx_ddp_core::Error::closure("the samples ran out").into()),
        _ => Ok(output),
    });
    let first =
        "rank 3 (pp 1, dp_shard 1), stage 1, Forward (micro-batch 2, chunk 0): the samples ran out";
    assert_eq!(heard[3], first);
    for error in &heard {
        assert!(error.contains(first), "{error}");
    }
}

#[test]
fn an_error_inside_a_backward_is_heard_on_every_rank_of_the_mesh() {
    let heard = heard(|rank, micro_batch, output| {
        if (rank, micro_batch) != (3, 1) {
            return Ok(output);
        }
        let mut outputs = autograd::function(
            "spoiled",
            &[&output],
            |_, inputs| Ok((vec![inputs[0].f_mul_scalar(1.0)?], ())),
            |_, _| Err(phalanx_ddp_core::Error::closure("the backward went wrong")),
        )?;
        Ok(outputs.remove(0))
    });
    for error in &heard {
        assert!(error.contains("the backward went wrong"), "{error}");
    }
    let start = "rank 3 (pp 1, dp_shard 1), stage 1, Backward (micro-batch 1, chunk 0): ";
    assert!(heard[3].starts_with(start), "{}", heard[3]);
}

#[test]
fn an_output_of_another_shape_says_what_to_do() {
    let heard = heard(|rank, micro_batch, output| match (rank, micro_batch) {
        (3, 0) => Ok(output.f_slice(0, 0, 2, 1)?),
        _ => Ok(output),
    });
    for error in &heard {
        assert!(
            error.contains("call Pipeline::agree on all ranks before shapes change"),
            "{error}"
        );
    }
}

#[test]
fn weights_that_differ_between_stages_are_an_error_on_every_rank() {
    compute_once();
    let errors = run_ranks(2, |mut world| {
        let (_, group, mut data) = groups(&mut world, 2, 1);
        let schedule = Schedule::new(ScheduleKind::OneFOneB, 2, 2).unwrap();
        let rank = group.rank();
        let range = partition_into_chunks(&[1.0; LAYERS], &schedule, rank).unwrap().remove(0);
        let vs = nn::VarStore::new(Device::Cpu);
        let part = Part::new(&Builder::new(vs.root(), 1), range);
        let (ddp, _optimizer) = ddp(&vs, &mut data, Zero::Off);
        let mut pipeline = Pipeline::new(TensorGroup::new(group), schedule, Device::Cpu).unwrap();
        let mut stage =
            |_: usize, at: usize, input: Option<Tensor>| part.forward(&[0, 0, at], input, false);
        let weights = [3.0, if rank == 0 { 3.0 } else { 4.0 }];
        pipeline.step(&mut stage, &ddp, &weights).unwrap_err().to_string()
    });
    assert_eq!(errors[0], errors[1]);
    let what = "rank 1 of the pipeline: weights of micro-batches [3.0, 4.0]; expected the first rank's, [3.0, 3.0]";
    assert_eq!(errors[0], what);
}

/// Says that this process is a rank of the test below.
const RANK: &str = "PHALANX_TEST_PIPELINE_RANK";

#[test]
#[ignore = "a rank of the test below, which starts it"]
fn rank_that_may_be_killed() {
    if std::env::var_os(RANK).is_none() {
        return;
    }
    compute_once();
    let world = Group::from_environment(GroupOptions::default()).unwrap();
    let outcome = step(world, (4, 1), |rank, micro_batch, output| {
        if (rank, micro_batch) == (2, 1) {
            std::process::abort();
        }
        Ok(output)
    });
    println!("heard: {}", outcome.unwrap_err());
}

#[test]
fn a_rank_that_dies_is_named_with_its_place_on_every_other_rank() {
    let (program, port) = (std::env::current_exe().unwrap(), free_port());
    let start = |rank: usize| {
        let mut command = Command::new(&program);
        let name = "failures::rank_that_may_be_killed";
        command.args([name, "--exact", "--ignored", "--nocapture"]).env(RANK, "1");
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", "4").env("LOCAL_WORLD_SIZE", "4");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..4).map(start).collect();
    for (rank, child) in ranks.into_iter().enumerate() {
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        if rank == 2 {
            assert!(!ended.status.success(), "{said}");
            continue;
        }
        let heard = said.split("heard: ").nth(1).unwrap_or_else(|| panic!("rank {rank}: {said}"));
        let place = format!("rank {rank} (pp {rank}), ");
        assert!(heard.starts_with(&place), "{heard}");
        assert!(heard.contains("rank 2 of this pipeline is rank 2 (pp 2)"), "{heard}");
        assert!(heard.contains("died"), "{heard}");
    }
}
