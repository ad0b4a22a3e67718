//! PyTorch's communication hooks: bf16 and `PowerSGD`.

use phalanx_ddp_core::hooks::{Cast, ErrorFeedback, PowerSgd, PowerSgdOptions};
use phalanx_ddp_core::{Ddp, Optimizer, Sgd};

use super::networks::Shape;
use super::optimizers::{made, momentum, slow};
use super::{training, Case, Way};

fn power_sgd(rank: usize, warm_start: bool) -> PowerSgd {
    PowerSgd::new(PowerSgdOptions { rank, start_step: 2, warm_start, ..Default::default() })
}

/// Gradients that bf16 rounds, and whose means it holds: three times a number of seven bits and a fraction that is dropped.
#[test]
fn gradients_that_travel_in_bf16() {
    let optimizer = |ddp: &Ddp| -> Optimizer {
        ddp.set_hook(Cast::bf16()).unwrap();
        made(ddp, Sgd { lr: 0.015_625, ..Sgd::default() })
    };
    let case = Case::new("hook_bf16", optimizer);
    Case { shape: Shape::Products, train: training::products, ways: &[Way::Plain], ..case }.check();
}

#[test]
fn powersgd_of_rank_one() {
    let optimizer = |ddp: &Ddp| {
        ddp.set_hook(ErrorFeedback::around(power_sgd(1, true))).unwrap();
        slow(ddp)
    };
    Case::new("hook_powersgd_1", optimizer).check();
}

/// Of two of the four matrices; the others are too small to gain.
#[test]
fn powersgd_of_rank_two_with_momentum() {
    let optimizer = |ddp: &Ddp| {
        ddp.set_hook(ErrorFeedback::around(power_sgd(2, true))).unwrap();
        momentum(ddp)
    };
    Case::new("hook_powersgd_2", optimizer).check();
}

#[test]
fn powersgd_that_begins_anew_each_time_and_keeps_nothing() {
    let optimizer = |ddp: &Ddp| {
        ddp.set_hook(power_sgd(2, false)).unwrap();
        slow(ddp)
    };
    Case::new("hook_powersgd_cold", optimizer).check();
}
