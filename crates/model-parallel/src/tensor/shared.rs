//! Variables that every rank has whole and that compute with another part of the tokens on each.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::parallel::TensorParallel;

/// The variable, whose gradient is the sum of those of all ranks of the group: equal on all of them.
///
/// For what each rank computes with its own tokens or columns alone; a variable whose gradient is already equal on all ranks would get it
/// n-fold.
///
/// # Errors
/// libtorch's own.
pub fn shared(variable: &Tensor, tp: &TensorParallel) -> crate::Result<Tensor> {
    let mut all = shared_all(&[variable], tp, "shared variable")?;
    Ok(all.swap_remove(0))
}

/// As [`shared`], of several of one kind with one all-reduce.
pub(super) fn shared_all(
    variables: &[&Tensor],
    tp: &TensorParallel,
    tag: &str,
) -> Result<Vec<Tensor>> {
    if tp.ranks() == 1 {
        return Ok(variables.iter().map(|variable| variable.shallow_clone()).collect());
    }
    let (group, tag) = (tp.group.clone(), format!("{tag}: gradients"));
    Function::new("shared").apply(
        variables,
        |_, inputs| {
            let shapes: Vec<Vec<i64>> = inputs.iter().map(|input| input.size()).collect();
            Ok((inputs.iter().map(|input| input.shallow_clone()).collect(), shapes))
        },
        move |backward, gradients| {
            let mut flats = Vec::new();
            // Absent on one rank is absent on all, for all compute alike.
            for gradient in gradients.iter().flatten() {
                flats.push(gradient.f_reshape([-1])?);
            }
            if flats.is_empty() {
                return Ok(gradients.iter().map(|_| None).collect());
            }
            let sums = group.all_reduce(&Tensor::f_cat(&flats, 0)?, &tag)?;
            let mut start = 0;
            let mut results = Vec::new();
            for (gradient, shape) in gradients.iter().zip(backward.state) {
                let Some(_) = gradient else {
                    results.push(None);
                    continue;
                };
                let len = shape.iter().product();
                results.push(Some(sums.f_narrow(0, start, len)?.f_view(shape.as_slice())?));
                start += len;
            }
            Ok(results)
        },
    )
}
