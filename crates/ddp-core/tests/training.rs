//! Training with several ranks is training with one: parity, bits, errors.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::{AdamW, Ddp, Error, Optimizer, ParameterGroup, ParameterGroups, Sync, Zero};
use support::{assert_within, options, whole_gradients, wrapped, Model, ROUNDOFF, WHOLE_MAX};
use tch::nn::OptimizerConfig as _;
use tch::{nn, Device, Kind, Tensor};

fn adamw() -> AdamW {
    AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() }
}

fn decays(name: &str) -> bool {
    !name.ends_with("bias") && !name.starts_with("norm")
}

fn no_decay() -> ParameterGroups {
    let others = ParameterGroup::chosen(|name| !decays(name));
    ParameterGroups::default().with(others.weight_decay(0.0))
}

fn groups() -> ParameterGroups {
    no_decay().with(ParameterGroup::matching(["two.*"]).lr(0.004))
}

#[test]
fn plain_tch_training_matches_one_rank_with_the_whole_batch() {
    const LR: f64 = 0.001;
    const STEPS: i64 = 6;
    let plain = |mut group: Group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer =
            nn::Sgd { momentum: 0.9, ..Default::default() }.build(&model.vs, LR).unwrap();
        let micro = 12 / group.world_size() as i64;
        for step in 0..STEPS {
            let start = step * 12 + group.rank() as i64 * micro;
            let loss = model.whole_loss_sum(start..start + micro) / micro as f64;
            optimizer.backward_step(&loss);
            assert!(ddp.statistics().unwrap().bucket_count >= 3);
        }
        model.values()
    };
    // Against exact arithmetic, in units of the roundoff: a gradient of at most WHOLE_MAX has eight roundings (1 / micro
    // and its product: 3, the sum over four ranks: 3, their mean: 2); a step adds two of the velocity (its product, its
    // sum; it is at most `step` gradients), one of the velocity times LR, and one of a weight, which is below 0.3 and
    // moves by less than 0.2. Two runs are off by twice as much.
    let (mut of_velocity, mut of_weight) = (0.0, 0.0);
    for step in 1..=STEPS {
        let velocity = WHOLE_MAX * step as f64;
        of_velocity += 8.0 * WHOLE_MAX + 2.0 * velocity;
        of_weight += LR * (of_velocity + velocity) + 0.5;
    }
    let alone = run_ranks(1, plain).remove(0);
    for world_size in [2, 3, 4] {
        let all = run_ranks(world_size, plain);
        assert!(all.iter().all(|values| *values == all[0]), "ranks differ");
        assert_within(&all[0], &alone, 2.0 * of_weight * ROUNDOFF);
    }
}

/// Samples and steps of the comparison with libtorch. Sixteen: the mean is exact too.
const LIBTORCH: (i64, i64) = (16, 5);

/// Our weights after the steps, and the gradients' norms.
fn with_ours(
    adamw: AdamW,
    groups: fn() -> ParameterGroups,
    clip: Option<f64>,
) -> (Vec<f32>, Vec<f64>) {
    let mut all = run_ranks(1, move |mut group| {
        let (samples, steps) = LIBTORCH;
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = Optimizer::new(&ddp, adamw, groups()).unwrap();
        let mut norms = Vec::new();
        for step in 0..steps {
            let loss = model.whole_loss_sum(step * samples..(step + 1) * samples);
            ddp.backward(&loss, samples as f64, Sync::Reduce).unwrap();
            norms.extend(optimizer.step(clip).unwrap().gradient_norm);
        }
        (model.values(), norms)
    });
    all.remove(0)
}

/// libtorch's weights after the steps, by parameter.
fn with_libtorch(adamw: AdamW, clip: Option<f64>) -> Vec<(String, Vec<f32>)> {
    let (samples, steps) = LIBTORCH;
    let model = Model::new(0);
    let AdamW { lr, beta1, beta2, eps, weight_decay: wd } = adamw;
    let settings = nn::AdamW { beta1, beta2, wd, eps, amsgrad: false };
    let mut optimizer = settings.build(&model.vs, lr).unwrap();
    for step in 0..steps {
        let loss = model.whole_loss_sum(step * samples..(step + 1) * samples) / samples as f64;
        optimizer.zero_grad();
        loss.backward();
        if let Some(norm_max) = clip {
            optimizer.clip_grad_norm(norm_max);
        }
        optimizer.step();
    }
    model.sorted().into_iter().map(|(name, value)| (name, support::values(&value))).collect()
}

fn joined(parameters: Vec<(String, Vec<f32>)>) -> Vec<f32> {
    parameters.into_iter().flat_map(|(_, values)| values).collect()
}

