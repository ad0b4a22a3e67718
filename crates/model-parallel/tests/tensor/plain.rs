//! The same models in plain tch on whole variables.

use tch::{Kind, Tensor};

use crate::model::{self, EPS, HEADS, THETA, TOKENS, WIDTH};
use crate::support::Named;

/// Logits `[batch, tokens, vocabulary]`.
pub(crate) fn logits(of: &Named, kind: model::Kind, ids: &Tensor) -> Tensor {
    let mut x = Tensor::embedding(&of["wte.weight"], ids, -1, false, false);
    if kind == model::Kind::Gpt {
        x += of["wpe.weight"].narrow(0, 0, TOKENS);
    }
    for at in 0..2 {
        x = block(of, kind, &format!("h.{at}"), &x);
    }
    let x = norm(of, kind, "ln_f", &x);
    let head = of.get("head.weight").unwrap_or_else(|| &of["wte.weight"]);
    x.matmul(&head.tr())
}

/// The sum of the losses.
pub(crate) fn loss(logits: &Tensor, targets: &Tensor) -> Tensor {
    let shape = logits.size();
    let flat = logits.view([-1, shape[2]]);
    let none = None::<&Tensor>;
    flat.cross_entropy_loss(&targets.flatten(0, 1), none, tch::Reduction::Sum, -100, 0.0)
}

fn norm(of: &Named, kind: model::Kind, name: &str, x: &Tensor) -> Tensor {
    let weight = &of[&format!("{name}.weight")];
    match kind {
        model::Kind::Gpt => {
            let bias = &of[&format!("{name}.bias")];
            x.layer_norm([WIDTH], Some(weight), Some(bias), EPS, false)
        }
        model::Kind::Llama { .. } => {
            let square = x.square().mean_dim([-1_i64].as_slice(), true, Kind::Double);
            x * (square + EPS).rsqrt() * weight
        }
    }
}

fn linear(of: &Named, name: &str, x: &Tensor) -> Tensor {
    let weight = &of[&format!("{name}.weight")];
    match of.get(&format!("{name}.bias")) {
        Some(bias) => x.matmul(weight) + bias, // as GPT-2 has it: [in, out]
        None => x.matmul(&weight.tr()),
    }
}

fn block(of: &Named, kind: model::Kind, name: &str, x: &Tensor) -> Tensor {
    let in_block = |layer: &str| format!("{name}.{layer}");
    let y = norm(of, kind, &in_block("ln_1"), x);
    let by_heads = |x: &Tensor, heads: i64| {
        let shape = x.size();
        x.reshape([shape[0], shape[1], heads, WIDTH / HEADS]).transpose(1, 2)
    };
    let (q, k, v) = match kind {
        model::Kind::Gpt => {
            let all = linear(of, &in_block("c_attn"), &y).chunk(3, -1);
            (by_heads(&all[0], HEADS), by_heads(&all[1], HEADS), by_heads(&all[2], HEADS))
        }
        model::Kind::Llama { kv_heads } => {
            let of_heads = |name, heads| by_heads(&linear(of, &in_block(name), &y), heads);
            let repeats = HEADS / kv_heads;
            let repeat = |x: &Tensor| x.repeat_interleave_self_int(repeats, 1, None);
            let (q, k) = (turned(&of_heads("q", HEADS)), turned(&of_heads("k", kv_heads)));
            (q, repeat(&k), repeat(&of_heads("v", kv_heads)))
        }
    };
    let out = attention(&q, &k, &v).transpose(1, 2).flatten(2, 3);
    let name = if kind == model::Kind::Gpt { "attn_out" } else { "o" };
    let x = x + linear(of, &in_block(name), &out);
    let y = norm(of, kind, &in_block("ln_2"), &x);
    let y = match kind {
        model::Kind::Gpt => {
            linear(of, &in_block("c_proj"), &linear(of, &in_block("c_fc"), &y).gelu("tanh"))
        }
        model::Kind::Llama { .. } => {
            let gate = linear(of, &in_block("gate"), &y);
            let inner = &gate * gate.sigmoid() * linear(of, &in_block("up"), &y);
            linear(of, &in_block("down"), &inner)
        }
    };
    x + y
}

fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let scale = ((WIDTH / HEADS) as f64).sqrt();
    let later = Tensor::ones([TOKENS, TOKENS], (Kind::Bool, q.device())).triu(1);
    let scores = (q.matmul(&k.transpose(2, 3)) / scale).masked_fill(&later, f64::NEG_INFINITY);
    scores.softmax(-1, Kind::Double).matmul(v)
}

/// Rotary positions as complex numbers: the halves of a head are their real and imaginary parts. Angles are those of single precision.
fn turned(x: &Tensor) -> Tensor {
    let head_dim = WIDTH / HEADS;
    let float = (Kind::Float, x.device());
    let exponents = Tensor::arange_start_step(0, head_dim, 2, float) / head_dim as f64;
    let frequencies = Tensor::full([1], THETA, float).pow(&exponents).reciprocal();
    let angles = Tensor::arange(TOKENS, float).outer(&frequencies);
    let (cos, sin) = (angles.cos().to_kind(Kind::Double), angles.sin().to_kind(Kind::Double));
    let halves = x.chunk(2, -1);
    let (left, right) = (&halves[0], &halves[1]);
    Tensor::cat(&[left * &cos - right * &sin, right * &cos + left * &sin], -1)
}
