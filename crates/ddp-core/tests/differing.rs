//! Ranks that run different operations, where parameters are gathered: the bits are those of no sharding.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use phalanx_comm::environment::HostLink;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::WeightsOptions;
use phalanx_ddp_core::{AdamW, Ddp, DdpOptions, Optimizer, ParameterGroups, Sync, Zero};
use support::{options, pattern, run_over, values, wrapped, Model};
use tch::{nn, nn::Module, Device, Kind, Tensor};

/// Ranks that do not share memory.
fn run<T: Send + 'static>(
    world_size: usize,
    rank: impl Fn(Group) -> T + Send + std::marker::Sync + 'static,
) -> Vec<T> {
    run_over(world_size, HostLink::Tcp, rank)
}

fn adamw(ddp: &Ddp) -> Optimizer {
    let rule = AdamW { lr: 0.01, ..AdamW::default() };
    Optimizer::new(ddp, rule, ParameterGroups::default()).unwrap()
}

/// Ways to cut what `world_size` ranks have; the first cuts nothing.
fn cuts(world_size: usize) -> Vec<DdpOptions> {
    let units = vec!["*".to_owned()];
    let three = options(Zero::Three);
    let mut cuts = vec![
        options(Zero::Off),
        three.clone(),
        DdpOptions { units: units.clone(), ..three.clone() },
        DdpOptions { units, stay_gathered: vec!["two".to_owned()], ..three.clone() },
    ];
    if world_size == 4 {
        cuts.push(DdpOptions { shard_ranks: Some(2), ..three });
    }
    cuts
}

fn assert_alike<T: PartialEq + Send + 'static>(
    world_size: usize,
    of: impl Fn(Group, DdpOptions) -> T + Clone + Send + std::marker::Sync + 'static,
) {
    let mut expected = None;
    for options in cuts(world_size) {
        let (of, cut) = (of.clone(), options.clone());
        let mut all = run(world_size, move |group| of(group, cut.clone()));
        assert!(all.iter().all(|outcome| *outcome == all[0]), "{world_size} ranks, {options:?}");
        let expected = expected.get_or_insert_with(|| all.remove(0));
        assert!(all.iter().all(|outcome| outcome == expected), "{world_size} ranks, {options:?}");
    }
}

/// Twice: ranks have `batches` by rank, in two micro-batches each, and then one step with all of them.
fn uneven(mut group: Group, options: DdpOptions, batches: &[i64]) -> Vec<u32> {
    let (model, ddp) = wrapped(&mut group, options);
    let mut optimizer = adamw(&ddp);
    let rank = group.rank() as i64;
    for epoch in 0..2 {
        let join = ddp.join().unwrap();
        for batch in 0..batches[group.rank()] {
            let start = ((epoch * 8 + batch) * 8 + rank) * 4;
            let parts =
                [(start..start + 3, Sync::Accumulate), (start + 3..start + 4, Sync::Reduce)];
            for (samples, sync) in parts {
                let weight = samples.end - samples.start;
                ddp.backward(&model.loss_sum(samples), weight as f64, sync).unwrap();
            }
            optimizer.step(Some(1.0)).unwrap();
        }
        join.finish(|| optimizer.step(Some(1.0)).map(drop)).unwrap();
        let start = 1000 + rank * 2;
        ddp.backward(&model.loss_sum(start..start + 2), 2.0, Sync::Reduce).unwrap();
        optimizer.step(None).unwrap();
    }
    ddp.compare_parameters().unwrap();
    model.bits()
}

#[test]
fn ranks_that_run_out_of_batches_gather_with_the_others() {
    for batches in [vec![3], vec![1, 4], vec![2, 0, 3], vec![0, 3, 1, 2]] {
        let of = batches.clone();
        assert_alike(batches.len(), move |group, options| uneven(group, options, &of));
    }
}

/// A model of which each sample uses one of three branches; some of it may be frozen.
struct Branches {
    vs: nn::VarStore,
    branches: Vec<nn::Linear>,
    head: nn::Linear,
}

