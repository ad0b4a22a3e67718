//! Weights that do not train are sharded like parameters under ZeRO-3, and no stage changes a bit.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use std::path::Path;

use phalanx_comm::environment::HostLink;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{
    Checkpointer, CheckpointerOptions, LoadOptions, OnError, WeightsOptions,
};
use phalanx_ddp_core::{AdamW, Ddp, DdpOptions, Optimizer, ParameterGroups, Sync, Zero};
use support::{options, run_over as run, Model, LINKS, STAGES};
use tch::{nn, Device, Kind};

/// The large matrices, and what goes with one of them.
const FROZEN: [&str; 3] = ["one.weight", "two.bias", "two.weight"];

fn freeze(model: &Model, names: &[&str], on: bool) {
    for (name, variable) in model.sorted() {
        if names.contains(&name.as_str()) {
            let _same = variable.set_requires_grad(!on);
        }
    }
}

/// A model whose large matrices are frozen; every rank starts from other values, rank 0's count.
fn tuned(group: &mut Group, options: DdpOptions) -> (Model, Ddp) {
    let model = Model::new(group.rank() as i64 * 1000);
    freeze(&model, &FROZEN, true);
    let ddp = Ddp::new(&model.vs, group, options).unwrap();
    (model, ddp)
}

fn optimizer(ddp: &Ddp) -> Optimizer {
    let rule = AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() };
    Optimizer::new(ddp, rule, ParameterGroups::default()).unwrap()
}

/// Steps on 12 samples each, in two micro-batches where that can be, with clipping.
fn train(
    group: &Group,
    (model, ddp, optimizer): (&Model, &Ddp, &mut Optimizer),
    steps: std::ops::Range<i64>,
) {
    let (rank, world_size) = (group.rank() as i64, group.world_size() as i64);
    let parts = if 12 % (world_size * 2) == 0 { 2 } else { 1 };
    let micro = 12 / (world_size * parts);
    for step in steps {
        for part in 0..parts {
            let start = step * 12 + (rank * parts + part) * micro;
            let sync = if part + 1 == parts { Sync::Reduce } else { Sync::Accumulate };
            ddp.backward(&model.loss_sum(start..start + micro), micro as f64, sync).unwrap();
        }
        assert!(!optimizer.step(Some(0.5)).unwrap().skipped);
    }
}

/// The model's bits after three steps.
fn outcome(group: &mut Group, options: DdpOptions) -> Vec<u32> {
    let (model, ddp) = tuned(group, options);
    train(group, (&model, &ddp, &mut optimizer(&ddp)), 0..3);
    ddp.compare_parameters().unwrap();
    model.bits()
}

/// Ways to cut the model on so many ranks, under this stage.
fn cuts(zero: Zero, world_size: usize) -> Vec<DdpOptions> {
    let units = vec!["*".to_owned()];
    let mut cuts = vec![
        options(zero),
        DdpOptions { units: units.clone(), ..options(zero) },
        DdpOptions { units, stay_gathered: vec!["two".to_owned()], ..options(zero) },
    ];
    if world_size == 4 {
        cuts.push(DdpOptions { shard_ranks: Some(2), ..options(zero) });
    }
    cuts
}

#[test]
fn every_stage_has_the_bits_of_no_sharding() {
    for kind in [None, Some(Kind::BFloat16)] {
        for link in LINKS {
            for world_size in [1, 2, 3, 4] {
                let with = move |options| DdpOptions { parameter_kind: kind, ..options };
                let off = move |mut group: Group| outcome(&mut group, with(options(Zero::Off)));
                let expected = run(world_size, link, off).remove(0);
                for cut in cuts(Zero::Three, world_size) {
                    let shown = format!("{kind:?}, {link:?}, {world_size} ranks, {cut:?}");
                    let all = run(world_size, link, move |mut group| {
                        outcome(&mut group, with(cut.clone()))
                    });
                    assert!(all.iter().all(|bits| *bits == expected), "{shown}");
                }
            }
        }
    }
}

