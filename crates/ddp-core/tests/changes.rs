//! A model that changes after it was wrapped, and programs that go wrong: followed, or an error on every rank that
//! says what it is. Never other weights on other ranks.

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
    AdamW, Ddp, DdpOptions, Error, NonFinite, Optimizer, ParameterGroups, Sgd, SparseGradients,
    Sync, Zero,
};
use support::{
    assert_within, options, panic_text, pattern, values, wrapped, Model, ROUNDOFF, STAGES,
};
use tch::nn::{Module, OptimizerConfig as _};
use tch::{nn, Device, Kind, Tensor};

fn linear(path: nn::Path<'_>, inputs: i64, outputs: i64) -> nn::Linear {
    nn::linear(path, inputs, outputs, nn::LinearConfig::default())
}

/// Inputs that differ from rank to rank and step to step.
fn input(group: &Group, step: i64) -> Tensor {
    pattern(&[4, 5], 10 * step + group.rank() as i64)
}

/// All values of a store, by name.
fn weights(vs: &nn::VarStore) -> Vec<f32> {
    let mut all: Vec<_> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.into_iter().flat_map(|(_, tensor)| values(&tensor.to_kind(Kind::Float))).collect()
}

fn all_say(errors: &[String], parts: &[&str]) {
    for error in errors {
        for part in parts {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}

#[test]
fn a_layer_added_after_wrapping_is_named_in_the_first_step() {
    let errors = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let early = linear(vs.root() / "early", 5, 3);
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let late = linear(vs.root() / "late", 3, 1);
        let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
        let loss = late.forward(&early.forward(&input(&group, 0))).sum(Kind::Float);
        panic_text(|| optimizer.backward_step(&loss))
    });
    all_say(&errors, &["late.bias, late.weight", "after it was wrapped"]);
}

#[test]
fn a_layer_added_on_one_rank_stops_the_others_too() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let early = linear(vs.root() / "early", 5, 3);
        let ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        if group.rank() == 1 {
            let _late = linear(vs.root() / "late", 3, 1);
        }
        let loss = early.forward(&input(&group, 0)).sum(Kind::Float);
        ddp.backward(&loss, 1.0, Sync::Reduce).unwrap_err().to_string()
    });
    all_say(&errors, &["late.bias, late.weight"]);
    assert!(errors[0].contains("rank 1"), "{}", errors[0]);
}

/// The change takes every hook of the wrapped model out of the way: only what was added trains.
#[test]
fn a_late_layer_is_named_also_where_nothing_else_trains() {
    let errors = run_ranks(2, |mut group| {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let base = linear(vs.root() / "base", 5, 3);
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        vs.freeze();
        let head = linear(vs.root() / "head", 3, 1);
        let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
        let loss = head.forward(&base.forward(&input(&group, 0))).sum(Kind::Float);
        panic_text(|| optimizer.backward_step(&loss))
    });
    all_say(&errors, &["head.bias, head.weight", "after it was wrapped"]);
}

/// How far two runs of [`with_schedule`] may be apart that add up their samples in other orders. A gradient is a sum over
/// 6 samples of products of at most 7 terms below 3 (inputs and tanh below 1, weights below 1.5, errors below 8): its
/// terms have some 40 roundings on their way, each of at most 24 roundoffs. Five steps of 0.05 with momentum 0.5 move a
/// weight by at most 0.05 × 2 × 5 gradients' worth of them, and what a step is off by the next may double.
const REORDERED: f64 = 40.0 * 24.0 * 0.5 * 32.0 * ROUNDOFF;

/// Trains with a layer that is frozen in the steps of `frozen`; one rank computes all ranks' samples.
fn with_schedule(mut group: Group, frozen: &[bool], zero: Zero, of_tch: bool) -> Vec<f32> {
    let vs = nn::VarStore::new(Device::Cpu);
    let first = linear(vs.root() / "first", 5, 7);
    let second = linear(vs.root() / "second", 7, 1);
    for (index, (_, mut variable)) in
        std::collections::BTreeMap::from_iter(vs.variables()).into_iter().enumerate()
    {
        tch::no_grad(|| variable.copy_(&pattern(&variable.size(), index as i64)));
    }
    let freeze = |on: bool| {
        let _bias = first.bs.as_ref().map(|bias| bias.set_requires_grad(!on));
        let _weight = first.ws.set_requires_grad(!on);
    };
    freeze(frozen[0]);
    let ddp = Ddp::new(&vs, &mut group, options(zero)).unwrap();
    let rule = Sgd { lr: 0.05, momentum: 0.5, ..Sgd::default() };
    let mut ours =
        (!of_tch).then(|| Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap());
    // tch's optimizer takes what is trainable, frozen or not.
    let mut theirs =
        of_tch.then(|| nn::Sgd { momentum: 0.5, ..nn::Sgd::default() }.build(&vs, 0.05).unwrap());
    let (rank, ranks) = (group.rank() as i64, group.world_size() as i64);
    for (step, &frozen) in frozen.iter().enumerate() {
        freeze(frozen);
        let samples = rank * 6 / ranks..(rank + 1) * 6 / ranks;
        let rows: Vec<Tensor> =
            samples.clone().map(|sample| pattern(&[5], 100 * step as i64 + sample)).collect();
        let x = Tensor::stack(&rows, 0);
        let y = second.forward(&first.forward(&x).tanh());
        let loss = (y - 1.0).square().sum(Kind::Float);
        ddp.backward(&loss, samples.count() as f64, Sync::Reduce).unwrap();
        if let Some(ours) = &mut ours {
            let _step = ours.step(None).unwrap();
        }
        if let Some(theirs) = &mut theirs {
            theirs.step();
            theirs.zero_grad();
        }
    }
    weights(&vs)
}

