//! Gradients that are added up over some ranks and divided by the weights of more.

#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a failed unwrap is a failed test, and numbers are small"
)]

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::{Ddp, DdpOptions, Error, Sync};
use tch::{Device, Kind, Tensor};

fn parameter(len: i64) -> Tensor {
    Tensor::zeros([len], (Kind::Float, Device::Cpu)).set_requires_grad(true)
}

/// Ranks of equal parity have a parameter in common whose gradients are whole numbers; weights are 1, 3, 5 and 7.
#[test]
fn gradients_of_some_ranks_are_divided_by_the_weights_of_all() {
    run_ranks(4, |mut world| {
        let rank = world.rank();
        let mut alike = world.split(Some(u32::try_from(rank % 2).unwrap()), 0).unwrap().unwrap();
        let (own, of_all) = (parameter(5), parameter(3));
        let named = |tensor: &Tensor| vec![("p".to_owned(), tensor.shallow_clone())];
        let options = DdpOptions::default;
        let some = Ddp::from_tensors(named(&own), Vec::new(), &mut alike, options()).unwrap();
        let all = Ddp::from_tensors(named(&of_all), Vec::new(), &mut world, options()).unwrap();
        some.weigh_over(&mut world).unwrap();
        let weight = (2 * rank + 1) as f64;
        for _ in 0..3 {
            // Two micro-batches, of which the first has a third of the weight; rank r's gradient is 16 (r + 1).
            let loss =
                || (&own * 8.0 * (rank + 1) as f64).sum(Kind::Float) + of_all.sum(Kind::Float);
            all.backward(&loss(), weight / 4.0, Sync::Accumulate).unwrap();
            all.backward(&loss(), weight * 3.0 / 4.0, Sync::Reduce).unwrap();
            // 16 (1 + 3) or 16 (2 + 4), over 1 + 3 + 5 + 7.
            let expected = [4.0, 6.0][rank % 2];
            assert_eq!(Vec::<f32>::try_from(own.grad()).unwrap(), [expected; 5]);
            assert_eq!(Vec::<f32>::try_from(of_all.grad()).unwrap(), [0.5; 3]);
            some.release_gradients().unwrap();
            all.release_gradients().unwrap();
        }
        // A rank that has nothing of its own exchanges all the same.
        if rank == 3 {
            some.exchange_weighted().unwrap();
        } else {
            some.backward(&(&own * 9.0).sum(Kind::Float), weight, Sync::Reduce).unwrap();
        }
        assert_eq!(Vec::<f32>::try_from(own.grad()).unwrap(), [[2.0; 5], [1.0; 5]][rank % 2]);
        some.release_gradients().unwrap();
        // Plain backwards: by the number of all ranks.
        (&own * 8.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(own.grad()).unwrap(), [4.0; 5]);
    });
}

#[test]
fn weights_of_others_come_before_the_first_gradient_and_without_join() {
    run_ranks(2, |mut world| {
        let own = parameter(2);
        let named = vec![("p".to_owned(), own.shallow_clone())];
        let ddp = Ddp::from_tensors(named, Vec::new(), &mut world, DdpOptions::default()).unwrap();
        let loss = || own.sum(Kind::Float);
        ddp.backward(&loss(), 1.0, Sync::Accumulate).unwrap();
        assert!(matches!(ddp.weigh_over(&mut world), Err(Error::BadSetting { .. })));
        ddp.backward(&loss(), 1.0, Sync::Reduce).unwrap();
        ddp.release_gradients().unwrap();
        ddp.weigh_over(&mut world).unwrap();
        assert!(matches!(ddp.join(), Err(Error::BadSetting { .. })));
        ddp.backward(&loss(), 2.0, Sync::Reduce).unwrap();
        assert_eq!(Vec::<f32>::try_from(own.grad()).unwrap(), [0.5; 2]);
    });
}