impl Branches {
    fn new(frozen: &[&str]) -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let linear = |name: String, from, to| {
            nn::linear(vs.root() / name, from, to, nn::LinearConfig::default())
        };
        let branches = (0..3).map(|at| linear(format!("branch{at}"), 30, 50)).collect();
        let head = linear("head".to_owned(), 50, 1);
        let mut all: Vec<_> = vs.variables().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        for (seed, (name, variable)) in (0..).zip(&mut all) {
            let values = pattern(&variable.size(), seed) * 0.2;
            tch::no_grad(|| variable.copy_(&values));
            if frozen.contains(&name.as_str()) {
                let _same = variable.set_requires_grad(false);
            }
        }
        Self { vs, branches, head }
    }

    fn loss(&self, branch: usize, seed: i64) -> Tensor {
        let x = pattern(&[3, 30], seed);
        let hidden = self.branches[branch].forward(&x).tanh();
        (self.head.forward(&hidden) - 1.0).square().sum(Kind::Float)
    }

    fn bits(&self) -> Vec<u32> {
        let mut all: Vec<_> = self.vs.variables().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let flat: Vec<Tensor> = all.iter().map(|(_, v)| v.detach().reshape([-1])).collect();
        values(&Tensor::cat(&flat, 0)).into_iter().map(f32::to_bits).collect()
    }
}

/// Each rank takes another branch in each micro-batch; rank 0 alone looks at a loss and at all weights between steps.
fn branched(mut group: Group, options: DdpOptions, frozen: &[&str]) -> Vec<u32> {
    let model = Branches::new(frozen);
    let options = DdpOptions { find_unused_parameters: true, ..options };
    let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
    let mut optimizer = adamw(&ddp);
    let rank = group.rank();
    for step in 0..5 {
        for (part, sync) in [(0, Sync::Accumulate), (1, Sync::Reduce)] {
            let branch = (rank * (step + 1) + step + part) % 3;
            // One of them sits a micro-batch out.
            if part == 1 || !(rank + step).is_multiple_of(3) {
                let seed = (step * 100 + part * 10 + rank) as i64;
                ddp.backward(&model.loss(branch, seed), 3.0, sync).unwrap();
            }
        }
        optimizer.step(Some(1.0)).unwrap();
        if rank == 0 {
            let loss = tch::no_grad(|| model.loss(step % 3, 7).double_value(&[]));
            assert!(loss.is_finite() && !model.bits().is_empty());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
    model.bits()
}

#[test]
fn ranks_gather_what_the_graph_of_any_of_them_needs() {
    for world_size in [1, 2, 3, 4] {
        assert_alike(world_size, |group, options| branched(group, options, &[]));
    }
}

#[test]
fn ranks_gather_frozen_weights_that_the_graph_of_any_of_them_needs() {
    const FROZEN: [&str; 4] =
        ["branch0.weight", "branch1.weight", "branch1.bias", "branch2.weight"];
    for world_size in [1, 2, 3, 4] {
        assert_alike(world_size, |group, options| branched(group, options, &FROZEN));
    }
}

#[test]
fn micro_batches_of_different_graphs_are_exchanged_by_themselves() {
    for world_size in [2, 3] {
        let of = |zero| {
            run(world_size, move |mut group| {
                let model = Branches::new(&[]);
                let options = DdpOptions {
                    find_unused_parameters: true,
                    shard_accumulation: true,
                    ..options(zero)
                };
                let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
                let mut optimizer = adamw(&ddp);
                for step in 0..3 {
                    for (part, sync) in [(0, Sync::Accumulate), (1, Sync::Reduce)] {
                        let branch = (group.rank() + step + part) % 3;
                        let seed = (step * 100 + part * 10 + group.rank()) as i64;
                        ddp.backward(&model.loss(branch, seed), 3.0, sync).unwrap();
                    }
                    optimizer.step(Some(1.0)).unwrap();
                }
                model.bits()
            })
        };
        let (two, three) = (of(Zero::Two), of(Zero::Three));
        assert!(two == three && two.iter().all(|bits| *bits == two[0]), "{world_size} ranks");
    }
}

#[test]
fn a_rank_that_dies_is_named_where_the_others_meet() {
    let errors = run(2, |mut group| {
        let model = Model::new(0);
        let options = DdpOptions { find_unused_parameters: true, ..options(Zero::Three) };
        let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
        if group.rank() == 1 {
            drop(ddp);
            drop(group);
            return String::new();
        }
        support::panic_text(|| drop(model.loss_sum(0..2)))
    });
    assert!(errors[0].contains("rank 1"), "{}", errors[0]);
}
