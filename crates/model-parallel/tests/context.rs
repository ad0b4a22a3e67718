//! Attention over sequences that are cut over ranks against that of one rank, and a model that trains so.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test, numbers are small, and a thing of one rank is called as that of another"
)]

use std::ops::Range;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::recompute::checkpointed;
use phalanx_ddp_core::{Ddp, DdpOptions, Sync};
use phalanx_model_parallel::context::{HeadsAttention, Order, RingAttention, Sequence};
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::{linear, Builder, Init, Pass};
use phalanx_model_parallel::tensor::{Attend, IGNORED};
use phalanx_model_parallel::Error;
use tch::{nn, Device, Kind, Reduction, Tensor};

/// Divisible by twice each world size.
const TOKENS: i64 = 24;
const HEAD_DIM: i64 = 8;
const ORDERS: [Order; 2] = [Order::Balanced, Order::Consecutive];

#[derive(Clone, Copy, Debug)]
enum Way {
    Ring,
    Heads,
}

fn attention(way: Way, sequence: &Sequence, is_causal: bool) -> Box<dyn Attend> {
    let sequence = sequence.clone();
    match way {
        Way::Ring => Box::new(RingAttention::new("attn", sequence, is_causal)),
        Way::Heads => Box::new(HeadsAttention::new("attn", sequence, is_causal)),
    }
}

/// A case: how it is cut, and what is attended to.
#[derive(Clone, Copy, Debug)]
struct Case {
    way: Way,
    order: Order,
    is_causal: bool,
    /// Of queries, and of keys.
    heads: [i64; 2],
    kind: Kind,
}

fn values(name: &str, shape: &[i64], kind: Kind) -> Tensor {
    let key = Key::of_seed(1).named(name);
    let count = shape.iter().product::<i64>().unsigned_abs();
    let all: Vec<f64> = (0..count).map(|place| key.normal(place)).collect();
    Tensor::from_slice(&all).view(shape).to_kind(kind)
}

/// Queries, keys, values, and what outputs are multiplied by: of all tokens.
fn inputs(case: &Case) -> [Tensor; 4] {
    let [heads, kv_heads] = case.heads;
    [("q", heads), ("k", kv_heads), ("v", kv_heads), ("outer", heads)]
        .map(|(name, heads)| values(name, &[2, heads, TOKENS, HEAD_DIM], case.kind))
}

/// The output, and the gradients of queries, keys and values: of all tokens, by one rank in f64.
fn expected(case: &Case) -> [Tensor; 4] {
    let [q, k, v, outer] = inputs(case).map(|tensor| tensor.to_kind(Kind::Double));
    let [q, k, v] = [q, k, v].map(|tensor| tensor.set_requires_grad(true));
    let group = case.heads[0] / case.heads[1];
    let repeated = |tensor: &Tensor| tensor.repeat_interleave_self_int(group, 1, None);
    let scores = q.matmul(&repeated(&k).transpose(-2, -1)) / (HEAD_DIM as f64).sqrt();
    let later = Tensor::ones([TOKENS, TOKENS], (Kind::Bool, Device::Cpu)).triu(1);
    let scores =
        if case.is_causal { scores.masked_fill(&later, f64::NEG_INFINITY) } else { scores };
    let output = scores.softmax(-1, Kind::Double).matmul(&repeated(&v));
    (&output * outer).sum(Kind::Double).backward();
    [output.detach(), q.grad(), k.grad(), v.grad()]
}

/// The same from a rank's tokens.
fn computed(case: &Case, group: Group) -> [Tensor; 4] {
    let sequence = Sequence::new(TensorGroup::new(group), case.order);
    let cut = |tensor: &Tensor| sequence.cut(tensor, 2).unwrap();
    let [q, k, v, outer] = inputs(case).map(|tensor| cut(&tensor));
    let [q, k, v] = [q, k, v].map(|tensor| tensor.set_requires_grad(true));
    let attention = attention(case.way, &sequence, case.is_causal);
    let output = attention.attend(&q, &k, &v, &Pass::evaluation()).unwrap();
    assert_eq!((output.size(), output.kind()), (q.size(), case.kind));
    (&output * outer).sum(case.kind).backward();
    [output.detach(), q.grad(), k.grad(), v.grad()]
        .map(|tensor| sequence.join(&tensor, 2).unwrap().to_kind(Kind::Double))
}

