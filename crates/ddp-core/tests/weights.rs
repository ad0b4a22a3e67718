//! Weights of files in wrapped models: every rank reads its part, and together they have what one process would have.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::path::{Path, PathBuf};

use phalanx_comm::environment::HostLink;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{
    load_safetensors, save_safetensors, LoadOptions, WeightsOptions,
};
use phalanx_ddp_core::diloco::{DiLoCo, DiLoCoOptions, OuterSgd};
use phalanx_ddp_core::{
    AdamW, Ddp, DdpOptions, Error, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, pattern, run_over as run, wrapped, Model, LINKS, STAGES};
use tch::{nn, Device, Kind, Tensor};

const KINDS: [Kind; 4] = [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double];

/// A folder, and a file of weights in it.
fn file_in(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("model.safetensors")
}

/// The weights of a model with this seed, of this kind.
fn save(path: &Path, seed: i64, kind: Kind) {
    let tensors = Model::new(seed).sorted();
    let tensors: Vec<_> =
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect();
    save_safetensors(path, &tensors).unwrap();
}

fn optimizer(ddp: &Ddp) -> Optimizer {
    let rule = AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() };
    Optimizer::new(ddp, rule, ParameterGroups::default()).unwrap()
}

/// Steps on 12 samples each.
fn train(
    group: &Group,
    (model, ddp): (&Model, &Ddp),
    optimizer: &mut Optimizer,
    steps: std::ops::Range<i64>,
) {
    let micro = 12 / group.world_size() as i64;
    for step in steps {
        let start = step * 12 + group.rank() as i64 * micro;
        ddp.backward(&model.loss_sum(start..start + micro), micro as f64, Sync::Reduce).unwrap();
        optimizer.step(Some(0.5)).unwrap();
    }
}

/// All stages, and those inside of a part of the ranks.
fn shardings(world_size: usize) -> Vec<DdpOptions> {
    let cut = |ranks: Option<usize>| {
        STAGES.map(move |zero| DdpOptions { shard_ranks: ranks, ..options(zero) })
    };
    let hybrid = [Some(2), Some(1)].into_iter().filter(|_| world_size == 4);
    std::iter::once(None).chain(hybrid).flat_map(cut).collect()
}

#[test]
fn what_a_model_has_saved_another_one_loads_to_the_bit() {
    for link in LINKS {
        for world_size in [1, 2, 3, 4] {
            for options in shardings(world_size) {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().to_owned();
                let shown = format!("{options:?}, {link:?}, {world_size} ranks");
                let all = run(world_size, link, move |mut group| {
                    let (model, ddp) = wrapped(&mut group, options.clone());
                    train(&group, (&model, &ddp), &mut optimizer(&ddp), 0..1);
                    let small = WeightsOptions { shard_bytes_max: 3000, ..Default::default() };
                    ddp.save_weights(&path.join("many"), &small).unwrap();
                    ddp.save_weights(&path.join("one.safetensors"), &WeightsOptions::default())
                        .unwrap();
                    let other = Model::new(500);
                    let loaded = Ddp::new(&other.vs, &mut group, options.clone()).unwrap();
                    let index = path.join("many/model.safetensors.index.json");
                    for file in [path.join("many"), path.join("one.safetensors"), index] {
                        // Whatever the program wrote before, and wherever that is.
                        for (_, mut variable) in other.sorted() {
                            drop(tch::no_grad(|| variable.fill_(0.25)));
                        }
                        let left = loaded.load_weights(&file, &LoadOptions::default()).unwrap();
                        assert!(left.is_empty(), "{left:?}");
                        assert!(other.bits() == model.bits(), "{}", file.display());
                        // Before one writes where ranks share memory, all have read.
                        group.barrier().unwrap().wait().unwrap();
                    }
                    loaded.compare_parameters().unwrap();
                    model.bits()
                });
                assert!(all.iter().all(|bits| *bits == all[0]), "{shown}");
                let index = folder.path().join("many/model.safetensors.index.json");
                assert!(index.is_file(), "several files");
            }
        }
    }
}