#[test]
fn a_rank_has_its_segments_and_nothing_beside() {
    for (world_size, kind) in [(2, None), (3, None), (4, Some(Kind::BFloat16))] {
        let of = move |zero| {
            run(world_size, HostLink::Tcp, move |mut group| {
                let options = DdpOptions { parameter_kind: kind, ..options(zero) };
                let (_model, ddp) = tuned(&mut group, options);
                ddp.memory().unwrap()
            })
        };
        let element = kind.unwrap_or(Kind::Float).elt_size_in_bytes();
        // Buckets: one.weight with two.bias and two.weight or each by itself; a bucket is padded to a block a rank.
        let (least, most) = (131 * 7 + 131 * 33 + 33, 131 * 7 + 131 * 33 + 33 + 2 * 64);
        let most = most + 3 * world_size * 1024;
        for (two, three) in of(Zero::Two).into_iter().zip(of(Zero::Three)) {
            let frozen = three.frozen * world_size;
            assert!((least * element..=most * element).contains(&frozen), "{frozen}");
            assert_eq!((two.frozen, two.gradients), (0, three.gradients));
            assert_eq!(two.parameters, three.parameters * world_size);
        }
    }
}

/// Trains with matrices that are frozen in the steps of `frozen`.
fn scheduled(mut group: Group, zero: Zero, frozen: &[&[&str]]) -> Vec<u32> {
    let model = Model::new(0);
    freeze(&model, frozen[0], true);
    let ddp = Ddp::new(&model.vs, &mut group, options(zero)).unwrap();
    let mut optimizer = optimizer(&ddp);
    for (step, names) in (0..).zip(frozen) {
        freeze(&model, &FROZEN, false);
        freeze(&model, names, true);
        train(&group, (&model, &ddp, &mut optimizer), step..step + 1);
    }
    ddp.compare_parameters().unwrap();
    if zero == Zero::Three && frozen.iter().any(|names| names.is_empty()) {
        assert_eq!(ddp.memory().unwrap().frozen, 0, "all have moved");
    }
    model.bits()
}

/// What is frozen in which step.
const SCHEDULES: [&[&[&str]]; 3] = [
    &[&FROZEN, &FROZEN, &["one.weight", "two.bias"], &["one.weight"], &["one.weight"]],
    &[&["two.bias", "two.weight"], &["two.bias", "two.weight"], &[], &FROZEN],
    &[&FROZEN, &["one.weight"], &FROZEN, &[]],
];

#[test]
fn weights_begin_to_train_and_cease_to_between_steps() {
    for schedule in SCHEDULES {
        for link in LINKS {
            for world_size in [1, 2, 3] {
                let of =
                    |zero| run(world_size, link, move |group| scheduled(group, zero, schedule));
                let expected = of(Zero::Off).remove(0);
                let all = of(Zero::Three);
                assert!(all.iter().all(|bits| *bits == expected), "{link:?}, {world_size} ranks");
            }
        }
    }
}

/// Goes on in `folder` from what is saved there up to a step, and saves.
fn go_on(group: &mut Group, folder: &Path, zero: Zero, to: i64) -> Vec<u32> {
    let (model, ddp) = tuned(group, options(zero));
    let mut optimizer = optimizer(&ddp);
    let quiet = CheckpointerOptions {
        heed_signals: false,
        on_error: OnError::Fail,
        ..CheckpointerOptions::default()
    };
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet).unwrap();
    let resumed = checkpointer.resume(Some(&mut optimizer)).unwrap();
    let from = resumed.map_or(0, |resumed| resumed.step as i64);
    train(group, (&model, &ddp, &mut optimizer), from..to);
    checkpointer.save(to.unsigned_abs(), Some(&mut optimizer), || ()).unwrap();
    checkpointer.finish().unwrap();
    model.bits()
}

#[test]
fn a_run_goes_on_in_another_stage_and_world() {
    for link in LINKS {
        for stages in [[Zero::Three, Zero::Off, Zero::Three], [Zero::Off, Zero::Three, Zero::One]] {
            let folder = tempfile::tempdir().unwrap();
            let mut bits = Vec::new();
            for (zero, to) in stages.into_iter().zip([1, 2, 3]) {
                let path = folder.path().to_owned();
                let all = run(3, link, move |mut group| go_on(&mut group, &path, zero, to));
                assert!(all.iter().all(|of_rank| *of_rank == all[0]), "{link:?}, {zero:?}");
                bits.clone_from(&all[0]);
            }
            let whole = run(3, link, |mut group| outcome(&mut group, options(Zero::Off)));
            assert!(bits == whole[0], "{link:?}, {stages:?}");
        }
    }
}

