//! Single layers: options, gradients that are put off, and what is refused.

use phalanx_comm::testing::run_ranks;
use phalanx_model_parallel::layer::{Builder, Deferred, Init, Pass};
use phalanx_model_parallel::tensor::{
    cross_entropy, logits, shared, Attention, AttentionOptions, ColumnLinear, LayerNorm,
    LinearOptions, Projections, RowLinear, TensorParallel, VocabEmbedding,
};
use phalanx_model_parallel::{Axis, Error};
use tch::{nn, Device, Kind, Tensor};

use crate::model;
use crate::parity::{ids, targets};
use crate::support::{
    change, close, compute_once, gradients, parallel, part, same, values, whole_shape, Named,
};

const INPUTS: i64 = 12;
const OUTPUTS: i64 = 24;

/// The rank's tokens of `[batch, tokens, …]`.
fn tokens_of(x: &Tensor, rank: usize, ranks: usize) -> Tensor {
    x.chunk(i64::try_from(ranks).unwrap(), 1)[rank].contiguous()
}

/// A column-parallel and a row-parallel layer one behind the other: input's gradient, output and variables' gradients.
fn pair(options: &LinearOptions, tp: &TensorParallel) -> (Tensor, Tensor, Named, Named) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let root = Builder::new(vs.root(), 1);
    let columns = ColumnLinear::new(&(&root / "up"), INPUTS, OUTPUTS, options.clone(), tp).unwrap();
    let rows = LinearOptions { parts: Vec::new(), ..options.clone() };
    let rows = RowLinear::new(&(&root / "down"), OUTPUTS, INPUTS, rows, tp).unwrap();
    let cuts = root.cuts();
    change(&mut vs, &cuts);
    let (rank, ranks) = (tp.group.rank(), tp.ranks());
    let mine = |x: Tensor| if tp.cuts_tokens() { tokens_of(&x, rank, ranks) } else { x };
    let x = mine(values("x", &[2, 12, INPUTS])).set_requires_grad(true);
    let y = rows.forward(&columns.forward(&x).unwrap()).unwrap();
    (&y * mine(values("outer", &[2, 12, INPUTS]))).sum(Kind::Double).backward();
    let of_variables = gradients(&vs);
    let plain = of_variables.iter().map(|(name, gradient)| {
        (name.clone(), values(name, &whole_shape(name, gradient, &cuts)).set_requires_grad(true))
    });
    let plain: Named = plain.collect();
    let oriented =
        |name: &str| if options.transposed { plain[name].tr() } else { plain[name].copy() };
    let whole_x = values("x", &[2, 12, INPUTS]).set_requires_grad(true);
    // What the ranks have side by side is not in the order of the whole where there are parts; sums over it are the same.
    let hidden = whole_x.linear(&oriented("up.weight"), plain.get("up.bias"));
    let expected = hidden.linear(&oriented("down.weight"), plain.get("down.bias"));
    (&expected * values("outer", &[2, 12, INPUTS])).sum(Kind::Double).backward();
    close("output", &y, &mine(expected.detach()));
    close("gradient of the input", &x.grad(), &mine(whole_x.grad()));
    let expected =
        plain.iter().map(|(name, leaf)| (name.clone(), part(&leaf.grad(), cuts.get(name))));
    (y.detach(), x.grad(), of_variables, expected.collect())
}

#[test]
fn a_column_and_a_row_of_any_options_are_two_linear_layers() {
    compute_once();
    for ranks in 1..=4 {
        for sequence in [false, true] {
            for (bias, transposed) in [(true, false), (false, true), (true, true), (false, false)] {
                let all = run_ranks(ranks, move |group| {
                    let options = LinearOptions { bias, transposed, ..LinearOptions::default() };
                    pair(&options, &parallel(group, sequence))
                });
                for (y, of_x, of_variables, expected) in &all {
                    for (name, gradient) in of_variables {
                        close(name, gradient, &expected[name]);
                    }
                    if !sequence {
                        same("output", y, &all[0].0);
                        same("gradient of the input", of_x, &all[0].1);
                    }
                }
            }
        }
    }
}

