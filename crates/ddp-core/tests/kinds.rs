//! Kinds: gradients and masters of half precision in f32, several kinds at once, loss scaling.

#![allow(clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::amp::LossScaler;
use phalanx_ddp_core::checkpoint::{save_safetensors, LoadOptions};
use phalanx_ddp_core::{
    AdamW, Ddp, DdpOptions, NonFinite, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use support::{options, values, STAGES};
use tch::{Device, Kind, Tensor};

/// Four ranks, four micro-batches each, in bf16: small gradients that a bf16 sum would lose.
#[test]
fn half_precision_gradients_add_up_and_travel_in_f32() {
    let sums = |kind: Option<Kind>| {
        run_ranks(4, move |mut group| {
            let weight = Tensor::ones([500], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
            let parameters = vec![("w".to_owned(), weight.shallow_clone())];
            let options = DdpOptions { gradient_kind: kind, ..options(Zero::Off) };
            let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
            for part in 0..4 {
                // 256 once, then 1: bf16 has 8 bits.
                let factor = if part == 0 { 256.0 } else { 1.0 };
                let loss = (&weight * factor).sum(Kind::Float);
                let sync = if part == 3 { Sync::Reduce } else { Sync::Accumulate };
                ddp.backward(&loss, 0.25, sync).unwrap();
            }
            let gradient = weight.grad();
            (gradient.kind(), values(&gradient.to_kind(Kind::Float))[0])
        })
    };
    assert_eq!(sums(None), [(Kind::Float, 259.0); 4]);
    assert_eq!(sums(Some(Kind::BFloat16)), [(Kind::BFloat16, 256.0); 4]);
    assert_eq!(sums(Some(Kind::Double)), [(Kind::Double, 259.0); 4]);
}

/// Steps of a thousandth of a weight's last bit, a thousand times.
#[test]
fn half_precision_parameters_have_masters_that_keep_small_steps() {
    for zero in STAGES {
        let all = run_ranks(2, move |mut group| {
            let weight =
                Tensor::ones([3000], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
            let parameters = vec![("w".to_owned(), weight.shallow_clone())];
            let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options(zero)).unwrap();
            let rule = Sgd { lr: 1.0 / 8192.0, ..Sgd::default() };
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            for _ in 0..64 {
                weight.sum(Kind::Float).backward();
                let _step = optimizer.step(None).unwrap();
            }
            // Weights that are loaded count: masters follow.
            let once = values(&weight.to_kind(Kind::Float))[2999];
            // Before one writes where ranks share memory, all have read.
            group.barrier().unwrap().wait().unwrap();
            let _filled = tch::no_grad(|| weight.shallow_clone().fill_(2.0));
            weight.sum(Kind::Float).backward();
            let _step = optimizer.step(None).unwrap();
            (once, values(&weight.to_kind(Kind::Float))[0])
        });
        // 1 − 64/8192 is a bf16 number; in bf16 alone 1 − 1/8192 is 1.
        assert_eq!(all, [(1.0 - 64.0 / 8192.0, 2.0); 2], "{zero:?}");
    }
}

/// Values that bf16 does not have, and steps too small for it: what comes out shows what masters began from. The order of buckets
/// changes before the first step, and with it who has which element.
#[test]
fn masters_of_parameters_that_become_halves_begin_from_what_they_were() {
    const SIZES: [i64; 5] = [3000, 70, 5000, 64, 1];
    const STEPS: i64 = 3;
    let begin =
        |len| (Tensor::arange(len, (Kind::Float, Device::Cpu)) * 7).remainder(8) / 1024.0 + 1.0;
    let rounded = |values: Tensor| values.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    for (world_size, shard_ranks) in [(1, None), (2, None), (3, None), (4, None), (4, Some(2))] {
        for zero in STAGES {
            let all = run_ranks(world_size, move |mut group| {
                let leaf = |len| begin(len).set_requires_grad(true);
                let weights = SIZES.map(leaf);
                let frozen = begin(9);
                let mut named: Vec<_> = weights.iter().enumerate().collect();
                named.push((9, &frozen));
                let named = named.iter().map(|(at, w)| (format!("w{at}"), w.shallow_clone()));
                let parameter_kind = Some(Kind::BFloat16);
                let options = DdpOptions { parameter_kind, shard_ranks, ..options(zero) };
                let named: Vec<_> = named.collect();
                let ddp = Ddp::from_tensors(named, vec![], &mut group, options).unwrap();
                let before = ddp.ready_order().unwrap();
                let rule = Sgd { lr: 1.0 / 512.0, ..Sgd::default() };
                let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
                for _ in 0..STEPS {
                    // The last one that is used is ready first.
                    let mut sum = weights[4].sum(Kind::Float);
                    for weight in weights[..4].iter().rev() {
                        sum += weight.sum(Kind::Float);
                    }
                    ddp.backward(&-sum, 1.0, Sync::Reduce).unwrap();
                    let _step = optimizer.step(None).unwrap();
                }
                let is_laid_anew = ddp.ready_order().unwrap() != before;
                let can_be = matches!(zero, Zero::Off | Zero::One);
                assert_eq!(is_laid_anew, can_be, "{zero:?}");
                assert_eq!((weights[0].kind(), frozen.kind()), (Kind::BFloat16, Kind::BFloat16));
                let widened = weights.iter().map(|w| values(&w.to_kind(Kind::Float)));
                (widened.collect::<Vec<_>>(), values(&frozen.to_kind(Kind::Float)))
            });
            let right = SIZES.map(|len| values(&rounded(begin(len) + STEPS as f64 / 512.0)));
            for (weights, frozen) in &all {
                assert_eq!(weights[..], right, "{zero:?} on {world_size} ranks");
                assert_eq!(*frozen, values(&rounded(begin(9))));
            }
        }
    }
}

/// Weights in f32 that are loaded into a model in half precision, between two steps: masters are what the file has.
#[test]
fn masters_are_what_a_file_has_and_not_what_it_is_rounded_to() {
    const SIZES: [i64; 3] = [3000, 70, 5000];
    let begin =
        |len| (Tensor::arange(len, (Kind::Float, Device::Cpu)) * 7).remainder(8) / 1024.0 + 1.0;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let saved: Vec<_> = (0..3).map(|at| (format!("w{at}"), begin(SIZES[at]))).collect();
    save_safetensors(&path, &saved).unwrap();
    for world_size in [1, 2, 3] {
        for zero in STAGES {
            let path = path.clone();
            let all = run_ranks(world_size, move |mut group| {
                let weights = SIZES.map(|len| {
                    Tensor::ones([len], (Kind::Float, Device::Cpu)).set_requires_grad(true)
                });
                let named = weights.iter().enumerate();
                let named = named.map(|(at, w)| (format!("w{at}"), w.shallow_clone())).collect();
                let parameter_kind = Some(Kind::BFloat16);
                let options = DdpOptions { parameter_kind, ..options(zero) };
                let ddp = Ddp::from_tensors(named, vec![], &mut group, options).unwrap();
                let rule = Sgd { lr: 1.0 / 512.0, ..Sgd::default() };
                let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
                for step in 0..4 {
                    if step == 1 {
                        assert!(ddp
                            .load_weights(&path, &LoadOptions::default())
                            .unwrap()
                            .is_empty());
                    }
                    let sum: Tensor = weights.iter().map(|w| w.sum(Kind::Float)).sum();
                    ddp.backward(&-sum, 1.0, Sync::Reduce).unwrap();
                    let _step = optimizer.step(None).unwrap();
                }
                weights.map(|w| values(&w.to_kind(Kind::Float)))
            });
            let rounded = |len| (begin(len) + 3.0 / 512.0).to_kind(Kind::BFloat16);
            let right = SIZES.map(|len| values(&rounded(len).to_kind(Kind::Float)));
            assert!(all.iter().all(|weights| *weights == right), "{zero:?} on {world_size} ranks");
        }
    }
}

#[test]
fn kinds_can_be_mixed() {
    let all = run_ranks(3, |mut group| {
        let make = |kind| Tensor::ones([300], (kind, Device::Cpu)).set_requires_grad(true);
        let (a, b, c) = (make(Kind::Float), make(Kind::BFloat16), make(Kind::Double));
        let named = [("a", &a), ("b", &b), ("c", &c)];
        let parameters = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let ddp =
            Ddp::from_tensors(parameters.into(), vec![], &mut group, options(Zero::One)).unwrap();
        let mut optimizer =
            Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default()).unwrap();
        for _ in 0..2 {
            let sum = named.iter().map(|(_, tensor)| tensor.sum(Kind::Double)).sum::<Tensor>();
            ddp.backward(&(sum * (group.rank() as f64 + 1.0)), 2.0, Sync::Reduce).unwrap();
            let _step = optimizer.step(Some(1.0)).unwrap();
        }
        named.map(|(_, tensor)| values(&tensor.to_kind(Kind::Float)))
    });
    assert!(all[0] == all[1] && all[0] == all[2]);
    assert!(all[0].iter().all(|values| values[0] < 1.0), "{:?}", all[0]);
}

#[test]
fn the_loss_scale_goes_down_with_a_skipped_step_and_up_with_good_ones() {
    for zero in STAGES {
        let all = run_ranks(2, move |mut group| {
            let weight = Tensor::ones([300], (Kind::Half, Device::Cpu)).set_requires_grad(true);
            let parameters = vec![("w".to_owned(), weight.shallow_clone())];
            let options = DdpOptions { non_finite: NonFinite::SkipStep, ..options(zero) };
            let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
            let rule = Sgd { lr: 0.5, ..Sgd::default() };
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            let mut scaler = LossScaler::new(32768.0, 2.0, 0.5, 2).unwrap();
            let mut told = Vec::new();
            for step in 0..5 {
                // 4 × 32768 is infinite in f16, on rank 1 alone in the first step.
                let factor = if step == 0 && group.rank() == 0 { 0.0 } else { 0.25 };
                let factor = if step == 0 && group.rank() == 1 { 4.0 } else { factor };
                let loss = (&weight * factor).sum(Kind::Float);
                ddp.backward(&scaler.scale(&loss).unwrap(), 1.0, Sync::Reduce).unwrap();
                told.push(optimizer.step_scaled(None, &mut scaler).unwrap().skipped);
            }
            (told, scaler.value(), values(&weight.to_kind(Kind::Float))[7])
        });
        // Four steps of 0.5 × 0.25; the scale: halved, doubled after two good steps, twice.
        let right = (vec![true, false, false, false, false], 65536.0, 0.5);
        assert_eq!(all, [right.clone(), right], "{zero:?}");
    }
}
