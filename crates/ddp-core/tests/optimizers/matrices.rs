//! Matrices that are needed whole although they are sharded: of every kind and layout, and those that come later.

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions};
use phalanx_ddp_core::diloco::{DiLoCo, DiLoCoOptions};
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{Adafactor, Ddp, DdpOptions, Muon, Optimizer, ParameterGroups, Sync, Zero};
use tch::{Device, Kind, Tensor};

use super::stages::{groups, muon, Make, STAGES};
use super::support::{options, pattern, values, wrapped};

const WHOLE: [Make; 2] = [
    || Box::new(Muon { lr: 0.02, flattens: true, ..Muon::default() }),
    || Box::new(Adafactor { lr: 0.02, ..Adafactor::default() }),
];

/// Ranks that train by themselves compute whole matrices by themselves, with what other ranks have kept of them until then.
#[test]
fn ranks_that_train_by_themselves_turn_matrices_by_themselves() {
    const PLAIN: u64 = 2;
    let train = |mut group: Group, make: Make, own: Option<i64>| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = Optimizer::new(&ddp, make(), groups()).unwrap();
        let diloco = DiLoCoOptions { plain_steps: PLAIN, ..DiLoCoOptions::default() };
        let mut local = own.is_none().then(|| DiLoCo::new(&ddp, diloco).unwrap());
        let rank = own.unwrap_or(group.rank() as i64);
        for step in 0..5 {
            let part = |rank: i64| model.loss_sum(rank * 6..rank * 6 + 6);
            if step < PLAIN as i64 && group.world_size() == 1 {
                // Both ranks' samples, one after the other.
                ddp.backward(&part(0), 6.0, Sync::Accumulate).unwrap();
                ddp.backward(&part(1), 6.0, Sync::Reduce).unwrap();
            } else {
                ddp.backward(&part(rank), 6.0, Sync::Reduce).unwrap();
            }
            let _step = optimizer.step(None).unwrap();
            local.iter_mut().for_each(|local| assert!(!local.step().unwrap(), "no averaging"));
        }
        model.bits()
    };
    for make in [WHOLE[0], WHOLE[1]] {
        let together = run_ranks(2, move |group| train(group, make, None));
        for (rank, bits) in (0..).zip(&together) {
            let alone = run_ranks(1, move |group| train(group, make, Some(rank))).remove(0);
            assert!(*bits == alone, "{:?}: rank {rank}", make());
        }
        assert_ne!(together[0], together[1]);
    }
}

#[test]
fn what_is_kept_of_a_matrix_stays_with_it_when_others_begin_to_train() {
    let late = ["tall", "double", "vector"];
    for rule in WHOLE {
        let with = (rule, None);
        let alone = run_ranks(1, move |group| train_thawing(group, Zero::Off, with, &late));
        for world_size in [2, 4] {
            for zero in STAGES {
                let train = move |group| train_thawing(group, zero, with, &late);
                for of_rank in run_ranks(world_size, train) {
                    assert!(of_rank == alone[0], "{:?} {zero:?} on {world_size} ranks", rule());
                }
            }
        }
    }
}

/// Matrices in f32, bf16 and f64, kernels that lie channels-last, one of a single row, one without elements, a vector.
fn mixed() -> Vec<(String, Tensor)> {
    let of = |kind, shape: &[i64], seed| pattern(shape, seed).to_kind(kind);
    let kernel = pattern(&[6, 3, 3, 5], 4).permute([0, 3, 1, 2]);
    assert_eq!(kernel.stride(), [45, 1, 15, 5], "channels-last");
    let all = [
        ("float", of(Kind::Float, &[40, 57], 1)),
        ("tall", of(Kind::Float, &[130, 20], 2)),
        ("half", of(Kind::BFloat16, &[33, 70], 3)),
        ("kernel", kernel),
        ("double", of(Kind::Double, &[23, 31], 5)),
        ("row", of(Kind::Float, &[1, 90], 6)),
        ("empty", of(Kind::Float, &[0, 4], 7)),
        ("vector", of(Kind::BFloat16, &[75], 8)),
    ];
    all.map(|(name, tensor)| (name.to_owned(), tensor.set_requires_grad(true))).into()
}

fn train_mixed(group: Group, zero: Zero, with: (Make, Option<Kind>)) -> Vec<Vec<u64>> {
    train_thawing(group, zero, with, &[])
}

