//! Activation checkpointing: the same bits with and without, in every kind of backward.
//!
//! Nothing here draws random numbers: `recompute_random.rs` does, in a process of its own, for the generator is the process's.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "a failed unwrap is a failed test, and numbers are small"
)]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use phalanx_comm::environment::HostLink;
use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::recompute::{self, checkpointed, checkpointed_one, Checkpoint, Checkpointed};
use phalanx_ddp_core::{
    amp, autograd, Adam, Ddp, Error, Optimizer, ParameterGroups, Result, Sync, Zero,
};
use support::{options, pattern, run_over, values};
use tch::nn::{Module as _, ModuleT};
use tch::{nn, Device, Kind, Tensor};

/// How the blocks of a network run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Plain,
    Each,
    /// Both blocks in one part, each in a part of its own inside.
    Nested,
}

/// A block that saves tensors of several kinds: inputs, outputs, integers, weights.
#[derive(Debug)]
struct Block {
    wide: nn::Linear,
    narrow: nn::Linear,
    norm: nn::LayerNorm,
}

impl Block {
    fn new(path: &nn::Path<'_>) -> Self {
        Self {
            wide: nn::linear(path / "wide", 12, 37, nn::LinearConfig::default()),
            narrow: nn::linear(path / "narrow", 37, 12, nn::LinearConfig::default()),
            norm: nn::layer_norm(path / "norm", vec![12], nn::LayerNormConfig::default()),
        }
    }
}

impl nn::Module for Block {
    fn forward(&self, x: &Tensor) -> Tensor {
        let order = x.argsort(-1, false);
        let inside =
            self.wide.forward(&x.gather(-1, &order, false)).gelu("none").softmax(-1, Kind::Float);
        self.norm.forward(&(self.narrow.forward(&inside) + x).tanh())
    }
}

/// Blocks `a` (used twice), `b` and one that is used only where it is asked for, and a head.
struct Network {
    vs: nn::VarStore,
    a: Arc<Checkpointed<Block>>,
    b: Arc<Checkpointed<Block>>,
    spare: Arc<Checkpointed<Block>>,
    head: nn::Linear,
}

impl Network {
    fn new() -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let block = |name: &str| Arc::new(Checkpointed::new(Block::new(&(vs.root() / name))));
        let (a, b, spare) = (block("a"), block("b"), block("spare"));
        let head = nn::linear(vs.root() / "head", 12, 1, nn::LinearConfig::default());
        let network = Self { vs, a, b, spare, head };
        for (index, (_, mut variable)) in network.sorted().into_iter().enumerate() {
            let start = pattern(&variable.size(), index as i64) * 0.4;
            tch::no_grad(|| variable.copy_(&start));
        }
        network
    }

    fn sorted(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> = self.vs.variables().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    fn loss(&self, seed: i64, how: How, spare: bool) -> Tensor {
        let x = pattern(&[5, 12], seed);
        let one = |block: &Arc<Checkpointed<Block>>, x: &Tensor| match how {
            How::Plain => block.run_plain(x),
            _ => block.forward_t(x, true),
        };
        let hidden = match how {
            How::Nested => {
                let (a, b) = (Arc::clone(&self.a), Arc::clone(&self.b));
                let outer = move |x: &Tensor| b.f_forward_t(&a.f_forward_t(x, true)?, true);
                checkpointed_one(&x, outer).unwrap()
            }
            _ => one(&self.b, &one(&self.a, &x)),
        };
        let hidden = if spare { one(&self.spare, &hidden) } else { hidden };
        (self.head.forward(&one(&self.a, &hidden)) - pattern(&[5, 1], seed + 50))
            .square()
            .sum(Kind::Float)
    }

    fn bits(&self) -> Vec<u32> {
        self.sorted().iter().flat_map(|(_, tensor)| bits(tensor)).collect()
    }

    fn gradient_bits(&self) -> Vec<Vec<u32>> {
        let of = |(_, tensor): &(String, Tensor)| match tensor.grad() {
            gradient if gradient.defined() => bits(&gradient),
            _ => Vec::new(),
        };
        self.sorted().iter().map(of).collect()
    }
}

trait Plainly {
    fn run_plain(&self, x: &Tensor) -> Tensor;
}