/// Loss and gradients of a model, whose weights' gradients come later if `puts_off`.
fn trained(kind: model::Kind, tp: &TensorParallel, puts_off: bool) -> (Tensor, Named, usize) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let root = Builder::new(vs.root(), 1);
    let model = model::Model::new(&root, kind, 0.1, tp).unwrap();
    let cuts = root.cuts();
    change(&mut vs, &cuts);
    let pass = Pass::training(1, 0);
    let forward = || {
        let hidden = model.hidden(&ids(0), &pass).unwrap();
        model.loss(&hidden, &targets()).unwrap()
    };
    let deferred = Deferred::new();
    let loss = if puts_off { deferred.during(forward) } else { forward() };
    loss.backward();
    let left = deferred.take().compute().unwrap();
    let count = left.len();
    for (weight, gradient) in left {
        // Adds the gradient: 1 · it.
        (weight * gradient).sum(Kind::Double).backward();
    }
    (loss.detach(), gradients(&vs), count)
}

#[test]
fn weights_whose_gradients_are_put_off_get_the_same_bits() {
    compute_once();
    // Weights and biases of products with cut outputs, weights of those with cut inputs, and the head.
    for (kind, count) in [
        (model::Kind::Gpt, 2 * (2 + 1 + 2 + 1) + 1),
        (model::Kind::Llama { kv_heads: 1 }, 2 * 7 + 1),
    ] {
        for (ranks, sequence) in [(1, false), (2, false), (2, true), (3, true)] {
            run_ranks(ranks, move |group| {
                let tp = parallel(group, sequence);
                let (loss, at_once, none) = trained(kind, &tp, false);
                let (again, later, left) = trained(kind, &tp, true);
                assert_eq!((none, left), (0, count));
                same("loss", &again, &loss);
                for (name, gradient) in &at_once {
                    same(&format!("{name} on {ranks} ranks"), &later[name], gradient);
                }
            });
        }
    }
}

#[test]
fn a_shared_variable_gets_the_sum_of_the_ranks_gradients() {
    run_ranks(3, |group| {
        let tp = parallel(group, false);
        let variable = values("v", &[4]).set_requires_grad(true);
        let factor = tp.group.rank() as f64 + 1.0;
        (shared(&variable, &tp).unwrap() * factor).sum(Kind::Double).backward();
        assert_eq!(Vec::<f64>::try_from(variable.grad()).unwrap(), [6.0; 4]);
    });
}

#[test]
fn heads_and_columns_that_cannot_be_cut_are_errors_on_every_rank() {
    let refused = run_ranks(3, |group| {
        let tp = parallel(group, false);
        let vs = nn::VarStore::new(Device::Cpu);
        let root = Builder::new(vs.root(), 1);
        let heads = LinearOptions { unit: 2, ..LinearOptions::default() };
        let columns = |outputs, options: &LinearOptions| {
            ColumnLinear::new(&(&root / "c"), 6, outputs, options.clone(), &tp).unwrap_err()
        };
        let row = RowLinear::new(&(&root / "r"), 8, 6, LinearOptions::default(), &tp);
        let words = VocabEmbedding::new(&(&root / "w"), 2, 4, Init::Constant(0.0), &tp);
        [
            columns(8, &heads),
            columns(8, &LinearOptions::default()),
            row.unwrap_err(),
            words.unwrap_err(),
        ]
    });
    for [heads, columns, row, words] in refused {
        let is = |error: &Error, expected: &'static str, count: i64| matches!(error, Error::Indivisible { what, len, axis: Axis::Tp, ranks: 3, .. } if *what == expected && *len == count);
        assert!(is(&heads, "heads", 4) && is(&columns, "columns", 8), "{heads}; {columns}");
        assert!(is(&row, "columns", 8) && is(&words, "vocabulary", 2), "{row}; {words}");
        assert_eq!(heads.to_string(), "c: heads 4 cannot be divided by tp 3; possible: 1, 2, 4");
    }
}

#[test]
fn an_attention_of_products_with_other_columns_is_an_error() {
    let tp = TensorParallel::alone().unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let root = Builder::new(vs.root(), 1);
    let new = |options: AttentionOptions, parts: Vec<i64>, inputs: i64| {
        let columns = parts.iter().sum();
        let all = LinearOptions { parts, ..LinearOptions::default() };
        let all = ColumnLinear::new(&(&root / "all"), 8, columns, all, &tp).unwrap();
        let out = RowLinear::new(&(&root / "out"), inputs, 8, LinearOptions::default(), &tp);
        Attention::new(Projections::Fused(all), out.unwrap(), options).map(drop)
    };
    let options = AttentionOptions::new(8, 4);
    new(options.clone(), options.parts(), 8).unwrap();
    let fewer = AttentionOptions { kv_heads: 2, ..options.clone() };
    new(fewer.clone(), fewer.parts(), 8).unwrap();
    let odd = AttentionOptions { head_dim: 3, rotary: Some(1e4), ..options.clone() };
    for refused in [
        new(options.clone(), vec![24], 8),
        new(fewer, options.parts(), 8),
        new(options.clone(), options.parts(), 4),
        new(AttentionOptions { kv_heads: 3, ..options.clone() }, options.parts(), 8),
        new(odd.clone(), odd.parts(), 12),
        new(AttentionOptions { dropout: 1.0, ..options.clone() }, options.parts(), 8),
    ] {
        assert!(matches!(refused, Err(Error::BadSetting { .. })), "{refused:?}");
    }
}

