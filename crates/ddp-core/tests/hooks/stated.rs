//! What hooks keep is saved and loaded.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::hooks::State;
use phalanx_ddp_core::{Ddp, DdpOptions, Zero};

use super::{gradients, options, Model, Which, ALL};

fn step(model: &Model, ddp: &Ddp, (rank, step): (usize, usize)) -> Vec<Vec<f32>> {
    ddp.release_gradients().unwrap();
    model.loss(&gradients(rank, step)).backward();
    model.gradients()
}

#[test]
fn a_run_that_goes_on_from_a_saved_state_has_the_same_bits() {
    for world_size in [1, 2, 3] {
        for which in ALL {
            let all = run_ranks(world_size, move |mut group| {
                let (rank, model) = (group.rank(), Model::new());
                let ddp = model.wrap(&mut group, options(Zero::Off));
                which.set(&ddp).unwrap();
                let before: Vec<_> = (0..3).map(|at| step(&model, &ddp, (rank, at))).collect();
                let state: State = ddp.hook_state().unwrap();
                let order = ddp.ready_order().unwrap();
                let through: Vec<_> = (3..6).map(|at| step(&model, &ddp, (rank, at))).collect();
                drop(ddp);
                let options = DdpOptions { ready_order: Some(order), ..options(Zero::Off) };
                let model = Model::new();
                let ddp = model.wrap(&mut group, options);
                which.set(&ddp).unwrap();
                ddp.load_hook_state(&state).unwrap();
                let anew: Vec<_> = (3..6).map(|at| step(&model, &ddp, (rank, at))).collect();
                assert!(before[0] != through[0]);
                through == anew
            });
            assert!(all.iter().all(|&same| same), "{which:?} on {world_size} ranks");
        }
    }
}

#[test]
fn a_state_of_something_else_is_refused() {
    let errors = run_ranks(1, |mut group| {
        let model = Model::new();
        let ddp = model.wrap(&mut group, options(Zero::Off));
        Which::Int8.set(&ddp).unwrap();
        ddp.load_hook_state(&State::default()).unwrap_err().to_string()
    });
    assert!(errors[0].contains("a hook's state"), "{errors:?}");
}
