//! What data-parallel training promises beyond the plain case: unused parameters, static graphs, uneven inputs, buffers,
//! several models.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::{
    Adam, Buffers, Ddp, DdpOptions, Error, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, pattern, values, wrapped, Model, STAGES};
use tch::nn::{Module, OptimizerConfig as _};
use tch::{nn, Device, Kind, Tensor};

/// Three layers of weights that are whole numbers; a loss uses those that it is told to, so that sums are exact.
struct Branches {
    vs: nn::VarStore,
    layers: Vec<(&'static str, Tensor)>,
}

impl Branches {
    fn new() -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let layers = [("a", 300), ("b", 70), ("c", 2000), ("d", 5)].map(|(name, len)| {
            let mut tensor = vs.root().zeros(name, &[len]);
            let values = Tensor::arange(len, (Kind::Float, Device::Cpu)).remainder(7) - 3;
            tch::no_grad(|| tensor.copy_(&values));
            (name, tensor)
        });
        Self { vs, layers: layers.into() }
    }

    /// Gradients are `factor` times the place, for the layers in `used`.
    fn loss(&self, used: &str, factor: i64) -> Tensor {
        let of = |(name, tensor): &(&str, Tensor)| {
            let at = Tensor::arange(tensor.size()[0], (Kind::Float, Device::Cpu)).remainder(11);
            used.contains(name).then(|| (tensor * (at * factor)).sum(Kind::Float))
        };
        self.layers.iter().filter_map(of).sum::<Tensor>()
    }

    fn values(&self) -> Vec<f32> {
        self.layers.iter().flat_map(|(_, tensor)| values(tensor)).collect()
    }
}

/// Plain tch on one process: the mean over the ranks of what each would do in a step.
fn alone(steps: &[&[&str]], lr: f64) -> Vec<f32> {
    let model = Branches::new();
    let mut optimizer =
        nn::Sgd { momentum: 0.5, wd: 0.25, ..nn::Sgd::default() }.build(&model.vs, lr).unwrap();
    for (step, ranks) in steps.iter().enumerate() {
        let losses =
            ranks.iter().enumerate().filter(|(_, used)| !used.is_empty()).map(|(rank, used)| {
                model.loss(used, (step * 4 + rank + 1) as i64) / ranks.len() as f64
            });
        let losses: Vec<Tensor> = losses.collect();
        optimizer.zero_grad();
        losses.into_iter().for_each(|loss| loss.backward());
        optimizer.step();
    }
    model.values()
}

const UNUSED: [&[&str]; 4] = [&["abcd", "abcd"], &["ac", "ab"], &["c", "c"], &["bd", "ac"]];

#[test]
fn unused_parameters_are_found_and_those_that_nobody_used_are_left_alone() {
    for ours in [false, true] {
        for zero in STAGES {
            if !ours && zero != Zero::Off {
                continue;
            }
            let all = run_ranks(2, move |mut group| {
                let model = Branches::new();
                let options = DdpOptions { find_unused_parameters: true, ..options(zero) };
                let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
                let rule = Sgd { lr: 0.125, momentum: 0.5, weight_decay: 0.25, ..Sgd::default() };
                let mut own = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
                let plain = nn::Sgd { momentum: 0.5, wd: 0.25, ..nn::Sgd::default() };
                let mut plain = plain.build(&model.vs, 0.125).unwrap();
                for (step, ranks) in UNUSED.iter().enumerate() {
                    let factor = (step * 4 + group.rank() + 1) as i64;
                    let loss = model.loss(ranks[group.rank()], factor);
                    match ours {
                        true => {
                            loss.backward();
                            let _step = own.step(None).unwrap();
                        }
                        false => plain.backward_step(&loss),
                    }
                }
                model.values()
            });
            assert!(all[0] == all[1], "ranks differ");
            // Whole numbers times powers of two: exact.
            assert!(all[0] == alone(&UNUSED, 0.125), "ours {ours}, {zero:?}");
        }
    }
}

#[test]
fn unused_parameters_that_were_not_announced_are_named() {
    let errors = run_ranks(2, |mut group| {
        let model = Branches::new();
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        ddp.backward(&model.loss("abd", 1), 1.0, Sync::Reduce).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("1 of 4 parameters: c;"), "{error}");
        assert!(error.contains("find_unused_parameters"), "{error}");
    }
}

