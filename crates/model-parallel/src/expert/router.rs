//! Who goes where: probabilities of experts by token, the best k of them, and the losses that keep experts equally busy.

use phalanx_comm::Sum;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Result as DdpResult;
use tch::{Kind, Tensor};

use super::rows;
use super::ExpertOptions;
use crate::error::Result;
use crate::layer::{linear, Builder};

/// A linear layer without bias, a softmax over experts in f32 (f64 for tokens in f64), and the k most probable.
#[derive(Debug)]
pub struct Router {
    weight: Tensor,
    top_k: i64,
    normalise: bool,
}

/// What a router says of tokens.
#[derive(Debug)]
pub struct Routing {
    probabilities: Tensor,
    experts: Tensor,
    weights: Tensor,
    load: Vec<i64>,
    /// Σ (log Σ exp logits)² over tokens.
    z_sum: Tensor,
    /// The choices, on the host.
    choices: Vec<i64>,
}

impl Router {
    /// Variable `gate.weight`, `[experts, width]`.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(builder: &Builder<'_>, width: i64, options: &ExpertOptions) -> Result<Self> {
        let shape = [options.experts, width];
        let weight = (builder / "gate").whole("weight", &shape, options.init)?;
        Ok(Self { weight, top_k: options.top_k, normalise: options.normalise })
    }

    /// Routes `[tokens, width]`. On a GPU it waits for the choices, which the host needs to know.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn route(&self, tokens: &Tensor) -> Result<Routing> {
        let kind = if tokens.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let logits = linear(tokens, &self.weight, None)?.f_to_kind(kind)?;
        let probabilities = logits.f_softmax(-1, kind)?;
        let (best, experts) = probabilities.f_topk(self.top_k, -1, true, true)?;
        let weights = match self.normalise {
            true => best.f_div(&best.f_sum_dim_intlist([-1_i64].as_slice(), true, None)?)?,
            false => best,
        };
        let choices = rows::numbers(&experts)?;
        let z = logits.f_logsumexp([-1_i64].as_slice(), false)?.f_square()?;
        let z_sum = z.f_sum(kind)?;
        let load = counted(&choices, self.weight.size()[0]);
        Ok(Routing { probabilities, experts, weights, load, z_sum, choices })
    }
}

impl Routing {
    /// `[tokens, experts]`: how probable each expert is.
    pub fn probabilities(&self) -> &Tensor {
        &self.probabilities
    }

    /// `[tokens, k]`, i64: the chosen, the most probable first.
    pub fn experts(&self) -> &Tensor {
        &self.experts
    }

    /// `[tokens, k]`: what each of their outputs is multiplied by.
    pub(crate) fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// `[experts]`, on the host: how many tokens chose each.
    #[must_use]
    pub fn load(&self) -> &[i64] {
        &self.load
    }

    pub(super) fn choices(&self) -> &[i64] {
        &self.choices
    }

    /// E · Σₑ fₑ Pₑ over the tokens of this call, which are this rank's alone: fₑ the share of tokens that chose expert e, Pₑ the mean of its probabilities.
    ///
    /// It is k where experts are equally busy, and more where they are not; 0 for no tokens. The gradient flows through P. As it is a mean over tokens, and a loss
    /// for [`Ddp::backward`](phalanx_ddp_core::Ddp::backward) is a sum, multiply it by the weight that
    /// `backward` is given: the number of tokens that have a loss.
    ///
    /// # Errors
    /// libtorch's own.
    ///
    /// # Source
    /// Fedus et al. 2021 (Switch Transformer), equations 4 to 6; for k > 1 as `load_balancing_loss_func` of transformers' Mixtral has it for one layer (for several that
    /// takes fₑ and Pₑ over all layers together, and this is a layer's own).
    pub fn balance_loss(&self) -> DdpResult<Tensor> {
        self.balanced(&self.load, self.size().0)
    }

    /// This rank's part of the [`balance_loss`](Self::balance_loss) over the tokens of all ranks of `group`, say those of `cp`, which have parts of the same sequences: fₑ and the
    /// number of tokens are theirs together, and the ranks' parts add up to the loss. Collective.
    ///
    /// # Errors
    /// Those of the group; libtorch's own.
    pub fn balance_loss_over(&self, group: &TensorGroup) -> DdpResult<Tensor> {
        if group.world_size() == 1 {
            return self.balance_loss();
        }
        let mut counts = self.load.clone();
        counts.push(self.probabilities.size()[0]);
        let tagged = "tokens of each expert";
        group.with_group(|group| group.tagged(tagged).all_reduce(&mut counts[..], Sum)?.wait())?;
        let tokens = counts.pop().unwrap_or(0);
        self.balanced(&counts, divisor(tokens))
    }

    fn balanced(&self, load: &[i64], tokens: f64) -> DdpResult<Tensor> {
        let kind = self.probabilities.kind();
        let load = Tensor::f_from_slice(load)?.f_to_device(self.probabilities.device())?;
        let sums = self.probabilities.f_sum_dim_intlist([0_i64].as_slice(), false, None)?;
        let sum = load.f_to_kind(kind)?.f_mul(&sums)?.f_sum(kind)?;
        Ok(sum.f_mul_scalar(self.size().1 / (tokens * tokens))?)
    }

    /// The mean over tokens of (log Σₑ exp logitₑ)²: keeps logits small. 0 for no tokens.
    ///
    /// # Errors
    /// libtorch's own.
    ///
    /// # Source
    /// Zoph et al. 2022 (ST-MoE), equation 5.
    pub fn z_loss(&self) -> DdpResult<Tensor> {
        Ok(self.z_sum.f_mul_scalar(1.0 / self.size().0)?)
    }

    /// Tokens and experts, as divisors.
    fn size(&self) -> (f64, f64) {
        let size = self.probabilities.size();
        (divisor(size[0]), divisor(size[1]))
    }
}

/// A count; 1 for none, for sums over them are 0.
#[expect(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^53")]
fn divisor(count: i64) -> f64 {
    count.max(1) as f64
}

fn counted(choices: &[i64], expert_count: i64) -> Vec<i64> {
    let mut load = vec![0; usize::try_from(expert_count).unwrap_or(0)];
    for &expert in choices {
        load[usize::try_from(expert).unwrap_or(0)] += 1;
    }
    load
}
