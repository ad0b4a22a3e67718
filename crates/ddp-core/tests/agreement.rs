//! Do all ranks hold the same model? What differs is named alike on every rank.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::{Ddp, Error, Zero};
use support::options;
use tch::{nn, Device, Kind};

#[test]
fn models_that_differ_are_refused_with_the_same_words_everywhere() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let width = if group.rank() == 1 { 5 } else { 4 };
        let _layer = nn::linear(vs.root() / "fc", width, 2, nn::LinearConfig::default());
        match Ddp::new(&vs, &mut group, options(Zero::Off)) {
            Err(error @ Error::ModelMismatch { .. }) => error.to_string(),
            other => panic!("expected a mismatch, got {other:?}"),
        }
    });
    assert!(errors[0].contains("ranks 0, 2: parameter fc.weight [2, 4] Float"), "{}", errors[0]);
    assert!(errors[0].contains("rank 1: parameter fc.weight [2, 5] Float"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]));
}

/// Builds what a rank trains.
type Build = fn(nn::Path<'_>, usize);

fn layer(path: nn::Path<'_>, bias: bool) {
    let _layer = nn::linear(path, 4, 2, nn::LinearConfig { bias, ..nn::LinearConfig::default() });
}

/// What differs on rank 1, how ranks build it, and what the error must say.
const DIFFERING: [(&str, Build, [&str; 2]); 7] = [
    (
        "one parameter more",
        |root, rank| {
            layer(&root / "fc", true);
            if rank == 1 {
                layer(&root / "more", false);
            }
        },
        ["rank 1: parameter more.weight [2, 4] Float", "ranks 0, 2: nothing"],
    ),
    (
        "one parameter fewer",
        |root, rank| layer(&root / "fc", rank != 1),
        ["ranks 0, 2: parameter fc.bias [2] Float", "rank 1: nothing"],
    ),
    (
        "another type",
        |mut root, rank| {
            layer(&root / "fc", false);
            root.set_kind(if rank == 1 { Kind::Double } else { Kind::Float });
        },
        [
            "rank 1: parameter fc.weight [2, 4] Double",
            "ranks 0, 2: parameter fc.weight [2, 4] Float",
        ],
    ),
    (
        "another name",
        |root, rank| layer(&root / if rank == 1 { "fb" } else { "fc" }, false),
        ["rank 1: parameter fb.weight [2, 4]", "ranks 0, 2: parameter fc.weight [2, 4]"],
    ),
    (
        "another order",
        |root, rank| {
            let names = if rank == 1 { ["b", "a"] } else { ["a", "b"] };
            for name in names {
                layer(&root / name, false);
            }
        },
        ["ranks 0, 2: parameter a.weight", "rank 1: parameter b.weight"],
    ),
    (
        "frozen on one rank",
        |root, rank| {
            layer(&root / "fc", false);
            let frozen = root.zeros("scale", &[3]);
            let _scale = frozen.set_requires_grad(rank != 1);
        },
        ["ranks 0, 2: parameter scale [3] Float", "rank 1: frozen scale [3] Float"],
    ),
    (
        "nothing to train on one rank",
        |root, rank| {
            if rank != 1 {
                layer(&root / "fc", false);
            }
        },
        ["ranks 0, 2: parameter fc.weight [2, 4] Float", "rank 1: nothing"],
    ),
];

/// Rank 1 of three builds something else; every rank must say so itself and in the same words, which name the parameter
/// and what each rank has. A rank that had waited for another would say instead that its call timed out.
#[test]
fn whatever_differs_of_a_model_is_named_alike_on_every_rank() {
    for (what, build, parts) in DIFFERING {
        let ended = run_ranks(3, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            build(vs.root(), group.rank());
            match Ddp::new(&vs, &mut group, options(Zero::Off)) {
                Err(error @ Error::ModelMismatch { .. }) => error.to_string(),
                other => panic!("{what}: expected a mismatch, got {other:?}"),
            }
        });
        for error in &ended {
            assert_eq!(*error, ended[0], "{what}");
            for part in parts {
                assert!(error.contains(part), "{what}: no {part:?} in {error}");
            }
        }
    }
}

#[test]
fn models_with_nothing_to_train_are_refused_on_every_rank() {
    let ended = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        Ddp::new(&vs, &mut group, options(Zero::Off)).map(drop)
    });
    for result in ended {
        assert!(matches!(result, Err(Error::NothingToTrain)), "{result:?}");
    }
}