#[test]
fn a_parameter_of_an_earlier_micro_batch_takes_part() {
    let gradients = run_ranks(2, |mut group| {
        let model = Branches::new();
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let factor = group.rank() as i64 + 1;
        ddp.no_sync(|| model.loss("abcd", factor).backward()).unwrap();
        model.loss("ab", factor).backward();
        model.layers.iter().flat_map(|(_, tensor)| values(&tensor.grad())).collect::<Vec<_>>()
    });
    let model = Branches::new();
    for factor in [1, 2] {
        ((model.loss("abcd", factor) + model.loss("ab", factor)) / 2.0).backward();
    }
    let right: Vec<f32> =
        model.layers.iter().flat_map(|(_, tensor)| values(&tensor.grad())).collect();
    assert!(gradients[0] == right && gradients[1] == right);
}

/// Tied weights and a branch that is never used: the first backward counts, the others wait for as much.
#[test]
fn a_static_graph_is_counted_once() {
    let all = run_ranks(3, |mut group| {
        let model = Branches::new();
        let options = DdpOptions { static_graph: true, ..options(Zero::One) };
        let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
        let rule = Sgd { lr: 0.125, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        for step in 0..3 {
            let factor = step * 3 + group.rank() as i64 + 1;
            // Twice the same weights.
            let loss = (model.loss("acd", factor) + model.loss("a", factor)) * 3.0;
            loss.backward();
            assert!(!optimizer.step(None).unwrap().skipped);
        }
        model.values()
    });
    let model = Branches::new();
    let mut optimizer = nn::Sgd::default().build(&model.vs, 0.125).unwrap();
    for step in 0..3 {
        let factor = step * 9 + 6; // of the three ranks together; a third and thrice cancel
        optimizer.backward_step(&(model.loss("acd", factor) + model.loss("a", factor)));
    }
    let bound = 4.0 * 3.0 * 2048.0 * support::ROUNDOFF; // a third is rounded, and a product with it
    for values in &all {
        assert!(*values == all[0], "ranks differ");
        support::assert_within(values, &model.values(), bound);
    }
}

#[test]
fn a_static_graph_that_changes_is_named() {
    let errors = run_ranks(2, |mut group| {
        let model = Branches::new();
        let options = DdpOptions { static_graph: true, ..options(Zero::Off) };
        let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
        ddp.backward(&model.loss("abc", 1), 1.0, Sync::Reduce).unwrap();
        ddp.release_gradients().unwrap();
        ddp.backward(&model.loss("ac", 1), 1.0, Sync::Reduce).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("1 of 4 parameters: b;"), "{error}");
    }
    let errors = run_ranks(2, |mut group| {
        let model = Branches::new();
        let options = DdpOptions { static_graph: true, ..options(Zero::Off) };
        let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
        let used = if group.rank() == 0 { "abc" } else { "ab" };
        ddp.backward(&model.loss(used, 1), 1.0, Sync::Reduce).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("rank 1: c: 0 gradients"), "{error}");
    }
}

/// Rank r has r + 1 batches in excess of two.
fn uneven(mut group: Group, zero: Zero, weighted: bool) -> (Vec<f32>, usize) {
    let model = Branches::new();
    let ddp = Ddp::new(&model.vs, &mut group, options(zero)).unwrap();
    let rule = Sgd { lr: 0.125, momentum: 0.5, ..Sgd::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
    let join = ddp.join().unwrap();
    for batch in 0..2 + group.rank() {
        let loss = model.loss("abcd", (batch + group.rank() + 1) as i64);
        match weighted {
            true => ddp.backward(&loss, (1 + group.rank()) as f64, Sync::Reduce).unwrap(),
            false => loss.backward(),
        }
        let _step = optimizer.step(None).unwrap();
    }
    let mut shadowed = 0;
    join.finish(|| {
        shadowed += 1;
        optimizer.step(None).map(drop)
    })
    .unwrap();
    (model.values(), shadowed)
}

#[test]
fn ranks_that_run_out_of_batches_shadow_the_others_and_end_with_their_weights() {
    for weighted in [false, true] {
        for zero in STAGES {
            let all = run_ranks(3, move |group| uneven(group, zero, weighted));
            let shadowed: Vec<usize> = all.iter().map(|(_, shadowed)| *shadowed).collect();
            assert_eq!(shadowed, [2, 1, 0]);
            assert!(all.iter().all(|(values, _)| *values == all[0].0), "ranks differ");
            // One process that has all samples of the ranks that still have any.
            let model = Branches::new();
            let plain = nn::Sgd { momentum: 0.5, ..nn::Sgd::default() };
            let mut optimizer = plain.build(&model.vs, 0.125).unwrap();
            for batch in 0..4 {
                let ranks = (0..3).filter(|rank| batch < 2 + rank);
                let total: usize =
                    ranks.clone().map(|rank| if weighted { 1 + rank } else { 1 }).sum();
                let loss: Tensor =
                    ranks.map(|rank| model.loss("abcd", (batch + rank + 1) as i64)).sum();
                optimizer.backward_step(&(loss / total as f64));
            }
            // The mean is rounded twice, and so is the momentum; gradients of up to 10 × 12, four steps of 1/8.
            let bound = 4.0 * 4.0 * 128.0 * support::ROUNDOFF;
            support::assert_within(&all[0].0, &model.values(), bound);
        }
    }
}

#[test]
fn buffers_are_rank_zeros_or_the_mean_or_each_ranks_own() {
    let means = |policy: Buffers| {
        run_ranks(2, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root() / "bn", 3, nn::BatchNormConfig::default());
            let options = DdpOptions { buffers: policy, ..options(Zero::Off) };
            let _ddp = Ddp::new(&vs, &mut group, options).unwrap();
            // Every value 10 on rank 0, 30 on rank 1: the running mean takes a tenth of it.
            let x =
                Tensor::full([4, 3], 10.0 + 20.0 * group.rank() as f64, (Kind::Float, Device::Cpu));
            nn::ModuleT::forward_t(&norm, &x, true).sum(Kind::Float).backward();
            values(&vs.variables()["bn.running_mean"])
        })
    };
    assert_eq!(means(Buffers::RankZero), [[1.0; 3], [1.0; 3]]);
    assert_eq!(means(Buffers::Mean), [[2.0; 3], [2.0; 3]]);
    assert_eq!(means(Buffers::Own), [[1.0; 3], [3.0; 3]]);
}

