//! Experts on several ranks against one process that has all of them: losses, gradients, what is dropped, and cases that are hard on an exchange.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test, numbers are small, and a thing of one rank is called as that of another"
)]

use std::collections::BTreeMap;

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::recompute::checkpointed_one;
use phalanx_ddp_core::{DdpOptions, Sync, Zero};
use phalanx_model_parallel::expert::{
    mixtral_expert, ExpertOptions, ExpertParallel, MixtureOfExperts, Parameters,
};
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::{linear, Builder, Init};
use phalanx_model_parallel::tensor::TensorParallel;
use phalanx_model_parallel::{Axes, Error, Mesh, MeshGroups, Shape};
use tch::{nn, Device, Kind, Tensor};

const WIDTH: i64 = 8;
const HIDDEN: i64 = 12;
const INIT: Init = Init::Normal { std: 0.4 };
const MOE: &str = "layers.0.block_sparse_moe";

/// What is compared.
#[derive(Clone, Copy)]
struct Case {
    options: ExpertOptions,
    /// By rank.
    tokens: [i64; 4],
    /// All tokens' first choice.
    favourite: Option<i64>,
    kind: Kind,
}

impl Case {
    fn of(experts: i64, top_k: i64, capacity_factor: Option<f64>) -> Self {
        let normalise = top_k > 1;
        let options = ExpertOptions { experts, top_k, normalise, capacity_factor, init: INIT };
        Self { options, tokens: [7, 4, 10, 5], favourite: None, kind: Kind::Double }
    }
}

struct Model {
    vs: nn::VarStore,
    projection: Tensor,
    layer: MixtureOfExperts,
}

/// Numbers by name.
type Numbers = BTreeMap<String, Vec<f64>>;

impl Model {
    fn new(case: &Case, ep: &ExpertParallel) -> Self {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let builder = Builder::new(vs.root(), 5);
        let projection = builder.whole("projection", &[WIDTH, WIDTH], INIT).unwrap();
        let inner = &(&(&builder / "layers") / 0) / "block_sparse_moe";
        let tp = ep.of_experts();
        let make = |b: &Builder<'_>, _: i64| mixtral_expert(b, (WIDTH, HIDDEN), INIT, &tp);
        let layer = MixtureOfExperts::new(&inner, WIDTH, case.options, ep, make).unwrap();
        if case.kind == Kind::Double {
            vs.double();
        }
        let gate = vs.variables()[&format!("{MOE}.gate.weight")].shallow_clone();
        tch::no_grad(|| {
            for expert in 0..case.options.experts {
                let pull = match case.favourite {
                    Some(favourite) if favourite == expert => 60.0,
                    Some(_) => -60.0,
                    None => 0.0,
                };
                drop(gate.get(expert).get(0).fill_(pull));
            }
        });
        Self { vs, projection, layer }
    }

    /// The sum of losses of a rank's tokens, and how many of their choices were dropped.
    fn loss(&self, case: &Case, rank: usize) -> (Tensor, i64) {
        let count = case.tokens[rank];
        let input = values(rank, count, case.kind);
        // The first column is 1, for the router to pull at.
        let is_first = Tensor::arange(WIDTH, (Kind::Int64, Device::Cpu)).eq(0).to_kind(case.kind);
        let x = linear(&input, &self.projection, None).unwrap() * (1 - &is_first) + is_first;
        let mixture = self.layer.forward(&x).unwrap();
        assert_eq!(mixture.output.size(), x.size());
        let errors = (x + &mixture.output - values(rank + 10, count, case.kind)).square();
        let balance = mixture.routing.balance_loss().unwrap() * 0.5;
        let auxiliary = balance + mixture.routing.z_loss().unwrap() * 0.01;
        (errors.sum(case.kind) + auxiliary * count as f64, mixture.dropped.iter().sum())
    }
}

/// A rank's groups for experts.
fn parallel(groups: &mut MeshGroups, sequence: bool) -> ExpertParallel {
    let mut taken = |axes| TensorGroup::new(groups.get(axes).unwrap().duplicate().unwrap());
    let group = taken(Axes::EP);
    ExpertParallel { group, tp: TensorParallel { group: taken(Axes::TP), sequence } }
}

