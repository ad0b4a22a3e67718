//! The arithmetic of batch normalisation over several batches.
//!
//! Batches are put together by Chan's formula, which does not cancel where the mean is large: with n, mean and M2 (the sum
//! of squared deviations) of what there is, and `δ = mean_r − mean` of what comes, `mean += δ · n_r / (n + n_r)` and
//! `M2 += M2_r + δ² · n · n_r / (n + n_r)`. Backward, with x̂ = (x − mean) / σ and sums over all ranks:
//! `dx = (dy − Σdy / n − x̂ · Σ(dy · x̂) / n) · weight / σ`.
//!
//! Everything stays on the device: nothing waits for a GPU.
//!
//! Source: Chan, Golub and `LeVeque` 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"; Ioffe and Szegedy 2015.

use tch::{Kind, Tensor};

use crate::autograd::{Backward, Saving};
use crate::Result;

/// Counts travel as two numbers, low and high, each of which is exact in f32.
const COUNT_BASE: i64 = 1 << 20;

/// The kind of statistics of inputs of `kind`.
fn kind_for(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// All dimensions but the channels'.
fn dims(xs: &Tensor) -> Vec<i64> {
    let count = i64::try_from(xs.dim()).unwrap_or(i64::MAX);
    (0..count).filter(|&dim| dim != 1).collect()
}

/// A vector by channel, in the shape that `xs` is combined with.
fn by_channel(vector: &Tensor, xs: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; xs.dim()];
    shape[1] = -1;
    Ok(vector.f_view(shape.as_slice())?)
}

/// What a rank tells of its batch: means, squared deviations, and how many values a channel has.
pub(super) fn of_batch(xs: &Tensor) -> Result<Tensor> {
    let kind = kind_for(xs.kind());
    let channels = xs.size()[1];
    let elements: i64 = xs.size().iter().product();
    let count = if channels > 0 { elements / channels } else { 0 };
    let options = (kind, xs.device());
    let (means, squares) = if count == 0 {
        (Tensor::f_zeros([channels], options)?, Tensor::f_zeros([channels], options)?)
    } else {
        let (variance, mean) =
            xs.f_to_kind(kind)?.f_var_mean_correction(dims(xs).as_slice(), 0, false)?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let squares = variance.f_mul_scalar(count as f64)?;
        (mean, squares)
    };
    let counts = Tensor::f_from_slice(&[count % COUNT_BASE, count / COUNT_BASE])?;
    let counts = counts.f_to_kind(kind)?.f_to_device(xs.device())?;
    Ok(Tensor::f_cat(&[means, squares, counts], 0)?)
}

/// What all ranks' batches have, by channel, on every rank with the same bits.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) mean: Tensor,
    /// Divided by the number of values.
    pub(super) variance: Tensor,
    /// 1 / σ.
    inverse: Tensor,
    /// How many values a channel has: a scalar.
    count: Tensor,
}

impl Moments {
    /// Puts together what the ranks told, a row each.
    pub(super) fn of_ranks(all: &Tensor, eps: f64) -> Result<Self> {
        let channels = (all.size()[1] - 2) / 2;
        let zero = || all.f_narrow(1, 0, channels)?.f_select(0, 0)?.f_zeros_like();
        let (mut mean, mut squares) = (zero()?, zero()?);
        let mut count = Tensor::f_zeros([], (all.kind(), all.device()))?;
        for rank in 0..all.size()[0] {
            let row = all.f_select(0, rank)?;
            let low = row.f_select(0, 2 * channels)?;
            let high = row.f_select(0, 2 * channels + 1)?;
            #[expect(clippy::cast_precision_loss, reason = "a power of two")]
            let theirs = low.f_add(&high.f_mul_scalar(COUNT_BASE as f64)?)?;
            let together = count.f_add(&theirs)?;
            // Of nothing and nothing: nothing.
            let share = theirs.f_div(&together.f_clamp_min(1.0)?)?;
            let apart = row.f_narrow(0, 0, channels)?.f_sub(&mean)?;
            let between = apart.f_square()?.f_mul(&share.f_mul(&count)?)?;
            squares = squares.f_add(&row.f_narrow(0, channels, channels)?)?.f_add(&between)?;
            mean = mean.f_add(&apart.f_mul(&share)?)?;
            count = together;
        }
        let variance = squares.f_div(&count.f_clamp_min(1.0)?)?;
        let inverse = variance.f_add_scalar(eps)?.f_rsqrt()?;
        Ok(Self { mean, variance, inverse, count })
    }