#[test]
fn frozen_weights_are_no_buffers() {
    let all = run_ranks(2, |mut group| {
        let (model, _ddp) = {
            let model = Model::new(0);
            let frozen = model.vs.variables().remove("one.weight").unwrap();
            let _same = frozen.set_requires_grad(false);
            let options = DdpOptions { fingerprint_interval: 0, ..options(Zero::Off) };
            let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
            (model, ddp)
        };
        // A change on one rank stays there: nobody sends frozen weights in every step.
        let frozen = model.vs.variables().remove("one.weight").unwrap();
        if group.rank() == 1 {
            let _filled = tch::no_grad(|| frozen.shallow_clone().fill_(0.5));
        }
        model.loss_sum(0..2).backward();
        values(&frozen)
    });
    assert!(all[1].iter().all(|&value| (value - 0.5).abs() < f32::EPSILON));
    assert!(all[0] != all[1]);
}

/// Two models whose losses are one sum: the weight is that of both.
#[test]
fn one_weighted_backward_over_two_models_weighs_both() {
    let gradients = run_ranks(2, |mut group| {
        let (left, right) = (Branches::new(), Branches::new());
        let first = Ddp::new(&left.vs, &mut group, options(Zero::Off)).unwrap();
        let _second = Ddp::new(&right.vs, &mut group, options(Zero::Off)).unwrap();
        let factor = group.rank() as i64 + 1;
        let loss = || left.loss("abcd", factor) + right.loss("abcd", 2 * factor);
        first.backward(&loss(), 1.0, Sync::Accumulate).unwrap();
        first.backward(&loss(), 3.0, Sync::Reduce).unwrap();
        [&left, &right].map(|model| values(&model.layers[0].1.grad())[1])
    });
    // 2 × (1 + 2) over 2 × 4 samples.
    assert_eq!(gradients, [[0.75, 1.5]; 2]);
}

#[test]
fn two_models_take_turns_as_in_a_gan() {
    let all = run_ranks(2, |mut group| {
        let (left, right) = (Branches::new(), Branches::new());
        let _first = Ddp::new(&left.vs, &mut group, options(Zero::Off)).unwrap();
        let _second = Ddp::new(&right.vs, &mut group, options(Zero::Off)).unwrap();
        let mut optimizers =
            [&left, &right].map(|model| nn::Sgd::default().build(&model.vs, 0.125).unwrap());
        for step in 0..3 {
            let factor = step + group.rank() as i64;
            optimizers[0].zero_grad();
            optimizers[1].zero_grad();
            left.loss("abcd", factor).backward();
            right.loss("abcd", 3 * factor).backward();
            optimizers[1].step();
            optimizers[0].step();
        }
        (left.values(), right.values())
    });
    assert!(all[0] == all[1]);
    assert!(all[0].0 != all[0].1);
}