fn values(rank: usize, count: i64, kind: Kind) -> Tensor {
    let key = Key::of_seed(rank as u64).named("x");
    let all: Vec<f64> =
        (0..(count * WIDTH).unsigned_abs()).map(|place| key.normal(place)).collect();
    Tensor::from_slice(&all).view([1, count, WIDTH]).to_kind(kind)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).reshape([-1])).unwrap()
}

/// All experts in one process, which takes the ranks' tokens one rank after the other.
fn alone(case: &Case, world_size: usize) -> Numbers {
    let model = Model::new(case, &ExpertParallel::alone().unwrap());
    let mut all = Numbers::new();
    for rank in 0..world_size {
        let (loss, dropped) = model.loss(case, rank);
        loss.backward();
        all.insert(format!("loss {rank}"), numbers(&loss));
        all.insert(format!("dropped {rank}"), vec![dropped as f64]);
    }
    let tokens: i64 = case.tokens[..world_size].iter().sum();
    for (name, variable) in model.vs.variables() {
        all.insert(name, numbers(&(variable.grad() / tokens as f64)));
    }
    all
}

/// The same on a mesh; what each rank has of it.
fn together(case: Case, shape: Shape, world_size: usize) -> Vec<Numbers> {
    run_ranks(world_size, move |mut world| {
        let rank = world.rank();
        let mut groups = Mesh::new(shape, world_size).unwrap().split(&mut world).unwrap();
        let ep = parallel(&mut groups, false);
        let model = Model::new(&case, &ep);
        let options = DdpOptions { bucket_bytes: vec![300, 900], ..DdpOptions::default() };
        let wrapped = Parameters::of(&model.vs).wrap(&mut groups, &options).unwrap();
        let (loss, dropped) = model.loss(&case, rank);
        wrapped.shared.backward(&loss, case.tokens[rank] as f64, Sync::Reduce).unwrap();
        let mut all = Numbers::new();
        all.insert(format!("loss {rank}"), numbers(&loss));
        all.insert(format!("dropped {rank}"), vec![dropped as f64]);
        for (name, variable) in model.vs.variables() {
            all.insert(name, numbers(&variable.grad()));
        }
        all
    })
}

