//! Checkpoints are the same files on every mesh: a training goes on wherever it was saved.

use std::path::Path;
use std::sync::Arc;

use phalanx_checkpoint::{diff, Folder};
use phalanx_comm::slots::{memory, Slots};
use phalanx_ddp_core::checkpoint::{Checkpointer, CheckpointerOptions, Next, OnError, Origin};
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{AdamW, Ema, Lars, Optimizer, ParameterGroups, Sgd, Zero};
use tch::Kind;

use crate::model::{bound, mesh, on_mesh, options, wrapped, Mesh, Rank, ALONE};

fn quiet() -> CheckpointerOptions {
    CheckpointerOptions { heed_signals: false, on_error: OnError::Fail, ..Default::default() }
}

fn sgd() -> Box<dyn Rule> {
    Box::new(Sgd { lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.01, dampening: 0.0 })
}

fn adamw() -> Box<dyn Rule> {
    Box::new(AdamW { lr: 0.01, ..AdamW::default() })
}

fn lars() -> Box<dyn Rule> {
    Box::new(Lars { lr: 0.1, trust_coefficient: 0.5, ..Lars::default() })
}

/// Where a training goes on, and up to which step.
#[derive(Clone, Copy, Debug)]
struct Leg {
    mesh: Mesh,
    zero: Zero,
    kind: Kind,
    to: u64,
}

/// Goes on in `from`, trains up to a step, saves into `into`; gives the losses of its steps.
fn go_on(
    rank: &mut Rank,
    (from, into): (&Path, &Path),
    leg: Leg,
    rule: fn() -> Box<dyn Rule>,
) -> Vec<f64> {
    let (part, ddp) = wrapped(rank, options(leg.zero), leg.kind);
    let mut optimizer = Optimizer::new(&ddp, rule(), ParameterGroups::default()).unwrap();
    let mut ema = Ema::new(&ddp, 0.9).unwrap();
    let mut reader = Checkpointer::new(from, &ddp, quiet()).unwrap().with_ema(&ema);
    let resumed = reader.resume(Some(&mut optimizer)).unwrap();
    let done = resumed.map_or(0, |resumed| {
        assert_eq!(resumed.values::<u64>().unwrap(), 7 * resumed.step);
        resumed.step
    });
    assert_eq!(optimizer.step_count(), done);
    let mut losses = Vec::new();
    for step in done + 1..=leg.to {
        optimizer.set_lr(0.1 / step as f64).unwrap();
        let loss = part.backward(rank, &ddp, step as i64);
        optimizer.step(Some(0.5)).unwrap();
        ema.update().unwrap();
        losses.push(if rank.is_last() && rank.at.tp == 0 { loss } else { 0.0 });
    }
    let mut writer = Checkpointer::new(into, &ddp, quiet()).unwrap().with_ema(&ema);
    writer.save(leg.to, Some(&mut optimizer), || 7 * leg.to).unwrap();
    writer.finish().unwrap();
    losses
}

/// A leg on all ranks of its mesh; losses over all of them.
fn run(from: &Path, into: &Path, leg: Leg, rule: fn() -> Box<dyn Rule>) -> Vec<f64> {
    let (from, into) = (from.to_owned(), into.to_owned());
    let all =
        on_mesh(leg.mesh, leg.zero, move |mut rank| go_on(&mut rank, (&from, &into), leg, rule));
    (0..all[0].len()).map(|step| all.iter().map(|losses| losses[step]).sum()).collect()
}

/// The tensors, but for random states, that two folders' checkpoints have not alike.
fn differing(left: &Path, right: &Path) -> Vec<String> {
    let open = |folder: &Path| Folder::new(folder).newest().unwrap().unwrap();
    let found = diff(&open(left), &open(right)).unwrap();
    let names = found.into_iter().map(|one| one.name);
    names.filter(|name| !name.starts_with("random/")).collect()
}

const MESHES: [(usize, usize, usize); 9] = [
    (2, 2, 1),
    (1, 1, 4),
    (1, 4, 1),
    (2, 1, 2),
    (1, 2, 2),
    (1, 1, 1),
    (2, 1, 1),
    (1, 1, 3),
    (1, 3, 1),
];

