//! What PyTorch's `DistributedDataParallel` comes to, we come to: losses and weights of the same training, to 1e-5.
//!
//! `scripts/parity_fixtures.py` trained each case under PyTorch on two ranks and three; here the same is trained by
//! threads, with the optimizer's state whole and sharded, through libtorch's own backward and through [`Ddp::backward`].

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod features;
mod fixtures;
mod hooks;
mod networks;
mod optimizers;
mod schedules;
mod training;

use std::rc::Rc;
use std::sync::Arc;

use fixtures::{Fixtures, Outcome};
use networks::{Network, Shape};
use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::{Ddp, DdpOptions, Optimizer, Sync, Zero};
use tch::{Device, Kind, Tensor};

/// How losses go backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `Tensor::backward` of the mean.
    Plain,
    /// [`Ddp::backward`] of the sum.
    Weighted,
}

/// A case of the fixtures, and how ours trains it.
#[derive(Clone)]
struct Case {
    name: &'static str,
    shape: Shape,
    options: DdpOptions,
    optimizer: fn(&Ddp) -> Optimizer,
    train: fn(&mut Run),
    ways: &'static [Way],
}

impl Case {
    fn new(name: &'static str, optimizer: fn(&Ddp) -> Optimizer) -> Self {
        Self {
            name,
            shape: Shape::Mlp,
            // At least three buckets, of uneven sizes.
            options: DdpOptions {
                bucket_bytes: vec![128, 600],
                fingerprint_interval: 2,
                ..DdpOptions::default()
            },
            optimizer,
            train: training::plain,
            ways: &[Way::Plain, Way::Weighted],
        }
    }

    /// Trains it in every way that there is and compares.
    fn check(self) {
        self.check_and(|_row, _ranks| {});
    }

    fn check_and(self, more: impl Fn(&fixtures::Row, &[Outcome])) {
        compute_once();
        let fixtures = Fixtures::read();
        for row in fixtures.rows(self.name) {
            for zero in [Zero::Off, Zero::One, Zero::Two, Zero::Three] {
                for &way in self.ways {
                    let case = Self {
                        options: DdpOptions { zero, ..self.options.clone() },
                        ..self.clone()
                    };
                    let case = Arc::new(case);
                    let ranks =
                        run_ranks(row.world_size, move |group| Run::new(group, &case, way).ended());
                    row.compare(&ranks, &format!("{zero:?}, {way:?}"));
                    more(row, &ranks);
                }
            }
        }
    }
}

/// The libraries under libtorch choose their kernels in their first call: before ranks make it side by side.
fn compute_once() {
    tch::set_num_threads(1);
    let of = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let weight = of(&[16, 16]).set_requires_grad(true);
    let output = of(&[4, 16]).matmul(&weight).tanh();
    output.matmul(&of(&[16])).square().sum(Kind::Float).backward();
}

/// One rank of one case.
struct Run {
    rank: usize,
    world_size: usize,
    network: Network,
    optimizer: Optimizer,
    ddp: Rc<Ddp>,
    way: Way,
    train: fn(&mut Run),
    outcome: Outcome,
}

impl Run {
    fn new(mut group: Group, case: &Case, way: Way) -> Self {
        tch::set_num_threads(1);
        let network = Network::new(case.shape, &mut group);
        let ddp = Ddp::new(&network.vs, &mut group, case.options.clone()).unwrap();
        let optimizer = (case.optimizer)(&ddp);
        let ddp = Rc::new(ddp);
        let (rank, world_size, train) = (group.rank(), group.world_size(), case.train);
        Self { rank, world_size, network, optimizer, ddp, way, train, outcome: Outcome::default() }
    }

    fn ended(mut self) -> Outcome {
        (self.train)(&mut self);
        assert!(self.ddp.statistics().unwrap().bucket_count >= 3);
        self.outcome.tensors = self.network.tensors();
        self.outcome
    }

    /// An exchanged backward of the mean over `rows` samples.
    fn backward(&self, loss_sum: &Tensor, rows: usize) {
        match self.way {
            Way::Plain => (loss_sum / rows as f64).backward(),
            Way::Weighted => self.ddp.backward(loss_sum, rows as f64, Sync::Reduce).unwrap(),
        }
    }

    /// Keeps the mean of a sum over `rows` samples as this step's loss.
    fn note_loss(&mut self, loss_sum: &Tensor, rows: usize) {
        self.outcome.losses.push(loss_sum.double_value(&[]) / rows as f64);
    }
}
