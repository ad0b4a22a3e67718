//! Every optimizer that PyTorch has, LAMB by its formula, and their groups of parameters; tch's own as well.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::optim::{
    Adafactor, Adam, AdamW, AdjustLr, Lamb, Muon, Optimizer, ParameterGroup, ParameterGroups, Rule,
    Sgd,
};
use phalanx_ddp_core::{Ddp, DdpOptions};
use tch::nn::{self, OptimizerConfig as _};

use super::fixtures::{Fixtures, Outcome};
use super::networks::{Network, Shape, ROWS};
use super::Case;

pub(crate) fn made(ddp: &Ddp, rule: impl Rule + 'static) -> Optimizer {
    Optimizer::new(ddp, rule, ParameterGroups::default()).unwrap()
}

pub(crate) fn slow(ddp: &Ddp) -> Optimizer {
    made(ddp, Sgd { lr: 0.02, ..Sgd::default() })
}

pub(crate) fn momentum(ddp: &Ddp) -> Optimizer {
    made(ddp, Sgd { lr: 0.01, momentum: 0.9, ..Sgd::default() })
}

pub(crate) const DECAYED: Sgd =
    Sgd { lr: 0.01, momentum: 0.9, dampening: 0.0, nesterov: false, weight_decay: 0.1 };

pub(crate) fn decayed(ddp: &Ddp) -> Optimizer {
    made(ddp, DECAYED)
}

/// Not the usual 1e-8: see the script.
const EPS: f64 = 1.0 / 32.0;
const ADAMW: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: EPS, weight_decay: 0.1 };

pub(crate) fn adamw(ddp: &Ddp) -> Optimizer {
    made(ddp, ADAMW)
}

pub(crate) fn adamw_of_groups(ddp: &Ddp) -> Optimizer {
    Optimizer::new(ddp, ADAMW, groups()).unwrap()
}

fn groups() -> ParameterGroups {
    ParameterGroups::default()
        .with(ParameterGroup::matching(["*.bias"]).lr(0.004).weight_decay(0.0))
        .with(ParameterGroup::matching(["c.*"]).lr(0.002).weight_decay(0.5))
}

#[test]
fn sgd() {
    Case::new("sgd", slow).check();
}

#[test]
fn sgd_with_momentum() {
    Case::new("sgd_momentum", momentum).check();
}

#[test]
fn sgd_with_momentum_and_dampening() {
    let optimizer =
        |ddp: &Ddp| made(ddp, Sgd { lr: 0.02, momentum: 0.9, dampening: 0.3, ..Sgd::default() });
    Case::new("sgd_dampening", optimizer).check();
}

#[test]
fn sgd_with_nesterovs_momentum() {
    let optimizer =
        |ddp: &Ddp| made(ddp, Sgd { lr: 0.01, momentum: 0.9, nesterov: true, ..Sgd::default() });
    Case::new("sgd_nesterov", optimizer).check();
}

#[test]
fn sgd_with_weight_decay() {
    Case::new("sgd_weight_decay", decayed).check();
}

#[test]
fn adam() {
    let optimizer = |ddp: &Ddp| made(ddp, Adam { lr: 0.01, eps: EPS, ..Adam::default() });
    Case::new("adam", optimizer).check();
}

#[test]
fn adam_with_weight_decay_inside_the_gradient() {
    let optimizer =
        |ddp: &Ddp| made(ddp, Adam { lr: 0.01, eps: EPS, weight_decay: 0.5, ..Adam::default() });
    Case::new("adam_l2", optimizer).check();
}

#[test]
fn adamw_of_one_group() {
    Case::new("adamw", adamw).check();
}

#[test]
fn groups_of_parameters_with_rates_and_decays_of_their_own() {
    Case::new("adamw_groups", adamw_of_groups).check();
    let optimizer = |ddp: &Ddp| Optimizer::new(ddp, DECAYED, groups()).unwrap();
    Case::new("sgd_groups", optimizer).check();
}

#[test]
fn lamb() {
    let optimizer =
        |ddp: &Ddp| made(ddp, Lamb { lr: 0.02, eps: EPS, weight_decay: 0.1, ..Lamb::default() });
    Case::new("lamb", optimizer).check();
}

/// The last layer is the head, which AdamW has.
fn of_matrices(lr: f64, adamw_lr: f64) -> Muon {
    Muon {
        lr,
        others: vec!["d.*".to_owned()],
        adamw: AdamW { lr: adamw_lr, ..ADAMW },
        ..Muon::default()
    }
}

#[test]
fn muon() {
    Case::new("muon", |ddp| made(ddp, of_matrices(0.006, 0.004))).check();
    let matching = |ddp: &Ddp| {
        let adjust_lr = AdjustLr::MatchRmsAdamW;
        let plain = Muon { nesterov: false, momentum: 0.9, adjust_lr, ..of_matrices(0.008, 0.01) };
        made(ddp, plain)
    };
    Case::new("muon_match_rms", matching).check();
}

const ADAFACTOR: Adafactor = Adafactor {
    lr: 0.02,
    beta2_decay: -0.8,
    eps1: Some(EPS),
    eps2: 1e-3,
    clip_threshold: 1.0,
    weight_decay: 0.1,
};

#[test]
fn adafactor() {
    Case::new("adafactor", |ddp| made(ddp, ADAFACTOR)).check();
    let of_groups = |ddp: &Ddp| {
        let rule = Adafactor { lr: 0.01, weight_decay: 0.0, ..ADAFACTOR };
        Optimizer::new(ddp, rule, groups()).unwrap()
    };
    Case::new("adafactor_groups", of_groups).check();
}

/// An optimizer of tch.
type OfTch = fn(&nn::VarStore) -> nn::Optimizer;

#[test]
fn tchs_own_optimizers_find_pytorchs_gradients() {
    let sgd = nn::Sgd::default();
    assert!(sgd.momentum == 0.0 && sgd.wd == 0.0 && !sgd.nesterov, "tch's defaults are PyTorch's");
    let cases: [(&str, OfTch); 5] = [
        ("sgd", |vs| nn::Sgd::default().build(vs, 0.02).unwrap()),
        ("sgd_momentum", |vs| nn::sgd(0.9, 0.0, 0.0, false).build(vs, 0.01).unwrap()),
        ("sgd_nesterov", |vs| nn::sgd(0.9, 0.0, 0.0, true).build(vs, 0.01).unwrap()),
        ("sgd_weight_decay", |vs| nn::sgd(0.9, 0.0, 0.1, false).build(vs, 0.01).unwrap()),
        ("adamw", |vs| {
            nn::AdamW { wd: 0.1, eps: EPS, ..nn::AdamW::default() }.build(vs, 0.01).unwrap()
        }),
    ];
    let fixtures = Fixtures::read();
    for (name, build) in cases {
        for row in fixtures.rows(name) {
            let ranks = run_ranks(row.world_size, move |mut group| {
                tch::set_num_threads(1);
                let network = Network::new(Shape::Mlp, &mut group);
                let options = DdpOptions { bucket_bytes: vec![128, 600], ..DdpOptions::default() };
                let _ddp = Ddp::new(&network.vs, &mut group, options).unwrap();
                let mut optimizer = build(&network.vs);
                let mut outcome = Outcome::default();
                for step in 0..6 {
                    let loss = network.loss_sum(step, group.rank(), 0, ROWS) / ROWS as f64;
                    optimizer.backward_step(&loss);
                    outcome.losses.push(loss.double_value(&[]));
                }
                outcome.tensors = network.tensors();
                outcome
            });
            row.compare(&ranks, "an optimizer of tch");
        }
    }
}
