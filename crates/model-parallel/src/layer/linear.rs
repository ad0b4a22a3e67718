//! The product with a weight, as a custom function whose weight's gradient can be put off.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::deferred::Deferred;

/// `x · weightᵀ + bias`: what `Tensor::linear` computes, with the same bits forward and backward whether the weight's gradient comes with the input's or
/// [later](Deferred). Under autocast it is computed in the kind of that, like its gradients.
///
/// `x` is `[…, in]`, `weight` `[out, in]`, `bias` `[out]`.
///
/// # Errors
/// libtorch's own.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let deferred = Deferred::active();
    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    let mut outputs = Function::new("linear").apply(
        &inputs,
        |saving, inputs| {
            saving.save(inputs[0]);
            saving.save(inputs[1]);
            let output = inputs[0].f_linear(inputs[1], inputs.get(2).copied())?;
            // Of a type that can be sent: the weight itself, for its gradient later.
            let weights = (inputs[1].shallow_clone(), inputs.get(2).map(|one| one.shallow_clone()));
            Ok((vec![output], weights))
        },
        move |backward, gradients| {
            let needs = &backward.needs_input_grad;
            let Some(gradient) = &gradients[0] else { return Ok(none(needs.len())) };
            let (input, saved) = (&backward.saved[0], &backward.saved[1]);
            let of_x = match needs[0] {
                true => Some(gradient.f_matmul(&saved.f_to_kind(gradient.kind())?)?),
                false => None,
            };
            let wants = (needs[1], needs.get(2).copied().unwrap_or(false));
            let Some(deferred) = &deferred else {
                let (of_weight, of_bias) = weight_gradients(input, gradient, wants)?;
                let mut all = vec![of_x, of_weight];
                all.extend((needs.len() > 2).then_some(of_bias));
                return Ok(all);
            };
            let (kept, kept_bias) = backward.state;
            let (kept, kept_bias) =
                (kept.shallow_clone(), kept_bias.as_ref().map(Tensor::shallow_clone));
            let (input, outer) = (input.shallow_clone(), gradient.shallow_clone());
            deferred.leave(move || {
                let (of_weight, of_bias) = weight_gradients(&input, &outer, wants)?;
                let pair = of_weight.map(|of| (kept, of));
                Ok(pair.into_iter().chain(kept_bias.zip(of_bias)).collect())
            });
            let mut all = none(needs.len());
            all[0] = of_x;
            Ok(all)
        },
    )?;
    outputs.pop().ok_or(phalanx_ddp_core::Error::BackwardAbandoned)
}

/// No gradient for so many inputs.
pub(crate) fn none(count: usize) -> Vec<Option<Tensor>> {
    std::iter::repeat_with(|| None).take(count).collect()
}

/// The gradients of weight and bias, those that are wanted.
pub(crate) fn weight_gradients(
    x: &Tensor,
    gradient: &Tensor,
    (weight, bias): (bool, bool),
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let rows = |tensor: &Tensor| {
        let width = tensor.size().last().copied().unwrap_or(1);
        tensor.f_reshape([-1, width])
    };
    let gradient = rows(gradient)?;
    let of_weight = match weight {
        true => Some(gradient.f_tr()?.f_matmul(&rows(x)?.f_to_kind(gradient.kind())?)?),
        false => None,
    };
    let of_bias = match bias {
        true => Some(gradient.f_sum_dim_intlist([0_i64].as_slice(), false, None)?),
        false => None,
    };
    Ok((of_weight, of_bias))
}
