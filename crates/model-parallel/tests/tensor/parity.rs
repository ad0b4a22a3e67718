//! Whole models: losses, logits and gradients on every number of ranks are those of one.

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_model_parallel::layer::{Builder, Cuts, Pass};
use tch::{nn, Device, Tensor};

use crate::model::{Kind, Model, TOKENS, VOCABULARY};
use crate::plain;
use crate::support::{
    change, close, compute_once, gradients, parallel, part, same, values, whole_shape, Named,
};

const BATCH: i64 = 3;

/// One way of running a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) dropout: f64,
    pub(crate) sequence: bool,
}

/// What a rank has after a backward.
pub(crate) struct Outcome {
    pub(crate) first: Named,
    pub(crate) cuts: Cuts,
    pub(crate) loss: Tensor,
    pub(crate) logits: Tensor,
    pub(crate) gradients: Named,
}

pub(crate) fn ids(seed: i64) -> Tensor {
    let places = Tensor::arange(BATCH * TOKENS, (tch::Kind::Int64, Device::Cpu));
    (places.square() * 7 + places * (seed + 3) + seed).remainder(VOCABULARY).view([BATCH, TOKENS])
}

/// Some tokens have no target.
pub(crate) fn targets() -> Tensor {
    let targets = ids(5);
    targets.where_self(&ids(2).ne(4), &Tensor::from(-100_i64))
}

impl Case {
    pub(crate) fn run(self, group: Group) -> Outcome {
        let tp = parallel(group, self.sequence);
        let mut vs = nn::VarStore::new(Device::Cpu);
        let builder = Builder::new(vs.root(), 1);
        let model = Model::new(&builder, self.kind, self.dropout, &tp).unwrap();
        let copied = |(name, variable): (String, Tensor)| (name, variable.detach().copy());
        let first = vs.variables().into_iter().map(copied).collect();
        let cuts = builder.cuts();
        change(&mut vs, &cuts);
        let pass = Pass::training(3, 5);
        let hidden = model.hidden(&ids(0), &pass).unwrap();
        let loss = model.loss(&hidden, &targets()).unwrap();
        loss.backward();
        let logits = model.logits(&hidden).unwrap();
        Outcome { first, cuts, loss: loss.detach(), logits, gradients: gradients(&vs) }
    }

    pub(crate) fn on(self, ranks: usize) -> Vec<Outcome> {
        run_ranks(ranks, move |group| self.run(group))
    }
}

/// Loss, logits and gradients in plain tch.
fn plainly(kind: Kind, shapes: &[(String, Vec<i64>)]) -> (Tensor, Tensor, Named) {
    let leaf = |(name, shape): &(String, Vec<i64>)| {
        (name.clone(), values(name, shape).set_requires_grad(true))
    };
    let of: Named = shapes.iter().map(leaf).collect();
    let logits = plain::logits(&of, kind, &ids(0));
    let loss = plain::loss(&logits, &targets());
    loss.backward();
    let gradients = of.iter().map(|(name, leaf)| (name.clone(), leaf.grad())).collect();
    (loss.detach(), logits.detach(), gradients)
}

fn shapes(outcome: &Outcome) -> Vec<(String, Vec<i64>)> {
    let shape = |(name, gradient): (&String, &Tensor)| {
        (name.clone(), whole_shape(name, gradient, &outcome.cuts))
    };
    outcome.gradients.iter().map(shape).collect()
}

/// The whole tensor of the ranks' parts, where each of its elements is on at least one.
pub(crate) fn together(
    name: &str,
    outcomes: &[Outcome],
    of: impl Fn(&Outcome) -> &Named,
) -> Tensor {
    let Some(cut) = outcomes[0].cuts.get(name) else { return of(&outcomes[0])[name].copy() };
    let some = &of(&outcomes[0])[name];
    let whole = Tensor::full(cut.shape(), f64::NAN, (some.kind(), some.device()));
    let dim = i64::try_from(cut.dim()).unwrap();
    for outcome in outcomes {
        let mut start = 0;
        for range in outcome.cuts[name].ranges() {
            let len = range.end - range.start;
            let mine = of(outcome)[name].narrow(dim, start, len);
            whole.narrow(dim, range.start, len).copy_(&mine);
            start += len;
        }
    }
    assert_eq!(whole.isnan().any().int64_value(&[]), 0, "{name}: a part is on no rank");
    whole
}