/// How far a number may be from another way of adding up the same terms: as many roundings as a path through the layer has operations (its
/// longest products, the sum over all tokens), of sums of no more than all tokens' terms.
fn bound(case: &Case, expected: &[f64]) -> f64 {
    let eps = if case.kind == Kind::Double { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let tokens: i64 = case.tokens.iter().sum();
    let operations = 4 * WIDTH + 2 * HIDDEN + tokens;
    let largest = expected.iter().fold(1.0_f64, |largest, value| largest.max(value.abs()));
    eps * operations as f64 * tokens as f64 * largest
}

fn check(case: Case, shape: Shape, world_size: usize) {
    let expected = alone(&case, world_size);
    let actual = together(case, shape, world_size);
    let mut seen = 0;
    for (rank, of_rank) in actual.iter().enumerate() {
        for (name, values) in of_rank {
            let expected = &expected[name];
            assert_eq!(values.len(), expected.len());
            let bound = bound(&case, expected);
            for (value, expected) in values.iter().zip(expected) {
                let off = (value - expected).abs();
                assert!(off <= bound, "{shape}, rank {rank}, {name}: {value} and {expected}");
            }
        }
        seen += of_rank.keys().filter(|name| name.contains("experts")).count();
    }
    // Whole experts: each on as many ranks as there are copies.
    let copies = world_size / shape.ep;
    assert_eq!(seen, 3 * copies * usize::try_from(case.options.experts).unwrap());
}

/// Meshes of so many ranks, and numbers of experts that they can have.
fn meshes(world_size: usize) -> Vec<(Shape, i64)> {
    let one = Shape::default();
    match world_size {
        1 => vec![(one, 4)],
        2 => vec![(Shape { dp_shard: 2, ep: 2, ..one }, 4), (Shape { dp_shard: 2, ..one }, 4)],
        3 => vec![(Shape { dp_shard: 3, ep: 3, ..one }, 3)],
        _ => vec![
            (Shape { dp_shard: 4, ep: 4, ..one }, 8),
            (Shape { dp_shard: 4, ep: 2, ..one }, 4),
            (Shape { dp_replicate: 2, dp_shard: 2, ep: 2, ..one }, 4),
        ],
    }
}

#[test]
fn losses_and_gradients_are_those_of_one_process() {
    for world_size in 1..=4 {
        for (shape, experts) in meshes(world_size) {
            for top_k in [1, 2] {
                for capacity_factor in [None, Some(1.0), Some(0.3)] {
                    let case = Case::of(experts, top_k, capacity_factor);
                    check(case, shape, world_size);
                    if capacity_factor.is_none() {
                        check(Case { kind: Kind::Float, ..case }, shape, world_size);
                    }
                }
            }
        }
    }
}

/// What the router does not even out: everything to one expert and nothing to the others, and ranks without tokens.
#[test]
fn all_tokens_to_one_expert_and_ranks_without_tokens_are_computed_as_well() {
    for world_size in [1, 2, 4] {
        for (shape, experts) in meshes(world_size) {
            for favourite in [0, experts - 1] {
                for top_k in [1, 2] {
                    let case =
                        Case { favourite: Some(favourite), ..Case::of(experts, top_k, None) };
                    check(case, shape, world_size);
                    let case = Case { tokens: [3, 0, 9, 0], ..case };
                    check(case, shape, world_size);
                    let capacity_factor = Some(1.0);
                    let options = ExpertOptions { capacity_factor, ..case.options };
                    check(Case { options, ..case }, shape, world_size);
                }
            }
        }
    }
}

#[test]
fn a_capacity_drops_tokens_and_dropless_none() {
    let dropped = |capacity_factor| -> f64 {
        let case = Case { favourite: Some(1), ..Case::of(4, 1, capacity_factor) };
        alone(&case, 3)
            .iter()
            .filter(|(name, _)| name.starts_with("dropped"))
            .map(|(_, n)| n[0])
            .sum()
    };
    assert_eq!(dropped(None).to_bits(), 0.0_f64.to_bits());
    // Of 7, 4 and 10 tokens one expert takes ⌈7/4⌉, ⌈4/4⌉ and ⌈10/4⌉.
    assert_eq!(dropped(Some(1.0)).to_bits(), (21.0_f64 - 6.0).to_bits());
}

/// Libraries choose their kernels at their first product: before ranks compute side by side.
fn compute_once() {
    tch::set_num_threads(1);
    let of = |shape: &[i64], kind| Tensor::ones(shape, (kind, Device::Cpu));
    for kind in [Kind::Float, Kind::Double] {
        let weight = of(&[16, 16], kind).set_requires_grad(true);
        of(&[4, 16], kind).matmul(&weight).softmax(-1, kind).sum(kind).backward();
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    compute_once();
    let case = Case { kind: Kind::Float, ..Case::of(4, 2, Some(1.2)) };
    let shape = Shape { dp_shard: 4, ep: 2, ..Shape::default() };
    let bits = || -> Vec<u64> {
        let all = together(case, shape, 4);
        all.into_iter().flat_map(BTreeMap::into_values).flatten().map(f64::to_bits).collect()
    };
    assert_eq!(bits(), bits());
}

#[test]
fn a_layer_that_is_computed_again_in_the_backward_has_the_same_bits() {
    compute_once();
    let case = Case { kind: Kind::Float, ..Case::of(4, 2, Some(1.2)) };
    run_ranks(2, move |world| {
        let ep =
            ExpertParallel { group: TensorGroup::new(world), ..ExpertParallel::alone().unwrap() };
        let rank = ep.group.rank();
        let gradients = |again: bool| {
            let Model { vs, layer, .. } = Model::new(&case, &ep);
            let x = values(rank, case.tokens[rank], case.kind).set_requires_grad(true);
            let forward = move |x: &Tensor| -> phalanx_ddp_core::Result<Tensor> {
                let mixture = layer.forward(&x.tanh())?;
                Ok(mixture.output + mixture.routing.balance_loss()?)
            };
            let output =
                if again { checkpointed_one(&x, forward).unwrap() } else { forward(&x).unwrap() };
            output.square().sum(case.kind).backward();
            let mut all: Vec<_> =
                vs.variables().into_iter().filter(|(_, v)| v.grad().defined()).collect();
            all.sort_by(|left, right| left.0.cmp(&right.0));
            all.into_iter().map(|(_, v)| v.grad()).chain([x.grad()]).collect::<Vec<_>>()
        };
        for (kept, again) in gradients(false).iter().zip(&gradients(true)) {
            assert!(kept.equal(again));
        }
    });
}

#[test]
fn variables_have_the_names_of_mixtral_and_the_global_number_of_their_expert() {
    let names = run_ranks(2, |world| {
        let ep =
            ExpertParallel { group: TensorGroup::new(world), ..ExpertParallel::alone().unwrap() };
        let model = Model::new(&Case::of(4, 2, None), &ep);
        let mut names: Vec<String> = model.vs.variables().into_keys().collect();
        names.sort();
        names
    });
    let expert =
        |number: i64| ["w1", "w2", "w3"].map(|w| format!("{MOE}.experts.{number}.{w}.weight"));
    let shared = [format!("{MOE}.gate.weight"), "projection".to_owned()];
    assert_eq!(names[0], [expert(0).as_slice(), &expert(1), &shared].concat());
    assert_eq!(names[1], [expert(2).as_slice(), &expert(3), &shared].concat());
}

/// The formula as transformers has it: a mean over tokens of one-hot choices, times mean probabilities.
#[test]
fn the_balance_loss_is_that_of_mixtral() {
    let case = Case::of(4, 2, None);
    let model = Model::new(&case, &ExpertParallel::alone().unwrap());
    let routing = model.layer.forward(&values(0, 9, Kind::Double)).unwrap().routing;
    let shares =
        routing.experts().one_hot(4).to_kind(Kind::Double).mean_dim(0, false, None::<Kind>);
    let means = routing.probabilities().mean_dim(0, false, None::<Kind>);
    let expected = (shares * means.unsqueeze(0)).sum(Kind::Double).double_value(&[]) * 4.0;
    let actual = routing.balance_loss().unwrap().double_value(&[]);
    // Sums of 9 tokens and 4 experts, all terms positive.
    assert!((actual - expected).abs() <= 20.0 * f64::EPSILON * expected, "{actual}, {expected}");
    // Equal shares: k.
    assert!(actual > 1.0 && routing.load().iter().sum::<i64>() == 18);
}

#[test]
fn settings_that_cannot_be_are_errors_that_say_what_can() {
    let case = Case::of(4, 2, None);
    run_ranks(3, move |world| {
        let ep =
            ExpertParallel { group: TensorGroup::new(world), ..ExpertParallel::alone().unwrap() };
        let tp = ep.of_experts();
        let vs = nn::VarStore::new(Device::Cpu);
        let builder = &Builder::new(vs.root(), 5) / "moe";
        let made = |options: ExpertOptions| {
            let make = |b: &Builder<'_>, _: i64| mixtral_expert(b, (WIDTH, HIDDEN), INIT, &tp);
            MixtureOfExperts::new(&builder, WIDTH, options, &ep, make)
        };
        let message = made(case.options).unwrap_err().to_string();
        assert_eq!(message, "moe: experts 4 cannot be divided by ep 3; possible: 1, 2, 4");
        let options = ExpertOptions { top_k: 7, experts: 6, ..case.options };
        assert!(made(options).unwrap_err().to_string().contains("top_k 7 of 6 experts"));
        let options = ExpertOptions { experts: 6, capacity_factor: Some(0.0), ..case.options };
        assert!(matches!(made(options), Err(Error::BadSetting { .. })));
        let layer = made(ExpertOptions { experts: 6, ..case.options }).unwrap();
        let odd = Tensor::zeros([2, WIDTH + 1], (Kind::Float, Device::Cpu));
        let message = layer.forward(&odd).unwrap_err().to_string();
        assert!(message.contains("moe") && message.contains("[2, 9]"), "{message}");
    });
}

/// Two steps under every stage of sharding: the mean gradient that reaches the optimizer is the same.
#[test]
fn sharded_experts_train_as_whole_ones() {
    use phalanx_ddp_core::optim::{Optimizer, ParameterGroups, Sgd};
    let case = Case::of(4, 2, None);
    let trained = |zero: Zero| {
        run_ranks(4, move |mut world| {
            let rank = world.rank();
            let shape = Shape { dp_shard: 4, ep: 2, ..Shape::default() };
            let mut groups = Mesh::new(shape, 4).unwrap().split(&mut world).unwrap();
            let ep = parallel(&mut groups, false);
            let model = Model::new(&case, &ep);
            let options = DdpOptions { zero, ..DdpOptions::default() };
            let wrapped = Parameters::of(&model.vs).wrap(&mut groups, &options).unwrap();
            let experts = wrapped.experts.as_ref().unwrap();
            let sgd = |ddp| {
                Optimizer::new(ddp, Sgd { lr: 0.1, ..Sgd::default() }, ParameterGroups::default())
            };
            let mut optimizers = [sgd(&wrapped.shared).unwrap(), sgd(experts).unwrap()];
            let mut losses = Vec::new();
            for _ in 0..3 {
                let (loss, _) = model.loss(&case, rank);
                let weight = case.tokens[rank] as f64;
                wrapped.shared.backward(&loss, weight, Sync::Reduce).unwrap();
                for optimizer in &mut optimizers {
                    optimizer.step(None).unwrap();
                }
                losses.push(loss.double_value(&[]).to_bits());
            }
            losses
        })
    };
    let whole = trained(Zero::Off);
    for zero in [Zero::One, Zero::Two, Zero::Three] {
        assert_eq!(trained(zero), whole, "{zero:?}");
    }
}

/// Experts whose matrices are cut over two ranks, and tokens too: outputs, and gradients of inputs, of the router and of the parts of experts.
#[test]
fn experts_that_are_cut_compute_as_whole_ones() {
    let input = || values(0, 6, Kind::Double).set_requires_grad(true);
    let outer = values(1, 6, Kind::Double);
    for favourite in [None, Some(2)] {
        let case = Case { favourite, ..Case::of(4, 2, None) };
        let whole = Model::new(&case, &ExpertParallel::alone().unwrap());
        let x = input();
        let output = whole.layer.forward(&x).unwrap().output;
        (&output * &outer).sum(Kind::Double).backward();
        let mut expected = Numbers::new();
        expected.insert("output".to_owned(), numbers(&output));
        expected.insert("x".to_owned(), numbers(&x.grad()));
        for (name, variable) in whole.vs.variables() {
            let grad = if variable.grad().defined() { variable.grad() } else { continue };
            // Both ranks have 6 of the 12 columns.
            let half = |rank: i64| match (name.contains("w2"), name.contains("experts")) {
                (_, false) => grad.shallow_clone(),
                (true, true) => grad.narrow(1, 6 * rank, 6),
                (false, true) => grad.narrow(0, 6 * rank, 6),
            };
            for rank in 0..2 {
                expected.insert(format!("{name} {rank}"), numbers(&half(rank)));
            }
        }
        for sequence in [false, true] {
            let ranks = run_ranks(4, move |mut world| {
                let shape = Shape { dp_shard: 2, ep: 2, tp: 2, ..Shape::default() };
                let mut groups = Mesh::new(shape, 4).unwrap().split(&mut world).unwrap();
                let parallel = parallel(&mut groups, sequence);
                let model = Model::new(&case, &parallel);
                let at = world.rank() as i64 % 2;
                // Both ranks of `ep` compute the same tokens: an expert's gradients are twice those of one.
                let (x, outer) = (input(), values(1, 6, Kind::Double));
                let cut = |tensor: &Tensor| match sequence {
                    true => tensor.narrow(1, 3 * at, 3),
                    false => tensor.shallow_clone(),
                };
                let output = model.layer.forward(&cut(&x)).unwrap().output;
                (&output * cut(&outer)).sum(Kind::Double).backward();
                let mut all = Numbers::new();
                all.insert("output".to_owned(), numbers(&output));
                all.insert("x".to_owned(), numbers(&cut(&x.grad())));
                for (name, variable) in model.vs.variables() {
                    if variable.grad().defined() {
                        let factor = if name.contains("experts") { 0.5 } else { 1.0 };
                        all.insert(format!("{name} {at}"), numbers(&(variable.grad() * factor)));
                    }
                }
                all
            });
            for (rank, all) in ranks.iter().enumerate() {
                for (name, values) in all {
                    let whole = &expected[name];
                    let bound = bound(&case, whole);
                    // With tokens cut a rank has the first half of them, or the second.
                    let start =
                        if values.len() < whole.len() { rank % 2 * values.len() } else { 0 };
                    for (value, expected) in values.iter().zip(&whole[start..]) {
                        assert!((value - expected).abs() <= bound, "{name}: {value}, {expected}");
                    }
                }
            }
        }
    }
}
