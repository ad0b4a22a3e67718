//! Products that are cut into rows, whose exchanges run beside them: the bits do not depend on how many exchanges there are.

use phalanx_comm::testing::run_ranks;
use phalanx_model_parallel::layer::{Builder, Deferred};
use phalanx_model_parallel::tensor::{
    Chunks, ColumnLinear, LinearOptions, RowLinear, TensorParallel,
};
use tch::{nn, Device, Kind};

use crate::support::{change, compute_once, gradients, parallel, same, values, Named};

/// Two column-parallel layers of one input and a row-parallel one behind them.
#[expect(
    clippy::struct_excessive_bools,
    reason = "two flags that have nothing to do with each other"
)]
struct Case {
    kind: Kind,
    /// Samples, tokens, columns.
    shape: [i64; 3],
    bias: bool,
    puts_off: bool,
}

impl Case {
    /// Output and gradients of everything.
    fn run(&self, tp: &TensorParallel, chunks: Chunks) -> Named {
        let [batch, tokens, width] = self.shape;
        let mut vs = nn::VarStore::new(Device::Cpu);
        let root = Builder::new(vs.root(), 1);
        let options = || LinearOptions { bias: self.bias, ..LinearOptions::default() };
        let column = |name: &str| {
            let layer = ColumnLinear::new(&(&root / name), width, 24, options(), tp);
            layer.unwrap().with_chunks(chunks)
        };
        let (up, gate) = (column("up"), column("gate"));
        let down = RowLinear::new(&(&root / "down"), 24, width, options(), tp).unwrap();
        let down = down.with_chunks(chunks);
        let cuts = root.cuts();
        change(&mut vs, &cuts);
        match self.kind {
            Kind::Float => vs.float(),
            Kind::BFloat16 => vs.bfloat16(),
            _ => {}
        }
        let own = |name: &str| {
            let whole = values(name, &[batch, tokens, width]).to_kind(self.kind);
            let ranks = i64::try_from(tp.ranks()).unwrap();
            match tp.cuts_tokens() {
                true => whole.chunk(ranks, 1)[tp.group.rank()].contiguous(),
                false => whole,
            }
        };
        let x = own("x").set_requires_grad(true);
        let forward = || {
            let both = ColumnLinear::forward_all(&[&up, &gate], &x).unwrap();
            down.forward(&(both[0].tanh() * &both[1])).unwrap()
        };
        let deferred = Deferred::new();
        let y = if self.puts_off { deferred.during(forward) } else { forward() };
        (&y * own("outer")).sum(self.kind).backward();
        for (weight, gradient) in deferred.take().compute().unwrap() {
            (weight * gradient).sum(self.kind).backward();
        }
        let mut all = gradients(&vs);
        all.extend([("y".to_owned(), y.detach()), ("x".to_owned(), x.grad())]);
        all
    }
}

fn all_same(what: &str, actual: &Named, expected: &Named) {
    assert_eq!(actual.len(), expected.len());
    for (name, tensor) in expected {
        same(&format!("{what}: {name}"), &actual[name], tensor);
    }
}

/// One to five products, of as many rows or not, in one to five exchanges; sequences that lie one behind the other, or parts of each.
#[test]
fn any_number_of_exchanges_has_the_bits_of_one() {
    compute_once();
    for ranks in 1..=4 {
        for sequence in [false, true] {
            run_ranks(ranks, move |group| {
                let tp = parallel(group, sequence);
                for (batch, bias, puts_off) in
                    [(1, true, false), (2, false, true), (7, true, false)]
                {
                    let shape = [batch, 36, 12];
                    let case = Case { kind: Kind::Double, shape, bias, puts_off };
                    for products_max in [1, 3, 5] {
                        let cut =
                            |exchanges_max| Chunks { rows_min: 1, products_max, exchanges_max };
                        let expected = case.run(&tp, cut(1));
                        for exchanges in 2..=products_max {
                            let what = format!(
                                "{ranks} ranks, {batch} samples, {exchanges} of {products_max}"
                            );
                            all_same(&what, &case.run(&tp, cut(exchanges)), &expected);
                        }
                    }
                }
            });
        }
    }
}

/// As on one node, and as on several: the library's own numbers, at the size from which they matter.
#[test]
fn ranks_of_one_node_and_of_several_have_the_same_bits() {
    compute_once();
    for sequence in [false, true] {
        run_ranks(2, move |group| {
            let tp = parallel(group, sequence);
            for kind in [Kind::Float, Kind::BFloat16] {
                for shape in [[1, 2100, 20], [8, 256, 20]] {
                    let case = Case { kind, shape, bias: true, puts_off: false };
                    let together = case.run(&tp, Chunks::of((2, 1), false));
                    let apart = case.run(&tp, Chunks::of((2, 2), false));
                    all_same(&format!("{kind:?} {shape:?}"), &apart, &together);
                }
            }
        });
    }
}

/// As experts have them.
#[test]
fn products_of_no_rows_and_of_one_are_exchanged_too() {
    compute_once();
    run_ranks(3, |group| {
        let tp = parallel(group, false);
        for tokens in [0, 1, 2] {
            let case =
                Case { kind: Kind::Double, shape: [1, tokens, 12], bias: true, puts_off: false };
            let cut = Chunks { rows_min: 1, products_max: 4, exchanges_max: 4 };
            let found = case.run(&tp, cut);
            assert_eq!(found["y"].size(), [1, tokens, 12]);
            let whole = case.run(&tp, Chunks { exchanges_max: 1, ..cut });
            all_same(&format!("{tokens} tokens"), &found, &whole);
        }
    });
}