fn check(kind: Kind, ranks: usize, sequence: bool) {
    let case = Case { kind, dropout: 0.0, sequence };
    let outcomes = case.on(ranks);
    let (loss, logits, gradients) = plainly(kind, &shapes(&outcomes[0]));
    for (rank, outcome) in outcomes.iter().enumerate() {
        let what = |name: &str| format!("{case:?}: rank {rank} of {ranks}: {name}");
        close(&what("loss"), &outcome.loss, &loss);
        close(&what("logits"), &outcome.logits, &logits);
        same(&what("loss of rank 0"), &outcome.loss, &outcomes[0].loss);
        assert_eq!(outcome.gradients.len(), gradients.len());
        for (name, gradient) in &outcome.gradients {
            let cut = outcome.cuts.get(name);
            close(&what(name), gradient, &part(&gradients[name], cut));
            // What several ranks have is the same on all of them.
            let whole = together(name, &outcomes, |outcome| &outcome.gradients);
            same(&what(name), gradient, &part(&whole, cut));
        }
    }
}

#[test]
fn a_gpt_of_any_number_of_ranks_is_that_of_plain_tch() {
    compute_once();
    for ranks in 1..=4 {
        check(Kind::Gpt, ranks, false);
        check(Kind::Gpt, ranks, true);
    }
}

#[test]
fn a_llama_of_any_number_of_ranks_is_that_of_plain_tch_with_heads_on_several_ranks_too() {
    compute_once();
    for (ranks, kv_heads) in [(1, 4), (2, 4), (2, 1), (3, 3), (3, 1), (4, 4), (4, 2), (4, 1)] {
        check(Kind::Llama { kv_heads }, ranks, false);
        check(Kind::Llama { kv_heads }, ranks, true);
    }
}

#[test]
fn parts_put_together_are_the_first_weights_of_one_rank() {
    for kind in [Kind::Gpt, Kind::Llama { kv_heads: 2 }] {
        let case = Case { kind, dropout: 0.0, sequence: true };
        let alone = case.on(1);
        for ranks in [2, 4] {
            let outcomes = case.on(ranks);
            for (name, whole) in &alone[0].first {
                let together = together(name, &outcomes, |outcome| &outcome.first);
                same(&format!("{name} on {ranks} ranks"), &together, whole);
            }
        }
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    compute_once();
    for sequence in [false, true] {
        let case = Case { kind: Kind::Llama { kv_heads: 2 }, dropout: 0.1, sequence };
        let runs = [case.on(4), case.on(4)];
        for (left, right) in runs[0].iter().zip(&runs[1]) {
            same("loss", &left.loss, &right.loss);
            for (name, gradient) in &left.gradients {
                same(name, gradient, &right.gradients[name]);
            }
        }
    }
}

#[test]
fn dropout_of_any_number_of_ranks_drops_what_one_drops() {
    compute_once();
    for (kind, ranks) in [(Kind::Gpt, 2), (Kind::Gpt, 3), (Kind::Llama { kv_heads: 2 }, 4)] {
        let case = Case { kind, dropout: 0.3, sequence: false };
        let alone = case.on(1).remove(0);
        let without = Case { dropout: 0.0, ..case }.on(1).remove(0);
        assert!(!alone.loss.equal(&without.loss), "nothing was dropped");
        for sequence in [false, true] {
            for outcome in (Case { sequence, ..case }).on(ranks) {
                close("loss", &outcome.loss, &alone.loss);
                for (name, gradient) in &outcome.gradients {
                    let whole = part(&alone.gradients[name], outcome.cuts.get(name));
                    close(&format!("{case:?}: {name}"), gradient, &whole);
                }
            }
        }
    }
}
