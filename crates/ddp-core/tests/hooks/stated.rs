//! What hooks keep is saved and loaded.

use std::path::Path;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions};
use phalanx_ddp_core::hooks::State;
use phalanx_ddp_core::{Ddp, DdpOptions, Optimizer, ParameterGroups, Sgd, Zero};

use super::{gradients, options, values, Fed, Int8, Model, PowerSgdInBf16, Which, ALL};

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

/// Steps up to `to`, saved at the end.
fn leg(mut group: Group, folder: &Path, which: Which, (zero, to): (Zero, u64)) -> Vec<Vec<f32>> {
    let (rank, model) = (group.rank(), Model::new());
    let ddp = model.wrap(&mut group, options(zero));
    which.set(&ddp).unwrap();
    let rule = Sgd { lr: 0.1, momentum: 0.5, ..Sgd::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
    let quiet = CheckpointerOptions { heed_signals: false, ..Default::default() };
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet).unwrap();
    let done = checkpointer.resume(Some(&mut optimizer)).unwrap();
    for step in done.map_or(0, |resumed| resumed.step)..to {
        model.loss(&gradients(rank, usize::try_from(step).unwrap())).backward();
        let _step = optimizer.step(None).unwrap();
    }
    checkpointer.save(to, Some(&mut optimizer), || ()).unwrap();
    checkpointer.finish().unwrap();
    model.named.iter().map(|(_, tensor)| values(tensor)).collect()
}

fn run(which: Which, legs: &[(usize, Zero, u64)]) -> Vec<Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    let mut last = Vec::new();
    for &(world_size, zero, to) in legs {
        let path = folder.path().to_owned();
        let all = run_ranks(world_size, move |group| leg(group, &path, which, (zero, to)));
        assert!(all.iter().all(|of_rank| *of_rank == all[0]), "{which:?}");
        last.clone_from(&all[0]);
    }
    last
}

#[test]
fn checkpoints_have_what_hooks_keep() {
    use Zero::{Off, One};
    for which in [Fed(&Int8), Fed(&Which::TopK(0.1)), Fed(&Which::PowerSgd(2)), PowerSgdInBf16] {
        let whole = run(which, &[(3, Off, 6)]);
        assert!(run(which, &[(3, Off, 2), (3, One, 4), (3, Off, 6)]) == whole, "{which:?}");
        // On another number of ranks each has the mean: what is kept of the mean stays.
        run(which, &[(3, One, 3), (2, Off, 5), (4, One, 6)]);
    }
}

#[test]
fn a_checkpoint_of_another_hook_is_gone_on_from_anew() {
    let folder = tempfile::tempdir().unwrap();
    for (which, to) in [(Which::Plain, 1), (Fed(&Int8), 2), (Fed(&Which::TopK(0.1)), 3)] {
        let path = folder.path().to_owned();
        let all = run_ranks(2, move |group| leg(group, &path, which, (Zero::Off, to)));
        assert!(all[0] == all[1]);
    }
}
