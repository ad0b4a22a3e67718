//! A training that ends half-way and goes on is the training that did not end.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::{run_ranks, run_ranks_with};
use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions, Next, OnError};
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{
    Adafactor, Adam, AdamW, Buffers, Ddp, DdpOptions, Error, Lamb, Lars, Lion, Muon, Optimizer,
    ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, wrapped, Model, STAGES};
use tch::{nn, nn::ModuleT as _, Device, Kind, Tensor};

/// Makes a rule.
type Make = fn() -> Box<dyn Rule>;

const RULES: [Make; 8] = [
    || Box::new(AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() }),
    || Box::new(Adam { lr: 0.01, ..Adam::default() }),
    || Box::new(Sgd { lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.1, dampening: 0.0 }),
    || Box::new(Lamb { lr: 0.02, ..Lamb::default() }),
    || Box::new(Lars { lr: 0.5, trust_coefficient: 0.02, ..Lars::default() }),
    || Box::new(Lion { lr: 0.002, ..Lion::default() }),
    || Box::new(Muon { lr: 0.01, others: vec!["three.*".to_owned()], ..Muon::default() }),
    || Box::new(Adafactor { lr: 0.02, ..Adafactor::default() }),
];

/// A part of a run: the steps `from + 1..=to`, on one world.
#[derive(Clone, Copy)]
struct Leg {
    world_size: usize,
    zero: Zero,
    to: u64,
}

fn quiet() -> CheckpointerOptions {
    // Handlers of signals are the whole process's, which is the other tests' as well.
    CheckpointerOptions { heed_signals: false, on_error: OnError::Fail, ..Default::default() }
}

/// Goes on in `folder` up to step `leg.to`, saves, and gives the bits of all parameters and the losses by step.
fn go_on(mut group: Group, folder: &Path, leg: Leg, rule: Make) -> (Vec<u32>, Vec<f64>) {
    let (model, ddp) = wrapped(&mut group, options(leg.zero));
    let mut optimizer = Optimizer::new(&ddp, rule(), ParameterGroups::default()).unwrap();
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet()).unwrap();
    let resumed = checkpointer.resume(Some(&mut optimizer)).unwrap();
    let done = resumed.map_or(0, |resumed| {
        assert_eq!(resumed.values::<String>().unwrap(), format!("after {}", resumed.step));
        resumed.step
    });
    assert_eq!(optimizer.step_count(), done);
    let micro = 12 / group.world_size() as i64;
    let mut losses = Vec::new();
    for step in done + 1..=leg.to {
        let start = step as i64 * 12 + group.rank() as i64 * micro;
        let loss = model.loss_sum(start..start + micro);
        ddp.backward(&loss, micro as f64, Sync::Reduce).unwrap();
        optimizer.set_lr(0.05 / step as f64).unwrap();
        optimizer.step(Some(0.5)).unwrap();
        let mut sum = [loss.double_value(&[])];
        group.all_reduce(&mut sum[..], phalanx_comm::Sum).unwrap().wait().unwrap();
        losses.push(sum[0] / 12.0);
    }
    checkpointer.save(leg.to, Some(&mut optimizer), || format!("after {}", leg.to)).unwrap();
    checkpointer.finish().unwrap();
    (model.bits(), losses)
}

/// One leg after the other in one folder: what the last one ends with, the same on every rank, and all losses.
fn run(legs: &[Leg], rule: Make) -> (Vec<u32>, Vec<f64>) {
    let folder = tempfile::tempdir().unwrap();
    let mut losses = Vec::new();
    let mut bits = Vec::new();
    for &leg in legs {
        let path = folder.path().to_owned();
        // Parameters of ZeRO-3 are gathered where ranks share no memory.
        let link = if leg.zero == Zero::Three { HostLink::Tcp } else { HostLink::Auto };
        let options = GroupOptions::default();
        let rank = move |group| go_on(group, &path, leg, rule);
        let all = run_ranks_with(leg.world_size, link, options, rank);
        assert!(all.iter().all(|of_rank| *of_rank == all[0]), "ranks are alike");
        losses.extend(&all[0].1);
        bits.clone_from(&all[0].0);
    }
    (bits, losses)
}

#[test]
fn a_run_that_is_broken_twice_has_the_bits_of_an_unbroken_one() {
    for (number, rule) in RULES.into_iter().enumerate() {
        let world_sizes = if number == 0 { 1..4 } else { 2..4 };
        for world_size in world_sizes {
            for zero in STAGES {
                let to = |to| Leg { world_size, zero, to };
                let whole = run(&[to(7)], rule);
                let broken = run(&[to(1), to(4), to(7)], rule);
                assert_eq!(broken, whole, "{:?}, {world_size} ranks, {zero:?}", rule());
            }
        }
    }
}

