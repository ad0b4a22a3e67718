//! Batch normalisation over all ranks is that of their concatenated batch.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "a failed unwrap is a failed test, and numbers are small"
)]

mod support;

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::recompute::Checkpointed;
use phalanx_ddp_core::{
    Buffers, Ddp, DdpOptions, Error, Optimizer, ParameterGroups, Sgd, Sync, SyncBatchNorm,
    SyncBatchNormConfig, SyncGroup, Zero,
};
use support::{options, pattern, run_over};
use tch::nn::ModuleT as _;
use tch::{nn, Device, Kind, Tensor};

const CHANNELS: i64 = 5;

/// Samples of each rank: uneven, one of them has none.
const SAMPLES: [i64; 4] = [3, 1, 0, 6];

fn doubles(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).contiguous().reshape([-1])).unwrap()
}

fn assert_close(what: &str, left: &[f64], right: &[f64], bound: f64) {
    assert_eq!(left.len(), right.len(), "{what}");
    for (at, (l, r)) in left.iter().zip(right).enumerate() {
        assert!(
            (l - r).abs() <= bound,
            "{what}, element {at}: {l} and {r}, more than {bound:.1e} apart"
        );
    }
}

/// The batch of all of `world_size` ranks, with channels of different mean and spread, and gradients for it.
fn whole(world_size: usize, tail: &[i64], kind: Kind) -> (Tensor, Tensor) {
    let total: i64 = SAMPLES[..world_size].iter().sum();
    let shape = [&[total, CHANNELS], tail].concat();
    let mut by_channel = vec![1; shape.len()];
    by_channel[1] = CHANNELS;
    let channel =
        Tensor::arange(CHANNELS, (Kind::Double, Device::Cpu)).reshape(by_channel.as_slice());
    let values = pattern(&shape, 3).to_kind(Kind::Double) * (&channel + 1.0) + (&channel - 2.0);
    (values.to_kind(kind), pattern(&shape, 8).to_kind(kind))
}

/// This rank's samples.
fn part(whole: &Tensor, rank: usize) -> Tensor {
    whole.narrow(0, SAMPLES[..rank].iter().sum(), SAMPLES[rank])
}

fn config() -> SyncBatchNormConfig {
    let ws_init = nn::Init::Const(1.5);
    let bs_init = nn::Init::Const(-0.25);
    SyncBatchNormConfig { ws_init, bs_init, momentum: 0.3, ..SyncBatchNormConfig::default() }
}

/// Output, gradients of input, weight and bias, running mean and variance.
type Outcome = [Vec<f64>; 6];

fn outcome(x: &Tensor, y: &Tensor, vs: &nn::VarStore) -> Outcome {
    let variables = vs.variables();
    let gradient = |name: &str| doubles(&variables[name].grad());
    [
        doubles(y),
        doubles(&x.grad()),
        gradient("bn.weight"),
        gradient("bn.bias"),
        doubles(&variables["bn.running_mean"]),
        doubles(&variables["bn.running_var"]),
    ]
}

/// libtorch's own, of the whole batch, in f64.
fn alone(world_size: usize, tail: &[i64], from: Kind) -> Outcome {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let SyncBatchNormConfig { ws_init, bs_init, momentum, .. } = config();
    let config =
        nn::BatchNormConfig { ws_init, bs_init, momentum, ..nn::BatchNormConfig::default() };
    let path = vs.root() / "bn";
    let norm = match tail.len() {
        0 | 1 => nn::batch_norm1d(path, CHANNELS, config),
        2 => nn::batch_norm2d(path, CHANNELS, config),
        _ => nn::batch_norm3d(path, CHANNELS, config),
    };
    vs.set_kind(Kind::Double);
    let (x, dy) = whole(world_size, tail, from);
    let x = x.to_kind(Kind::Double).set_requires_grad(true);
    let mut y = x.shallow_clone();
    for _ in 0..2 {
        y = norm.forward_t(&x, true);
        (&y * dy.to_kind(Kind::Double)).sum(Kind::Double).backward();
    }
    outcome(&x, &y, &vs)
}