#[test]
fn frozen_weights_come_back_on_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let steps = [(4, Zero::Three), (2, Zero::One), (3, Zero::Three), (1, Zero::Three)];
    let frozen = |bits: &[u32]| {
        let model = Model::new(0);
        let mut start = 0;
        let mut all = Vec::new();
        for (name, variable) in model.sorted() {
            let end = start + variable.numel();
            if FROZEN.contains(&name.as_str()) {
                all.extend_from_slice(&bits[start..end]);
            }
            start = end;
        }
        all
    };
    let expected = frozen(&Model::new(0).bits());
    for ((world_size, zero), to) in steps.into_iter().zip(1..) {
        let path = folder.path().to_owned();
        let all =
            run(world_size, HostLink::Tcp, move |mut group| go_on(&mut group, &path, zero, to));
        assert!(all.iter().all(|bits| frozen(bits) == expected), "{world_size} ranks, {zero:?}");
    }
}

#[test]
fn weights_are_written_whole_and_loaded_in_segments() {
    for link in LINKS {
        for (world_size, shard_ranks) in [(1, None), (3, None), (4, Some(2))] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            let all = run(world_size, link, move |mut group| {
                let options = DdpOptions { shard_ranks, ..options(Zero::Three) };
                let (model, ddp) = tuned(&mut group, options.clone());
                train(&group, (&model, &ddp, &mut optimizer(&ddp)), 0..1);
                ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
                let other = Model::new(500);
                freeze(&other, &FROZEN, true);
                let loaded = Ddp::new(&other.vs, &mut group, options).unwrap();
                drop(other.loss_sum(0..1)); // some of it is here when it is loaded
                assert!(loaded.load_weights(&path, &LoadOptions::default()).unwrap().is_empty());
                assert!(other.bits() == model.bits());
                model.bits()
            });
            assert!(all.iter().all(|bits| *bits == all[0]), "{link:?}, {world_size} ranks");
        }
    }
}

/// Builds the model layer by layer, what is large frozen at once, and trains it.
fn built(mut group: Group, zero: Zero) -> Vec<u32> {
    let vs = nn::VarStore::new(Device::Cpu);
    let mut building = Ddp::begin(&vs, &mut group, options(zero)).unwrap();
    let variables = std::sync::Arc::clone(&vs.variables_);
    let model = Model::built(vs, group.rank() as i64 * 1000, |_| {
        for (name, variable) in &variables.lock().unwrap().named_variables {
            if FROZEN.contains(&name.as_str()) {
                let _same = variable.set_requires_grad(false);
            }
        }
        building.add().unwrap();
    });
    let ddp = building.finish().unwrap();
    train(&group, (&model, &ddp, &mut optimizer(&ddp)), 0..3);
    model.bits()
}

#[test]
fn a_model_that_is_built_piece_by_piece_is_the_same() {
    for link in LINKS {
        for world_size in [1, 2, 3] {
            let whole = |mut group: Group| outcome(&mut group, options(Zero::Off));
            let expected = run(world_size, link, whole).remove(0);
            let all = run(world_size, link, |group| built(group, Zero::Three));
            assert!(all.iter().all(|bits| *bits == expected), "{link:?}, {world_size} ranks");
        }
    }
}

#[test]
fn what_the_program_writes_is_kept() {
    for link in LINKS {
        let of = |zero| {
            run(2, link, move |mut group| {
                let (model, ddp) = tuned(&mut group, options(zero));
                let mut optimizer = optimizer(&ddp);
                train(&group, (&model, &ddp, &mut optimizer), 0..1);
                // Where ranks share memory, all have read before one writes.
                group.barrier().unwrap().wait().unwrap();
                for (name, mut variable) in model.sorted() {
                    if FROZEN.contains(&name.as_str()) {
                        drop(tch::no_grad(|| variable.fill_(0.03)));
                    }
                }
                group.barrier().unwrap().wait().unwrap();
                train(&group, (&model, &ddp, &mut optimizer), 1..3);
                model.bits()
            })
        };
        let expected = of(Zero::Off);
        for zero in STAGES {
            assert!(of(zero) == expected, "{link:?}, {zero:?}");
        }
    }
}
