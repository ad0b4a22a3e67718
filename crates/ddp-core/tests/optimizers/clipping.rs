//! Clipping by any norm and by value, and norms that are not finite.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::amp::LossScaler;
use phalanx_ddp_core::{
    Clip, Ddp, DdpOptions, Error, NonFinite, Optimizer, ParameterGroups, Sgd, Step, Sync, Zero,
};
use tch::{Device, Kind, Tensor};

use super::stages::STAGES;
use super::support::{options, values, ROUNDOFF};

/// A descent of one step of the gradients themselves, of a vector that starts at zero: what became of the gradients.
fn stepped(clip: Clip, zero: Zero, scale: Option<f64>) -> (Vec<f32>, Step) {
    let mut all = run_ranks(2, move |mut group| {
        let weight = Tensor::zeros([3000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let options = DdpOptions { non_finite: NonFinite::SkipStep, ..options(zero) };
        let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
        let rule = Sgd { lr: 1.0, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        let loss = (&weight * gradients()).sum(Kind::Float);
        let step = match scale {
            None => {
                ddp.backward(&loss, 1.0, Sync::Reduce).unwrap();
                optimizer.step(clip).unwrap()
            }
            Some(scale) => {
                let mut scaler = LossScaler::new(scale, 2.0, 0.5, 100).unwrap();
                ddp.backward(&scaler.scale(&loss).unwrap(), 1.0, Sync::Reduce).unwrap();
                optimizer.step_scaled(clip, &mut scaler).unwrap()
            }
        };
        (values(&-&weight), step)
    });
    assert!(all[0] == all[1], "ranks differ");
    all.remove(0)
}

/// −8, …, 8: whole numbers.
fn gradients() -> Tensor {
    (Tensor::arange(3000, (Kind::Float, Device::Cpu)).remainder(17)) - 8.0
}

#[test]
fn all_gradients_are_scaled_to_the_norm_that_was_asked_for() {
    let exact: Vec<f64> = values(&gradients()).into_iter().map(f64::from).collect();
    for p in [1.0, 1.5, 2.0, 3.0, f64::INFINITY] {
        let norm = match p.is_infinite() {
            true => 8.0,
            false => exact.iter().map(|x| x.abs().powf(p)).sum::<f64>().powf(1.0 / p),
        };
        for zero in STAGES {
            for (max, scale) in [(norm / 4.0, None), (norm / 4.0, Some(1024.0)), (2.0 * norm, None)]
            {
                let (ours, step) = stepped(Clip::p_norm(max, p), zero, scale);
                let told = step.gradient_norm.unwrap();
                // 3000 powers and sums of f64, each rounded once.
                assert!((told - norm).abs() <= 3000.0 * f64::EPSILON * norm, "{p}: {told} {norm}");
                let divisor = ((norm + 1e-6) / max).max(1.0);
                for (found, exact) in ours.iter().zip(&exact) {
                    let expected = exact / divisor;
                    // The divisor in f32, and the quotient.
                    let bound = 2.5 * ROUNDOFF * expected.abs();
                    assert!(
                        (f64::from(*found) - expected).abs() <= bound,
                        "{p} {max}: {found} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn each_element_is_clamped_to_the_value_that_was_asked_for() {
    for zero in STAGES {
        for scale in [None, Some(1024.0)] {
            let (ours, step) = stepped(Clip::value(2.5), zero, scale);
            assert_eq!(step.gradient_norm.is_some(), scale.is_some(), "nobody asked for a norm");
            assert!(ours == values(&gradients().clamp(-2.5, 2.5)), "{zero:?} {scale:?}");
        }
    }
}

#[test]
fn an_option_is_a_largest_norm() {
    let of = |clip: Option<f64>| stepped(clip.into(), Zero::Off, None);
    assert!(of(Some(3.0)) == stepped(Clip::norm(3.0), Zero::Off, None));
    assert!(of(None) == stepped(Clip::none(), Zero::Off, None));
    assert_eq!(of(None).1.gradient_norm, None);
}

/// Gradients that are finite on each rank, and whose sum is not.
fn overflowing(zero: Zero, non_finite: NonFinite, clip: Clip) -> (Result<bool, String>, Vec<f32>) {
    let mut all = run_ranks(2, move |mut group| {
        let weight = Tensor::ones([3000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let options = DdpOptions { non_finite, ..options(zero) };
        let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
        let rule = Sgd { lr: 0.25, ..Sgd::default() };
        let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
        (&weight * 3e38).sum(Kind::Float).backward();
        let skipped = match optimizer.step(clip) {
            Ok(step) => Ok(step.skipped),
            Err(Error::NonFiniteNorm { norm }) if norm.is_infinite() => Err("infinite".to_owned()),
            Err(other) => Err(other.to_string()),
        };
        // The group is good, and gradients are gone.
        let after = values(&weight);
        (&weight * 2.0).sum(Kind::Float).backward();
        assert!(optimizer.step(Some(f64::INFINITY)).unwrap().gradient_norm > Some(0.0));
        (skipped, after)
    });
    assert!(all[0].0 == all[1].0, "ranks differ");
    all.remove(0)
}

#[test]
fn a_norm_that_is_not_finite_is_what_the_policy_makes_of_it() {
    let infinite = || Err("infinite".to_owned());
    for zero in STAGES {
        let told = |policy, clip| {
            let (told, after) = overflowing(zero, policy, clip);
            let is_untouched = after.iter().all(|value| value.to_bits() == 1.0_f32.to_bits());
            assert_eq!(is_untouched, told != Ok(false), "{policy:?}");
            told
        };
        assert_eq!(told(NonFinite::Error, Clip::norm(1.0)), infinite());
        assert_eq!(told(NonFinite::Error, Clip::p_norm(1.0, f64::INFINITY)), infinite());
        assert_eq!(told(NonFinite::SkipStep, Clip::norm(1.0)), Ok(true));
        assert_eq!(told(NonFinite::SkipStep, Clip::norm(1.0).error_if_nonfinite()), infinite());
    }
}

/// As PyTorch's `clip_grad_norm_` without `error_if_nonfinite`: parameters are spoilt.
#[test]
fn whoever_does_not_look_goes_on_with_what_there_is() {
    for policy in [NonFinite::Warn, NonFinite::Ignore] {
        let all = run_ranks(2, move |mut group| {
            let weight = Tensor::ones([300], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let parameters = vec![("w".to_owned(), weight.shallow_clone())];
            let options = DdpOptions { non_finite: policy, ..options(Zero::One) };
            let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
            (&weight * 3e38).sum(Kind::Float).backward();
            let step = optimizer.step(Some(1.0)).unwrap();
            (step.skipped, values(&weight)[0].is_nan())
        });
        assert_eq!(all, [(false, true); 2], "{policy:?}");
    }
}

#[test]
fn limits_that_cannot_be_are_refused() {
    run_ranks(1, |mut group| {
        let weight = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options(Zero::Off)).unwrap();
        let mut optimizer =
            Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
        let nan = f64::NAN;
        for (clip, named) in [
            (Clip::norm(0.0), "norm_max is 0"),
            (Clip::norm(nan), "norm_max is NaN"),
            (Clip::p_norm(1.0, 0.5), "p of a norm is 0.5, expected 1 or more, or infinity"),
            (Clip::p_norm(1.0, nan), "p of a norm is NaN"),
            (Clip::value(-1.0), "value_max is -1"),
        ] {
            let error = optimizer.step(clip).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    });
}
