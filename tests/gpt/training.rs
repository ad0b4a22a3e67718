//! Trains a small model on the fixed batches of `scripts/gpt_fixtures.py`, with the trainer of the example, on ranks that are threads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_data::progress::Silent;
use phalanx_ddp_core::feed::Feed;
use tch::{nn, Device, Tensor};

use super::gpt::config::Config;
use super::gpt::place::{self, Place};
use super::gpt::sample::{generate, Choice};
use super::gpt::train::Trainer;
use super::gpt::{batching, data, source};

pub(crate) type Tensors = BTreeMap<String, Tensor>;

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What a training comes to.
pub(crate) struct Trained {
    pub(crate) losses: Vec<f64>,
    pub(crate) norms: Vec<f64>,
    pub(crate) weights: Tensors,
    /// Greedy tokens behind each prompt.
    pub(crate) greedy: Vec<Vec<i64>>,
}

/// A training: of `micro_batches` a step on each data-parallel rank, from the weights of a file or from those that the seed gives.
#[derive(Clone, Default)]
pub(crate) struct Job {
    pub(crate) config: Config,
    pub(crate) global_batch: usize,
    pub(crate) micro_batches: usize,
    pub(crate) first_weights: Option<PathBuf>,
    pub(crate) prompts: Vec<Vec<i64>>,
    pub(crate) new_tokens: usize,
}

/// A rank that is ready for its first step.
struct Ready {
    trainer: Trainer,
    feed: Feed,
    world: Group,
}

/// The configuration, on the fixed batches in their order.
pub(crate) fn config(text: &str) -> Config {
    let mut config = Config::parse(text, Path::new("test.json")).expect("a configuration");
    config.data.batches = Some(fixture("gpt_batches.safetensors"));
    config.data.shuffle = false;
    config
}

impl Job {
    /// By rank 0 of so many.
    pub(crate) fn run(&self, world_size: usize) -> Trained {
        self.config.validate("the test").expect("a valid configuration");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model.safetensors");
        let (job, to) = (self.clone(), path.clone());
        let mut ranks = run_ranks(world_size, move |group| job.rank(group, &to));
        let weights = Tensor::read_safetensors(&path).expect("the last weights");
        let (losses, norms, greedy) = ranks.swap_remove(0);
        for (rank, (theirs, _, tokens)) in (1..).zip(&ranks) {
            assert_eq!(theirs, &losses, "losses of rank {rank}");
            assert_eq!(tokens, &greedy, "tokens of rank {rank}");
        }
        Trained { losses, norms, weights: weights.into_iter().collect(), greedy }
    }

    /// What each rank's first step says, where one of them has another configuration.
    pub(crate) fn first_step_of(
        &self,
        world_size: usize,
        other: (usize, fn(&mut Config)),
    ) -> Vec<Result<(), String>> {
        let job = self.clone();
        run_ranks(world_size, move |group| {
            let mut job = job.clone();
            if group.rank() == other.0 {
                (other.1)(&mut job.config);
            }
            let Ready { mut trainer, mut feed, mut world } = job.ready(group);
            let step = trainer.step(1, (&mut feed, &mut world));
            step.map(drop).map_err(|error| error.to_string())
        })
    }

    fn ready(&self, mut world: Group) -> Ready {
        tch::set_num_threads(1);
        let config = &self.config;
        let mesh = config.mesh.of_world(world.world_size()).expect("a mesh");
        let wanted = batching::Wanted {
            global_batch: Some(self.global_batch),
            micro_batch: None,
            accumulate: Some(self.micro_batches),
        };
        let batching =
            batching::Batching::resolve(place::readers(&mesh), wanted, Default::default())
                .expect("a batch that can be cut");
        place::check(config, &mesh, batching).expect("a model that fits the mesh");
        let text = data::open(config, &Silent).expect("the batches");
        let place = Place::new((config, batching), mesh, &mut world).expect("groups");
        let reader = place.reader();
        let vs = nn::VarStore::new(Device::Cpu);
        let settings = (config, batching, true);
        let trainer = Trainer::new(&vs, (place, &mut world), settings).expect("a trainer");
        if let Some(path) = &self.first_weights {
            trainer.load_weights(path).expect("weights that fit");
        }
        let feed = source::feed(&text.source, config, batching, reader, (Device::Cpu, None))
            .expect("a feed");
        Ready { trainer, feed, world }
    }

    fn rank(&self, world: Group, to: &Path) -> (Vec<f64>, Vec<f64>, Vec<Vec<i64>>) {
        let config = &self.config;
        let Ready { mut trainer, mut feed, mut world } = self.ready(world);
        let step = |step| trainer.step(step, (&mut feed, &mut world)).expect("a step");
        let records: Vec<_> = (1..=config.train.steps).map(step).collect();
        trainer.save_weights(to).expect("weights can be saved");
        let kind = config.mesh.schedule().expect("a schedule");
        let greedy = |prompt: &Vec<i64>| {
            let tokens = |keeps| {
                let choice = Choice { temperature: 0.0, seed: 0, keeps };
                let wanted = (prompt.as_slice(), self.new_tokens);
                generate(&trainer, kind, wanted, choice).expect("tokens")
            };
            let all = tokens(true);
            // In bf16 a product of one row is rounded otherwise than one of many.
            if config.train.precision == super::gpt::config::Precision::Fp32 {
                assert_eq!(all, tokens(false), "with keys and values of tokens before, without");
            }
            all
        };
        let greedy = self.prompts.iter().map(greedy).collect();
        let of = |number: fn(&super::gpt::metrics::StepRecord) -> f64| {
            records.iter().map(number).collect::<Vec<f64>>()
        };
        (of(|record| record.loss), of(|record| record.grad_norm), greedy)
    }
}

/// The largest difference of the weights, and where it is; of what is no number, infinity.
pub(crate) fn apart(one: &Tensors, other: &Tensors) -> (f64, String) {
    let names: Vec<&String> = one.keys().collect();
    assert_eq!(names, other.keys().collect::<Vec<_>>());
    let difference = |name: &String| {
        let (one, other) = (&one[name], &other[name]);
        assert_eq!(one.size(), other.size(), "{name}");
        let most = (one - other).abs().max().double_value(&[]);
        if most.is_nan() {
            f64::INFINITY
        } else {
            most
        }
    };
    let all = one.keys().map(|name| (difference(name), name.clone()));
    all.fold((0.0, String::new()), |most, next| if next.0 > most.0 { next } else { most })
}
