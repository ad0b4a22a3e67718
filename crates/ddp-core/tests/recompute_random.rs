//! Checkpointed parts that draw random numbers: dropout is what it was, and what comes after it as well.

#![allow(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test"
)]

mod support;

use std::sync::{Mutex, PoisonError};

use phalanx_ddp_core::recompute::checkpointed_one;
use phalanx_ddp_core::{amp, Result};
use support::{pattern, values};
use tch::{Device, Kind, Tensor};

/// The generator is the process's: one test at a time.
static GENERATOR: Mutex<()> = Mutex::new(());

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// Two parts with dropout, one that contains another, random numbers between them and after them.
fn trained(checkpointing: bool, kind: Kind) -> Vec<u32> {
    let weights = [1, 2, 3].map(|seed| pattern(&[16, 16], seed).set_requires_grad(true));
    let part = |weight: &Tensor, x: &Tensor| -> Result<Tensor> {
        Ok(x.f_matmul(weight)?
            .f_native_dropout(0.5, true)?
            .0
            .f_gelu("none")?
            .f_dropout(0.3, true)?)
    };
    let run = |index: usize, x: &Tensor| {
        let own = weights[index].shallow_clone();
        match checkpointing {
            true => checkpointed_one(x, move |x| part(&own, x)),
            false => part(&own, x),
        }
    };
    tch::manual_seed(7);
    let mut found = Vec::new();
    for step in 0..2 {
        let x = pattern(&[8, 16], step);
        let forward = || -> Result<Tensor> {
            let hidden = run(0, &x)?;
            let noise = Tensor::f_randn([8, 16], (Kind::Float, Device::Cpu))?;
            let hidden = hidden.f_add(&noise)?;
            let nested = |hidden: &Tensor| {
                let [second, third] = [1, 2].map(|index| weights[index].shallow_clone());
                let outer = move |x: &Tensor| {
                    let third = third.shallow_clone();
                    let x = part(&second, x)?.f_dropout(0.1, true)?;
                    let x = match checkpointing {
                        true => checkpointed_one(&x, move |x| part(&third, x)),
                        false => part(&third, &x),
                    };
                    Ok(x?.f_dropout(0.2, true)?)
                };
                match checkpointing {
                    true => checkpointed_one(hidden, outer),
                    false => outer(hidden),
                }
            };
            nested(&hidden)
        };
        let output = match kind {
            Kind::Float => forward(),
            kind => amp::autocast(Device::Cpu, kind, forward).unwrap(),
        };
        let loss = output.unwrap().to_kind(Kind::Float).square().sum(Kind::Float);
        found.extend(bits(&loss));
        loss.backward();
        found.extend(weights.iter().flat_map(|weight| bits(&weight.grad())));
        // The generator goes on from where the forward left it.
        found.extend(bits(&Tensor::randn([4], (Kind::Float, Device::Cpu))));
    }
    found
}

#[test]
fn dropout_is_what_it_was() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    for kind in [Kind::Float, Kind::BFloat16] {
        assert!(trained(false, kind) == trained(true, kind), "{kind:?}");
    }
}

#[test]
fn the_generator_is_put_back_after_an_error() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(3);
    let x = pattern(&[4], 1).set_requires_grad(true);
    let runs = std::sync::atomic::AtomicUsize::new(0);
    let y = checkpointed_one(&x, move |x| {
        assert!(runs.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0, "not again");
        Ok(x.f_exp()?.f_dropout(0.5, true)?)
    });
    let y = y.unwrap();
    let (first, second) = {
        tch::manual_seed(4);
        let draw = || bits(&Tensor::randn([4], (Kind::Float, Device::Cpu)));
        (draw(), draw())
    };
    tch::manual_seed(4);
    let draw = || bits(&Tensor::randn([4], (Kind::Float, Device::Cpu)));
    assert!(draw() == first);
    let text = y.sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(text.contains("not again"), "{text}");
    assert!(draw() == second);
}