/// How far two AdamW may be apart after the steps of [`LIBTORCH`] if both round every operation once, whatever their
/// order, in units of the roundoff: `ratio_max` bounds the first moment over the root of the second plus ε,
/// `of_gradients` is the relative error of the gradients, and weights start below 0.3.
///
/// After step t the moments have 4 t roundings each (4 a step: two constants, a product or two, the sum), relative to the sum
/// of the absolute terms; the root halves those of the second. Seven more: the root, its correction (2), + ε, the
/// quotient, the step size (2). A weight has three a step: 1 − lr × decay, its product, the difference.
fn of_adamw(lr: f64, ratio_max: f64, of_gradients: f64) -> f64 {
    let (mut weight, mut of_weight) = (0.3, 0.0);
    for step in 1..=LIBTORCH.1 {
        weight += lr * ratio_max;
        let of_ratio = 4.0 * step as f64 + 2.0 * step as f64 + 7.0 + 2.0 * of_gradients;
        of_weight += 3.0 * weight + lr * ratio_max * of_ratio;
    }
    2.0 * of_weight * ROUNDOFF
}

/// Both get the same gradients, bit for bit. Those of a network would not do: where a gradient is nothing but rounding,
/// Adam divides it by its own size.
#[test]
fn adamw_is_that_of_libtorch() {
    let adamw = AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() };
    // The first moment is Σ aᵢgᵢ, the second Σ bᵢgᵢ², with Σ aᵢ = Σ bᵢ = 1: by Cauchy and Schwarz their ratio is at most
    // √Σ aᵢ²/bᵢ, which is 1.013 after five steps of β = (0.9, 0.999), and less before.
    let bound = of_adamw(adamw.lr, 1.02, 0.0);
    let all_decay = with_libtorch(adamw, None);
    let none_decay = with_libtorch(AdamW { weight_decay: 0.0, ..adamw }, None);
    let (ours, _) = with_ours(adamw, no_decay, None);
    let pairs = all_decay.iter().zip(none_decay);
    let chosen = pairs.map(|(with, without)| if decays(&with.0) { with.clone() } else { without });
    assert_within(&ours, &joined(chosen.collect()), bound);
    assert_within(&with_ours(adamw, ParameterGroups::default, None).0, &joined(all_decay), bound);
}

/// With ε = 1 the update is as large as the gradient, and so shows by how much it was clipped.
#[test]
fn clipping_is_that_of_libtorch() {
    const NORM_MAX: f64 = 0.5;
    let adamw = AdamW { lr: 1.0, eps: 1.0, weight_decay: 0.1, ..AdamW::default() };
    let (ours, norms) = with_ours(adamw, ParameterGroups::default, Some(NORM_MAX));
    let model = Model::new(0);
    for (step, norm) in (0..).zip(&norms) {
        let range = step * LIBTORCH.0..(step + 1) * LIBTORCH.0;
        let squares = whole_gradients(&model, range).into_iter().map(|c| c.square());
        let sum = squares.map(|s| s.sum(Kind::Double).double_value(&[])).sum::<f64>();
        // Whole numbers below 2^24: exact in f32, in which libtorch adds them up.
        assert!(sum < f64::from(1 << 24));
        assert!(norm.to_bits() == (sum.sqrt() / 16.0).to_bits(), "step {step}: {norm}");
    }
    // No ratio is above the largest clipped gradient. libtorch's clipped gradients have ten roundings: the norm of each
    // parameter (1), the norm of the six norms (squares of rounded numbers 3, sums 5, halved, and the root: 5), + 1e-6, the
    // quotient, the product; and one to spare for ours, which have two.
    let ratio_max = norms.iter().map(|norm| WHOLE_MAX * NORM_MAX / norm).fold(0.0, f64::max);
    let libtorchs = joined(with_libtorch(adamw, Some(NORM_MAX)));
    assert_within(&ours, &libtorchs, of_adamw(adamw.lr, ratio_max, 10.0));
}

#[test]
fn uneven_weights_give_the_mean_over_all_samples() {
    let cuts = [0, 5, 6, 12];
    let gradients = run_ranks(3, move |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let rank = group.rank();
        let loss = model.whole_loss_sum(cuts[rank]..cuts[rank + 1]);
        ddp.backward(&loss, (cuts[rank + 1] - cuts[rank]) as f64, Sync::Reduce).unwrap();
        gradients(&model)
    });
    for of_rank in &gradients {
        // The sum is exact; 1/12 and its product round once each, the expected value once.
        assert_within(of_rank, &mean_of_twelve(), 3.0 * WHOLE_MAX * ROUNDOFF);
    }
}

/// The mean gradients of the first twelve samples, rounded once.
fn mean_of_twelve() -> Vec<f32> {
    let means = whole_gradients(&Model::new(0), 0..12).into_iter().map(|sum| sum / 12.0);
    means.flat_map(|mean| support::values(&mean.reshape([-1]))).collect()
}

