//! Our schedules are closed forms; PyTorch's schedulers step.

use phalanx_ddp_core::schedule::{Schedule, Shape};

use super::fixtures::Fixtures;

#[test]
fn schedules_are_those_of_pytorch() {
    let of = Fixtures::read().schedules;
    let shapes = [
        ("constant", Shape::Constant),
        ("linear", Shape::Linear),
        ("cosine", Shape::Cosine),
        ("polynomial", Shape::Polynomial { power: of.power }),
        ("warmup_stable_decay", Shape::WarmupStableDecay { decay_steps: of.decay_steps }),
    ];
    assert_eq!(of.rows.len(), shapes.len());
    for (row, (name, shape)) in of.rows.iter().zip(shapes) {
        assert_eq!(row.name, name);
        let schedule = Schedule::new(shape, of.peak, of.total_steps).unwrap();
        let schedule = schedule.with_warmup(of.warmup_steps).unwrap();
        let schedule = schedule.with_floor(row.floor).unwrap();
        for (step, theirs) in row.rates.iter().enumerate() {
            let ours = schedule.lr(step as u64);
            // PyTorch multiplies each rate by a ratio to get the next: that rounds.
            let off = (ours - theirs).abs();
            assert!(off <= 1e-12, "{name}: step {step}: {ours}, and PyTorch's {theirs}");
        }
    }
}