#[test]
fn layers_are_frozen_and_unfrozen_between_steps() {
    for of_tch in [true, false] {
        for zero in STAGES {
            if of_tch && zero != Zero::Off {
                continue;
            }
            for schedule in [
                vec![false, true, true, false, false],
                vec![true, true, false, false, true],
                vec![true, false],
            ] {
                let steps = schedule.clone();
                let alone =
                    run_ranks(1, move |group| with_schedule(group, &steps, zero, of_tch)).remove(0);
                for world_size in [2, 3] {
                    let steps = schedule.clone();
                    let all = run_ranks(world_size, move |group| {
                        with_schedule(group, &steps, zero, of_tch)
                    });
                    assert!(all.iter().all(|weights| *weights == all[0]), "ranks differ");
                    assert_within(&all[0], &alone, REORDERED);
                }
            }
        }
    }
}

#[test]
fn a_frozen_layer_stays_as_it_is() {
    let all = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer =
            Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default()).unwrap();
        let frozen = model.vs.variables().remove("one.weight").unwrap();
        let _same = frozen.set_requires_grad(false);
        let before = values(&frozen);
        for step in 0..3 {
            let start = step * 8 + group.rank() as i64 * 4;
            ddp.backward(&model.loss_sum(start..start + 4), 4.0, Sync::Reduce).unwrap();
            assert!(!optimizer.step(Some(1.0)).unwrap().skipped);
        }
        assert!(before == values(&frozen), "it moved");
        model.bits()
    });
    assert!(all[0] == all[1]);
}

#[test]
fn a_layer_frozen_on_one_rank_is_named_on_every_rank() {
    let errors = run_ranks(3, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Reduce).unwrap();
        ddp.release_gradients().unwrap();
        if group.rank() == 2 {
            let frozen = model.vs.variables().remove("two.bias").unwrap();
            let _same = frozen.set_requires_grad(false);
        }
        ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Reduce).unwrap_err().to_string()
    });
    // The others are in the middle of an exchange: the name of the call says what rank 2 is about.
    all_say(&errors, &["a change of which variables train"]);
}

#[test]
fn a_converted_model_is_named() {
    let errors = run_ranks(2, |mut group| {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let layer = linear(vs.root() / "fc", 5, 1);
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        vs.double();
        let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
        let loss = layer.forward(&input(&group, 0).to_kind(Kind::Double)).sum(Kind::Double);
        panic_text(|| optimizer.backward_step(&loss))
    });
    all_say(&errors, &["fc.weight: its kind is Double", "fc.bias: its kind is Double"]);
}

