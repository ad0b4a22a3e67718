//! What `DistributedDataParallel` does beside averaging: unused parameters, joining, accumulation, and so on.

use phalanx_ddp_core::optim::{Optimizer, Sgd};
use phalanx_ddp_core::{Buffers, Ddp, DdpOptions, NonFinite, SparseGradients};

use super::fixtures::Fixtures;
use super::networks::Shape;
use super::optimizers::{adamw, adamw_of_groups, decayed, made, momentum, slow, DECAYED};
use super::{training, Case, Way};

/// Parameters that no rank used are left alone, by momentum, decay and step counts as well; those that some rank used
/// have the mean over all ranks.
#[test]
fn unused_parameters() {
    let damped = |ddp: &_| made(ddp, Sgd { dampening: 0.3, ..DECAYED });
    with_branches("unused_sgd", damped).check();
    with_branches("unused_adamw", adamw).check();
}

fn with_branches(name: &'static str, optimizer: fn(&Ddp) -> Optimizer) -> Case {
    let case = Case::new(name, optimizer);
    let options = DdpOptions { find_unused_parameters: true, ..case.options.clone() };
    Case { shape: Shape::Branches, options, ..case }
}

/// The gradients of earlier micro-batches count, also of parameters that the last one does not use.
#[test]
fn parameters_unused_in_the_micro_batch_that_exchanges() {
    let case = with_branches("unused_in_the_last", decayed);
    Case { train: training::unused_in_the_last, ..case }.check();
}

#[test]
fn a_static_graph_with_shared_and_unused_parameters() {
    let case = Case::new("static_graph", momentum);
    let options = DdpOptions { static_graph: true, ..case.options.clone() };
    let case = Case { shape: Shape::Tied, options, ..case };
    case.clone().check();
    let name = "static_graph_accumulation";
    Case { name, train: training::accumulated, ..case }.check();
}

#[test]
fn ranks_that_end_early_join() {
    Case { train: training::joined, ..Case::new("join", momentum) }.check();
}

#[test]
fn micro_batches_accumulate() {
    Case { train: training::accumulated, ..Case::new("accumulation", momentum) }.check();
}

#[test]
fn several_losses_before_one_step_add_up() {
    let optimizer = |ddp: &_| made(ddp, Sgd { lr: 0.005, momentum: 0.9, ..Sgd::default() });
    Case { train: training::two_losses, ..Case::new("two_losses", optimizer) }.check();
}

#[test]
fn micro_batches_clipping_groups_and_a_schedule_together() {
    Case { train: training::together, ..Case::new("together", adamw_of_groups) }.check();
}

#[test]
fn clipping_by_the_norm_of_all_gradients() {
    Case { train: training::clipped, ..Case::new("clipping", momentum) }.check();
}

#[test]
fn loss_scaling_skips_a_step_that_overflows_on_one_rank() {
    let case = Case::new("loss_scaling", adamw);
    let options = DdpOptions { non_finite: NonFinite::SkipStep, ..case.options.clone() };
    Case { train: training::scaled, options, ..case }.check();
}

#[test]
fn a_schedule_of_learning_rates() {
    Case { train: training::scheduled, ..Case::new("schedule", adamw) }.check();
}

#[test]
fn running_statistics() {
    let cases = [
        ("buffers_rank_zero", Buffers::RankZero),
        ("buffers_own", Buffers::Own),
        ("buffers_mean", Buffers::Mean),
    ];
    for (name, buffers) in cases {
        // What each rank ends with is what PyTorch left on that rank, or on rank 0 if no other one's count.
        let of = |rank| if buffers == Buffers::RankZero { 0 } else { rank };
        let case = Case::new(name, slow);
        let options = DdpOptions { buffers, ..case.options.clone() };
        let case = Case { shape: Shape::Normed, options, ..case };
        case.check_and(|row, ranks| row.compare_buffers(ranks, of));
    }
}

#[test]
fn sparse_gradients_that_are_made_dense() {
    let case = Case::new("sparse", slow);
    let sparse_gradients = SparseGradients::Densify;
    let options = DdpOptions { sparse_gradients, ..case.options.clone() };
    Case { shape: Shape::Embedded, options, ..case }.check();
}

/// PyTorch has no such thing: the reference is one process with everybody's samples.
#[test]
fn uneven_batches_by_weight() {
    let case = Case::new("weighted", momentum);
    Case { train: training::weighted, ways: &[Way::Weighted], ..case }.check();
}

#[test]
fn every_case_of_the_fixtures_is_trained() {
    let sources =
        [include_str!("features.rs"), include_str!("optimizers.rs"), include_str!("hooks.rs")]
            .concat();
    for name in Fixtures::read().names() {
        assert!(sources.contains(&format!("\"{name}\"")), "nothing trains {name}");
    }
}