/// As [`train_mixed`]; those of these names begin to train after the first step.
fn train_thawing(
    mut group: Group,
    zero: Zero,
    (rule, gradient_kind): (Make, Option<Kind>),
    late: &[&str],
) -> Vec<Vec<u64>> {
    let named = mixed();
    let late: Vec<&Tensor> =
        named.iter().filter(|(n, _)| late.contains(&n.as_str())).map(|(_, t)| t).collect();
    late.iter().for_each(|tensor| drop(tensor.set_requires_grad(false)));
    let parameters = named.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    let options = DdpOptions { bucket_bytes: vec![3000, 9000], gradient_kind, ..options(zero) };
    let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
    let mut optimizer = Optimizer::new(&ddp, rule(), ParameterGroups::default()).unwrap();
    for step in 0..3 {
        late.iter().filter(|_| step > 0).for_each(|tensor| drop(tensor.set_requires_grad(true)));
        let of = |(at, (_, tensor)): (i64, &(String, Tensor))| {
            let gradient = pattern(&tensor.size(), 100 + step * 10 + at).to_kind(tensor.kind());
            (tensor * gradient).sum(Kind::Double)
        };
        let loss = (0..).zip(&named).map(of).sum::<Tensor>();
        ddp.backward(&loss, 1.0, Sync::Reduce).unwrap();
        let _step = optimizer.step(Some(1.0)).unwrap();
    }
    let bits = |tensor: &Tensor| {
        let flat = tensor.detach().to_kind(Kind::Double).contiguous().reshape([-1]);
        Vec::<f64>::try_from(&flat).unwrap().into_iter().map(f64::to_bits).collect()
    };
    named.iter().map(|(_, tensor)| bits(tensor)).collect()
}

#[test]
fn every_kind_and_layout_has_the_same_bits_in_every_stage_and_number_of_ranks() {
    // Directions are in the gradients' memory, or in memory of their own where kinds differ.
    for (rule, kind) in [(WHOLE[0], None), (WHOLE[1], None), (WHOLE[0], Some(Kind::BFloat16))] {
        let with = (rule, kind);
        let alone = run_ranks(1, move |group| train_mixed(group, Zero::Off, with)).remove(0);
        let finite = |bits: &u64| f64::from_bits(*bits).is_finite();
        assert!(alone.iter().flatten().all(finite), "{:?}", rule());
        // Every rank has the same gradients, and sums of two and four are exact.
        for world_size in [1, 2, 4] {
            for zero in STAGES {
                for of_rank in run_ranks(world_size, move |group| train_mixed(group, zero, with)) {
                    assert!(of_rank == alone, "{:?} {zero:?} on {world_size} ranks", rule());
                }
            }
        }
    }
}

/// The second layer is frozen for two steps; the last is left out of two.
fn unfrozen(mut group: Group, zero: Zero, rule: &dyn Fn() -> Box<dyn Rule>) -> Vec<u32> {
    let model = super::support::Model::new(group.rank() as i64 * 1000);
    let variables = model.vs.variables();
    let freeze = |on: bool| {
        for name in ["two.weight", "two.bias"] {
            let _same = variables[name].set_requires_grad(!on);
        }
    };
    freeze(true);
    let ddp = Ddp::new(&model.vs, &mut group, options(zero)).unwrap();
    let mut optimizer = Optimizer::new(&ddp, rule(), groups()).unwrap();
    for step in 0..5 {
        freeze(step < 2 || step == 4);
        let start = step * 12 + group.rank() as i64 * 4;
        ddp.backward(&model.loss_sum(start..start + 4), 4.0, Sync::Reduce).unwrap();
        let _step = optimizer.step(Some(0.5)).unwrap();
    }
    model.bits()
}

#[test]
fn matrices_that_begin_to_train_later_have_the_same_bits_in_every_stage() {
    let rules: [Make; 2] = [|| Box::new(muon()), WHOLE[1]];
    for rule in rules {
        let run = |zero| run_ranks(3, move |group| unfrozen(group, zero, &rule));
        let unsharded = run(STAGES[0]);
        assert!(unsharded.iter().all(|bits| *bits == unsharded[0]), "ranks differ");
        for stage in &STAGES[1..] {
            assert!(run(*stage) == unsharded, "{:?} {stage:?}", rule());
        }
    }
}

/// The names of the states that a checkpoint has, after a step on two ranks.
fn saved_states(zero: Zero, rule: Make) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    run_ranks(2, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(zero));
        let mut optimizer = Optimizer::new(&ddp, rule(), ParameterGroups::default()).unwrap();
        ddp.backward(&model.loss_sum(0..4), 4.0, Sync::Reduce).unwrap();
        let _step = optimizer.step(None).unwrap();
        let options = CheckpointerOptions { heed_signals: false, ..Default::default() };
        let mut checkpointer = Checkpointer::new(&path, &ddp, options).unwrap();
        checkpointer.save(1, Some(&mut optimizer), || ()).unwrap();
        checkpointer.finish().unwrap();
    });
    let newest = phalanx_checkpoint::Folder::new(folder.path()).newest().unwrap().unwrap();
    let names = phalanx_checkpoint::Tensors::names(&newest);
    let states = names.iter().filter_map(|name| name.strip_prefix("optimizer/"));
    states.map(ToOwned::to_owned).collect()
}