#[test]
fn several_losses_before_one_step_add_up() {
    let gradients = run_ranks(2, |mut group| {
        let model = Branches::new();
        let _ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        let factor = group.rank() as i64 + 1;
        model.loss("abcd", factor).backward();
        model.loss("abcd", 10 * factor).backward();
        values(&model.layers[0].1.grad())[1]
    });
    assert_eq!(gradients, [16.5; 2]);
    let errors = run_ranks(2, |mut group| {
        let model = Branches::new();
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        ddp.backward(&model.loss("abcd", 1), 1.0, Sync::Reduce).unwrap();
        ddp.backward(&model.loss("abcd", 1), 1.0, Sync::Reduce).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| error.contains("Sync::Accumulate")), "{errors:?}");
}

#[test]
fn buckets_follow_the_order_in_which_gradients_become_ready() {
    let train = |ready_order: Option<Vec<String>>| {
        run_ranks(2, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            // Registered against the order of use: the reverse of registration is the worst guess.
            let layers: Vec<nn::Linear> = (0..6)
                .rev()
                .map(|at| {
                    nn::linear(vs.root() / format!("l{at}"), 16, 16, nn::LinearConfig::default())
                })
                .collect();
            for (at, (_, mut tensor)) in
                std::collections::BTreeMap::from_iter(vs.variables()).into_iter().enumerate()
            {
                tch::no_grad(|| tensor.copy_(&(pattern(&tensor.size(), at as i64) * 0.4)));
            }
            let options = DdpOptions {
                bucket_bytes: vec![1200],
                ready_order: ready_order.clone(),
                ..options(Zero::One)
            };
            let ddp = Ddp::new(&vs, &mut group, options).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Adam::default(), ParameterGroups::default()).unwrap();
            let before = ddp.ready_order().unwrap();
            for step in 0..3 {
                let x = pattern(&[4, 16], step * 2 + group.rank() as i64);
                let y = layers.iter().rev().fold(x, |x, layer| layer.forward(&x).tanh());
                ddp.backward(&y.square().sum(Kind::Float), 4.0, Sync::Reduce).unwrap();
                let _step = optimizer.step(Some(1.0)).unwrap();
            }
            let mut all: Vec<_> = vs.variables().into_iter().collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            let weights: Vec<f32> = all.iter().flat_map(|(_, tensor)| values(tensor)).collect();
            (before, ddp.ready_order().unwrap(), weights)
        })
    };
    let all = train(None);
    let (before, after, weights) = &all[0];
    let layer = |name: &String| name[..2].to_owned();
    assert_eq!(layer(&before[0]), "l0", "{before:?}");
    let order: Vec<String> = after.iter().step_by(2).map(layer).collect();
    assert_eq!(order, ["l5", "l4", "l3", "l2", "l1", "l0"], "{after:?}");
    assert!(all[1].1 == *after && all[1].2 == *weights, "ranks differ");
    // A run that starts with that order has it from the first step on, and the same bits.
    let resumed = train(Some(after.clone()));
    assert_eq!(resumed[0].0, *after);
    assert!(resumed[0].2 == *weights);
}

#[test]
fn statistics_say_what_was_exchanged() {
    run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        for _ in 0..3 {
            model.loss_sum(0..2).backward();
            ddp.release_gradients().unwrap();
        }
        let statistics = ddp.statistics().unwrap();
        assert_eq!(statistics.exchange_count, 3);
        assert_eq!(statistics.ranks.len(), 2);
        assert!(statistics.bucket_count >= 3);
        assert!(statistics.bytes >= 4 * 5000);
        assert!((0.0..=1.0).contains(&statistics.overlap));
        assert!(statistics.exposed_comm <= statistics.exchange);
        assert!(statistics.stragglers.is_empty(), "{:?}", statistics.stragglers);
    });
}

#[test]
fn one_step_is_weighed_or_it_is_not() {
    let errors = run_ranks(2, |mut group| {
        let model = Branches::new();
        let ddp = Ddp::new(&model.vs, &mut group, options(Zero::Off)).unwrap();
        ddp.no_sync(|| model.loss("abcd", 1).backward()).unwrap();
        ddp.backward(&model.loss("abcd", 1), 1.0, Sync::Reduce).unwrap_err()
    });
    assert!(errors.iter().any(|error| matches!(error, Error::MixedWeights)), "{errors:?}");
}
