//! What cannot be one model is an error on every rank.

use std::collections::BTreeMap;

use phalanx_ddp_core::{
    Adafactor, Cut, Ddp, Error, ModelPart, Muon, Optimizer, ParameterGroups, Zero,
};
use tch::Kind;

use crate::model::{mesh, on_mesh, options, wrapped, Mesh, Part, Rank};

/// What `set_part` says on all ranks, to parts whose cuts were changed: the same words.
fn refused(mesh: Mesh, change: fn(&Rank, &mut Part, &mut BTreeMap<String, Cut>)) -> String {
    let errors = on_mesh(mesh, Zero::Off, move |mut rank| {
        let mut part = Part::new(&rank, Kind::Double);
        let mut cuts = part.cuts.clone();
        change(&rank, &mut part, &mut cuts);
        let ddp = Ddp::new(&part.vs, &mut rank.data, options(Zero::Off)).unwrap();
        let given = ModelPart { model: &mut rank.model, world: &mut rank.world, cuts };
        ddp.set_part(given).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    errors[0].clone()
}

#[test]
fn parts_that_make_no_model_are_named_on_every_rank() {
    let cuts = mesh(1, 2, 2);
    let hole = refused(cuts, |rank, _, cuts| {
        if rank.at.tp == 1 {
            // As if it were somewhere else.
            let cut = Cut::new(&[6, 10], 1, vec![5..10]);
            cuts.insert("layer0-down".to_owned(), cut);
        }
    });
    assert!(hole.contains("layer0-down") && hole.contains("rank 1"), "{hole}");
    let unknown = refused(cuts, |_, _, cuts| {
        cuts.insert("nowhere".to_owned(), Cut::new(&[4], 0, vec![0..2]));
    });
    assert!(unknown.contains("nowhere: in `cuts`"), "{unknown}");
    let shape = refused(cuts, |rank, _, cuts| {
        if rank.at.tp == 0 {
            cuts.insert("layer1-bias".to_owned(), Cut::new(&[6], 0, vec![0..3]));
        }
    });
    assert!(shape.contains("layer1-bias: its shape is [6], of its cut [3]"), "{shape}");
}

#[test]
fn a_cut_that_is_not_given_is_found_by_its_values() {
    // With an even cut both parts have the same shape, so that the values alone tell.
    let found = refused(mesh(1, 1, 3), |_, _, cuts| drop(cuts.remove("layer0-up")));
    assert!(found.contains("layer0-up is not the same on ranks 0 and 1"), "{found}");
}

#[test]
fn tied_parameters_that_drift_apart_are_found() {
    let errors = on_mesh(mesh(2, 1, 1), Zero::Off, |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Double);
        ddp.compare_parts().unwrap();
        if rank.is_last() {
            tch::no_grad(|| drop(part.variable("embedding").fill_(1.0)));
        }
        ddp.compare_parts().unwrap_err().to_string()
    });
    assert!(errors[0].contains("embedding is not the same on ranks 0 and 1"), "{}", errors[0]);
    assert_eq!(errors[0], errors[1]);
}

#[test]
fn rules_that_need_matrices_whole_refuse_those_that_are_cut() {
    let errors = on_mesh(mesh(2, 1, 2), Zero::One, |mut rank| {
        let (_part, ddp) = wrapped(&mut rank, options(Zero::One), Kind::Float);
        let refused = |rule| Optimizer::new(&ddp, rule, ParameterGroups::default()).map(drop);
        let error = refused(Adafactor::default()).unwrap_err();
        assert!(matches!(error, Error::CutParameter { .. }), "{error}");
        // Those that are cut are taken by the element, and the embedding whole.
        let others = vec!["*-up".to_owned(), "*-down".to_owned()];
        let muon = Muon { others, ..Muon::default() };
        drop(Optimizer::new(&ddp, muon, ParameterGroups::default()).unwrap());
        error.to_string()
    });
    assert!(errors[0].starts_with("Adafactor needs layer0-"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
}

#[test]
fn a_part_comes_before_the_optimizer_and_once() {
    on_mesh(mesh(1, 1, 1), Zero::Off, |mut rank| {
        let (part, ddp) = wrapped(&mut rank, options(Zero::Off), Kind::Double);
        let cuts = part.cuts.clone();
        let given = ModelPart { model: &mut rank.model, world: &mut rank.world, cuts };
        let error = ddp.set_part(given).unwrap_err().to_string();
        assert!(error.contains("has a part already"), "{error}");
    });
}
