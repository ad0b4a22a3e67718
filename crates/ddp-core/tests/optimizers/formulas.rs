//! LARS and Lion, which PyTorch has not, against their formulas in f64.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{
    Error, Lars, Lion, Muon, Optimizer, ParameterGroup, ParameterGroups, Sync, Zero,
};

use super::support::{options, values, whole_gradients, wrapped, Model, ROUNDOFF};

/// Sixteen: the mean of whole numbers is exact in f32.
const SAMPLES: i64 = 16;
const STEPS: i64 = 4;

fn is_plain(name: &str) -> bool {
    name.ends_with("bias")
}

/// Biases neither decay nor are scaled; layer two has its own rate.
fn groups(lr_of_two: f64) -> ParameterGroups {
    let plain = ParameterGroup::matching(["*bias"]).weight_decay(0.0).without_trust_ratio();
    ParameterGroups::default().with(plain).with(ParameterGroup::matching(["two.*"]).lr(lr_of_two))
}

/// Weights that two ranks come to under ZeRO-1, in the order of their names.
fn trained(rule: fn() -> Box<dyn Rule>, lr_of_two: f64) -> Vec<Vec<f32>> {
    let mut all = run_ranks(2, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        let mut optimizer = Optimizer::new(&ddp, rule(), groups(lr_of_two)).unwrap();
        let half = SAMPLES / 2;
        for step in 0..STEPS {
            let start = step * SAMPLES + group.rank() as i64 * half;
            let loss = model.whole_loss_sum(start..start + half);
            ddp.backward(&loss, half as f64, Sync::Reduce).unwrap();
            let _step = optimizer.step(None).unwrap();
        }
        model.sorted().iter().map(|(_, tensor)| values(&tensor.reshape([-1]))).collect::<Vec<_>>()
    });
    all.remove(0)
}

/// The exact mean gradients of a step, in the order of names.
fn gradients(model: &Model, step: i64) -> Vec<Vec<f64>> {
    let sums = whole_gradients(model, step * SAMPLES..(step + 1) * SAMPLES);
    let mean = |sum: &f32| f64::from(*sum) / SAMPLES as f64;
    sums.iter().map(|sum| values(&sum.reshape([-1])).iter().map(mean).collect()).collect()
}

/// A parameter of an oracle: values, and by how much f32 may be off, element by element.
struct Parameter {
    name: String,
    values: Vec<f64>,
    off: Vec<f64>,
    momentum: Vec<f64>,
    momentum_off: Vec<f64>,
}

