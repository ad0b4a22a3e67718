//! Error feedback: what was applied and what is kept are together what was due, over many steps, over a new layout of the buckets, and with
//! weights; and what is kept does not grow.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::hooks::{Kept, State};
use phalanx_ddp_core::{Ddp, Sync, Zero};
use tch::{Kind, Tensor};

use super::{gradients, largest, options, values, Model, Which, SHAPES, U32, UBF16};
use super::{Bf16, Fed, Fp16, Int8, PowerSgdInBf16};

const FED: [Which; 6] = [
    Fed(&Bf16),
    Fed(&Fp16),
    Fed(&Int8),
    Fed(&Which::TopK(0.1)),
    Fed(&Which::PowerSgd(2)),
    PowerSgdInBf16,
];

/// By parameter and element.
type Elements = Vec<Vec<f64>>;

fn zeros() -> Elements {
    let len = |shape: &&[i64]| usize::try_from(shape.iter().product::<i64>()).unwrap();
    SHAPES.iter().map(|(_, shape)| vec![0.0; len(shape)]).collect()
}

fn add(sums: &mut Elements, values: &[Vec<f32>], factor: f64) {
    for (sums, values) in sums.iter_mut().zip(values) {
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += factor * f64::from(value);
        }
    }
}

/// This rank's residuals.
fn residuals(ddp: &Ddp) -> Vec<Vec<f32>> {
    let state: State = ddp.hook_state().unwrap();
    let of = |(name, _): &(&str, &[i64])| match state.tensors.get(&format!("hook/residual/{name}"))
    {
        Some(Kept::ByRank(tensor)) => values(tensor),
        Some(Kept::Alike(_)) => panic!("every rank has its own"),
        None => Vec::new(), // without feedback
    };
    SHAPES.iter().map(of).collect()
}

/// What a rank saw: the means it applied, the largest of what was due in all steps together, its residuals at the end.
struct Seen {
    applied: Elements,
    kept: Vec<Vec<f32>>,
}

/// Steps with the gradients of `wanted`, and weights if there are.
fn train(
    world_size: usize,
    which: Which,
    steps: usize,
    wanted: fn(usize, usize) -> Vec<Tensor>,
    weight: Option<fn(usize, usize) -> f64>,
) -> Vec<Seen> {
    run_ranks(world_size, move |mut group| {
        let (rank, model) = (group.rank(), Model::new());
        let ddp = model.wrap(&mut group, options(Zero::Off));
        which.set(&ddp).unwrap();
        let mut applied = zeros();
        let initial = ddp.ready_order().unwrap();
        for step in 0..steps {
            // Ready from the first parameter to the last: the buckets are laid anew after the first step.
            let loss = model.loss_from_the_end(&wanted(rank, step));
            match weight {
                None => loss.backward(),
                Some(weight) => ddp.backward(&loss, weight(rank, step), Sync::Reduce).unwrap(),
            }
            add(&mut applied, &model.gradients(), 1.0);
            ddp.release_gradients().unwrap();
        }
        assert!(ddp.ready_order().unwrap() != initial);
        Seen { applied, kept: residuals(&ddp) }
    })
}

