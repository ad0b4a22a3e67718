//! What ranks agree on before they train, and what they hear where they do not.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::{Pipeline, Shaped, Stage};
use phalanx_model_parallel::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::model::compute_once;

const ONE_F_ONE_B: ScheduleKind = ScheduleKind::OneFOneB;

fn pipeline(group: phalanx_comm::Group, micro_batches: usize) -> Result<Pipeline> {
    let schedule = Schedule::new(ONE_F_ONE_B, group.world_size(), micro_batches)?;
    Pipeline::new(TensorGroup::new(group), schedule, Device::Cpu)
}

/// The error that all ranks of three have, where rank `r`'s stage is `stage(r)`.
fn disagreement<S: Stage>(stage: impl Fn(usize) -> S + Send + Sync + 'static) -> String {
    compute_once();
    let errors = run_ranks(3, move |group| {
        let mut stage = stage(group.rank());
        let mut pipeline = pipeline(group, 2).unwrap();
        let error = pipeline.agree(&mut stage).unwrap_err();
        assert!(matches!(error, Error::PipelineMismatch { .. }), "{error}");
        // The group is as good as before.
        let again = pipeline.agree(&mut stage).unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        error.to_string()
    });
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    errors[0].clone()
}

/// A stage that multiplies with a matrix of these sizes.
fn product(rank: usize, from: i64, to: i64) -> impl Stage {
    move |_: usize, _: usize, input: Option<Tensor>| {
        let x = input.unwrap_or_else(|| Tensor::ones([4, from], (Kind::Float, Device::Cpu)));
        let x = x.f_matmul(&Tensor::ones([from, to], (Kind::Float, Device::Cpu)))?;
        if rank == 2 {
            Ok(x.f_sum(Kind::Float)?)
        } else {
            Ok(x)
        }
    }
}

#[test]
fn a_stage_that_cannot_take_what_it_gets_is_named_on_every_rank() {
    let error = disagreement(|rank| product(rank, 5, if rank == 1 { 6 } else { 5 }));
    let start = "stage 2, on rank 2 of the pipeline: ";
    let end = "expected a stage that takes Float of shape [4, 6] from stage 1";
    assert!(error.starts_with(start) && error.ends_with(end), "{error}");
}

#[test]
fn a_last_stage_that_returns_no_number_is_named_on_every_rank() {
    let error = disagreement(|_| product(0, 5, 5));
    assert!(error.contains("it returns Float of shape [4, 5]"), "{error}");
}

#[test]
fn a_stage_whose_output_has_no_gradient_is_named_on_every_rank() {
    let error = disagreement(|_| {
        |_: usize, _: usize, _: Option<Tensor>| Ok(Tensor::f_ones([2], (Kind::Int64, Device::Cpu))?)
    });
    let what =
        "stage 0, on rank 0 of the pipeline: it gives Int64 of shape [2], which has no gradient";
    assert!(error.starts_with(what), "{error}");
}

/// A stage that says what it gives.
struct Described(Shaped);

impl Stage for Described {
    fn forward(&mut self, _: usize, _: usize, _: Option<Tensor>) -> Result<Tensor> {
        Err(Error::NotThere { what: "a stage that is to run".to_owned() })
    }

    fn output(&self, _: usize) -> Option<Shaped> {
        Some(Shaped { shape: self.0.shape.clone(), kind: self.0.kind })
    }
}

#[test]
fn stages_that_are_described_do_not_run() {
    run_ranks(3, |group| {
        let shape = if group.rank() == 2 { vec![] } else { vec![4, 5] };
        let mut stage = Described(Shaped { shape, kind: Kind::BFloat16 });
        pipeline(group, 1).unwrap().agree(&mut stage).unwrap();
    });
}

#[test]
fn ranks_with_other_schedules_hear_so() {
    let errors = run_ranks(2, |group| {
        let micro_batches = 2 + group.rank();
        pipeline(group, micro_batches).unwrap_err().to_string()
    });
    assert_eq!(errors[0], errors[1]);
    let start = "rank 1 of the pipeline: a schedule of 3 micro-batches, 1 chunks a rank";
    assert!(errors[0].starts_with(start), "{}", errors[0]);
}

#[test]
fn schedules_that_do_not_fit_the_group_or_nccl_are_refused() {
    let errors = run_ranks(2, |group| {
        let group = TensorGroup::new(group);
        let schedule = Schedule::new(ONE_F_ONE_B, 3, 4).unwrap();
        let error = Pipeline::new(group.clone(), schedule, Device::Cpu).unwrap_err();
        let kind = ScheduleKind::Interleaved { chunks: 2 };
        let interleaved = Schedule::new(kind, 2, 4).unwrap();
        let made = Pipeline::new(group, interleaved, Device::Cpu).unwrap();
        (error.to_string(), made.together().unwrap_err().to_string())
    });
    for (ranks, sends) in errors {
        assert_eq!(
            ranks,
            "the group of the pipeline: it has 2 ranks; expected the 3 of the schedule"
        );
        assert!(sends.contains("gpipe, 1f1b or zb-h1 over NCCL"), "{sends}");
    }
}