/// How far each may be from the exact result.
///
/// A score is a sum of d products of roundings each, and its error is one of the probability's exponent; sums over tokens add a rounding a term. An output is a mean of values; a
/// gradient of a value a sum of outer gradients by probabilities, at most one a query. That of a score is a probability times the difference of two sums of d products, both at most g; those of
/// queries and keys are sums of these, whose magnitudes add up to 2 g for a query. In bf16 results are rounded once, and so is the output that the backward uses; libtorch's kernel rounds probabilities and the gradients of scores as well.
fn bounds(case: &Case, world_size: usize) -> [f64; 4] {
    let largest = |tensor: &Tensor| tensor.to_kind(Kind::Double).abs().max().double_value(&[]);
    let [q, k, v, outer] = inputs(case).map(|tensor| largest(&tensor));
    let (tokens, dim) = (TOKENS as f64, HEAD_DIM as f64);
    let (scale, per_key) = (dim.sqrt().recip(), tokens * (case.heads[0] / case.heads[1]) as f64);
    let (eps, narrow) = match case.kind {
        Kind::Double => (f64::EPSILON, 0.0),
        Kind::Float => (f64::from(f32::EPSILON), 0.0),
        // Seven bits behind the leading one.
        _ => (f64::from(f32::EPSILON), 8.0 * 2.0_f64.powi(-8)),
    };
    let of_scores = 2.0 * (dim + 2.0) * dim * q * k * scale;
    let relative = eps * (of_scores + 4.0 * (per_key + dim) + 8.0 * world_size as f64) + narrow;
    let g = dim * outer * v;
    [v, 2.0 * g * k * scale, 2.0 * g * q * scale * per_key, per_key * outer]
        .map(|size| relative * size)
}

fn check(case: Case) {
    let exact = expected(&case);
    for world_size in 1..=4 {
        let bounds = bounds(&case, world_size);
        let ranks = run_ranks(world_size, move |group| computed(&case, group));
        for all in &ranks {
            for (at, what) in ["output", "q", "k", "v"].into_iter().enumerate() {
                let off = (&all[at] - &exact[at]).abs().max().double_value(&[]);
                assert!(off <= bounds[at], "{case:?}, {world_size} ranks, {what}: {off:.1e} off");
            }
        }
    }
}

fn check_all(way: Way, heads: &[[i64; 2]]) {
    for order in ORDERS {
        for is_causal in [true, false] {
            for &heads in heads {
                for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
                    check(Case { way, order, is_causal, heads, kind });
                }
            }
        }
    }
}

#[test]
fn a_ring_attends_as_one_rank() {
    check_all(Way::Ring, &[[3, 3], [4, 2], [5, 1]]);
}

#[test]
fn heads_that_are_exchanged_attend_as_one_rank() {
    check_all(Way::Heads, &[[12, 12], [24, 12]]);
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
    for way in [Way::Ring, Way::Heads] {
        let order = Order::Balanced;
        let case = Case { way, order, is_causal: true, heads: [12, 12], kind: Kind::Float };
        let run = || run_ranks(4, move |group| computed(&case, group));
        for (first, second) in run().iter().zip(&run()) {
            for (first, second) in first.iter().zip(second) {
                assert!(first.equal(second), "{way:?}");
            }
        }
    }
}

#[test]
fn attention_that_is_computed_again_in_the_backward_has_the_same_bits() {
    compute_once();
    for way in [Way::Ring, Way::Heads] {
        run_ranks(3, move |group| {
            let order = Order::Balanced;
            let case = Case { way, order, is_causal: true, heads: [6, 3], kind: Kind::Float };
            let sequence = Sequence::new(TensorGroup::new(group), order);
            let [q, k, v, outer] = inputs(&case).map(|tensor| sequence.cut(&tensor, 2).unwrap());
            let gradients = |again: bool| {
                let leaves = [&q, &k, &v].map(|leaf| leaf.copy().set_requires_grad(true));
                let attention = attention(way, &sequence, true);
                let attend = move |inputs: &[Tensor]| -> phalanx_ddp_core::Result<Vec<Tensor>> {
                    let [q, k, v] = inputs else { return Ok(Vec::new()) };
                    // What is kept of its own operations is recomputed with it.
                    Ok(vec![attention.attend(&(q * 2.0), k, v, &Pass::evaluation())?.tanh()])
                };
                let output = match again {
                    true => checkpointed(&leaves.each_ref(), attend).unwrap().swap_remove(0),
                    false => attend(&leaves.each_ref().map(Tensor::shallow_clone))
                        .unwrap()
                        .swap_remove(0),
                };
                (output * &outer).sum(Kind::Float).backward();
                leaves.map(|leaf| leaf.grad())
            };
            for (kept, again) in gradients(false).iter().zip(&gradients(true)) {
                assert!(kept.equal(again), "{way:?}");
            }
        });
    }
}