/// Applied + mean of what is kept − due, by parameter: the most.
fn check(
    which: Which,
    (world_size, steps): (usize, usize),
    wanted: fn(usize, usize) -> Vec<Tensor>,
    weight: Option<fn(usize, usize) -> f64>,
) {
    let ranks = train(world_size, which, steps, wanted, weight);
    let mut sums = ranks[0].applied.clone();
    for of_rank in &ranks {
        add(&mut sums, &of_rank.kept, 1.0 / world_size as f64);
    }
    let mut most = 0.0_f64;
    for step in 0..steps {
        let total = weight.map_or(world_size as f64, |weight| {
            (0..world_size).map(|rank| weight(rank, step)).sum()
        });
        for rank in 0..world_size {
            let of_rank: Vec<Vec<f32>> = wanted(rank, step).iter().map(values).collect();
            add(&mut sums, &of_rank, -1.0 / total);
            let factor = world_size as f64 / total;
            most = most.max(factor * largest(of_rank.iter().flatten().map(|&g| f64::from(g))));
        }
    }
    let off = largest(sums.iter().flatten().copied());
    // Each step: what goes in is rounded a few times in f32, as are the ranks' sum, the result and what is lost, P times over where a mean's loss is
    // one rank's to keep. None of these is larger than what a rank sends, which is its gradient and what it keeps.
    let kept = largest(ranks.iter().flat_map(|r| r.kept.iter().flatten().map(|&v| f64::from(v))));
    let applied = largest(ranks[0].applied.iter().flatten().copied()) / steps as f64;
    let size = most + kept + applied;
    let mut bound = steps as f64 * (6.0 + 2.0 * world_size as f64) * U32 * size * 4.0;
    if matches!(which, Fed(Bf16 | Fp16)) || which == PowerSgdInBf16 {
        // The mean of what travels in half precision is rounded once more, the same on every rank, and nobody keeps that.
        bound += steps as f64 * UBF16 * size;
    }
    assert!(off <= bound, "{which:?} on {world_size} ranks: off by {off:.2e} of {bound:.2e}");
}

#[test]
fn what_is_applied_and_what_is_kept_are_what_was_due() {
    for world_size in 1..=4 {
        for which in FED {
            check(which, (world_size, 8), gradients, None);
        }
    }
}

#[test]
fn weights_that_change_from_step_to_step_are_kept_apart() {
    let weight: fn(usize, usize) -> f64 = |rank, step| 1.0 + rank as f64 + 2.0 * (step % 3) as f64;
    for which in [Fed(&Int8), Fed(&Which::TopK(0.1)), Fed(&Which::PowerSgd(2))] {
        check(which, (3, 7), gradients, Some(weight));
    }
}

/// The same gradients in every step: without feedback what is lost is lost again and again.
#[test]
fn the_sum_over_many_steps_comes_to_the_true_sum() {
    const STEPS: usize = 120;
    let same: fn(usize, usize) -> Vec<Tensor> = |rank, _| gradients(rank, 0);
    for world_size in [2, 3] {
        let ranks = world_size as f64;
        let all: Vec<Vec<Vec<f32>>> =
            (0..world_size).map(|rank| same(rank, 0).iter().map(values).collect()).collect();
        let most = largest(all.iter().flatten().flatten().map(|&g| f64::from(g)));
        let norm = |values: &Vec<Vec<f32>>| {
            values.iter().flatten().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
        };
        let longest = all.iter().map(norm).fold(0.0, f64::max);
        for (which, alone, bound) in [
            // A rank keeps at most 1/254 of the largest that it sends, y ≤ g + e, and P/254 of the largest mean that it makes, itself at most the
            // largest y and what that is off by: e ≤ (1 + P (1 + 1/254)) (g + e)/254.
            (Fed(&Int8), Int8, {
                let share = (1.0 + ranks * 1.01) / 254.0;
                share / (1.0 - share) * most
            }),
            // Of a vector y the n − k smallest of n elements have at most the share 1 − k/n of its square, so |e| ≤ s (|g| + |e|) with
            // s = √(1 − 0.1) over all buckets together.
            (Fed(&Which::TopK(0.1)), Which::TopK(0.1), {
                let share = 0.9_f64.sqrt();
                share / (1.0 - share) * longest
            }),
        ] {
            let fed = train(world_size, which, STEPS, same, None);
            let off = |seen: &Seen| {
                let mut sums = seen.applied.clone();
                all.iter().for_each(|g| add(&mut sums, g, -(STEPS as f64) / ranks));
                largest(sums.iter().flatten().copied())
            };
            let rounding = STEPS as f64 * 16.0 * U32 * (most + bound);
            assert!(off(&fed[0]) <= bound + rounding, "{which:?}: {} of {bound}", off(&fed[0]));
            let lost = off(&train(world_size, alone, STEPS, same, None)[0]);
            assert!(lost > 4.0 * off(&fed[0]), "{alone:?}: {lost} beside {}", off(&fed[0]));
        }
    }
}