impl Plainly for Arc<Checkpointed<Block>> {
    /// The module without its checkpoint: what is not recorded is not kept, so what it does is seen from outside.
    fn run_plain(&self, x: &Tensor) -> Tensor {
        self.bare(|block| block.forward(x))
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

#[test]
fn gradients_have_the_bits_of_plain_ones() {
    let gradients = |how| {
        let network = Network::new();
        network.loss(3, how, true).backward();
        network.gradient_bits()
    };
    let plain = gradients(How::Plain);
    assert!(plain.iter().all(|one| !one.is_empty()));
    assert!(plain == gradients(How::Each));
    assert!(plain == gradients(How::Nested));
}

#[test]
fn a_closure_runs_once_more_and_then_goes() {
    let (runs, x) = (Arc::new(AtomicUsize::new(0)), pattern(&[4], 1).set_requires_grad(true));
    let make = || {
        let runs = Arc::clone(&runs);
        let outputs = checkpointed(&[&x], move |inputs| {
            runs.fetch_add(1, Ordering::SeqCst);
            let middle = inputs[0].f_exp()?;
            Ok(vec![middle.f_sin()?, middle.f_cos()?])
        });
        outputs.unwrap()
    };
    let outputs = make();
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    (&outputs[0] + &outputs[1]).sum(Kind::Float).backward();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    assert_eq!(Arc::strong_count(&runs), 1, "the closure is dropped with what the graph saved");
    // Each backward over a graph that is kept recomputes.
    let outputs = make();
    let loss = (&outputs[0] + &outputs[1]).sum(Kind::Float);
    let first = Tensor::run_backward(&[&loss], &[&x], true, false).remove(0);
    let second = Tensor::run_backward(&[&loss], &[&x], true, false).remove(0);
    assert_eq!(runs.load(Ordering::SeqCst), 5);
    assert!(bits(&first) == bits(&second));
    drop((loss, outputs));
    assert_eq!(Arc::strong_count(&runs), 1);
    // Nothing is recorded: nothing is kept.
    tch::no_grad(make);
    assert_eq!(Arc::strong_count(&runs), 1);
}

#[test]
fn inputs_and_outputs_may_be_of_any_sort() {
    let weight = pattern(&[6, 3], 1).set_requires_grad(true);
    let (x, rows) = (pattern(&[4, 3], 2), Tensor::from_slice(&[5_i64, 0, 5, 2]));
    let forward = |weight: &Tensor, x: &Tensor, rows: &Tensor| -> Result<Vec<Tensor>> {
        let picked = weight.f_index_select(0, rows)?.f_mul(x)?;
        let largest = picked.f_argmax(1, false)?;
        Ok(vec![picked.f_square()?, largest, picked.f_exp()?.f_detach()?, picked.f_sin()?])
    };
    let loss = |outputs: &[Tensor]| (&outputs[0] * &outputs[2] + &outputs[3]).sum(Kind::Float);
    let plain = forward(&weight, &x, &rows).unwrap();
    let expected = Tensor::run_backward(&[loss(&plain)], &[&weight], false, false).remove(0);
    // No input requires gradients: the weight is the closure's own.
    let own = weight.shallow_clone();
    let outputs =
        checkpointed(&[&x, &rows], move |inputs| forward(&own, &inputs[0], &inputs[1])).unwrap();
    assert_eq!(
        outputs.iter().map(Tensor::requires_grad).collect::<Vec<_>>(),
        [true, false, false, true]
    );
    assert_eq!(outputs[1].kind(), Kind::Int64);
    loss(&outputs).backward();
    assert!(bits(&weight.grad()) == bits(&expected));
    // An input that is a variable, and one that is computed.
    let mut variable = weight.detach().set_requires_grad(true);
    let computed = &variable * 2.0;
    let outputs = checkpointed(&[&variable, &computed], |inputs| {
        Ok(vec![inputs[0].f_mul(&inputs[1])?.f_exp()?, inputs[0].shallow_clone()])
    });
    let outputs = outputs.unwrap();
    (&outputs[0] + &outputs[1]).sum(Kind::Float).backward();
    let plain = weight.detach().set_requires_grad(true);
    ((&plain * (&plain * 2.0)).exp() + &plain).sum(Kind::Float).backward();
    assert!(bits(&variable.grad()) == bits(&plain.grad()));
    variable.zero_grad();
}

#[test]
fn a_backward_of_a_backward_is_right() {
    let twice = |how: How| {
        let x = pattern(&[5], 4).set_requires_grad(true);
        let cube = |x: &Tensor| -> Result<Tensor> { Ok(x.f_pow_tensor_scalar(3)?.f_tanh()?) };
        let y = if how == How::Plain { cube(&x) } else { checkpointed_one(&x, cube) };
        let first =
            Tensor::run_backward(&[y.unwrap().sum(Kind::Float)], &[&x], true, true).remove(0);
        bits(&Tensor::run_backward(&[first.square().sum(Kind::Float)], &[&x], false, false)[0])
    };
    assert!(twice(How::Plain) == twice(How::Each));
}

#[test]
fn autocast_is_what_it_was() {
    let train = |how: How| {
        let network = Network::new();
        let mut losses = Vec::new();
        for step in 0..2 {
            let loss = amp::autocast(Device::Cpu, Kind::BFloat16, || network.loss(step, how, true))
                .unwrap();
            losses.extend(bits(&loss));
            loss.backward();
        }
        (losses, network.gradient_bits())
    };
    let plain = train(How::Plain);
    assert!(plain == train(How::Each));
    assert!(plain == train(How::Nested));
    let full = Network::new();
    (0..2).for_each(|step| full.loss(step, How::Plain, true).backward());
    assert!(plain.1 != full.gradient_bits(), "autocast makes a difference");
}

/// A custom function inside of a part: what it saves is recomputed, and its backward finds it.
#[test]
fn custom_functions_may_be_inside() {
    let x = pattern(&[6], 1).set_requires_grad(true);
    let square = |x: &Tensor| {
        let outputs = autograd::function(
            "square",
            &[x],
            |saving, inputs| {
                saving.save(inputs[0]);
                Ok((vec![inputs[0].f_square()?], ()))
            },
            |backward, gradients| {
                let slope = backward.saved[0].f_mul_scalar(2.0)?;
                Ok(vec![gradients[0].as_ref().map(|g| g.f_mul(&slope)).transpose()?])
            },
        )?;
        outputs[0].f_exp().map_err(Error::from)
    };
    checkpointed_one(&x, square).unwrap().sum(Kind::Float).backward();
    let plain = x.detach().set_requires_grad(true);
    square(&plain).unwrap().sum(Kind::Float).backward();
    assert!(bits(&x.grad()) == bits(&plain.grad()));
}

#[test]
fn running_statistics_change_once() {
    let statistics = |checkpointed: Option<bool>| {
        let vs = nn::VarStore::new(Device::Cpu);
        let ws_init = nn::Init::Const(1.0);
        let config = nn::BatchNormConfig { ws_init, ..nn::BatchNormConfig::default() };
        let norm = nn::batch_norm1d(vs.root(), 3, config);
        let buffers = [norm.running_mean.shallow_clone(), norm.running_var.shallow_clone()];
        let norm = Checkpointed::new(norm);
        let norm = match checkpointed {
            Some(true) => norm.keeping(&[&buffers[0], &buffers[1]]),
            _ => norm,
        };
        let x = pattern(&[8, 3], 1).set_requires_grad(true);
        for _ in 0..2 {
            let y = match checkpointed {
                Some(_) => norm.forward_t(&x, true),
                None => norm.bare(|norm| norm.forward_t(&x, true)),
            };
            y.square().sum(Kind::Float).backward();
        }
        let statistics: Vec<u32> = buffers.iter().flat_map(bits).collect();
        (statistics, bits(&x.grad()))
    };
    let plain = statistics(None);
    assert_eq!(plain, statistics(Some(true)));
    let twice = statistics(Some(false));
    assert!(
        plain.0 != twice.0 && plain.1 == twice.1,
        "without being told of them they change twice"
    );
}

#[test]
fn a_closure_can_tell_its_runs() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    let x = pattern(&[2], 1).set_requires_grad(true);
    let outer = move |x: &Tensor| {
        let told = Arc::clone(&told);
        let inner = move |x: &Tensor| {
            told.lock().unwrap().push(recompute::is_recomputing());
            Ok(x.f_exp()?)
        };
        checkpointed_one(&x.f_sin()?, inner)
    };
    checkpointed_one(&x, outer).unwrap().sum(Kind::Float).backward();
    // The forward; the outer part, for the input of the inner one; the inner one.
    assert_eq!(*seen.lock().unwrap(), [false, true, true]);
    assert!(!recompute::is_recomputing());
}

/// One training: the parameters at the end.
fn trained(group: &mut Group, how: How, (zero, unused): (Zero, bool)) -> Vec<u32> {
    let network = Network::new();
    let options = phalanx_ddp_core::DdpOptions { find_unused_parameters: unused, ..options(zero) };
    let ddp = Ddp::new(&network.vs, group, options).unwrap();
    let mut optimizer = Optimizer::new(&ddp, Adam::default(), ParameterGroups::default()).unwrap();
    let rank = group.rank() as i64;
    for step in 0..4 {
        // In every other step nobody needs the spare block; in the others those do who are told to.
        let spare = |part: i64| !unused || (step % 2 == 1 && (rank + part) % 2 == 0);
        let loss = |part| network.loss(step * 100 + rank * 10 + part, how, spare(part));
        ddp.backward(&loss(0), 5.0, Sync::Accumulate).unwrap();
        ddp.backward(&loss(1), 5.0, Sync::Reduce).unwrap();
        let _step = optimizer.step(Some(1.0)).unwrap();
    }
    network.bits()
}

#[test]
fn ddp_sees_a_backward_like_any_other() {
    for world_size in [1, 2, 3, 4] {
        let cases = [Zero::Off, Zero::One, Zero::Two, Zero::Three];
        for case in cases.into_iter().zip([false, true, true, false]) {
            // A recomputation gathers parameters inside of the backward where they are sharded.
            let link = if case.0 == Zero::Three { HostLink::Tcp } else { HostLink::Auto };
            let of =
                |how| run_over(world_size, link, move |mut group| trained(&mut group, how, case));
            let plain = of(How::Plain);
            assert!(plain.iter().all(|rank| *rank == plain[0]), "ranks differ");
            assert!(plain == of(How::Each), "{world_size} ranks, {case:?}");
            if world_size == 3 {
                assert!(plain == of(How::Nested), "nested, {case:?}");
            }
        }
    }
}

#[test]
fn plain_backwards_accumulate_in_no_sync() {
    let gradients = |how| {
        run_ranks(2, move |mut group| {
            let network = Network::new();
            let ddp = Ddp::new(&network.vs, &mut group, options(Zero::Off)).unwrap();
            let seed = group.rank() as i64 * 10;
            ddp.no_sync(|| network.loss(seed, how, true).backward()).unwrap();
            network.loss(seed + 1, how, true).backward();
            network.gradient_bits()
        })
    };
    assert!(gradients(How::Plain) == gradients(How::Each));
}

/// The loss scaler skips the same step, and both train on alike.
#[test]
fn losses_may_be_scaled() {
    let train = |how| {
        run_ranks(2, move |mut group| {
            let network = Network::new();
            let non_finite = phalanx_ddp_core::NonFinite::SkipStep;
            let options = phalanx_ddp_core::DdpOptions { non_finite, ..options(Zero::One) };
            let ddp = Ddp::new(&network.vs, &mut group, options).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Adam::default(), ParameterGroups::default()).unwrap();
            let mut scaler = amp::LossScaler::new(1024.0, 2.0, 0.5, 2).unwrap();
            let mut skipped = Vec::new();
            for step in 0..4 {
                let loss = network.loss(step, how, true);
                let factor = if step == 2 { f64::INFINITY } else { 1.0 };
                let loss = scaler.scale(&(loss * factor)).unwrap();
                ddp.backward(&loss, 5.0, Sync::Reduce).unwrap();
                skipped.push(optimizer.step_scaled(Some(1.0), &mut scaler).unwrap().skipped);
            }
            (network.bits(), skipped)
        })
    };
    let plain = train(How::Plain);
    assert_eq!(plain[0].1, [false, false, true, false]);
    assert!(plain == train(How::Each));
}

/// As the backward of a GPU's model does.
#[test]
fn a_recomputation_may_run_on_another_thread() {
    let x = pattern(&[4], 1).set_requires_grad(true);
    let y = checkpointed_one(&x, |x| Ok(x.f_exp()?)).unwrap().sum(Kind::Float);
    std::thread::spawn(move || y.backward()).join().unwrap();
    assert_eq!(bits(&x.grad()), bits(&x.detach().exp()));
}

#[test]
fn what_a_checkpoint_keeps_is_put_back() {
    let buffer = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    let x = pattern(&[4], 1).set_requires_grad(true);
    let count = Mutex::new(buffer.shallow_clone());
    let checkpoint = Checkpoint::default().keeping(&[&buffer]);
    let y = checkpoint.run_one(&x, move |x| {
        let _counted = count.lock().unwrap().f_add_scalar_(1.0)?;
        Ok(x.f_exp()?)
    });
    y.unwrap().sum(Kind::Float).backward();
    assert_eq!(values(&buffer), [1.0]);
}
