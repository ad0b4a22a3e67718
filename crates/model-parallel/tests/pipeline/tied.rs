//! Weights that the first and the last stage share.

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::{Sync, Zero};
use phalanx_model_parallel::layer::{linear, Builder, Init};
use phalanx_model_parallel::pipeline::schedule::{Schedule, ScheduleKind};
use phalanx_model_parallel::pipeline::Pipeline;
use phalanx_model_parallel::Result;
use tch::{nn, Device, Kind, Tensor};

use super::model::{bits, compute_once, ddp, groups, values, weights};

const VOCABULARY: i64 = 11;
const WIDTH: i64 = 8;
const MICRO_BATCHES: usize = 3;
const STEPS: usize = 3;

type Bits = Vec<u32>;

fn embedding(builder: &Builder<'_>, name: &str) -> Tensor {
    let init = Init::Normal { std: 0.3 };
    (builder / name).whole("weight", &[VOCABULARY, WIDTH], init).unwrap()
}

fn embedded(weight: &Tensor, place: &[usize]) -> Result<Tensor> {
    let ids = values("ids", place, &[5]).f_abs()?.f_mul_scalar(VOCABULARY)?;
    let ids = ids.f_to_kind(Kind::Int64)?.f_clamp_max(VOCABULARY - 1)?;
    Ok(Tensor::f_embedding(weight, &ids, -1, false, false)?)
}

fn headed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(linear(&x.f_tanh()?, weight, None)?.f_square()?.f_sum(Kind::Float)?)
}

/// One process a data-parallel rank with two copies, whose gradients are added up by hand.
fn by_hand(dp: usize, zero: Zero) -> Vec<Bits> {
    run_ranks(dp, move |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let builder = Builder::new(vs.root(), 1);
        let (first, last) = (embedding(&builder, "first"), embedding(&builder, "last"));
        tch::no_grad(|| last.detach().copy_(&first));
        let rank = group.rank();
        let (ddp, mut optimizer) = ddp(&vs, &mut group, zero);
        for step in 0..STEPS {
            for (at, weight) in weights(MICRO_BATCHES, rank).into_iter().enumerate() {
                let loss = headed(&embedded(&first, &[rank, step, at]).unwrap(), &last).unwrap();
                ddp.backward(&loss, weight, Sync::Accumulate).unwrap();
            }
            let sum = first.grad() + last.grad();
            first.grad().copy_(&sum);
            last.grad().copy_(&sum);
            ddp.exchange_weighted().unwrap();
            optimizer.step(None).unwrap();
        }
        let all = bits(&vs);
        assert_eq!(all["first.weight"], all["last.weight"]);
        all["first.weight"].clone()
    })
}

fn tied(mut world: Group, pp: usize, dp: usize, kind: ScheduleKind, zero: Zero) -> Option<Bits> {
    let (_, group, mut data) = groups(&mut world, pp, dp);
    let (rank, dp_rank) = (group.rank(), data.rank());
    let schedule = Schedule::new(kind, pp, MICRO_BATCHES).unwrap();
    let mut pipeline = Pipeline::new(TensorGroup::new(group), schedule, Device::Cpu).unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let builder = Builder::new(vs.root(), 1);
    let is_end = rank == 0 || rank + 1 == pp;
    // They begin otherwise: the last copy becomes the first.
    let name = if rank == 0 { "first" } else { "last" };
    let weight = embedding(&builder, name);
    pipeline.tie("embedding", is_end.then_some(&weight)).unwrap();
    let (ddp, mut optimizer) = ddp(&vs, &mut data, zero);
    for step in 0..STEPS {
        let mut stage = |_: usize, at: usize, input: Option<Tensor>| {
            let x = match input {
                Some(x) => x,
                None => embedded(&weight, &[dp_rank, step, at])?,
            };
            match (rank + 1 == pp, is_end) {
                (true, _) => headed(&x, &weight),
                (false, true) => Ok(x),
                // Nothing of its weight changes what goes through.
                (false, false) => Ok(x.f_add(&weight.f_sum(Kind::Float)?.f_mul_scalar(0.0)?)?),
            }
        };
        pipeline.step(&mut stage, &ddp, &weights(MICRO_BATCHES, dp_rank)).unwrap();
        optimizer.step(None).unwrap();
    }
    let all = bits(&vs);
    is_end.then(|| all[&format!("{name}.weight")].clone())
}

#[test]
fn copies_of_a_tied_weight_stay_equal_and_learn_as_one_that_has_both_gradients() {
    compute_once();
    for (dp, zero) in [(1, Zero::Off), (2, Zero::Off), (2, Zero::One), (2, Zero::Three)] {
        let expected = by_hand(dp, zero);
        for kind in [ScheduleKind::GPipe, ScheduleKind::OneFOneB, ScheduleKind::ZbH1] {
            for pp in [2, 3] {
                let actual = run_ranks(pp * dp, move |world| tied(world, pp, dp, kind, zero));
                for weight in actual.into_iter().flatten() {
                    assert_eq!(weight, expected[0], "{kind}, pp {pp}, dp {dp}, {zero:?}");
                }
            }
        }
    }
}

#[test]
fn one_rank_ties_nothing_and_odd_ties_are_errors_on_every_rank() {
    compute_once();
    let errors = run_ranks(3, |group| {
        let schedule = Schedule::new(ScheduleKind::OneFOneB, 3, 1).unwrap();
        let rank = group.rank();
        let group = TensorGroup::new(group);
        let mut pipeline = Pipeline::new(group, schedule, Device::Cpu).unwrap();
        let zeros = |rows| Tensor::zeros([rows, 2], (Kind::Float, Device::Cpu));
        let mut tie = |weight: Option<Tensor>| pipeline.tie("head", weight.as_ref());
        tie((rank == 1).then(|| zeros(3))).unwrap();
        let errors = [
            tie(None).unwrap_err(),
            tie((rank != 1).then(|| zeros(3 + rank as i64))).unwrap_err(),
            tie(Some(zeros(3))).unwrap_err(),
        ];
        errors.map(|error| error.to_string())
    });
    for of_rank in &errors {
        assert_eq!(of_rank, &errors[0]);
    }
    let [none, shapes, three] = &errors[0];
    assert!(none.contains("no rank has it"), "{none}");
    let what = "tied weight head on rank 2 of the pipeline: Float of shape [5, 2]; expected Float of shape [3, 2]";
    assert_eq!(shapes, what);
    assert!(three.contains("a third copy"), "{three}");
}
