//! What `Ddp` and the optimizers do with models on a device: on a GPU by the example `gpu_check`, and on the processor
//! by `tests/training_checks.rs`, which shows that the checks themselves are right.
//!
//! Most train the same model on the processor first, in the same group, and compare.
#![expect(clippy::cast_precision_loss, clippy::cast_possible_wrap, reason = "small whole numbers")]

#[path = "layers.rs"]
mod layers;
#[path = "parts.rs"]
mod parts;

use anyhow::{bail, ensure, Context as _, Result};
use phalanx::checkpoint::{Checkpointer, CheckpointerOptions};
use phalanx::ddp::amp::LossScaler;
use phalanx::ddp::optim::{Adafactor, Adam, AdamW, Lamb, Lars, Lion, Muon, Rule, Sgd};
use phalanx::ddp::{Error, NonFinite};
use phalanx::tch::{self, nn, nn::Module as _, Device, Kind, Tensor};
use phalanx::{Ddp, DdpOptions, Group, Optimizer, ParameterGroups, Sync, Zero};

/// What a rank checks; says what it saw.
pub(crate) type TrainingCheck = fn(&mut Group, Device) -> Result<String>;

pub(crate) const CHECKS: [(&str, TrainingCheck); 20] = [
    ("training, zero 0", |group, device| training(group, device, Zero::Off)),
    ("training, zero 1", |group, device| training(group, device, Zero::One)),
    ("training, zero 2", |group, device| training(group, device, Zero::Two)),
    ("training, zero 3", |group, device| training(group, device, Zero::Three)),
    ("rules, zero 0", |group, device| rules(group, device, Zero::Off)),
    ("rules, zero 1", |group, device| rules(group, device, Zero::One)),
    ("rules, zero 3", |group, device| rules(group, device, Zero::Three)),
    ("bf16 parameters", half_precision),
    ("f16, scaled losses", scaled_losses),
    ("not finite: error", non_finite_is_an_error),
    ("not finite: skip_step", non_finite_is_skipped),
    ("unused parameters", unused_parameters),
    ("parameters compared", parameters_compared),
    ("join", join),
    ("checkpoint", checkpoint),
    ("layers computed again", layers::recompute),
    ("SyncBatchNorm", layers::batch_norm),
    ("weights in files, zero 3", layers::weights_in_files),
    ("collectives of tensors", parts::tensors),
    ("tensor parallelism", parts::cut_block),
];

/// Rows of a rank's batch, and their width.
const ROWS: i64 = 32;
const WIDTH: i64 = 64;

/// A small model with the same values on every device: random numbers of a GPU are others.
pub(crate) struct Net {
    pub(crate) vs: nn::VarStore,
    pub(crate) net: nn::Sequential,
}

pub(crate) fn network(device: Device, width: i64) -> Net {
    let vs = nn::VarStore::new(device);
    let mut net = nn::seq();
    for layer in 0..4 {
        let path = vs.root() / format!("l{layer}");
        net = net.add(nn::linear(path, width, width, nn::LinearConfig::default()));
        net = net.add_fn(|x| x.gelu("none"));
    }
    fill(&vs, (2.0 / width as f64).sqrt());
    Net { vs, net }
}

/// Gives the variables values that look random and are not.
fn fill(vs: &nn::VarStore, factor: f64) {
    for (index, (_, mut variable)) in sorted(vs).into_iter().enumerate() {
        let values = pattern(&variable.size(), index as f64) * factor;
        tch::no_grad(|| variable.copy_(&values));
    }
}

fn sorted(vs: &nn::VarStore) -> Vec<(String, Tensor)> {
    let mut all: Vec<_> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Values in (−1, 1).
fn pattern(shape: &[i64], seed: f64) -> Tensor {
    let at = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu));
    ((at + seed * 17.3) * 12.9898).sin().to_kind(Kind::Float).reshape(shape)
}

/// All values of a store, by name.
fn weights(vs: &nn::VarStore) -> Result<Vec<f32>> {
    let flat = |(_, tensor): (String, Tensor)| tensor.detach().to_kind(Kind::Float).reshape([-1]);
    let all: Vec<Tensor> = sorted(vs).into_iter().map(flat).collect();
    Ok(Vec::try_from(Tensor::cat(&all, 0).to_device(Device::Cpu))?)
}

/// A rank's batch of a step.
fn batch(group: &Group, device: Device, step: usize) -> Tensor {
    let seed = 1000.0 + (step * 64 + group.rank()) as f64;
    pattern(&[ROWS, WIDTH], seed).to_device(device)
}

