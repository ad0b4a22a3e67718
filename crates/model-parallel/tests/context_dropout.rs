//! Attention that drops probabilities, over sequences that are cut over ranks: what one rank drops, they drop.

#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a failed unwrap is a failed test, and numbers are small"
)]

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_model_parallel::context::{HeadsAttention, Order, RingAttention, Sequence};
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::Pass;
use phalanx_model_parallel::tensor::{Attend, AttentionDropout, Dropout};
use tch::{Kind, Tensor};

/// Divisible by twice each world size.
const TOKENS: i64 = 24;
const HEAD_DIM: i64 = 8;
/// Factors of what is kept are 2.
const P: f64 = 0.5;

#[derive(Clone, Copy, Debug)]
enum Way {
    Ring,
    Heads,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    way: Way,
    order: Order,
    is_causal: bool,
    /// Of queries, and of keys.
    heads: [i64; 2],
    kind: Kind,
}

/// Numbers that `rounded` has.
fn inputs(case: &Case, rounded: Kind) -> [Tensor; 4] {
    let [heads, kv_heads] = case.heads;
    [("q", heads), ("k", kv_heads), ("v", kv_heads), ("outer", heads)].map(|(name, heads)| {
        let key = Key::of_seed(1).named(name);
        let shape = [2, heads, TOKENS, HEAD_DIM];
        let count = shape.iter().product::<i64>().unsigned_abs();
        let all: Vec<f64> = (0..count).map(|place| key.normal(place)).collect();
        Tensor::from_slice(&all).view(shape).to_kind(rounded).to_kind(case.kind)
    })
}

/// Of all tokens, from a rank's: the output and the gradients of queries, keys and values.
fn computed(case: &Case, group: Group, (rounded, drops): (Kind, bool)) -> [Tensor; 4] {
    let sequence = Sequence::new(TensorGroup::new(group), case.order);
    let [q, k, v, outer] = inputs(case, rounded).map(|tensor| sequence.cut(&tensor, 2).unwrap());
    let [q, k, v] = [q, k, v].map(|tensor| tensor.set_requires_grad(true));
    let dropout = Dropout::new(P, Key::of_seed(4)).unwrap();
    let dropout = drops.then_some(AttentionDropout { dropout, first_head: 5 });
    let own = sequence.clone();
    let attention: Box<dyn Attend> = match case.way {
        Way::Ring => {
            Box::new(RingAttention::new("attn", own, case.is_causal).with_dropout(dropout))
        }
        Way::Heads => {
            Box::new(HeadsAttention::new("attn", own, case.is_causal).with_dropout(dropout))
        }
    };
    let output = attention.attend(&q, &k, &v, &Pass::training(3, 7)).unwrap();
    (&output * outer).sum(case.kind).backward();
    [output.detach(), q.grad(), k.grad(), v.grad()]
        .map(|tensor| sequence.join(&tensor, 2).unwrap().to_kind(Kind::Double))
}

/// By one rank, which computes the products one by one, in f64.
fn expected(case: &Case, drops: bool) -> [Tensor; 4] {
    let single = Group::single(phalanx_comm::GroupOptions::default()).unwrap();
    computed(&Case { kind: Kind::Double, ..*case }, single, (case.kind, drops))
}

/// As in `context.rs`: products of roundings through scores, sums over tokens. All that is kept counts twice.
fn bounds(case: &Case, world_size: usize) -> [f64; 4] {
    let largest = |tensor: &Tensor| tensor.to_kind(Kind::Double).abs().max().double_value(&[]);
    let [q, k, v, outer] = inputs(case, case.kind).map(|tensor| largest(&tensor));
    let (tokens, dim) = (TOKENS as f64, HEAD_DIM as f64);
    let (scale, per_key) = (dim.sqrt().recip(), tokens * (case.heads[0] / case.heads[1]) as f64);
    let eps = if case.kind == Kind::Double { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let of_scores = 2.0 * (dim + 2.0) * dim * q * k * scale;
    let relative = eps * (of_scores + 4.0 * (per_key + dim) + 8.0 * world_size as f64);
    let g = dim * outer * v;
    [v, 2.0 * g * k * scale, 2.0 * g * q * scale * per_key, per_key * outer]
        .map(|size| relative * size / (1.0 - P))
}

fn check(case: Case) {
    let exact = expected(&case, true);
    for world_size in 1..=4 {
        let bounds = bounds(&case, world_size);
        let ranks = run_ranks(world_size, move |group| computed(&case, group, (case.kind, true)));
        for all in &ranks {
            for (at, what) in ["output", "q", "k", "v"].into_iter().enumerate() {
                let off = (&all[at] - &exact[at]).abs().max().double_value(&[]);
                assert!(off <= bounds[at], "{case:?}, {world_size} ranks, {what}: {off:.1e} off");
            }
        }
    }
    let whole = expected(&case, false);
    assert!((&whole[0] - &exact[0]).abs().max().double_value(&[]) > 0.1, "something is dropped");
}

/// All cases of a way of attending.
fn check_all(way: Way, all_heads: &[[i64; 2]]) {
    for order in [Order::Balanced, Order::Consecutive] {
        for is_causal in [true, false] {
            for &heads in all_heads {
                for kind in [Kind::Double, Kind::Float] {
                    check(Case { way, order, is_causal, heads, kind });
                }
            }
        }
    }
}

#[test]
fn a_ring_drops_what_one_rank_drops() {
    check_all(Way::Ring, &[[3, 3], [4, 2], [5, 1]]);
}

#[test]
fn heads_that_are_exchanged_drop_what_one_rank_drops() {
    check_all(Way::Heads, &[[12, 12], [24, 12]]);
}

#[test]
fn outside_of_training_nothing_is_dropped() {
    let case = Case {
        way: Way::Ring,
        order: Order::Balanced,
        is_causal: true,
        heads: [2, 2],
        kind: Kind::Float,
    };
    run_ranks(2, move |group| {
        let sequence = Sequence::new(TensorGroup::new(group), case.order);
        let [q, k, v, _] = inputs(&case, case.kind).map(|tensor| sequence.cut(&tensor, 2).unwrap());
        let plain = RingAttention::new("attn", sequence, true);
        let dropout = Dropout::new(P, Key::of_seed(4)).unwrap();
        let drops = plain.clone().with_dropout(Some(AttentionDropout { dropout, first_head: 0 }));
        let pass = Pass::evaluation();
        let attended = Attend::attend(&drops, &q, &k, &v, &pass).unwrap();
        assert!(attended.equal(&plain.attend(&q, &k, &v).unwrap()));
    });
}