const STAGES: [Zero; 4] = [Zero::Off, Zero::One, Zero::Two, Zero::Three];

#[test]
fn what_is_saved_on_one_mesh_comes_back_on_any_bit_for_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let leg = |number: usize, to| {
            let (pp, dp, tp) = MESHES[number % MESHES.len()];
            Leg { mesh: mesh(pp, dp, tp), zero: STAGES[number % 4], kind, to }
        };
        // What is trained comes of one mesh, and goes through all.
        run(&path("none"), &path("0"), leg(0, 2), adamw);
        let count = if kind == Kind::Float { 18 } else { 5 };
        for number in 1..count {
            let (from, into) = (path(&(number - 1).to_string()), path(&number.to_string()));
            run(&from, &into, leg(number, 2), adamw);
            let found = differing(&from, &into);
            assert!(found.is_empty(), "{:?}: {found:?}", leg(number, 2));
        }
    }
}

#[test]
fn a_training_goes_on_on_another_mesh_to_the_losses_of_one_process() {
    for rule in [sgd, lars] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let leg = |mesh, zero, to| Leg { mesh, zero, kind: Kind::Double, to };
        let expected = run(&path("none"), &path("alone"), leg(ALONE, Zero::Off, 8), rule);
        let mut losses = Vec::new();
        let legs = [
            leg(mesh(2, 2, 1), Zero::Three, 2),
            leg(mesh(1, 1, 4), Zero::Off, 4),
            leg(mesh(1, 2, 2), Zero::One, 6),
            leg(mesh(2, 1, 2), Zero::Two, 8),
        ];
        for leg in legs {
            losses.extend(run(&path("many"), &path("many"), leg, rule));
        }
        for (step, (one, other)) in expected.iter().zip(&losses).enumerate() {
            let steps = i32::try_from(step).unwrap() + 1;
            assert!((one - other).abs() <= bound(*one, steps), "step {step}: {other}, alone {one}");
        }
        assert_eq!(losses.len(), expected.len());
    }
}

#[test]
fn snapshots_in_memory_are_of_all_parts() {
    for zero in [Zero::Off, Zero::Three] {
        let launcher = Arc::new(memory().unwrap());
        let train = |mesh: Mesh, to: u64| {
            let launcher = Arc::clone(&launcher);
            on_mesh(mesh, zero, move |mut rank| {
                let (part, ddp) = wrapped(&mut rank, options(zero), Kind::Double);
                let mut optimizer =
                    Optimizer::new(&ddp, adamw(), ParameterGroups::default()).unwrap();
                let slots = Slots::new(launcher.try_clone().unwrap(), rank.world.local_rank());
                let options = CheckpointerOptions { memory_every_steps: 1, ..quiet() };
                let mut checkpointer =
                    Checkpointer::with_slots(None, &ddp, options, Some(slots.unwrap())).unwrap();
                let resumed = checkpointer.resume(Some(&mut optimizer)).unwrap();
                let origin = resumed.as_ref().map(|resumed| (resumed.origin, resumed.step));
                for step in origin.map_or(0, |(_, step)| step) + 1..=to {
                    part.backward(&rank, &ddp, step as i64);
                    optimizer.step(Some(0.5)).unwrap();
                    let next = checkpointer.step(step, Some(&mut optimizer), || ()).unwrap();
                    assert_eq!(next, Next::Continue);
                }
                checkpointer.finish().unwrap();
                (origin, part.backward(&rank, &ddp, 100))
            })
        };
        let first = train(mesh(1, 1, 2), 3);
        let again = train(mesh(1, 1, 2), 3);
        assert!(again.iter().all(|(origin, _)| *origin == Some((Origin::Memory, 3))));
        let losses =
            |all: &[(_, f64)]| all.iter().map(|(_, loss)| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(losses(&first), losses(&again));
        // On another mesh, which all shares are found on.
        let other = train(mesh(2, 1, 2), 3);
        assert!(other.iter().all(|(origin, _)| *origin == Some((Origin::Memory, 3))));
        let (one, two) = (first[0].1, other[2].1);
        assert!((one - two).abs() <= bound(one, 1), "{one} {two}");
    }
}