#[test]
fn each_parameter_has_the_states_that_it_needs_and_no_more() {
    for zero in STAGES {
        let of_muon = saved_states(zero, || Box::new(muon()));
        let of = |parameter: &str| -> Vec<&str> {
            let is_it = |name: &&String| name.ends_with(parameter);
            of_muon.iter().filter(is_it).filter_map(|n| n.split('/').next()).collect()
        };
        assert_eq!(of("/two.weight"), ["momentum_buffer"]);
        assert_eq!(of("/three.weight"), ["exp_avg", "exp_avg_sq"]);
        assert_eq!(of("/one.bias"), ["exp_avg", "exp_avg_sq"]);
        let of_adafactor = saved_states(zero, WHOLE[1]);
        assert!(of_adafactor.contains(&"row_var/two.weight".to_owned()), "{of_adafactor:?}");
        assert!(of_adafactor.contains(&"variance/two.bias".to_owned()), "{of_adafactor:?}");
        assert!(!of_adafactor.contains(&"variance/two.weight".to_owned()), "{of_adafactor:?}");
    }
}

/// A rule of somebody else's: each row of a matrix becomes its mean.
#[derive(Debug)]
struct RowMeans;

impl Rule for RowMeans {
    fn name(&self) -> &'static str {
        "row means"
    }
    fn lr(&self) -> f64 {
        1.0
    }
    fn weight_decay(&self) -> f64 {
        0.0
    }
    fn states(&self) -> &'static [&'static str] {
        &[]
    }
    fn check(&self) -> phalanx_ddp_core::Result<()> {
        Ok(())
    }
    fn update(
        &self,
        _now: &phalanx_ddp_core::optim::Now,
        runs: &phalanx_ddp_core::optim::Runs,
    ) -> phalanx_ddp_core::Result<()> {
        for (direction, gradient) in runs.directions.iter().zip(&runs.gradients) {
            direction.shallow_clone().f_copy_(gradient)?;
        }
        Ok(())
    }
    fn whole(&self) -> Option<&dyn phalanx_ddp_core::optim::Whole> {
        Some(self)
    }
}

impl phalanx_ddp_core::optim::Whole for RowMeans {
    fn takes(&self, _name: &str, shape: &[i64]) -> bool {
        shape.len() == 2
    }
    fn states(&self) -> &'static [&'static str] {
        &[]
    }
    fn others(&self) -> (f64, f64) {
        (1.0, 0.0)
    }
    fn turn(
        &self,
        _now: &phalanx_ddp_core::optim::Now,
        direction: &Tensor,
        _kept: &[Tensor],
    ) -> phalanx_ddp_core::Result<Tensor> {
        let means = direction.f_mean_dim([1_i64].as_slice(), true, None::<Kind>)?;
        Ok(means.f_expand(direction.size(), true)?)
    }
}

#[test]
fn a_rule_sees_the_whole_matrix_wherever_its_pieces_are() {
    for world_size in [1, 2, 3, 4] {
        for zero in STAGES {
            let all = run_ranks(world_size, move |mut group| {
                let weight = Tensor::zeros([70, 64], (Kind::Float, Device::Cpu));
                let weight = weight.set_requires_grad(true);
                let parameters = vec![("w".to_owned(), weight.shallow_clone())];
                let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options(zero)).unwrap();
                let mut optimizer =
                    Optimizer::new(&ddp, RowMeans, ParameterGroups::default()).unwrap();
                // Whole numbers below 2^24 and their means of 64 are exact.
                let gradient = Tensor::arange(70 * 64, (Kind::Float, Device::Cpu));
                let loss = (&weight * gradient.reshape([70, 64])).sum(Kind::Float);
                ddp.backward(&(loss * world_size as f64), world_size as f64, Sync::Reduce).unwrap();
                let _step = optimizer.step(None).unwrap();
                values(&weight)
            });
            for of_rank in all {
                for (at, value) in of_rank.iter().enumerate() {
                    let row = (at / 64 * 64) as f32;
                    let expected = -(row + 31.5);
                    let off = (value - expected).abs();
                    // The mean over ranks rounds the divisor, the quotient and the sums: three ranks' are not exact.
                    assert!(
                        off <= 8.0 * f32::EPSILON * expected.abs(),
                        "{world_size} {zero:?}: {at}"
                    );
                }
            }
        }
    }
}