#[test]
fn ranks_have_the_tokens_that_their_order_says() {
    run_ranks(4, |group| {
        let rank = group.rank();
        let group = TensorGroup::new(group);
        let all = Tensor::arange(16, (Kind::Int64, Device::Cpu)).view([1, 16]);
        for (order, expected) in [
            (Order::Balanced, [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
            (Order::Consecutive, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ] {
            let sequence = Sequence::new(group.clone(), order);
            let mine = sequence.cut(&all, -1).unwrap();
            assert_eq!(Vec::<i64>::try_from(mine.get(0)).unwrap(), expected[rank]);
            assert!(sequence.positions(16).unwrap().equal(&mine.get(0)));
            assert!(sequence.join(&mine, 1).unwrap().equal(&all));
        }
    });
}

#[test]
fn what_cannot_be_cut_is_an_error_that_says_what_can() {
    run_ranks(4, |group| {
        let group = TensorGroup::new(group);
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let text = |order, len: i64| {
            let sequence = Sequence::new(group.clone(), order);
            sequence.cut(&zeros(&[2, len]), 1).unwrap_err().to_string()
        };
        let message = text(Order::Balanced, 10);
        assert!(message.contains("10 tokens for 4 ranks"), "{message}");
        assert!(message.contains("a multiple of 8, as 8 or 16 is"), "{message}");
        assert!(text(Order::Consecutive, 3).contains("a multiple of 4, as 4 is"));
        let sequence = Sequence::new(group.clone(), Order::Balanced);
        let attend = |way, shapes: [&[i64]; 3]| {
            let [q, k, v] = shapes.map(zeros);
            attention(way, &sequence, true).attend(&q, &k, &v, &Pass::evaluation()).unwrap_err()
        };
        let odd: &[i64] = &[1, 4, 3, 8];
        let message = attend(Way::Ring, [odd; 3]).to_string();
        assert!(message.contains("attn: 3 tokens on a rank"), "{message}");
        let six: &[i64] = &[1, 6, 4, 8];
        let message = attend(Way::Heads, [six; 3]).to_string();
        assert_eq!(message, "attn: heads 6 cannot be divided by cp 4; possible: 1, 2, 3, 6");
        let (eight, two): (&[i64], &[i64]) = (&[1, 8, 4, 8], &[1, 2, 4, 8]);
        let message = attend(Way::Heads, [eight, two, two]).to_string();
        assert!(message.contains("heads of keys and values 2"), "{message}");
        for shapes in [[six, two, six], [six, eight, eight], [odd, six, six]] {
            assert!(matches!(attend(Way::Ring, shapes), Error::BadInput { .. }));
        }
    });
}

const VOCABULARY: i64 = 11;
const WIDTH: i64 = 32;

/// A model of one block, in f64.
struct Model {
    vs: nn::VarStore,
}

impl Model {
    fn new() -> Self {
        let mut vs = nn::VarStore::new(Device::Cpu);
        let builder = Builder::new(vs.root(), 3);
        let init = Init::Normal { std: 0.3 };
        for (name, shape) in [
            ("words", [VOCABULARY, WIDTH]),
            ("positions", [TOKENS, WIDTH]),
            ("qkv", [3 * WIDTH, WIDTH]),
            ("out", [WIDTH, WIDTH]),
        ] {
            drop(builder.whole(name, &shape, init).unwrap());
        }
        vs.double();
        Self { vs }
    }

    /// The sum of losses of a rank's tokens, and how many of them have one.
    fn loss(
        &self,
        sequence: &Sequence,
        attention: &dyn Attend,
        samples: Range<i64>,
    ) -> (Tensor, f64) {
        let variables = self.vs.variables();
        let rows: Vec<Tensor> = samples
            .map(|sample| {
                let at = Tensor::arange(TOKENS + 1, (Kind::Int64, Device::Cpu)) + 7 * sample;
                (&at * &at * 3 + &at).remainder(VOCABULARY)
            })
            .collect();
        let all = Tensor::stack(&rows, 0);
        let ids = sequence.cut(&all.narrow(1, 0, TOKENS), 1).unwrap();
        let targets = all.narrow(1, 1, TOKENS);
        // The first tokens are a prompt: ranks have other numbers of losses.
        let prompt = Tensor::arange(TOKENS, (Kind::Int64, Device::Cpu)).lt(5);
        let targets = sequence.cut(&targets.masked_fill(&prompt, IGNORED), 1).unwrap();
        let positions = sequence.positions(TOKENS).unwrap();
        let mut x = Tensor::embedding(&variables["words"], &ids, -1, false, false);
        x += variables["positions"].index_select(0, &positions);
        let by_heads =
            |part: &Tensor| part.view_([part.size()[0], -1, 4, WIDTH / 4]).transpose(1, 2);
        let [q, k, v] =
            <[Tensor; 3]>::try_from(linear(&x, &variables["qkv"], None).unwrap().chunk(3, -1))
                .unwrap()
                .map(|part| by_heads(&part));
        let attended = attention.attend(&q, &k, &v, &Pass::evaluation()).unwrap();
        let attended = attended.transpose(1, 2).flatten(2, 3);
        x += linear(&attended, &variables["out"], None).unwrap();
        let logits = linear(&x, &variables["words"], None).unwrap();
        let weight = None::<Tensor>;
        let loss = logits.view([-1, VOCABULARY]).cross_entropy_loss(
            &targets.reshape([-1]),
            weight,
            Reduction::Sum,
            IGNORED,
            0.0,
        );
        let count = targets.ne(IGNORED).sum(Kind::Int64).int64_value(&[]);
        (loss, count as f64)
    }

    fn gradients(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<_> =
            self.vs.variables().into_iter().map(|(name, v)| (name, v.grad().copy())).collect();
        all.sort_by(|left, right| left.0.cmp(&right.0));
        all
    }
}

/// Each rank sums the losses of its own tokens; `Ddp` adds gradients up and divides by all weights.
#[test]
fn a_model_trains_over_context_ranks_as_on_one() {
    let alone = Model::new();
    let single = Sequence::new(TensorGroup::new(single()), Order::Balanced);
    let plain = attention(Way::Ring, &single, true);
    let (loss, count) = alone.loss(&single, &*plain, 0..2);
    (&loss / count).backward();
    let (loss, expected) = (loss.double_value(&[]), alone.gradients());
    for way in [Way::Ring, Way::Heads] {
        for order in ORDERS {
            for world_size in [1, 2, 4] {
                let ranks = run_ranks(world_size, move |mut group| {
                    let model = Model::new();
                    let options = DdpOptions { bucket_bytes: vec![3000], ..DdpOptions::default() };
                    let ddp = Ddp::new(&model.vs, &mut group, options).unwrap();
                    let sequence = Sequence::new(TensorGroup::new(group), order);
                    let attention = attention(way, &sequence, true);
                    // Two micro-batches.
                    let (first, count) = model.loss(&sequence, &*attention, 0..1);
                    ddp.backward(&first, count, Sync::Accumulate).unwrap();
                    let (second, count) = model.loss(&sequence, &*attention, 1..2);
                    ddp.backward(&second, count, Sync::Reduce).unwrap();
                    ((first + second).double_value(&[]), model.gradients())
                });
                // Sums of at most so many terms in f64, each of which came through as many operations.
                let bound = |size: f64| size * f64::EPSILON * (4 * TOKENS * WIDTH) as f64;
                let sum: f64 = ranks.iter().map(|rank| rank.0).sum();
                assert!((sum - loss).abs() <= bound(loss), "{way:?}, {order:?}: {sum}, {loss}");
                for (_, gradients) in &ranks {
                    for ((name, gradient), (_, expected)) in gradients.iter().zip(&expected) {
                        let off = (gradient - expected).abs().max().double_value(&[]);
                        let size = expected.abs().max().double_value(&[]).max(1.0);
                        assert!(off <= bound(size), "{way:?}, {order:?}, {name}: {off:.1e} off");
                    }
                }
            }
        }
    }
}

fn single() -> Group {
    Group::single(phalanx_comm::GroupOptions::default()).unwrap()
}