/// Two steps, weights of this kind from elsewhere, two steps.
fn interrupted(
    mut group: Group,
    options: DdpOptions,
    (path, load): (&Path, fn(&Path, &Model, &Ddp)),
) -> Vec<u32> {
    let (model, ddp) = wrapped(&mut group, options);
    let mut optimizer = optimizer(&ddp);
    train(&group, (&model, &ddp), &mut optimizer, 0..2);
    load(path, &model, &ddp);
    train(&group, (&model, &ddp), &mut optimizer, 2..4);
    model.bits()
}

#[test]
fn loading_between_two_steps_gives_the_same_bits_at_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    let plain = |path: &Path, model: &Model, _: &Ddp| {
        assert!(load_safetensors(path, &model.vs).unwrap().is_empty());
    };
    let ours = |path: &Path, _: &Model, ddp: &Ddp| {
        assert!(ddp.load_weights(path, &LoadOptions::default()).unwrap().is_empty());
    };
    for (world_size, kind) in [1, 2, 3, 4].into_iter().zip(KINDS) {
        let path = file_in(&folder);
        save(&path, 77, kind);
        for link in LINKS {
            let file = path.clone();
            let expected = run(world_size, link, move |group| {
                interrupted(group, options(Zero::Off), (&file, plain))
            });
            for options in shardings(world_size) {
                let (file, shown) = (path.clone(), format!("{options:?}, {link:?}"));
                let all = run(world_size, link, move |group| {
                    interrupted(group, options.clone(), (&file, ours))
                });
                assert!(all == expected, "{shown}, {world_size} ranks, {kind:?}");
            }
        }
    }
}

#[test]
fn a_model_that_is_built_piece_by_piece_is_filled() {
    for link in LINKS {
        for zero in STAGES {
            let folder = tempfile::tempdir().unwrap();
            let path = file_in(&folder);
            save(&path, 77, Kind::Float);
            let all = run(3, link, move |mut group| {
                let vs = nn::VarStore::new(Device::Cpu);
                let mut building = Ddp::begin(&vs, &mut group, options(zero)).unwrap();
                let model = Model::built(vs, 0, |_| building.add().unwrap());
                let ddp = building.finish().unwrap();
                assert!(ddp.load_weights(&path, &LoadOptions::default()).unwrap().is_empty());
                model.bits()
            });
            assert!(all.iter().all(|bits| *bits == Model::new(77).bits()), "{zero:?}, {link:?}");
        }
    }
}

#[test]
fn ranks_that_train_by_themselves_start_from_what_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_in(&folder);
    save(&path, 77, Kind::Float);
    let all = run(2, HostLink::Auto, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut inner = optimizer(&ddp);
        let outer = OuterSgd { lr: 0.5, momentum: 0.0, nesterov: false };
        let options = DiLoCoOptions { outer, sync_every: 2, plain_steps: 0 };
        let mut local = DiLoCo::new(&ddp, options).unwrap();
        train(&group, (&model, &ddp), &mut inner, 0..1);
        local.step().unwrap();
        ddp.load_weights(&path, &LoadOptions::default()).unwrap();
        local.average().unwrap();
        model.bits()
    });
    assert!(all.iter().all(|bits| *bits == Model::new(77).bits()));
}

/// Tensors with names.
type Named = Vec<(String, Tensor)>;

/// Parameters of a kind, one of them with columns that are dense; what does not train is of other kinds.
fn tensors(kind: Kind, seed: i64) -> (Named, Named) {
    let value = |shape: &[i64], index: i64| pattern(shape, seed + index).to_kind(kind);
    let trained = |tensor: Tensor| tensor.set_requires_grad(true);
    let parameters = [
        ("columns", trained(value(&[45, 70], 0).tr())),
        ("channels", trained(value(&[5, 7, 9, 3], 1).permute([0, 3, 1, 2]))),
        ("frozen", value(&[31], 2)),
        ("long", trained(value(&[4001], 3))),
        ("number", trained(value(&[], 4))),
    ];
    let buffers = [
        ("count", Tensor::from_slice(&[seed])),
        ("mean", pattern(&[3, 5], seed)),
        ("nothing", value(&[0, 4], 5)),
    ];
    let named = |(name, tensor): (&str, Tensor)| (name.to_owned(), tensor);
    (parameters.map(named).into(), buffers.map(named).into())
}