#[test]
fn sharded_gradients_are_out_of_reach_of_tchs_optimizers() {
    let errors = run_ranks(2, |mut group| {
        let (model, _ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = nn::AdamW::default().build(&model.vs, 0.1).unwrap();
        let loss = model.loss_sum(0..2);
        panic_text(|| optimizer.backward_step_clip_norm(&loss, 1.0))
    });
    all_say(&errors, &["Optimizer::new(&ddp", "Zero::Off"]);
}

#[test]
fn weights_are_forgotten_with_their_gradients() {
    for of_tch in [false, true] {
        let gradients = run_ranks(2, move |mut group| {
            let (model, ddp) = wrapped(&mut group, options(Zero::Off));
            let mut optimizer = nn::Sgd::default().build(&model.vs, 0.1).unwrap();
            let start = group.rank() as i64 * 4;
            ddp.backward(&model.whole_loss_sum(start..start + 4), 4.0, Sync::Accumulate).unwrap();
            match of_tch {
                true => optimizer.zero_grad(),
                false => ddp.release_gradients().unwrap(),
            }
            ddp.backward(&model.whole_loss_sum(start..start + 4), 4.0, Sync::Reduce).unwrap();
            values(&model.vs.variables()["three.weight"].grad())
        });
        let model = Model::new(0);
        (model.whole_loss_sum(0..8) / 8.0).backward();
        // Eighths of whole numbers: exact.
        assert!(gradients[0] == values(&model.vs.variables()["three.weight"].grad()));
    }
}

/// A loss that is not a number on rank 1 in the second step.
fn with_nan(group: &mut Group, policy: NonFinite) -> (Vec<Result<(), String>>, Vec<f32>) {
    let options = DdpOptions { non_finite: policy, ..options(Zero::Off) };
    let (model, _ddp) = wrapped(group, options);
    let mut optimizer = nn::Sgd::default().build(&model.vs, 0.05).unwrap();
    let mut outcomes = Vec::new();
    for step in 0..3 {
        let start = step * 8 + group.rank() as i64 * 4;
        let factor = if step == 1 && group.rank() == 1 { f64::NAN } else { 0.25 };
        let loss = model.loss_sum(start..start + 4) * factor;
        let text = panic_text(|| optimizer.backward_step(&loss));
        outcomes.push(if text == "no panic" { Ok(()) } else { Err(text) });
    }
    (outcomes, model.values())
}

#[test]
fn gradients_that_are_not_finite_are_an_error_with_rank_and_parameter() {
    let all = run_ranks(3, |mut group| with_nan(&mut group, NonFinite::Error));
    for (outcomes, weights) in &all {
        let error = outcomes[1].as_ref().unwrap_err();
        assert!(error.contains("rank 1: "), "{error}");
        assert!(error.contains("three.bias"), "{error}");
        assert!(error.contains("in exchange 2"), "{error}");
        // The group is good: a program that goes on has lost that step alone.
        assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
        assert!(weights.iter().all(|weight| weight.is_finite()));
        assert!(*weights == all[0].1);
    }
}

#[test]
fn a_step_with_gradients_that_are_not_finite_is_skipped_on_every_rank() {
    let all = run_ranks(3, |mut group| with_nan(&mut group, NonFinite::SkipStep));
    for (outcomes, weights) in &all {
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert!(weights.iter().all(|weight| weight.is_finite()));
        assert!(*weights == all[0].1);
    }
    let warned = run_ranks(2, |mut group| with_nan(&mut group, NonFinite::Warn));
    assert!(warned.iter().all(|(_, weights)| weights.iter().any(|weight| weight.is_nan())));
}

#[test]
fn two_forwards_then_two_exchanged_backwards_with_batch_norm() {
    let all = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let norm = nn::batch_norm1d(vs.root() / "bn", 5, nn::BatchNormConfig::default());
        let layer = linear(vs.root() / "fc", 5, 1);
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
        for step in 0..2 {
            let forward = |part: i64| {
                let x = input(&group, 2 * step + part);
                layer.forward(&nn::ModuleT::forward_t(&norm, &x, true)).square().mean(Kind::Float)
            };
            let (first, second) = (forward(0), forward(1));
            optimizer.zero_grad();
            first.backward();
            second.backward();
            optimizer.step();
        }
        weights(&vs)
    });
    assert!(all[0] == all[1], "ranks differ");
}

#[test]
fn sparse_gradients_are_named_or_made_dense() {
    let train = |mut group: Group, sparse: bool, how: SparseGradients| {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = nn::EmbeddingConfig { sparse, ..nn::EmbeddingConfig::default() };
        let table = nn::embedding(vs.root() / "table", 10, 3, config);
        let mut values = table.ws.shallow_clone();
        tch::no_grad(|| values.copy_(&pattern(&[10, 3], 1)));
        let options = DdpOptions { sparse_gradients: how, ..options(Zero::Off) };
        let ddp = Ddp::new(&vs, &mut group, options).unwrap();
        let mut optimizer = nn::Sgd::default().build(&vs, 0.5).unwrap();
        for step in 0..2 {
            let ids = Tensor::from_slice(&[1_i64, 4, 4, 5 + group.rank() as i64 + step]);
            let loss = table.forward(&ids).square().sum(Kind::Float);
            ddp.backward(&loss, 4.0, Sync::Reduce).map_err(|error| error.to_string())?;
            optimizer.step();
            optimizer.zero_grad();
        }
        Ok::<Vec<f32>, String>(weights(&vs))
    };
    let refused = run_ranks(2, move |group| train(group, true, SparseGradients::Refuse));
    for error in refused {
        let error = error.unwrap_err();
        assert!(error.contains("table.weight") && error.contains("sparse_gradients"), "{error}");
    }
    let dense = run_ranks(2, move |group| train(group, false, SparseGradients::Refuse).unwrap());
    let densified =
        run_ranks(2, move |group| train(group, true, SparseGradients::Densify).unwrap());
    assert!(dense == densified);
    assert!(dense[0] == dense[1]);
}