/// This rank's part of it, in `kind`, with variables in `variables`.
fn together(group: &mut Group, tail: &[i64], kind: Kind, variables: Kind) -> Outcome {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let sync = SyncGroup::new(group).unwrap();
    let norm = SyncBatchNorm::new(vs.root() / "bn", CHANNELS, config(), &sync);
    vs.set_kind(variables);
    let (x, dy) = whole(group.world_size(), tail, kind);
    let (x, dy) = (part(&x, group.rank()).set_requires_grad(true), part(&dy, group.rank()));
    let mut y = x.shallow_clone();
    for _ in 0..2 {
        y = norm.forward_t(&x, true);
        assert_eq!(y.kind(), kind);
        (&y * &dy).sum(kind).backward();
    }
    outcome(&x, &y, &vs)
}

/// Compares what ranks have with the whole: outputs and gradients of inputs one after the other, the sum of gradients of weights.
fn compare(ranks: &[Outcome], whole: &Outcome, bounds: [f64; 2]) {
    let joined = |at: usize| ranks.iter().flat_map(|rank| rank[at].clone()).collect::<Vec<f64>>();
    let added = |at: usize| -> Vec<f64> {
        let sum = |channel: usize| ranks.iter().map(|rank| rank[at][channel]).sum();
        (0..ranks[0][at].len()).map(sum).collect()
    };
    let [of_outputs, of_sums] = bounds;
    assert_close("output", &joined(0), &whole[0], of_outputs);
    assert_close("gradient of the input", &joined(1), &whole[1], of_outputs);
    assert_close("gradient of the weight", &added(2), &whole[2], of_sums);
    assert_close("gradient of the bias", &added(3), &whole[3], of_sums);
    for rank in ranks {
        assert!(
            rank[4] == ranks[0][4] && rank[5] == ranks[0][5],
            "ranks differ in running statistics"
        );
        assert_close("running mean", &rank[4], &whole[4], of_outputs);
        assert_close("running variance", &rank[5], &whole[5], of_outputs);
    }
}

/// What a result may be off by, for unit round-off `u`. Values reach 10, and their square 100, gradients 4; each number of the result is a sum of at most
/// `count` terms that were rounded eight times or less.
fn bounds(u: f64, count: i64) -> [f64; 2] {
    let of_sums = 100.0 * (count as f64 + 8.0) * u;
    [of_sums, of_sums * count as f64]
}

#[test]
fn it_is_that_of_the_concatenated_batch() {
    for world_size in [1, 2, 3, 4] {
        for tail in [&[][..], &[7], &[3, 2], &[2, 1, 3]] {
            let count = SAMPLES[..world_size].iter().sum::<i64>() * tail.iter().product::<i64>();
            for (kind, round_off) in
                [(Kind::Double, f64::EPSILON / 2.0), (Kind::Float, support::ROUNDOFF)]
            {
                let ranks =
                    run_ranks(world_size, move |mut group| together(&mut group, tail, kind, kind));
                compare(&ranks, &alone(world_size, tail, kind), bounds(round_off, count));
            }
        }
    }
}

/// Statistics are f32: the result is that of f32, rounded once.
#[test]
fn half_precision_has_statistics_in_f32() {
    for (kind, round_off) in [(Kind::BFloat16, 1.0 / 256.0), (Kind::Half, 1.0 / 2048.0)] {
        for variables in [Kind::Float, kind] {
            let ranks = run_ranks(3, move |mut group| together(&mut group, &[4], kind, variables));
            let whole = alone(3, &[4], kind);
            // Outputs and gradients reach 4; two backwards are added.
            let joined = |at: usize| {
                ranks.iter().flat_map(|rank: &Outcome| rank[at].clone()).collect::<Vec<_>>()
            };
            for at in [0, 1] {
                assert_close(
                    &format!("{kind:?}, {at}"),
                    &joined(at),
                    &whole[at],
                    4.0 * 4.0 * round_off,
                );
            }
            if variables == Kind::Float {
                let bound = bounds(support::ROUNDOFF, 16)[0];
                assert_close("running mean", &ranks[0][4], &whole[4], bound);
                assert_close("running variance", &ranks[0][5], &whole[5], bound);
            }
        }
    }
}