fn gradients(model: &Model) -> Vec<f32> {
    let flat: Vec<Tensor> =
        model.sorted().into_iter().map(|(_, v)| v.grad().reshape([-1])).collect();
    support::values(&Tensor::cat(&flat, 0))
}

#[test]
fn no_sync_accumulates_and_the_next_backward_exchanges_the_sum() {
    let gradients = run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let start = group.rank() as i64 * 6;
        ddp.no_sync(|| (model.whole_loss_sum(start..start + 3) / 6.0).backward()).unwrap();
        (model.whole_loss_sum(start + 3..start + 6) / 6.0).backward();
        self::gradients(&model)
    });
    // 1/6 and its product (3 roundings), the sum of two halves, the sum of two ranks, their mean (exact); one of the
    // expected value.
    assert_within(&gradients[0], &mean_of_twelve(), 6.0 * WHOLE_MAX * ROUNDOFF);
    assert!(gradients[0] == gradients[1], "ranks differ");
}

#[test]
fn every_rank_starts_from_rank_zeros_values() {
    let all = run_ranks(3, |mut group| wrapped(&mut group, options(Zero::One)).0.bits());
    let rank_zero = Model::new(0).bits();
    assert!(all.iter().all(|bits| *bits == rank_zero));
}

#[test]
fn a_parameter_without_a_gradient_is_named_in_the_same_step_on_every_rank() {
    let errors = run_ranks(3, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let used = nn::linear(vs.root() / "used", 4, 1, nn::LinearConfig::default());
        let lonely = nn::linear(vs.root() / "lonely", 4, 1, nn::LinearConfig::default());
        let ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
        let mut y = nn::Module::forward(&used, &x);
        if group.rank() != 1 {
            y += nn::Module::forward(&lonely, &x);
        }
        let error = ddp.backward(&y.sum(Kind::Float), 2.0, Sync::Reduce).unwrap_err();
        error.to_string()
    });
    for error in &errors {
        assert!(error.contains("rank 1"), "{error}");
        assert!(error.contains("lonely.weight"), "{error}");
        assert!(!error.contains("used.weight"), "{error}");
    }
}

#[test]
fn a_backward_that_fails_half_way_is_reported_by_the_next() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let variables = model.vs.variables();
        // A graph whose first half is gone: the last layer's gradients come, then backward fails.
        let shared = variables["one.weight"].square().sum(Kind::Float);
        ddp.no_sync(|| shared.backward()).unwrap();
        let half = variables["three.weight"].sum(Kind::Float) * 2.0 + &shared;
        assert!(half.f_backward().is_err());
        let loss = model.loss_sum(0..4);
        let error = ddp.backward(&loss, 4.0, Sync::Reduce).unwrap_err();
        assert!(matches!(error, Error::BackwardAbandoned), "{error}");
        drop(ddp);
    });
}

#[test]
fn running_statistics_are_rank_zeros() {
    let all = run_ranks(2, |mut group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let norm = nn::batch_norm1d(vs.root() / "bn", 3, nn::BatchNormConfig::default());
        let _ddp = Ddp::new(&vs, &mut group, options(Zero::Off)).unwrap();
        let x = Tensor::ones([4, 3], (Kind::Float, Device::Cpu))
            * (group.rank() as f64 + 1.0)
            * support::pattern(&[4, 1], 3);
        let y = nn::ModuleT::forward_t(&norm, &x, true);
        y.square().sum(Kind::Float).backward();
        support::values(&vs.variables()["bn.running_mean"])
    });
    assert!(all[0] == all[1], "running statistics differ: {all:?}");
    assert!(all[0].iter().any(|&mean| mean != 0.0));
}

#[test]
fn without_a_backward_there_is_no_step() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
        ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Accumulate).unwrap();
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
        ddp.backward(&model.loss_sum(0..3), 3.0, Sync::Reduce).unwrap();
        assert!(optimizer.step(Some(1.0)).unwrap().gradient_norm > Some(0.0));
        assert!(matches!(optimizer.step(None), Err(Error::NoGradients)));
    });
}

#[test]
fn the_model_outlives_its_ddp() {
    run_ranks(2, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::One));
        drop(ddp);
        drop(group);
        let loss = model.loss_sum(0..3);
        loss.backward();
        assert!(loss.double_value(&[]).is_finite());
    });
}

#[test]
fn settings_out_of_range_are_refused() {
    run_ranks(1, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Off));
        let bad = AdamW { beta2: 1.0, ..AdamW::default() };
        let error = Optimizer::new(&ddp, bad, groups()).unwrap_err().to_string();
        assert_eq!(error, "beta2 is 1, expected a number in [0, 1)");
        let refused = ddp.backward(&model.loss_sum(0..1), f64::NAN, Sync::Reduce).unwrap_err();
        assert!(refused.to_string().contains("weight is NaN"), "{refused}");
    });
}