/// Every tensor as f64, which holds all of these kinds.
fn numbers(all: &[(String, Tensor)]) -> Vec<f64> {
    let flat = |(_, tensor): &(String, Tensor)| {
        Vec::<f64>::try_from(tensor.detach().to_kind(Kind::Double).reshape([-1])).unwrap()
    };
    all.iter().flat_map(flat).collect()
}

/// Parameters and buffers.
fn together(kind: Kind, seed: i64) -> Named {
    let (mut all, buffers) = tensors(kind, seed);
    all.extend(buffers);
    all
}

/// What loading a file of `from` into a model of `to` gives on each rank, and after a step that moves nothing.
fn converted(world_size: usize, link: HostLink, zero: Zero, (from, to): (Kind, Kind)) {
    let folder = tempfile::tempdir().unwrap();
    let path = file_in(&folder);
    save_safetensors(&path, &together(from, 9)).unwrap();
    let all = run(world_size, link, move |mut group| {
        let (parameters, buffers) = tensors(to, group.rank() as i64);
        let clones = |list: &[(String, Tensor)]| -> Named {
            list.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
        };
        let mut all = clones(&parameters);
        all.extend(clones(&buffers));
        let ddp = Ddp::from_tensors(parameters, buffers, &mut group, options(zero)).unwrap();
        let rule = Sgd { lr: 0.0, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        let mut step = || {
            let trained = all.iter().filter(|(_, tensor)| tensor.requires_grad());
            let loss: Tensor = trained.map(|(_, tensor)| tensor.sum(Kind::Double)).sum();
            ddp.backward(&loss, 1.0, Sync::Reduce).unwrap();
            optimizer.step(None).unwrap();
        };
        step();
        assert!(ddp.load_weights(&path, &LoadOptions::default()).unwrap().is_empty());
        let loaded = numbers(&all);
        // Masters that did not follow would be written over what was loaded.
        step();
        (loaded, numbers(&all))
    });
    // As libtorch converts them in one process.
    let expected: Named = together(to, 0)
        .into_iter()
        .zip(together(from, 9))
        .map(|((name, mut tensor), (_, values))| {
            tch::no_grad(|| tensor.copy_(&values));
            (name, tensor)
        })
        .collect();
    let expected = numbers(&expected);
    for (loaded, stepped) in all {
        assert!(loaded == expected, "{zero:?}, {link:?}, {world_size} ranks, {from:?} → {to:?}");
        assert!(stepped == expected, "{zero:?}, {link:?}: masters, {from:?} → {to:?}");
    }
}

#[test]
fn every_kind_becomes_every_other_in_any_order_of_memory() {
    for zero in STAGES {
        for (world_size, link) in [(3, HostLink::Tcp), (2, HostLink::Auto), (1, HostLink::Auto)] {
            for from in KINDS {
                for to in KINDS {
                    converted(world_size, link, zero, (from, to));
                }
            }
        }
    }
}

#[test]
fn tensors_are_found_under_other_names_and_foreign_ones_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_in(&folder);
    let mut renamed: Vec<_> = Model::new(77)
        .sorted()
        .into_iter()
        .map(|(name, tensor)| (name.replace("norm.weight", "norm.gamma"), tensor))
        .collect();
    renamed.push(("pooler.bias".to_owned(), Tensor::from_slice(&[1_f32])));
    save_safetensors(&path, &renamed).unwrap();
    let all = run(2, HostLink::Tcp, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Three));
        let old = |name: &str| name.replace("weight", "gamma");
        let both = LoadOptions::with_names(move |name| vec![name.to_owned(), old(name)]);
        let left = ddp.load_weights(&path, &both).unwrap();
        let wrong = LoadOptions::with_names(move |name| vec![format!("bert.{name}"), old(name)]);
        let error = ddp.load_weights(&path, &wrong).unwrap_err().to_string();
        (model.bits(), left, error)
    });
    for (bits, left, error) in all {
        assert!(bits == Model::new(77).bits());
        assert_eq!(left, ["pooler.bias"]);
        let missing = "one.weight (in the file bert.one.weight or one.gamma): missing, the model";
        assert!(error.contains(missing) && !error.contains("norm.weight"), "{error}");
    }
}