#[test]
fn inputs_of_other_shapes_and_words_outside_of_the_vocabulary_are_errors_before_anything_is_sent() {
    run_ranks(2, |group| {
        let tp = parallel(group, true);
        let vs = nn::VarStore::new(Device::Cpu);
        let root = Builder::new(vs.root(), 1);
        let columns =
            ColumnLinear::new(&(&root / "c"), 6, 4, LinearOptions::default(), &tp).unwrap();
        let row = RowLinear::new(&(&root / "r"), 4, 6, LinearOptions::default(), &tp).unwrap();
        let words = VocabEmbedding::new(&(&root / "w"), 9, 4, Init::Constant(0.1), &tp).unwrap();
        let norm = LayerNorm::new(&(&root / "n"), 4, 1e-5, &tp).unwrap();
        let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let word =
            |word: i64, tokens: i64| Tensor::full([1, tokens], word, (Kind::Int64, Device::Cpu));
        let hidden = float(&[1, 2, 4]);
        for refused in [
            columns.forward(&float(&[1, 2, 5])),
            row.forward(&float(&[1, 3, 2])),
            words.forward(&word(9, 4)),
            words.forward(&word(-1, 4)),
            words.forward(&word(1, 3)),
            words.forward(&float(&[1, 4])),
            norm.forward(&float(&[1, 2, 3])),
            cross_entropy(&hidden, words.weight(), &word(9, 4), &tp),
            cross_entropy(&hidden, words.weight(), &word(-1, 4), &tp),
            cross_entropy(&hidden, words.weight(), &word(1, 2), &tp),
        ] {
            assert!(matches!(refused, Err(Error::BadInput { .. })), "{refused:?}");
        }
        // The group is as good as before.
        let same_words = words.forward(&word(8, 4)).unwrap();
        assert_eq!(same_words.size(), [1, 2, 4]);
        assert_eq!(logits(&hidden, words.weight(), &tp).unwrap().size(), [1, 4, 9]);
    });
}

#[test]
fn a_batch_without_targets_has_no_loss_and_no_gradients() {
    run_ranks(2, |group| {
        let tp = parallel(group, true);
        let hidden = values("hidden", &[1, 2, 4]).set_requires_grad(true);
        let weight = values("weight", &[5, 4]).set_requires_grad(true);
        let none = Tensor::full([1, 4], -100, (Kind::Int64, Device::Cpu));
        let loss = cross_entropy(&hidden, &weight, &none, &tp).unwrap();
        loss.backward();
        assert!(loss.double_value(&[]) == 0.0);
        for gradient in [hidden.grad(), weight.grad()] {
            assert!(gradient.abs().max().double_value(&[]) == 0.0);
        }
    });
}

#[test]
fn large_logits_have_a_finite_loss() {
    let alone = TensorParallel::alone().unwrap();
    let inputs = || {
        let targets = Tensor::from_slice(&[0_i64, 9, 3, 4]).view([1, 4]);
        (values("hidden", &[1, 4, 4]) * 1e4, values("weight", &[10, 4]), targets)
    };
    let expected = move || {
        let (hidden, weight, targets) = inputs();
        let (logits, targets) = (hidden.matmul(&weight.tr()).view([4, 10]), targets.view([4]));
        logits.cross_entropy_loss(&targets, None::<&Tensor>, tch::Reduction::Sum, -100, 0.0)
    };
    let (hidden, weight, targets) = inputs();
    close("loss", &cross_entropy(&hidden, &weight, &targets, &alone).unwrap(), &expected());
    let rows = [(0, 5), (5, 5)];
    run_ranks(2, move |group| {
        let tp = parallel(group, false);
        let (start, len) = rows[tp.group.rank()];
        let (hidden, weight, targets) = inputs();
        let loss = cross_entropy(&hidden, &weight.narrow(0, start, len), &targets, &tp).unwrap();
        close("loss", &loss, &expected());
    });
}
