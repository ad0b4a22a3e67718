//! Tokens that tensor parallelism has cut between blocks (sequence parallelism), for a layer that all its ranks compute alike.
//!
//! All `tp` ranks route all tokens of theirs, and get the same; experts are cut, or computed by each. So each needs the gradient of all tokens' outputs, and has the
//! whole gradient of its inputs.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::rows::first;
use crate::tensor::TensorParallel;

/// `[batch, tokens / n, width]` → `[batch, tokens, width]`.
pub(super) fn gathered(x: &Tensor, tp: &TensorParallel, layer: &str) -> Result<Tensor> {
    let (group, tag) = (tp.group.clone(), format!("{layer}: tokens of all ranks"));
    let outputs = Function::new("tokens of all ranks").apply(
        &[x],
        |_, inputs| Ok((vec![group.all_gather(inputs[0], 1, &tag)?], group.clone())),
        |backward, gradients| {
            let own = |gradient: &Tensor| own_part(gradient, backward.state);
            Ok(vec![gradients[0].as_ref().map(own).transpose()?])
        },
    )?;
    first(outputs)
}

/// `[batch, tokens, width]`, the same on all ranks → `[batch, tokens / n, width]`.
pub(super) fn own(x: &Tensor, tp: &TensorParallel, layer: &str) -> Result<Tensor> {
    let (group, tag) = (tp.group.clone(), format!("{layer}: gradients of all ranks' tokens"));
    let outputs = Function::new("own tokens").apply(
        &[x],
        |_, inputs| Ok((vec![own_part(inputs[0], &group)?], group.clone())),
        move |backward, gradients| {
            let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
            Ok(vec![Some(backward.state.all_gather(gradient, 1, &tag)?)])
        },
    )?;
    first(outputs)
}

fn own_part(x: &Tensor, group: &TensorGroup) -> Result<Tensor> {
    let count = i64::try_from(group.world_size()).unwrap_or(i64::MAX);
    let each = x.size()[1] / count;
    let rank = i64::try_from(group.rank()).unwrap_or(0);
    Ok(x.f_detach()?.f_narrow(1, rank * each, each)?.f_contiguous()?)
}