#[test]
fn the_stage_may_change_on_the_way() {
    for world_size in [1, 2, 3] {
        let leg = |zero, to| Leg { world_size, zero, to };
        let whole = run(&[leg(Zero::Off, 6)], RULES[0]);
        let legs = [leg(Zero::Three, 2), leg(Zero::Off, 3), leg(Zero::Two, 4), leg(Zero::Three, 6)];
        assert_eq!(run(&legs, RULES[0]), whole, "{world_size} ranks");
    }
}

#[test]
fn world_size_and_stage_may_change_on_the_way() {
    let leg = |world_size, zero, to| Leg { world_size, zero, to };
    for rule in RULES {
        let (_, whole) = run(&[leg(4, Zero::One, 9)], rule);
        let legs = [
            leg(4, Zero::Three, 3),
            leg(2, Zero::One, 6),
            leg(3, Zero::Off, 7),
            leg(3, Zero::Three, 9),
        ];
        let (_, losses) = run(&legs, rule);
        // The batch is the same, its sum is cut at other places.
        for (step, (one, other)) in losses.iter().zip(&whole).enumerate() {
            assert!((one - other).abs() <= 1e-6 * other.abs(), "{step}: {one} and {other}");
        }
    }
}

/// A convolution whose weights lie channels-last, and batch norm: strides and buffers.
fn convolution(mut group: Group, folder: &Path, (buffers, to): (Buffers, u64)) -> Vec<Vec<u32>> {
    let vs = nn::VarStore::new(Device::Cpu);
    let root = vs.root();
    let mut weights = root.var("conv", &[6, 5, 3, 3], nn::Init::Const(0.0));
    let values = support::pattern(&[6, 5, 3, 3], 3).permute([0, 3, 1, 2]).contiguous();
    let values = values.reshape([6, 3, 3, 5]).permute([0, 3, 1, 2]);
    tch::no_grad(|| weights.set_data(&values));
    let ones = nn::BatchNormConfig { ws_init: nn::Init::Const(1.0), ..Default::default() };
    let norm = nn::batch_norm2d(&root / "norm", 6, ones);
    let options = DdpOptions { buffers, ..options(Zero::One) };
    let ddp = Ddp::new(&vs, &mut group, options).unwrap();
    assert_eq!(weights.stride(), [45, 1, 15, 5], "the test's weights are channels-last");
    let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet()).unwrap();
    let done = checkpointer.resume(Some(&mut optimizer)).unwrap().map_or(0, |r| r.step);
    for step in done + 1..=to {
        let seed = (step * 10) as i64 + group.rank() as i64;
        let image = support::pattern(&[2, 5, 4, 4], seed);
        let out = image.conv2d(&weights, None::<Tensor>, [1, 1], [0, 0], [1, 1], 1);
        let loss = norm.forward_t(&out, true).pow_tensor_scalar(3).sum(Kind::Float);
        ddp.backward(&loss, 1.0, Sync::Reduce).unwrap();
        optimizer.step(None).unwrap();
    }
    checkpointer.save(to, Some(&mut optimizer), || ()).unwrap();
    checkpointer.finish().unwrap();
    let mut named: Vec<_> = vs.variables().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let bits = |tensor: &Tensor| support::values(tensor).into_iter().map(f32::to_bits).collect();
    named.iter().map(|(_, tensor)| bits(tensor)).collect()
}

#[test]
fn strides_and_buffers_come_back() {
    for buffers in [Buffers::RankZero, Buffers::Mean, Buffers::Own] {
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let leg = |folder: &Path, to| {
            let folder: PathBuf = folder.into();
            run_ranks(2, move |group| convolution(group, &folder, (buffers, to)))
        };
        let expected = leg(whole.path(), 5);
        drop(leg(broken.path(), 2));
        assert_eq!(leg(broken.path(), 5), expected, "{buffers:?}");
    }
}

#[test]
fn masters_of_half_precision_come_back() {
    let half = |mut group: Group, folder: PathBuf, to: u64| {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let zero = nn::LinearConfig { bs_init: Some(nn::Init::Const(0.0)), ..Default::default() };
        let net = nn::linear(vs.root() / "fc", 40, 3, zero);
        tch::no_grad(|| net.ws.shallow_clone().copy_(&support::pattern(&[3, 40], 1)));
        vs.bfloat16();
        let ddp = Ddp::new(&vs, &mut group, options(Zero::One)).unwrap();
        let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
        // So small that bf16 alone would not move.
        optimizer.set_lr(1e-4).unwrap();
        let mut checkpointer = Checkpointer::new(folder, &ddp, quiet()).unwrap();
        let done = checkpointer.resume(Some(&mut optimizer)).unwrap().map_or(0, |r| r.step);
        for step in done + 1..=to {
            let x = support::pattern(&[4, 40], step as i64).to_kind(Kind::BFloat16);
            let loss = x.linear(&net.ws, net.bs.as_ref()).square().sum(Kind::Float);
            ddp.backward(&loss, 4.0, Sync::Reduce).unwrap();
            optimizer.step(None).unwrap();
        }
        checkpointer.save(to, Some(&mut optimizer), || ()).unwrap();
        checkpointer.finish().unwrap();
        support::values(&net.ws.to_kind(Kind::Float))
    };
    let run = |legs: &'static [u64]| {
        let folder = tempfile::tempdir().unwrap();
        let leg = |&to: &u64| {
            let path = folder.path().to_owned();
            run_ranks(2, move |group| half(group, path.clone(), to))
        };
        legs.iter().map(leg).next_back().unwrap()
    };
    assert_eq!(run(&[10, 20, 40]), run(&[40]));
}