#[test]
fn a_rank_that_left_out_a_step_is_told_in_the_step() {
    let errors = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        for step in 0..4 {
            if step == 2 && group.rank() == 1 {
                continue; // a bad batch
            }
            ddp.at_step(step).unwrap();
            if let Err(error) = ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Reduce) {
                return (step, error.to_string());
            }
            ddp.release_gradients().unwrap();
        }
        panic!("nobody noticed");
    });
    assert_eq!((errors[0].0, errors[1].0), (2, 3));
    all_say(&[errors[0].1.clone(), errors[1].1.clone()], &["step 2", "step 3"]);
}

#[test]
fn a_rank_with_nothing_to_add_says_so() {
    for zero in STAGES {
        let all = run_ranks(3, move |mut group| {
            let (model, ddp) = wrapped(&mut group, options(zero));
            let rule = Sgd { lr: 0.1, ..Sgd::default() };
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            for step in 0..3 {
                if step == 1 && group.rank() == 1 {
                    ddp.exchange_weighted().unwrap();
                } else {
                    let start = step * 6 + group.rank() as i64 * 2;
                    let loss = model.whole_loss_sum(start..start + 2);
                    ddp.backward(&loss, 2.0, Sync::Reduce).unwrap();
                }
                let _step = optimizer.step(None).unwrap();
            }
            model.values()
        });
        assert!(all.iter().all(|values| *values == all[0]), "ranks differ");
        let model = Model::new(0);
        let mut optimizer = nn::Sgd::default().build(&model.vs, 0.1).unwrap();
        for step in 0..3 {
            let loss = match step {
                1 => (model.whole_loss_sum(6..8) + model.whole_loss_sum(10..12)) / 4.0,
                _ => model.whole_loss_sum(step * 6..step * 6 + 6) / 6.0,
            };
            optimizer.backward_step(&loss);
        }
        // Sums are exact; a step rounds the mean, the product with 0.1 (twice: the constant too) and the difference, of
        // weights below 0.3 + 3 × 0.1 × 8.
        assert_within(&all[0], &model.values(), 2.0 * 3.0 * 4.0 * 2.7 * ROUNDOFF);
    }
}

#[test]
fn a_step_on_gradients_that_nobody_else_has_seen_is_named() {
    let errors = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = nn::Sgd::default().build(&model.vs, 0.1).unwrap();
        ddp.no_sync(|| model.loss_sum(0..2).backward()).unwrap();
        optimizer.step();
        panic_text(|| model.loss_sum(0..2).backward())
    });
    all_say(&errors, &["was changed between accumulating gradients and exchanging them"]);
}

#[test]
fn a_tensor_given_twice_is_named() {
    run_ranks(1, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = linear(vs.root() / "fc", 5, 1);
        let twice = vec![
            ("a".to_owned(), layer.ws.shallow_clone()),
            ("b".to_owned(), layer.ws.shallow_clone()),
        ];
        let error = Ddp::from_tensors(twice, vec![], &mut group, options(Zero::Off)).unwrap_err();
        assert!(matches!(error, Error::SameTensorTwice { .. }), "{error}");
    });
}

#[test]
fn learning_rates_that_are_no_numbers_are_refused() {
    run_ranks(1, |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer =
            Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default()).unwrap();
        for lr in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(matches!(optimizer.set_lr(lr), Err(Error::BadSetting { .. })), "{lr}");
        }
        assert!(optimizer.set_lr(0.0).is_ok());
    });
}

#[test]
fn strides_are_a_part_of_the_model() {
    let errors = run_ranks(2, |mut group| {
        let weight = pattern(&[3, 4], 0);
        let weight = if group.rank() == 1 { weight.tr().contiguous().tr() } else { weight };
        let parameters = vec![("w".to_owned(), weight.set_requires_grad(true))];
        Ddp::from_tensors(parameters, vec![], &mut group, options(Zero::Off))
            .unwrap_err()
            .to_string()
    });
    all_say(&errors, &["rank 1: parameter w [3, 4] Float strides [1, 3]"]);
}

#[test]
fn parameters_that_differ_are_named_with_their_rank() {
    let errors = run_ranks(3, |mut group| {
        let options = DdpOptions { fingerprint_interval: 2, ..options(Zero::Off) };
        let (model, ddp) = wrapped(&mut group, options);
        for step in 0..2 {
            if step == 1 && group.rank() == 2 {
                let odd = model.vs.variables().remove("two.weight").unwrap();
                let _odd = tch::no_grad(|| odd.get(0).get(0).fill_(0.5));
            }
            if let Err(error) = ddp.backward(&model.loss_sum(0..2), 2.0, Sync::Reduce) {
                return format!("step {step}: {error}");
            }
            ddp.release_gradients().unwrap();
        }
        panic!("nobody noticed");
    });
    all_say(&errors, &["step 1", "two.weight", "rank 2 differs"]);
}
