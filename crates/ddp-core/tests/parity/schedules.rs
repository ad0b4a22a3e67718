//! Our schedules are closed forms; PyTorch's schedulers step.

use phalanx_ddp_core::schedule::LinearWarmup;

use super::fixtures::Fixtures;

#[test]
fn schedules_are_those_of_pytorch() {
    let of = Fixtures::read().schedules;
    let (peak, warmup_steps, total_steps) = (of.peak, of.warmup_steps, of.total_steps);
    let linear = LinearWarmup { peak, warmup_steps, total_steps };
    let constant = LinearWarmup { total_steps: 0, ..linear };
    let ours: [(&str, &dyn Fn(u64) -> f64); 2] =
        [("constant", &|step| constant.lr(step)), ("linear", &|step| linear.lr(step))];
    for (name, ours) in ours {
        for (step, theirs) in of.rates[name].iter().enumerate() {
            let rate = ours(step as u64);
            // PyTorch multiplies each rate by a ratio to get the next: that rounds.
            let off = (rate - theirs).abs();
            assert!(off <= 1e-12, "{name}: step {step}: {rate}, and PyTorch's {theirs}");
        }
    }
}
