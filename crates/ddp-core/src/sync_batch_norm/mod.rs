//! Batch normalisation over the batches of all ranks: what a network needs whose batches per rank are small.
//!
//! Each rank tells the mean, the squared deviations and the number of its values, by channel; the moments of all are put together
//! from those in rank order, so they have the same bits everywhere. In backward ranks tell each other the two sums that the gradient of
//! the input needs. A rank may have more values than another, or none.
//!
//! Source: Ioffe and Szegedy 2015, "Batch Normalization"; what is synchronised when is as in PyTorch's `SyncBatchNorm`
//! (`torch/nn/modules/_functions.py`); `moments.rs` has the source of the arithmetic.

mod moments;

use std::borrow::Borrow;

use phalanx_comm::Group;
use tch::nn::{Init, ModuleT, Path};
use tch::{nn, Kind, Tensor};

use crate::collective::TensorGroup;
use crate::{autograd, recompute, shim, Error, Result};
use moments::Moments;

/// Settings of a [`SyncBatchNorm`]; the defaults are those of `tch::nn::BatchNormConfig`.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "two switches, as PyTorch has them")]
pub struct SyncBatchNormConfig {
    /// Added to the variance.
    pub eps: f64,
    /// The share of a batch in the running statistics.
    pub momentum: f64,
    /// Whether there are a weight and a bias by channel.
    pub affine: bool,
    /// Whether there are running statistics. Without them evaluation takes those of its own batch, on each rank by itself.
    pub track_running_stats: bool,
    /// Where the weight begins.
    pub ws_init: Init,
    /// Where the bias begins.
    pub bs_init: Init,
}

impl Default for SyncBatchNormConfig {
    fn default() -> Self {
        nn::BatchNormConfig::default().into()
    }
}

impl From<nn::BatchNormConfig> for SyncBatchNormConfig {
    fn from(config: nn::BatchNormConfig) -> Self {
        let nn::BatchNormConfig { eps, momentum, affine, ws_init, bs_init, .. } = config;
        Self { eps, momentum, affine, track_running_stats: true, ws_init, bs_init }
    }
}

/// The ranks that normalise together: made once, for all layers of a model.
///
/// It duplicates a group, so its collectives never mix with those of the caller or of [`Ddp`](crate::Ddp), and all layers
/// share their order.
#[derive(Clone, Debug)]
pub struct SyncGroup {
    ranks: TensorGroup,
}

impl SyncGroup {
    /// Collective.
    ///
    /// # Errors
    /// Those of the group.
    pub fn new(group: &mut Group) -> Result<Self> {
        Ok(Self { ranks: TensorGroup::new(group.duplicate()?) })
    }

    /// Every rank's `mine`, a vector, as the rows of a matrix in rank order. Collective.
    fn rows(&self, mine: &Tensor, tag: &str) -> Result<Tensor> {
        self.ranks.all_gather(&mine.f_unsqueeze(0)?, 0, tag)
    }
}

/// Batch normalisation whose statistics are those of the batches of all ranks.
///
/// It takes the place of `nn::batch_norm1d`, `2d` and `3d`, with the same names of variables, so that weights load from one into the
/// other. Gradients are those of plain batch normalisation of the concatenated batch; weight and bias get this rank's part,
/// which [`Ddp`](crate::Ddp) averages like any other's.
///
/// With `train` each forward exchanges 2 · channels + 2 numbers a rank, and each backward that needs a gradient of the input
/// 2 · channels. Without `train` nothing is exchanged. A checkpointed part that runs again exchanges again, and leaves the running
/// statistics as they are.
///
/// # Shapes
/// Input and output `[samples, channels, …]`; ranks may differ in all but the channels. A rank may have no samples at all.
///
/// # Units
/// Statistics are f32, or f64 for f64; inputs may be bf16 and f16. The running variance is the unbiased one.
///
/// # Determinism
/// Ranks are put together in their order: all of them get the same bits, each time.
///
/// # Errors
/// Ranks that run different layers, or another number of them, get the group's error of being out of step, which names the layers. One that leaves
/// out the last one of a step while others wait in it is named when the group's time is up.
///
/// # Example
/// ```
/// use phalanx_comm::{Group, GroupOptions};
/// use phalanx_ddp_core::{SyncBatchNorm, SyncGroup};
/// use tch::{nn, nn::ModuleT, Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut group = Group::single(GroupOptions::default())?; // or Group::from_environment
/// let vs = nn::VarStore::new(Device::Cpu);
/// let sync = SyncGroup::new(&mut group)?;
/// let net = nn::seq_t()
///     .add(nn::conv2d(vs.root() / "conv", 3, 8, 3, Default::default()))
///     .add(SyncBatchNorm::new(vs.root() / "bn", 8, Default::default(), &sync)); // was nn::batch_norm2d
/// let y = net.forward_t(&Tensor::rand([4, 3, 9, 9], (Kind::Float, Device::Cpu)), true);
/// y.square().mean(Kind::Float).backward();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SyncBatchNorm {
    /// Where it stands in the model: ranks compare it in every exchange.
    name: String,
    channels: i64,
    config: SyncBatchNormConfig,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    running: Option<[Tensor; 2]>,
    group: SyncGroup,
}