    /// Divided by one less than the number of values.
    pub(super) fn unbiased_variance(&self) -> Result<Tensor> {
        let less = self.count.f_sub_scalar(1.0)?.f_clamp_min(1.0)?;
        Ok(self.variance.f_mul(&self.count.f_div(&less)?)?)
    }

    /// The normalised input, in its own kind.
    pub(super) fn apply(
        &self,
        xs: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<Tensor> {
        let cast = |tensor: Option<&Tensor>| {
            tensor.map(|tensor| tensor.f_to_kind(self.mean.kind())).transpose()
        };
        let (weight, bias) = (cast(weight)?, cast(bias)?);
        // The kernel of evaluation, which takes the moments as they are: one pass.
        let (mean, variance) = (Some(&self.mean), Some(&self.variance));
        Ok(xs.f_batch_norm(
            weight.as_ref(),
            bias.as_ref(),
            mean,
            variance,
            false,
            0.0,
            eps,
            false,
        )?)
    }

    /// Behind the input and, if there is one, the weight.
    pub(super) fn save(&self, saving: &mut Saving) {
        [&self.mean, &self.inverse, &self.count].into_iter().for_each(|tensor| saving.save(tensor));
    }
}

/// Gradients of the input and, if the layer has them, of weight and bias, for the gradient `dy` of the output. `all` tells
/// the sums of this rank to all: collective where the input's gradient is wanted.
pub(super) fn backward(
    backward: &Backward<'_, bool>,
    dy: Option<&Tensor>,
    all: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let (xs, saved) = (&backward.saved[0], &backward.saved);
    let affine = *backward.state;
    let (weight, at) = if affine { (Some(&saved[1]), 2) } else { (None, 1) };
    let (mean, inverse, count) = (&saved[at], &saved[at + 1], &saved[at + 2]);
    let kind = mean.kind();
    let dy = match dy {
        Some(dy) => dy.f_to_kind(kind)?,
        None => xs.f_zeros_like()?.f_to_kind(kind)?,
    };
    let normal = xs.f_to_kind(kind)?.f_sub(&by_channel(mean, xs)?)?;
    let normal = normal.f_mul(&by_channel(inverse, xs)?)?;
    let sum = |tensor: &Tensor| tensor.f_sum_dim_intlist(dims(xs).as_slice(), false, kind);
    let (of_bias, of_weight) = (sum(&dy)?, sum(&dy.f_mul(&normal)?)?);
    let dx = if backward.needs_input_grad[0] {
        let all = all(&Tensor::f_cat(&[&of_bias, &of_weight], 0)?)?;
        let mut sums = all.f_select(0, 0)?;
        for rank in 1..all.size()[0] {
            sums = sums.f_add(&all.f_select(0, rank)?)?;
        }
        let means = sums.f_div(&count.f_clamp_min(1.0)?)?;
        let channels = xs.size()[1];
        let mean_dy = by_channel(&means.f_narrow(0, 0, channels)?, xs)?;
        let mean_product = by_channel(&means.f_narrow(0, channels, channels)?, xs)?;
        let scale = match weight {
            Some(weight) => inverse.f_mul(&weight.f_to_kind(kind)?)?,
            None => inverse.shallow_clone(),
        };
        let dx = dy.f_sub(&mean_dy)?.f_sub(&normal.f_mul(&mean_product)?)?;
        Some(dx.f_mul(&by_channel(&scale, xs)?)?.f_to_kind(xs.kind())?)
    } else {
        None
    };
    let mut gradients = vec![dx];
    if let Some(weight) = weight {
        gradients.push(Some(of_weight.f_to_kind(weight.kind())?));
        gradients.push(Some(of_bias.f_to_kind(weight.kind())?));
    }
    Ok(gradients)
}