/// Squares of a mean of 4096 have no room in f32 for a variance of 1: squared deviations have.
#[test]
fn a_large_mean_does_not_eat_the_variance() {
    let variances = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let config = SyncBatchNormConfig { momentum: 1.0, ..config() };
        let norm = SyncBatchNorm::new(vs.root() / "bn", 1, config, &sync);
        // ±1 around 4096, as many of each on a rank: all of this is exact.
        let x = Tensor::from_slice(&[4095.0_f32, 4097.0, 4095.0, 4097.0]).reshape([4, 1]);
        let _y = norm.forward_t(&x, true);
        doubles(&norm.running().unwrap()[1])[0]
    });
    for variance in variances {
        assert!((variance - 8.0 / 7.0).abs() <= 4.0 * support::ROUNDOFF, "{variance}");
    }
}

#[test]
fn evaluation_is_each_ranks_own() {
    run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let norm = SyncBatchNorm::new(vs.root() / "bn", CHANNELS, config(), &sync);
        if group.rank() == 1 {
            // Nobody else is there.
            let x = pattern(&[3, CHANNELS], 1).set_requires_grad(true);
            let y = norm.forward_t(&x, false);
            let expected = (1.5 / (1.0_f64 + 1e-5).sqrt()) * &x - 0.25;
            assert!(y.allclose(&expected, 1e-6, 1e-6, false));
            y.sum(Kind::Float).backward();
            assert!(x.grad().defined());
        }
    });
}

#[test]
fn weights_and_statistics_may_be_left_out() {
    let all = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let config = SyncBatchNormConfig { affine: false, track_running_stats: false, ..config() };
        let norm = SyncBatchNorm::new(vs.root() / "bn", CHANNELS, config, &sync);
        assert!(vs.is_empty() && norm.weight().is_none() && norm.running().is_none());
        let (x, dy) = whole(2, &[3], Kind::Float);
        let (x, dy) = (part(&x, group.rank()).set_requires_grad(true), part(&dy, group.rank()));
        let y = norm.forward_t(&x, true);
        (&y * dy).sum(Kind::Float).backward();
        [doubles(&y), doubles(&x.grad()), doubles(&norm.forward_t(&x, false))]
    });
    let (x, dy) = whole(2, &[3], Kind::Double);
    let norm = |x: &Tensor| {
        let none = None::<&Tensor>;
        Tensor::batch_norm(x, none, none, none, none, true, 0.0, 1e-5, false)
    };
    let x = x.set_requires_grad(true);
    let y = norm(&x);
    (&y * dy).sum(Kind::Double).backward();
    let bound = bounds(support::ROUNDOFF, 12)[0];
    let joined = |at: usize| all.iter().flat_map(|rank| rank[at].clone()).collect::<Vec<f64>>();
    assert_close("output", &joined(0), &doubles(&y), bound);
    assert_close("gradient", &joined(1), &doubles(&x.grad()), bound);
    let own: Vec<f64> = [0, 1].iter().flat_map(|&rank| doubles(&norm(&part(&x, rank)))).collect();
    assert_close("evaluation", &joined(2), &own, bound);
}

