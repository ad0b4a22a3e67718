//! A step is made on all ranks of a model, or on none.

use phalanx_ddp_core::amp::LossScaler;
use phalanx_ddp_core::{Error, NonFinite, Optimizer, ParameterGroups, Sgd, Sync, Zero};
use tch::{Kind, Tensor};

use crate::model::{mesh, on_mesh, options, wrapped, Mesh, Part, Rank};

/// Makes a gradient of one rank no number.
fn spoil(rank: &Rank) -> impl Fn(&str, &mut Tensor) {
    // The last stage's second part, of the first samples.
    let last = Mesh { pp: rank.mesh.pp - 1, dp: 0, tp: rank.mesh.tp - 1 };
    let is_hit = rank.at == last;
    move |name, gradient| {
        if is_hit && name.ends_with("up") {
            *gradient = gradient.shallow_clone() * f64::NAN;
        }
    }
}

fn bits(part: &Part) -> Vec<u64> {
    let mut all: Vec<_> = part.vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let values =
        |(_, v): &(String, Tensor)| Vec::<f64>::try_from(v.detach().reshape([-1])).unwrap();
    all.iter().flat_map(values).map(f64::to_bits).collect()
}

const MESHES: [(usize, usize, usize); 3] = [(2, 1, 1), (1, 1, 2), (2, 2, 1)];

#[test]
fn gradients_that_are_not_finite_on_one_stage_skip_the_step_on_all() {
    for (pp, dp, tp) in MESHES {
        for zero in [Zero::Off, Zero::Two] {
            on_mesh(mesh(pp, dp, tp), zero, move |mut rank| {
                let options = options(zero);
                let options =
                    phalanx_ddp_core::DdpOptions { non_finite: NonFinite::SkipStep, ..options };
                let (part, ddp) = wrapped(&mut rank, options, Kind::Double);
                let mut optimizer =
                    Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
                part.backward(&rank, &ddp, 0);
                assert!(!optimizer.step(Some(1.0)).unwrap().skipped);
                let before = bits(&part);
                let mut scaler = LossScaler::default();
                let scale = scaler.value();
                part.backward_changed(&rank, &ddp, 1, spoil(&rank)).unwrap();
                assert!(optimizer.step_scaled(Some(1.0), &mut scaler).unwrap().skipped);
                assert!(scaler.value() < scale);
                assert_eq!(bits(&part), before);
                // And training goes on.
                part.backward(&rank, &ddp, 2);
                assert!(!optimizer.step(None).unwrap().skipped);
                assert_ne!(bits(&part), before);
                ddp.compare_parts().unwrap();
                ddp.compare_parameters().unwrap();
            });
        }
    }
}

#[test]
fn where_they_are_an_error_the_step_tells_it_on_all_ranks() {
    for (pp, dp, tp) in MESHES {
        let errors = on_mesh(mesh(pp, dp, tp), Zero::One, move |mut rank| {
            let (part, ddp) = wrapped(&mut rank, options(Zero::One), Kind::Double);
            let mut optimizer =
                Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
            part.backward_changed(&rank, &ddp, 0, spoil(&rank)).unwrap();
            let error = optimizer.step(Some(1.0)).unwrap_err();
            assert!(matches!(error, Error::NonFinite { .. }), "{error}");
            error.to_string()
        });
        // Of the world: the last stage's last part, of the first samples.
        let culprit = (pp - 1) * dp * tp + tp - 1;
        assert!(errors[0].contains(&format!("rank {culprit}:")), "{}", errors[0]);
        assert!(errors[0].contains("layer1-up"), "{}", errors[0]);
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    }
}

#[test]
fn a_norm_that_is_not_finite_is_so_on_all_ranks() {
    let all = on_mesh(mesh(2, 1, 1), Zero::Off, |mut rank| {
        let options =
            phalanx_ddp_core::DdpOptions { non_finite: NonFinite::SkipStep, ..options(Zero::Off) };
        let (part, ddp) = wrapped(&mut rank, options, Kind::Double);
        let mut optimizer =
            Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
        let is_hit = rank.is_last();
        // Each element is finite, and its square is not.
        let huge = |name: &str, gradient: &mut Tensor| {
            if is_hit && name.ends_with("bias") {
                *gradient = gradient.ones_like() * 1e200;
            }
        };
        part.backward_changed(&rank, &ddp, 0, huge).unwrap();
        optimizer.step(Some(1.0)).unwrap()
    });
    assert!(all.iter().all(|step| step.skipped && step.gradient_norm == Some(f64::INFINITY)));
}

#[test]
fn a_stage_whose_backward_fails_ends_the_step_of_the_others() {
    let errors = on_mesh(mesh(2, 1, 1), Zero::Off, |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Double);
        let mut optimizer =
            Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
        let used =
            part.sorted().into_iter().filter(|(name, _)| !rank.is_last() || name == "embedding");
        let loss = used.map(|(_, variable)| variable.sum(None::<Kind>)).sum::<Tensor>();
        let done = ddp.backward(&loss, 1.0, Sync::Reduce).and_then(|()| optimizer.step(None));
        done.unwrap_err().to_string()
    });
    let reason = "backward ended without a gradient";
    assert!(errors.iter().all(|error| error.contains(reason)), "{errors:?}");
}

#[test]
fn ranks_that_step_differently_hear_so() {
    let errors = on_mesh(mesh(2, 1, 1), Zero::Off, |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Double);
        let mut optimizer =
            Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
        optimizer.set_lr(if rank.is_last() { 0.1 } else { 0.2 }).unwrap();
        part.backward(&rank, &ddp, 0);
        optimizer.step(None).unwrap_err().to_string()
    });
    assert!(
        errors[0].contains("lr 0.2") && errors[0].contains("rank 1 of the world"),
        "{}",
        errors[0]
    );
    assert_eq!(errors[0], errors[1]);
}
