//! Files of weights have the whole model, whatever mesh wrote them and whichever reads them.

use std::fs;

use phalanx_ddp_core::checkpoint::{LoadOptions, WeightsOptions};
use phalanx_ddp_core::{AdamW, DdpOptions, Optimizer, ParameterGroups, Zero};
use tch::{Kind, Tensor};

use crate::model::{mesh, on_mesh, options, wrapped, wrapped_frozen, ALONE};

const MESHES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 3), (1, 4, 1)];

#[test]
fn weights_go_from_any_mesh_to_any_other_through_files_that_are_alike() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first.safetensors");
    // Other values than those that models begin with.
    let path = first.clone();
    on_mesh(ALONE, Zero::Off, move |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Float);
        let mut optimizer =
            Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default()).unwrap();
        part.backward(&rank, &ddp, 0);
        optimizer.step(None).unwrap();
        ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
    });
    let expected = fs::read(&first).unwrap();
    for (pp, dp, tp) in MESHES {
        for zero in [Zero::Off, Zero::Two, Zero::Three] {
            let (from, into) =
                (first.clone(), folder.path().join(format!("{pp}{dp}{tp}.safetensors")));
            let written = into.clone();
            on_mesh(mesh(pp, dp, tp), zero, move |mut rank| {
                let (_part, ddp) = wrapped(&mut rank, options(zero), Kind::Float);
                let left = ddp.load_weights(&from, &LoadOptions::default()).unwrap();
                assert!(left.is_empty(), "{left:?}");
                ddp.save_weights(&into, &WeightsOptions::default()).unwrap();
            });
            assert!(fs::read(&written).unwrap() == expected, "{pp} {dp} {tp}, {zero:?}");
        }
    }
}

#[test]
fn frozen_weights_of_which_ranks_have_segments_are_written_whole() {
    let folder = tempfile::tempdir().unwrap();
    let files = [(ALONE, Zero::Off), (mesh(2, 2, 1), Zero::Three), (mesh(1, 2, 2), Zero::Three)]
        .map(|(shape, zero)| {
            let path = folder.path().join(format!("{}.safetensors", shape.world_size() + shape.pp));
            let into = path.clone();
            on_mesh(shape, zero, move |mut rank| {
                let (_part, ddp) = wrapped_frozen(&mut rank, options(zero));
                ddp.save_weights(&into, &WeightsOptions::default()).unwrap();
            });
            fs::read(path).unwrap()
        });
    assert!(files[1] == files[0] && files[2] == files[0]);
}

#[test]
fn masters_are_what_the_files_have_before_they_are_rounded() {
    let folder = tempfile::tempdir().unwrap();
    let [source, whole, parts] =
        ["source", "whole", "parts"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let path = source.clone();
    on_mesh(ALONE, Zero::Off, move |mut rank| {
        let (_part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Float);
        ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
    });
    for (shape, into) in [(ALONE, &whole), (mesh(2, 1, 2), &parts)] {
        let (from, into) = (source.clone(), into.clone());
        on_mesh(shape, Zero::One, move |mut rank| {
            let options = DdpOptions { parameter_kind: Some(Kind::BFloat16), ..options(Zero::One) };
            let (part, ddp) = wrapped(&mut rank, options, Kind::Float);
            ddp.load_weights(&from, &LoadOptions::default()).unwrap();
            let mut optimizer = Optimizer::new(
                &ddp,
                AdamW { lr: 1e-4, weight_decay: 0.0, ..AdamW::default() },
                ParameterGroups::default(),
            )
            .unwrap();
            // Gradients of one sign: a step of Adam is then the rate, on every mesh.
            let ones = |_: &str, gradient: &mut Tensor| *gradient = gradient.ones_like();
            for step in 0..3 {
                part.backward_changed(&rank, &ddp, step, ones).unwrap();
                optimizer.step(None).unwrap();
            }
            ddp.save_weights(&into, &WeightsOptions::default()).unwrap();
        });
    }
    assert!(fs::read(whole).unwrap() == fs::read(parts).unwrap());
}

#[test]
fn misfits_are_named_on_every_rank_with_the_whole_shape() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    let tensor = Tensor::zeros([3, 3], (Kind::Float, tch::Device::Cpu));
    phalanx_ddp_core::checkpoint::save_safetensors(&path, &[("layer1-up".to_owned(), tensor)])
        .unwrap();
    let errors = on_mesh(mesh(2, 1, 1), Zero::Off, move |mut rank| {
        let (_part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Float);
        ddp.load_weights(&path, &LoadOptions::default()).unwrap_err().to_string()
    });
    assert!(errors[0].contains("layer0-up: missing, the model has [18, 6]"), "{}", errors[0]);
    assert_eq!(errors[0], errors[1]);
}