/// A network with a layer that is normalised, one that is checkpointed around its normalisation, and gradients through `Ddp`.
fn trained(group: &mut Group, checkpointing: bool, zero: Zero) -> Vec<u64> {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let sync = SyncGroup::new(group).unwrap();
    let block = |name: &str, from: i64| {
        let path = vs.root() / name;
        nn::seq_t()
            .add(nn::linear(&path / "fc", from, 9, nn::LinearConfig::default()))
            .add(SyncBatchNorm::new(&path / "bn", 9, config(), &sync))
            .add_fn(Tensor::tanh)
    };
    let blocks = [Checkpointed::new(block("a", 6)), Checkpointed::new(block("b", 9))];
    vs.set_kind(Kind::Double);
    let options = DdpOptions { buffers: Buffers::Own, ..options(zero) };
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    for (index, (name, variable)) in variables.iter_mut().enumerate() {
        if name.contains("fc") {
            let start = pattern(&variable.size(), index as i64);
            tch::no_grad(|| variable.copy_(&start));
        }
    }
    let ddp = Ddp::new(&vs, group, options).unwrap();
    let rule = Sgd { lr: 0.25, ..Sgd::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
    for step in 0..2 {
        let rows = 2 + group.rank() as i64;
        let x = pattern(&[rows, 6], step * 10 + group.rank() as i64).to_kind(Kind::Double);
        let y = blocks.iter().fold(x, |x, block| match checkpointing {
            true => block.forward_t(&x, true),
            false => block.bare(|block| block.forward_t(&x, true)),
        });
        let sync = if step == 0 { Sync::Accumulate } else { Sync::Reduce };
        ddp.backward(&y.square().sum(Kind::Double), rows as f64, sync).unwrap();
    }
    let _step = optimizer.step(None).unwrap();
    let bits = |tensor: &Tensor| doubles(tensor).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    variables.iter().flat_map(|(_, tensor)| bits(tensor)).collect()
}

#[test]
fn it_trains_in_ddp_also_checkpointed() {
    for world_size in [1, 2, 3, 4] {
        let of = |checkpointing, zero| {
            // Gathered over TCP where parameters are sharded.
            let link = if zero == Zero::Three { HostLink::Tcp } else { HostLink::Auto };
            run_over(world_size, link, move |mut group| trained(&mut group, checkpointing, zero))
        };
        let plain = of(false, Zero::Off);
        assert!(plain.iter().all(|rank| *rank == plain[0]), "{world_size} ranks differ");
        for zero in support::STAGES {
            assert!(
                plain == of(true, zero),
                "{world_size} ranks, {zero:?}: running statistics and parameters are alike"
            );
        }
    }
}

#[test]
fn ranks_that_run_other_layers_are_named() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let norm = |name: &str| SyncBatchNorm::new(vs.root() / name, 3, config(), &sync);
        let (first, second) = (norm("first"), norm("second"));
        let x = pattern(&[4, 3], 1);
        let y = match group.rank() {
            1 => Ok(x),
            _ => first.f_forward_t(&x, true),
        };
        y.and_then(|y| second.f_forward_t(&y, true)).unwrap_err()
    });
    for error in &errors {
        assert!(matches!(error, Error::Comm(phalanx_comm::Error::OutOfStep { .. })), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("first forward") && text.contains("second forward"), "{text}");
    }
}

/// In backward the others of the model's group hear it, too.
#[test]
fn ranks_that_run_other_layers_in_backward_are_named() {
    let errors = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let norm = |name: &str| SyncBatchNorm::new(vs.root() / name, 3, config(), &sync);
        let (first, second) = (norm("first"), norm("second"));
        let ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let x = pattern(&[4, 3], 1).set_requires_grad(true);
        let y = second.f_forward_t(&first.f_forward_t(&x, true).unwrap(), true).unwrap();
        if group.rank() == 1 {
            // A forward too many, while the other is in its backward.
            return first.f_forward_t(&x, true).unwrap_err().to_string();
        }
        ddp.backward(&y.sum(Kind::Float), 4.0, Sync::Reduce).unwrap_err().to_string()
    });
    for text in &errors {
        assert!(text.contains("first forward") && text.contains("second backward"), "{text}");
    }
}

#[test]
fn what_it_cannot_work_on_is_refused() {
    run_ranks(1, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let sync = SyncGroup::new(&mut group).unwrap();
        let norm = SyncBatchNorm::new(vs.root() / "bn", 3, config(), &sync);
        for x in [pattern(&[4, 2], 1), pattern(&[3], 1), pattern(&[4, 3], 1).to_kind(Kind::Int64)] {
            let error = norm.f_forward_t(&x, true).unwrap_err();
            assert!(matches!(&error, Error::BadInput { name, .. } if name == "bn"), "{error}");
        }
        let text = support::panic_text(|| norm.forward_t(&pattern(&[4, 2], 1), true));
        assert_eq!(
            text,
            "bn got Float of shape [4, 2], expected floating point of shape [samples, 3, …]"
        );
    });
}
