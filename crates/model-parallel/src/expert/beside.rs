//! Losses of a layer's own, in a model whose last stage alone returns one.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::rows::first;

/// `output` itself, whose backward is that of the scalar `loss` as well: as if the loss that the backward starts from had `loss` added to it. So a layer's own loss (the
/// balance of its experts) needs no way to the end of the model, which may be another rank's.
///
/// # Errors
/// libtorch's own.
///
/// # Example
/// ```
/// use phalanx_model_parallel::expert::with_loss;
/// use tch::{Kind, Tensor};
///
/// let x = Tensor::from_slice(&[1.0_f32, 2.0]).set_requires_grad(true);
/// let own = x.square().sum(Kind::Float);
/// with_loss(&(&x * 3.0), &own)?.sum(Kind::Float).backward();
/// assert_eq!(Vec::<f32>::try_from(x.grad())?, [5.0, 7.0]); // 3 + 2 x
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Source
/// Megatron-LM's `MoEAuxLossAutoScaler`.
pub fn with_loss(output: &Tensor, loss: &Tensor) -> Result<Tensor> {
    let like = (loss.size(), (loss.kind(), loss.device()));
    let outputs = Function::new("output with a loss of its own").apply(
        &[output, loss],
        |_, inputs| Ok((vec![inputs[0].shallow_clone()], like)),
        |backward, gradients| {
            let (shape, at) = backward.state;
            let one = Tensor::f_ones(shape.as_slice(), *at)?;
            Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone), Some(one)])
        },
    )?;
    first(outputs)
}
