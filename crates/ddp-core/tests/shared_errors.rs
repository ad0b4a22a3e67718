//! Errors that every rank has are told to the process, until training goes on: alone in its process, for what is told is the process's.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use phalanx_comm::recorder::take_shared_error;
use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::{Ddp, DdpOptions, Sync};
use tch::{Device, Kind, Tensor};

#[test]
fn an_error_of_all_ranks_is_told_until_an_exchange_has_gone_well() {
    run_ranks(1, |mut group| {
        let weight = Tensor::ones([5], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let named = vec![("w".to_owned(), weight.shallow_clone())];
        let ddp = Ddp::from_tensors(named, vec![], &mut group, DdpOptions::default()).unwrap();
        let backward = |factor: f64| {
            let loss = (&weight * factor).sum(Kind::Float);
            let outcome = ddp.backward(&loss, 1.0, Sync::Reduce);
            ddp.release_gradients().unwrap();
            outcome.is_ok()
        };
        assert!(!backward(f64::NAN));
        assert!(take_shared_error().unwrap().contains("not finite"));
        assert!(!backward(f64::NAN) && backward(1.0));
        assert_eq!(take_shared_error(), None, "it was caught, and training went on");
    });
}