fn parameters(model: &Model) -> Vec<Parameter> {
    let of = |(name, tensor): (String, tch::Tensor)| {
        let start = values(&tensor.reshape([-1]));
        let zeros = vec![0.0; start.len()];
        Parameter {
            name,
            values: start.into_iter().map(f64::from).collect(),
            off: zeros.clone(),
            momentum: zeros.clone(),
            momentum_off: zeros,
        }
    };
    model.sorted().into_iter().map(of).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn compare(ours: &[Vec<f32>], oracle: &[Parameter]) {
    for (ours, right) in ours.iter().zip(oracle) {
        assert_eq!(ours.len(), right.values.len(), "{}", right.name);
        for (at, &found) in ours.iter().enumerate() {
            let off = (f64::from(found) - right.values[at]).abs();
            // Products of errors are left out of the bounds: a part in a thousand covers them.
            let bound = right.off[at] * 1.001;
            assert!(off <= bound, "{}: {at}: off by {off:.2e} of {bound:.2e}", right.name);
        }
    }
}

#[test]
fn lars_is_its_formula() {
    const RULE: Lars = Lars {
        lr: 0.5,
        momentum: 0.75,
        nesterov: false,
        trust_coefficient: 0.02,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    for nesterov in [false, true] {
        let model = Model::new(0);
        let mut oracle = parameters(&model);
        for step in 0..STEPS {
            for (parameter, gradient) in oracle.iter_mut().zip(gradients(&model, step)) {
                lars(&Lars { nesterov, ..RULE }, parameter, &gradient);
            }
        }
        let rule: fn() -> Box<dyn Rule> = match nesterov {
            true => || Box::new(Lars { nesterov: true, ..RULE }),
            false => || Box::new(RULE),
        };
        compare(&trained(rule, 0.25), &oracle);
    }
}

/// A step, and the running error of the same step in f32: u is the roundoff, and each f32 operation and each constant
/// rounds once.
fn lars(rule: &Lars, parameter: &mut Parameter, gradient: &[f64]) {
    let u = ROUNDOFF;
    let lr = if parameter.name.starts_with("two") && !is_plain(&parameter.name) {
        0.25
    } else {
        rule.lr
    };
    let decay = if is_plain(&parameter.name) { 0.0 } else { rule.weight_decay };
    let (of_weight, of_gradient) = (norm(&parameter.values), norm(gradient));
    // The ratio is computed in f64 of weights that are off.
    let (ratio, ratio_off) = match is_plain(&parameter.name) {
        true => (1.0, 0.0),
        false => {
            let below = of_gradient + decay * of_weight + rule.eps;
            (rule.trust_coefficient * of_weight / below, norm(&parameter.off) / of_weight)
        }
    };
    for (at, &slope) in gradient.iter().enumerate() {
        let (value, off) = (parameter.values[at], parameter.off[at]);
        let raw = slope + decay * value;
        let raw_off = decay * (off + 2.0 * u * value.abs()) + u * raw.abs();
        let scaled = ratio * raw;
        let scaled_off = ratio * raw_off + scaled.abs() * (ratio_off + 2.0 * u);
        let kept = rule.momentum * parameter.momentum[at];
        let momentum = kept + scaled;
        let momentum_off = rule.momentum * parameter.momentum_off[at]
            + scaled_off
            + u * (2.0 * kept.abs() + momentum.abs());
        parameter.momentum[at] = momentum;
        parameter.momentum_off[at] = momentum_off;
        let (way, way_off) = match rule.nesterov {
            false => (momentum, momentum_off),
            true => {
                let ahead = rule.momentum * momentum;
                let way = scaled + ahead;
                let off = scaled_off + rule.momentum * momentum_off;
                (way, off + u * (2.0 * ahead.abs() + way.abs()))
            }
        };
        let moved = value - lr * way;
        parameter.values[at] = moved;
        parameter.off[at] = off + lr * (way_off + 2.0 * u * way.abs()) + u * moved.abs();
    }
}

/// With betas of few bits everything up to the sign is exact in f32: a gradient has 8 bits, and each step adds five.
#[test]
fn lion_is_its_formula() {
    const RULE: Lion = Lion { lr: 0.01, beta1: 0.875, beta2: 0.96875, weight_decay: 0.1 };
    let model = Model::new(0);
    let mut oracle = parameters(&model);
    for step in 0..STEPS {
        for (parameter, gradient) in oracle.iter_mut().zip(gradients(&model, step)) {
            lion(&RULE, parameter, &gradient);
        }
    }
    compare(&trained(|| Box::new(RULE), 0.004), &oracle);
}

fn lion(rule: &Lion, parameter: &mut Parameter, gradient: &[f64]) {
    let u = ROUNDOFF;
    let plain = is_plain(&parameter.name);
    let lr = if parameter.name.starts_with("two") && !plain { 0.004 } else { rule.lr };
    let decay = if plain { 0.0 } else { rule.weight_decay };
    for (at, &gradient) in gradient.iter().enumerate() {
        let momentum = parameter.momentum[at];
        let direction = rule.beta1 * momentum + (1.0 - rule.beta1) * gradient;
        let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
        let kept = parameter.values[at] * (1.0 - lr * decay);
        let moved = kept - lr * sign;
        parameter.momentum[at] = rule.beta2 * momentum + (1.0 - rule.beta2) * gradient;
        // The constant, the product; the rate; the difference.
        let rounded = u * (2.0 * kept.abs() + lr + moved.abs());
        parameter.off[at] += rounded;
        parameter.values[at] = moved;
    }
}

#[test]
fn settings_that_cannot_be_are_named() {
    run_ranks(1, |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::Off));
        let none = ParameterGroups::default;
        let refused = |rule: Box<dyn Rule>, setting: &str| {
            let error = Optimizer::new(&ddp, rule, none()).unwrap_err();
            let is_it =
                matches!(&error, Error::BadSetting { setting: named, .. } if *named == setting);
            assert!(is_it, "{setting}: {error}");
        };
        let lars = Lars::default();
        refused(Box::new(Lars { trust_coefficient: 0.0, ..lars }), "trust_coefficient");
        refused(Box::new(Lars { momentum: 1.0, ..lars }), "momentum");
        refused(Box::new(Lars { momentum: 0.0, nesterov: true, ..lars }), "nesterov");
        refused(Box::new(Lars { eps: -1.0, ..lars }), "eps");
        refused(Box::new(Lion { beta2: 1.0, ..Lion::default() }), "beta2");
        refused(Box::new(Lion { lr: f64::NAN, ..Lion::default() }), "lr");
        refused(Box::new(Lion { weight_decay: -0.1, ..Lion::default() }), "weight_decay");
        let muon = Muon::default;
        refused(Box::new(Muon { steps: 0, ..muon() }), "steps");
        refused(Box::new(Muon { momentum: -0.1, ..muon() }), "momentum");
        refused(Box::new(Muon { eps: 0.0, ..muon() }), "eps");
        refused(Box::new(Muon { lr: 0.0, ..muon() }), "adamw.lr");
        let adamw = phalanx_ddp_core::AdamW { beta1: 1.0, ..Default::default() };
        refused(Box::new(Muon { adamw, ..muon() }), "beta1");
        let adafactor = phalanx_ddp_core::Adafactor::default();
        let with = |beta2_decay, eps1, clip_threshold| {
            Box::new(phalanx_ddp_core::Adafactor { beta2_decay, eps1, clip_threshold, ..adafactor })
        };
        refused(with(0.1, None, 1.0), "beta2_decay");
        refused(with(-0.8, Some(0.0), 1.0), "eps1");
        refused(with(-0.8, None, 0.5), "clip_threshold");
    });
}