/// The network is to give back what it is given.
fn loss_sum(net: &nn::Sequential, x: &Tensor) -> Tensor {
    (net.forward(x) - x).square().sum(Kind::Float)
}

fn options(zero: Zero) -> DdpOptions {
    DdpOptions { zero, bucket_bytes: vec![16 << 10], ..DdpOptions::default() }
}

fn optimizer(ddp: &Ddp, rule: impl Rule + 'static) -> Result<Optimizer> {
    Ok(Optimizer::new(ddp, rule, ParameterGroups::default())?)
}

/// The largest difference of two runs, of numbers that are about one.
fn apart(left: &[f32], right: &[f32]) -> f32 {
    left.iter().zip(right).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max)
}

/// A few steps on the device beside the same on the processor.
fn training(group: &mut Group, device: Device, zero: Zero) -> Result<String> {
    let mut losses = Vec::new();
    for place in [Device::Cpu, device] {
        let Net { vs, net } = network(place, WIDTH);
        let ddp = Ddp::new(&vs, group, options(zero))?;
        let mut optimizer = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
        let mut of_device = Vec::new();
        for step in 0..10 {
            let loss = loss_sum(&net, &batch(group, place, step));
            ddp.backward(&loss, ROWS as f64, Sync::Reduce)?;
            let norm = optimizer.step(Some(1.0))?.gradient_norm.context("it was clipped")?;
            ensure!(norm.is_finite() && norm > 0.0, "gradient norm {norm}");
            of_device.push(loss.double_value(&[]));
        }
        losses.push(of_device);
    }
    let pairs = losses[0].iter().zip(&losses[1]);
    let difference = pairs.map(|(cpu, gpu)| ((cpu - gpu) / cpu).abs()).fold(0.0, f64::max);
    ensure!(difference < 1e-3, "losses differ from the CPU's by {difference:.1e}: {losses:?}");
    let (first, last) = (losses[1][0], losses[1][9]);
    ensure!(last < first, "the loss does not fall: {first} → {last}");
    Ok(format!("loss {first:.1} → {last:.1}, within {difference:.1e} of the CPU"))
}

/// Makes a rule.
type Make = fn() -> Box<dyn Rule>;

/// With everything on that they have.
const RULES: [(&str, Make); 8] = [
    ("AdamW", || Box::new(AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() })),
    ("Adam", || Box::new(Adam { lr: 0.01, weight_decay: 0.1, ..Adam::default() })),
    ("SGD", || {
        let (lr, momentum, dampening, weight_decay) = (0.01, 0.9, 0.0, 0.1);
        Box::new(Sgd { lr, momentum, dampening, nesterov: true, weight_decay })
    }),
    ("LAMB", || Box::new(Lamb { lr: 0.01, weight_decay: 0.1, ..Lamb::default() })),
    ("LARS", || Box::new(Lars { lr: 0.1, trust_coefficient: 0.02, ..Lars::default() })),
    ("Lion", || Box::new(Lion { lr: 0.001, weight_decay: 0.1, ..Lion::default() })),
    ("Muon", || Box::new(Muon { lr: 0.01, ..Muon::default() })),
    ("Adafactor", || Box::new(Adafactor { lr: 0.01, weight_decay: 0.1, ..Adafactor::default() })),
];

/// Every rule's steps beside those on the processor, with gradients that are whole numbers: nothing differs but the
/// rule's own rounding.
fn rules(group: &mut Group, device: Device, zero: Zero) -> Result<String> {
    let mut seen = Vec::new();
    for (name, rule) in RULES {
        let mut by_device = Vec::new();
        for place in [Device::Cpu, device] {
            let Net { vs, .. } = network(place, WIDTH);
            let ddp = Ddp::new(&vs, group, options(zero))?;
            let mut optimizer = optimizer(&ddp, rule())?;
            for step in 0..5 {
                ddp.backward(&whole_loss(&vs, group.rank() + step), 1.0, Sync::Reduce)?;
                let _step = optimizer.step(Some(2.0))?;
            }
            by_device.push(weights(&vs)?);
        }
        let off = apart(&by_device[0], &by_device[1]);
        // Weights below 1; 5 steps of some 40 roundings of 6e-8 are 1.2e-5, were they all on one side.
        ensure!(off < 1e-5, "{name}: weights differ from the CPU's by {off:.1e}");
        seen.push(format!("{name} {off:.0e}"));
    }
    Ok(format!("{} of the CPU", seen.join(", ")))
}