/// Rank 1's gradients in a step are not finite: nothing of them is kept, and the next step is right.
#[test]
fn a_step_that_is_skipped_leaves_nothing_behind() {
    use phalanx_ddp_core::{DdpOptions, NonFinite};
    for which in FED {
        let all = run_ranks(2, move |mut group| {
            let (rank, model) = (group.rank(), Model::new());
            let non_finite = NonFinite::SkipStep;
            let ddp = model.wrap(&mut group, DdpOptions { non_finite, ..options(Zero::Off) });
            which.set(&ddp).unwrap();
            for step in 0..2 {
                model.loss(&gradients(rank, step)).backward();
                ddp.release_gradients().unwrap();
            }
            let factor = if rank == 1 { f64::INFINITY } else { 1.0 };
            let bad: Vec<Tensor> = gradients(rank, 2).into_iter().map(|g| g * factor).collect();
            model.loss(&bad).backward();
            assert!(!model.named[0].1.grad().defined(), "{which:?}: skipped");
            assert!(ddp.hook_state().unwrap().tensors.is_empty(), "{which:?}: forgotten");
            model.loss(&gradients(rank, 3)).backward();
            model.gradients()
        });
        assert!(all[0].iter().flatten().all(|value| value.is_finite()), "{which:?}");
        assert!(all[0] == all[1], "{which:?}");
    }
}

/// Gradients that are finite on each rank, and too large for what they travel in: the norm is not finite, and nothing of that is kept.
#[test]
fn a_norm_that_is_not_finite_leaves_nothing_behind() {
    use phalanx_ddp_core::{DdpOptions, NonFinite, Optimizer, ParameterGroups, Sgd};
    for non_finite in [NonFinite::SkipStep, NonFinite::Error] {
        let all = run_ranks(2, move |mut group| {
            let (rank, model) = (group.rank(), Model::new());
            let ddp = model.wrap(&mut group, DdpOptions { non_finite, ..options(Zero::Off) });
            Fed(&Fp16).set(&ddp).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
            let large = |g: Tensor| g.zeros_like() + 1e5;
            model.loss(&gradients(rank, 0).into_iter().map(large).collect::<Vec<_>>()).backward();
            match optimizer.step(Some(1.0)) {
                Ok(step) => assert!(step.skipped && non_finite == NonFinite::SkipStep),
                Err(error) => assert!(non_finite == NonFinite::Error, "{error}"),
            }
            assert!(ddp.hook_state().unwrap().tensors.is_empty(), "{non_finite:?}: forgotten");
            model.loss(&gradients(rank, 1)).backward();
            model.gradients()
        });
        assert!(all[0].iter().flatten().all(|value| value.is_finite()), "{non_finite:?}");
        assert!(all[0] == all[1], "{non_finite:?}");
    }
}

/// In bf16 buckets what the kind itself loses is kept as well.
#[test]
fn gradients_in_half_precision_are_fed_back_too() {
    use phalanx_ddp_core::hooks::{ErrorFeedback, Int8Blocks};
    const STEPS: i32 = 64;
    let all = run_ranks(2, |mut group| {
        let weight = Tensor::ones([3000], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
        let named = vec![("w".to_owned(), weight.shallow_clone())];
        let gradient_kind = Some(Kind::BFloat16);
        let options = phalanx_ddp_core::DdpOptions { gradient_kind, ..options(Zero::Off) };
        let ddp = Ddp::from_tensors(named, vec![], &mut group, options).unwrap();
        ddp.set_hook(ErrorFeedback::around(Int8Blocks::default())).unwrap();
        let mut sum = 0.0;
        for _ in 0..STEPS {
            (&weight * 0.75).sum(Kind::Float).backward();
            sum += f64::from(values(&weight.grad().to_kind(Kind::Float))[7]);
            ddp.release_gradients().unwrap();
        }
        sum
    });
    // One residual: at most a bf16 step of what is sent, and the codes' halves.
    assert!(
        (all[0] - 48.0).abs() <= 0.75 * 4.0 * (UBF16 + 1.0 / 127.0) + 64.0 * 0.75 * UBF16,
        "{all:?}"
    );
}