/// What each rank is told, where rank `r` loads `path(r)`; nothing may have changed, and the group goes on.
fn refused(
    (link, zero): (HostLink, Zero),
    path: impl Fn(usize) -> PathBuf + Send + std::marker::Sync + 'static,
) -> Vec<(Error, String)> {
    let all = run(3, link, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(zero));
        let before = model.bits();
        let path = path(group.rank());
        let error = ddp.load_weights(&path, &LoadOptions::default()).unwrap_err();
        assert!(model.bits() == before, "something has changed: {error}");
        train(&group, (&model, &ddp), &mut optimizer(&ddp), 0..1);
        let text = error.to_string();
        (error, text)
    });
    assert!(all.iter().all(|(_, text)| *text == all[0].1), "{all:?}");
    all
}

#[test]
fn weights_that_do_not_fit_are_the_same_error_on_every_rank_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_in(&folder);
    let mut tensors = Model::new(77).sorted();
    tensors.retain(|(name, _)| name != "two.weight");
    tensors[2].1 = Tensor::ones([5], (Kind::Float, Device::Cpu));
    save_safetensors(&path, &tensors).unwrap();
    let plain = load_safetensors(&path, &Model::new(0).vs).unwrap_err().to_string();
    assert!(plain.contains("one.bias: [5], the model has [131]"), "{plain}");
    for link in LINKS {
        for zero in STAGES {
            let path = path.clone();
            for (error, text) in refused((link, zero), move |_| path.clone()) {
                assert!(matches!(error, Error::WeightsMismatch { .. }), "{error}");
                assert_eq!(text, plain, "{zero:?}");
            }
        }
    }
}

#[test]
fn a_rank_that_sees_another_file_or_none_is_named_to_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_in(&folder);
    save(&path, 77, Kind::Float);
    let cut = folder.path().join("cut.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let half = folder.path().join("half.safetensors");
    save(&half, 77, Kind::Half);
    let parts = folder.path().join("parts.safetensors");
    save_safetensors(&parts, &Model::new(77).sorted()[1..]).unwrap();
    let nowhere = folder.path().join("nowhere.safetensors");
    for (link, zero) in LINKS.into_iter().flat_map(|link| STAGES.map(|zero| (link, zero))) {
        let told = |odd: &PathBuf| {
            let (path, odd) = (path.clone(), odd.clone());
            let of_rank = move |rank| if rank == 1 { odd.clone() } else { path.clone() };
            let all = refused((link, zero), of_rank);
            assert!(all[0].1.contains("rank 1"), "{zero:?}: {}", all[0].1);
            all.into_iter().map(|(error, _)| error).collect::<Vec<_>>()
        };
        let absent = |error: &Error| matches!(error, Error::Io { path, .. } if *path == nowhere);
        assert!(told(&nowhere).iter().all(absent));
        let ill_formed = |error: &Error| matches!(error, Error::Safetensors { .. });
        assert!(told(&cut).iter().all(ill_formed));
        let misfit = |error: &Error| matches!(error, Error::WeightsMismatch { .. });
        assert!(told(&parts).iter().all(misfit));
        let other = |error: &Error| matches!(error, Error::RanksDiffer { .. });
        assert!(told(&half).iter().all(other));
    }
}