/// A loss whose gradients are whole numbers from −8 to 8.
fn whole_loss(vs: &nn::VarStore, seed: usize) -> Tensor {
    let seed = seed as i64;
    let product = |(index, (_, variable)): (usize, (String, Tensor))| {
        let at = Tensor::arange(
            i64::try_from(variable.numel()).unwrap_or(0),
            (Kind::Int64, Device::Cpu),
        );
        let mixed: Tensor = &at * &at * 3 + &at * (7 * seed + 1) + (5 * seed + index as i64);
        let whole = (mixed.remainder(17) - 8).to_kind(Kind::Float).reshape(variable.size());
        (&variable * whole.to_device(variable.device())).sum(Kind::Float)
    };
    sorted(vs).into_iter().enumerate().map(product).sum()
}

/// bf16 parameters: gradients in f32, and masters that keep steps below a parameter's last bit.
fn half_precision(group: &mut Group, device: Device) -> Result<String> {
    for zero in [Zero::Off, Zero::One] {
        let weight = Tensor::ones([3000], (Kind::BFloat16, device)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let ddp = Ddp::from_tensors(parameters, vec![], group, options(zero))?;
        let mut optimizer = optimizer(&ddp, Sgd { lr: 1.0 / 8192.0, ..Sgd::default() })?;
        for _ in 0..64 {
            ddp.backward(&weight.sum(Kind::Float), 1.0, Sync::Reduce)?;
            let kind = (zero == Zero::Off).then(|| weight.grad().kind());
            ensure!(kind.is_none_or(|kind| kind == Kind::Float), "gradients are {kind:?}");
            let _step = optimizer.step(None)?;
        }
        // 1 − 64/8192 is a bf16 number; without masters 1 − 1/8192 is 1 each time.
        let ends = (weight.min().double_value(&[]), weight.max().double_value(&[]));
        let right = 1.0 - 64.0 / 8192.0;
        ensure!(ends == (right, right), "{zero:?}: weights are {ends:?} and should be {right}");
    }
    let Net { mut vs, net } = network(device, WIDTH);
    vs.bfloat16();
    let ddp = Ddp::new(&vs, group, options(Zero::One))?;
    let mut optimizer = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
    let mut losses = Vec::new();
    for _ in 0..10 {
        let loss = loss_sum(&net, &batch(group, device, 0).to_kind(Kind::BFloat16));
        ddp.backward(&loss, ROWS as f64, Sync::Reduce)?;
        let _step = optimizer.step(Some(1.0))?;
        losses.push(loss.double_value(&[]));
    }
    ensure!(losses[9] < losses[0], "the loss does not fall: {losses:?}");
    Ok(format!("64 steps of 2^-13 kept; loss {:.1} → {:.1}", losses[0], losses[9]))
}

/// f16 parameters and gradients: a scale that is too large comes down by itself, and then training goes on.
fn scaled_losses(group: &mut Group, device: Device) -> Result<String> {
    const STEPS: usize = 40;
    let Net { mut vs, net } = network(device, WIDTH);
    vs.half();
    let options = DdpOptions {
        non_finite: NonFinite::SkipStep,
        gradient_kind: Some(Kind::Half),
        ..options(Zero::Off)
    };
    let ddp = Ddp::new(&vs, group, options)?;
    let mut optimizer = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
    // 2^24: no gradient of a loss that is a sum fits f16.
    let mut scaler = LossScaler::new(f64::from(1 << 24), 2.0, 0.5, 2000)?;
    let (mut skipped, mut losses) = (0, Vec::new());
    for _ in 0..STEPS {
        let loss = loss_sum(&net, &batch(group, device, 0).to_kind(Kind::Half));
        ddp.backward(&scaler.scale(&loss)?, ROWS as f64, Sync::Reduce)?;
        skipped += usize::from(optimizer.step_scaled(Some(1.0), &mut scaler)?.skipped);
        losses.push(loss.double_value(&[]));
    }
    let (first, last) = (losses[0], losses[STEPS - 1]);
    ensure!(skipped > 0 && skipped < STEPS / 2, "{skipped} steps of {STEPS} were skipped");
    ensure!(last.is_finite() && last < first, "the loss does not fall: {losses:?}");
    ddp.compare_parameters()?;
    Ok(format!("{skipped} steps skipped, scale {}; loss {first:.1} → {last:.1}", scaler.value()))
}

/// Three steps, in the second of which the last rank's loss is no number.
fn with_nan(
    group: &mut Group,
    device: Device,
    policy: NonFinite,
    mut told: impl FnMut(usize, phalanx::ddp::Result<()>, &mut Optimizer) -> Result<()>,
) -> Result<()> {
    let Net { vs, net } = network(device, WIDTH);
    let ddp = Ddp::new(&vs, group, DdpOptions { non_finite: policy, ..options(Zero::Off) })?;
    let mut optimizer = optimizer(&ddp, AdamW::default())?;
    for step in 0..3 {
        let is_bad = step == 1 && group.rank() + 1 == group.world_size();
        let loss =
            loss_sum(&net, &batch(group, device, step)) * if is_bad { f64::NAN } else { 1.0 };
        let before = weights(&vs)?;
        told(step, ddp.backward(&loss, ROWS as f64, Sync::Reduce), &mut optimizer)?;
        let moved = apart(&before, &weights(&vs)?);
        ensure!((moved > 0.0) == (step != 1), "step {step} moved weights by {moved:.1e}");
    }
    Ok(ddp.compare_parameters()?)
}

fn non_finite_is_an_error(group: &mut Group, device: Device) -> Result<String> {
    let last = group.world_size() - 1;
    let mut text = String::new();
    with_nan(group, device, NonFinite::Error, |step, outcome, optimizer| match (step, outcome) {
        (1, Err(error @ Error::NonFinite { rank, .. })) if rank == last => {
            text = error.to_string();
            Ok(())
        }
        (1, other) => bail!("rank {last}'s gradients are no numbers, and backward says {other:?}"),
        (_, outcome) => {
            outcome?;
            Ok(optimizer.step(None).map(drop)?)
        }
    })?;
    // As far as what was found; what to do follows.
    Ok(text.split(',').next().unwrap_or_default().to_owned())
}

fn non_finite_is_skipped(group: &mut Group, device: Device) -> Result<String> {
    with_nan(group, device, NonFinite::SkipStep, |step, outcome, optimizer| {
        outcome?;
        let skipped = optimizer.step(None)?.skipped;
        ensure!(skipped == (step == 1), "step {step}: skipped is {skipped}");
        Ok(())
    })?;
    Ok("one step of three, on every rank".into())
}

/// Layers that some ranks use, and one that nobody does.
fn unused_parameters(group: &mut Group, device: Device) -> Result<String> {
    let mut by_device = Vec::new();
    for place in [Device::Cpu, device] {
        let vs = nn::VarStore::new(place);
        let layer =
            |name: &str| nn::linear(vs.root() / name, WIDTH, WIDTH, nn::LinearConfig::default());
        let (base, of_some, of_nobody) = (layer("base"), layer("of_some"), layer("of_nobody"));
        fill(&vs, 0.1);
        let before = Vec::<f32>::try_from(of_nobody.ws.reshape([-1]).to_device(Device::Cpu))?;
        let options = DdpOptions { find_unused_parameters: true, ..options(Zero::Off) };
        let ddp = Ddp::new(&vs, group, options)?;
        let mut optimizer = optimizer(&ddp, Sgd { lr: 0.01, weight_decay: 0.1, ..Sgd::default() })?;
        for step in 0..4 {
            let y = base.forward(&batch(group, place, step));
            let uses = (step + group.rank()).is_multiple_of(2);
            let y = if uses { of_some.forward(&y) } else { y };
            ddp.backward(&y.square().sum(Kind::Float), ROWS as f64, Sync::Reduce)?;
            let _step = optimizer.step(Some(1.0))?;
        }
        ddp.compare_parameters()?;
        let after = Vec::<f32>::try_from(of_nobody.ws.reshape([-1]).to_device(Device::Cpu))?;
        ensure!(before == after, "what nobody used was updated");
        by_device.push(weights(&vs)?);
    }
    let off = apart(&by_device[0], &by_device[1]);
    ensure!(off < 1e-4, "weights differ from the CPU's by {off:.1e}");
    Ok(format!("left alone; the others within {off:.0e} of the CPU"))
}

/// Fingerprints are alike until one rank's parameters are changed.
fn parameters_compared(group: &mut Group, device: Device) -> Result<String> {
    let Net { vs, net } = network(device, WIDTH);
    let options = DdpOptions { fingerprint_interval: 1, ..options(Zero::Off) };
    let ddp = Ddp::new(&vs, group, options)?;
    let mut optimizer = optimizer(&ddp, AdamW::default())?;
    for step in 0..3 {
        ddp.backward(&loss_sum(&net, &batch(group, device, step)), ROWS as f64, Sync::Reduce)?;
        let _step = optimizer.step(None)?;
    }
    ddp.compare_parameters()?;
    if group.world_size() == 1 {
        return Ok("alike; one rank has nobody to differ from".into());
    }
    if group.rank() + 1 == group.world_size() {
        let odd = vs.variables().remove("l2.weight").context("a layer")?;
        let _odd = tch::no_grad(|| odd.get(0).get(0).fill_(0.5));
    }
    let loss = loss_sum(&net, &batch(group, device, 3));
    match ddp.backward(&loss, ROWS as f64, Sync::Reduce) {
        Err(Error::ParametersDiffer { name, ranks }) if name == "l2.weight" => {
            Ok(format!("alike; then {name} differs on rank {ranks}"))
        }
        other => bail!("the last rank's l2.weight is another, and backward says {other:?}"),
    }
}

/// Rank r has r + 2 batches.
fn join(group: &mut Group, device: Device) -> Result<String> {
    let mut by_device = Vec::new();
    for place in [Device::Cpu, device] {
        let Net { vs, .. } = network(place, WIDTH);
        let ddp = Ddp::new(&vs, group, options(Zero::One))?;
        let mut optimizer = optimizer(&ddp, Sgd { lr: 0.01, momentum: 0.5, ..Sgd::default() })?;
        let join = ddp.join()?;
        for step in 0..group.rank() + 2 {
            ddp.backward(&whole_loss(&vs, 10 * group.rank() + step), 1.0, Sync::Reduce)?;
            let _step = optimizer.step(None)?;
        }
        let mut shadowed = 0;
        join.finish(|| {
            shadowed += 1;
            optimizer.step(None).map(drop)
        })?;
        let missing = group.world_size() - 1 - group.rank();
        ensure!(shadowed == missing, "shadowed {shadowed} steps, {missing} were missing");
        ddp.compare_parameters()?;
        by_device.push(weights(&vs)?);
    }
    let off = apart(&by_device[0], &by_device[1]);
    ensure!(off < 1e-5, "weights differ from the CPU's by {off:.1e}");
    Ok(format!("2 to {} batches; within {off:.0e} of the CPU", group.world_size() + 1))
}

/// Steps of [`checkpoint`].
const HALF: usize = 3;

/// A run that is saved half-way and goes on with another model, beside one that is not.
fn checkpoint(group: &mut Group, device: Device) -> Result<String> {
    let mine = format!("phalanx-check-{}", std::process::id());
    let names = group.all_gather_bytes(mine.as_bytes())?;
    let folder = std::env::temp_dir().join(String::from_utf8(names[0].clone())?);
    let broken = [HALF, 2 * HALF].map(|to| resumed(group, device, (&folder, to)));
    if group.rank() == 0 {
        std::fs::remove_dir_all(&folder).context("removing what was saved")?;
    }
    let [_, broken] = broken;
    let whole = resumed(group, device, (&folder.with_extension("whole"), 2 * HALF))?;
    group.barrier()?.wait()?;
    if group.rank() == 0 {
        std::fs::remove_dir_all(folder.with_extension("whole")).context("removing it")?;
    }
    let difference = apart(&broken?, &whole);
    ensure!(difference <= 1e-6, "weights differ by {difference:e}");
    Ok(format!("weights differ by {difference:e} from an unbroken run's"))
}

/// Weights after step `to`, from what `folder` has on.
fn resumed(
    group: &mut Group,
    device: Device,
    (folder, to): (&std::path::Path, usize),
) -> Result<Vec<f32>> {
    let Net { vs, net } = network(device, WIDTH);
    let ddp = Ddp::new(&vs, group, options(Zero::One))?;
    let mut optimizer = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
    let quiet = CheckpointerOptions { heed_signals: false, ..CheckpointerOptions::default() };
    let mut checkpointer = Checkpointer::new(folder, &ddp, quiet)?;
    let done = checkpointer.resume(Some(&mut optimizer))?.map_or(0, |resumed| resumed.step);
    for step in usize::try_from(done)?..to {
        ddp.backward(&loss_sum(&net, &batch(group, device, step)), ROWS as f64, Sync::Reduce)?;
        optimizer.step(Some(1.0))?;
    }
    checkpointer.save(to as u64, Some(&mut optimizer), || ())?;
    checkpointer.finish()?;
    weights(&vs)
}