impl SyncBatchNorm {
    /// Registers `weight`, `bias`, `running_mean` and `running_var` under `path`.
    #[expect(single_use_lifetimes, reason = "an anonymous one is not allowed there yet")]
    pub fn new<'a>(
        path: impl Borrow<Path<'a>>,
        channels: i64,
        config: SyncBatchNormConfig,
        group: &SyncGroup,
    ) -> Self {
        let path = path.borrow();
        let affine = |name, init| config.affine.then(|| path.var(name, &[channels], init));
        Self {
            name: path.components().collect::<Vec<_>>().join("."),
            channels,
            config,
            weight: affine("weight", config.ws_init),
            bias: affine("bias", config.bs_init),
            running: config.track_running_stats.then(|| {
                let mean = path.zeros_no_train("running_mean", &[channels]);
                [mean, path.ones_no_train("running_var", &[channels])]
            }),
            group: group.clone(),
        }
    }

    /// The weight, where there is one.
    #[must_use]
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// The bias, where there is one.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The running mean and variance, where they are tracked.
    #[must_use]
    pub fn running(&self) -> Option<&[Tensor; 2]> {
        self.running.as_ref()
    }

    /// As [`forward_t`](ModuleT::forward_t), with the error as a value. With `train` collective.
    ///
    /// # Errors
    /// [`Error::BadInput`] for another shape or kind; those of the group; libtorch's own.
    pub fn f_forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.check(xs)?;
        if !train {
            return self.evaluate(xs);
        }
        let mut inputs = vec![xs];
        inputs.extend(self.weight.as_ref());
        inputs.extend(self.bias.as_ref());
        let (group, tag) = (self.group.clone(), format!("{} backward", self.name));
        let mut outputs = autograd::function(
            "SyncBatchNorm",
            &inputs,
            |saving, inputs| {
                let (output, moments) = self.normalise(inputs[0])?;
                inputs[..inputs.len().min(2)].iter().for_each(|input| saving.save(input));
                moments.save(saving);
                Ok((vec![output], self.config.affine))
            },
            move |backward, gradients| {
                moments::backward(backward, gradients[0].as_ref(), |sums| group.rows(sums, &tag))
            },
        )?;
        outputs.pop().ok_or(Error::BackwardAbandoned)
    }

    fn check(&self, xs: &Tensor) -> Result<()> {
        let (shape, kind) = (xs.size(), xs.f_kind()?);
        let is_float = matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
        if shape.len() >= 2 && shape[1] == self.channels && is_float {
            return Ok(());
        }
        Err(Error::BadInput {
            name: self.name.clone(),
            actual: format!("{kind:?} of shape {shape:?}"),
            expected: format!("floating point of shape [samples, {}, …]", self.channels),
        })
    }

    /// With the running statistics, or where there are none with those of this rank's own batch.
    fn evaluate(&self, xs: &Tensor) -> Result<Tensor> {
        let [mean, variance] = match &self.running {
            Some([mean, variance]) => [Some(mean), Some(variance)],
            None => [None, None],
        };
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        let (own, eps) = (mean.is_none(), self.config.eps);
        Ok(xs.f_batch_norm(weight, bias, mean, variance, own, 0.0, eps, true)?)
    }

    /// The output for the batches of all ranks, and their moments. Collective.
    fn normalise(&self, xs: &Tensor) -> Result<(Tensor, Moments)> {
        let own = moments::of_batch(xs)?;
        let all = self.group.rows(&own, &format!("{} forward", self.name))?;
        let moments = Moments::of_ranks(&all, self.config.eps)?;
        if let Some([mean, variance]) =
            self.running.as_ref().filter(|_| !recompute::is_recomputing())
        {
            // Not counted as a change, as that of libtorch's own kernel is not.
            shim::write(
                mean,
                &mean.f_lerp(&moments.mean.f_to_kind(mean.kind())?, self.config.momentum)?,
            )?;
            let unbiased = moments.unbiased_variance()?.f_to_kind(variance.kind())?;
            shim::write(variance, &variance.f_lerp(&unbiased, self.config.momentum)?)?;
        }
        let output =
            moments.apply(xs, self.weight.as_ref(), self.bias.as_ref(), self.config.eps)?;
        Ok((output, moments))
    }
}

impl ModuleT for SyncBatchNorm {
    /// # Panics
    /// With the text of the error, as tch's own modules do.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Tensor {
        self.f_forward_t(xs, train).unwrap_or_else(|error| panic!("{error}"))
    }
}