/// Saves a model of world size 2 after three steps.
fn saved() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    run_ranks(2, move |group| {
        go_on(group, &path, Leg { world_size: 2, zero: Zero::One, to: 3 }, RULES[0]);
    });
    folder
}

#[test]
fn another_model_and_another_rule_are_named() {
    let folder = saved();
    let path = folder.path().to_owned();
    let errors = run_ranks(2, move |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let _one = nn::linear(vs.root() / "one", 7, 130, nn::LinearConfig::default());
        let ddp = Ddp::new(&vs, &mut group, options(Zero::One)).unwrap();
        let rule = Sgd { momentum: 0.9, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
        checkpointer.resume(Some(&mut optimizer)).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("model/two.weight: only in the checkpoint"), "{error}");
    }
    let path = folder.path().to_owned();
    let errors = run_ranks(2, move |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let rule = Sgd { momentum: 0.9, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
        checkpointer.resume(Some(&mut optimizer)).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("the optimizer: AdamW, here it is SGD"), "{error}");
    }
}

#[test]
fn gradients_without_their_step_are_an_error() {
    let errors = run_ranks(2, |mut group| {
        let folder = tempfile::tempdir().unwrap();
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
        let mut checkpointer = Checkpointer::new(folder.path(), &ddp, quiet()).unwrap();
        ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Accumulate).unwrap();
        checkpointer.save(1, Some(&mut optimizer), || ()).unwrap_err()
    });
    assert!(errors.iter().all(|error| matches!(error, Error::MidStep { .. })), "{errors:?}");
}

#[test]
fn damage_to_the_newest_costs_the_steps_since_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    for to in [2, 4] {
        let path = folder.path().to_owned();
        let leg = Leg { world_size: 2, zero: Zero::One, to };
        run_ranks(2, move |group| go_on(group, &path, leg, RULES[0]));
    }
    let newest = folder.path().join("step-00000004");
    let shard = fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().path());
    let shard =
        shard.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max().unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let path = folder.path().to_owned();
    let steps = run_ranks(2, move |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
        checkpointer.resume(Some(&mut optimizer)).unwrap().unwrap().step
    });
    assert_eq!(steps, [2, 2]);
}

#[test]
fn where_everything_is_damaged_all_ranks_say_the_same() {
    let folder = saved();
    let only = folder.path().join("step-00000003");
    let mut files: Vec<_> = fs::read_dir(&only).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    // What of the optimizer lies in a rank's file is read by that rank alone.
    let mut bytes = fs::read(&files[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&files[0], bytes).unwrap();
    let path = folder.path().to_owned();
    let errors = run_ranks(2, move |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
        let error = checkpointer.resume(Some(&mut optimizer)).unwrap_err();
        assert!(matches!(error, Error::CheckpointDamaged { .. }), "{error}");
        error.to_string()
    });
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].contains("is damaged in block 0"), "{}", errors[0]);
}

#[test]
fn steps_are_saved_when_they_are_due() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    run_ranks(2, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = Optimizer::new(&ddp, RULES[0](), ParameterGroups::default()).unwrap();
        let options = CheckpointerOptions { every_steps: 3, ..quiet() };
        let mut checkpointer = Checkpointer::new(&path, &ddp, options).unwrap();
        for step in 1..=10 {
            ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Reduce).unwrap();
            optimizer.step(None).unwrap();
            let next = checkpointer.step(step, Some(&mut optimizer), || ()).unwrap();
            assert_eq!(next, Next::Continue);
        }
        checkpointer.finish().unwrap();
        assert_eq!(checkpointer.saved_step(), Some(9));
    });
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["step-00000006", "step-00000009"], "the last two stay");
}

#[test]
fn weights_alone_come_back_without_an_optimizer_of_ours() {
    let folder = saved();
    let path = folder.path().to_owned();
    let all = run_ranks(2, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
        let step = checkpointer.resume(None).unwrap().unwrap().step;
        (step, model.bits())
    });
    let fresh = Model::new(0).bits();
    assert!(all.iter().all(|(step, bits)| *step == 3 && *bits == all[0].1 && *bits != fresh));
}
