//! Norms, clipping and trust ratios are those of the whole model.

use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{Clip, Ddp, Lars, ModelPart, Optimizer, ParameterGroups, Sgd, Zero};
use tch::Kind;

use crate::model::{bound, mesh, on_mesh, options, wrapped, Mesh, Part, ALONE};

/// The norm, or the sum of losses, of each step; a rank's own.
type Trace = Vec<(f64, f64)>;

fn sgd() -> Box<dyn Rule> {
    Box::new(Sgd { lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.01, dampening: 0.0 })
}

fn lars() -> Box<dyn Rule> {
    Box::new(Lars { lr: 0.1, trust_coefficient: 0.5, ..Lars::default() })
}

const STEPS: i32 = 4;

/// Four steps on a mesh: each rank's norms, and losses over all ranks.
fn trained(mesh: Mesh, zero: Zero, rule: fn() -> Box<dyn Rule>, clip: Clip) -> Trace {
    let ranks = on_mesh(mesh, zero, move |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(zero), Kind::Double);
        let mut optimizer = Optimizer::new(&ddp, rule(), ParameterGroups::default()).unwrap();
        let mut trace = Vec::new();
        for step in 0..i64::from(STEPS) {
            let loss = part.backward(&rank, &ddp, step);
            let norm = optimizer.step(clip).unwrap().gradient_norm.unwrap_or(0.0);
            // Ranks of one tp group have the same loss: it counts on the first.
            let counts = rank.is_last() && rank.at.tp == 0;
            trace.push((norm, if counts { loss } else { 0.0 }));
        }
        trace
    });
    let norms = |trace: &Trace| trace.iter().map(|(norm, _)| norm.to_bits()).collect::<Vec<_>>();
    for trace in &ranks {
        assert_eq!(
            norms(trace),
            norms(&ranks[0]),
            "every rank has the same bits: {mesh:?}, {zero:?}"
        );
    }
    let losses = |step: usize| ranks.iter().map(|trace| trace[step].1).sum::<f64>();
    ranks[0].iter().enumerate().map(|(step, (norm, _))| (*norm, losses(step))).collect()
}

fn check(meshes: &[(Mesh, Zero)], rule: fn() -> Box<dyn Rule>, clip: Clip) {
    let alone = trained(ALONE, Zero::Off, rule, clip);
    for &(mesh, zero) in meshes {
        let found = trained(mesh, zero, rule, clip);
        for (step, (one, other)) in alone.iter().zip(&found).enumerate() {
            let steps = i32::try_from(step).unwrap() + 1;
            for (expected, actual) in [(one.0, other.0), (one.1, other.1)] {
                let difference = (expected - actual).abs();
                assert!(
                    difference <= bound(expected, steps),
                    "{mesh:?}, {zero:?}, {clip:?}, step {step}: {actual} and alone {expected}"
                );
            }
        }
    }
}

#[test]
fn every_mesh_and_stage_clips_to_the_norm_of_one_process() {
    let stages = [Zero::Off, Zero::One, Zero::Two, Zero::Three];
    let meshes = [(2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 1, 3), (1, 2, 2), (2, 2, 1), (1, 3, 1)];
    let all = meshes.into_iter().enumerate().flat_map(|(number, (pp, dp, tp))| {
        let stages = if dp == 1 { &stages[..1] } else { &stages[..] };
        // Stages of a mesh without dp are all alike: each of them once.
        let one = [stages[number % stages.len()]];
        let stages = if dp == 1 { one.to_vec() } else { stages.to_vec() };
        stages.into_iter().map(move |zero| (mesh(pp, dp, tp), zero))
    });
    check(&all.collect::<Vec<_>>(), sgd, Clip::norm(0.5));
}

#[test]
fn every_kind_of_clipping_is_of_the_whole_model() {
    let meshes = [(mesh(2, 1, 2), Zero::One), (mesh(1, 2, 2), Zero::Two)];
    let norm = |p| Clip::p_norm(0.2, p);
    for clip in [norm(1.0), norm(3.0), norm(f64::INFINITY), Clip::value(0.01), Clip::none()] {
        check(&meshes, sgd, clip);
    }
}

/// Three steps with one `Ddp` of all variables, or with two of them that are stepped together: norms and parameters, as bits.
fn divided(zero: Zero, is_divided: bool) -> Vec<(Vec<u64>, Vec<u64>)> {
    on_mesh(mesh(1, 2, 2), zero, move |mut rank| {
        let part = Part::new(&rank, Kind::Double);
        let is_inner = |name: &str| name.contains("up") || name.contains("down");
        let mut ddps = Vec::new();
        for inner in [false, true] {
            let own = |name: &str| !is_divided || is_inner(name) == inner;
            if !is_divided && inner {
                continue;
            }
            let variables = part.sorted().into_iter().filter(|(name, _)| own(name)).collect();
            let options = options(zero);
            let ddp = Ddp::from_tensors(variables, Vec::new(), &mut rank.data, options).unwrap();
            let cuts = part.cuts.clone().into_iter().filter(|(name, _)| own(name)).collect();
            let given = ModelPart { model: &mut rank.model, world: &mut rank.world, cuts };
            ddp.set_part(given).unwrap();
            ddps.push(ddp);
        }
        let new = |ddp| Optimizer::new(ddp, sgd(), ParameterGroups::default()).unwrap();
        let mut optimizers: Vec<Optimizer> = ddps.iter().map(new).collect();
        let mut norms = Vec::new();
        for step in 0..3 {
            part.backward(&rank, &ddps[0], step);
            let mut all: Vec<&mut Optimizer> = optimizers.iter_mut().collect();
            let done = Optimizer::step_all(&mut all, Some(0.3), None).unwrap();
            norms.push(done.gradient_norm.unwrap().to_bits());
        }
        let mut bits = Vec::new();
        for (_, variable) in part.sorted() {
            let values = Vec::<f64>::try_from(variable.detach().reshape([-1])).unwrap();
            bits.extend(values.into_iter().map(f64::to_bits));
        }
        (norms, bits)
    })
}

#[test]
fn models_that_are_stepped_together_are_clipped_to_one_norm() {
    for zero in [Zero::Off, Zero::Two] {
        assert_eq!(divided(zero, true), divided(zero, false), "{zero:?}");
    }
}

#[test]
fn trust_ratios_are_of_whole_parameters() {
    let meshes = [
        (mesh(2, 1, 2), Zero::Off),
        (mesh(1, 2, 2), Zero::One),
        (mesh(1, 2, 2), Zero::Three),
        (mesh(1, 1, 3), Zero::Off),
    ];
    check(&meshes, lars, Clip::norm(0.5));
}
