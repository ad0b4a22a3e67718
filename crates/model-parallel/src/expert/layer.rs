//! The layer: router, exchange, this rank's experts, and the way back.

use tch::Tensor;

use super::plan::Plan;
use super::rows::{self, Orders, Traffic};
use super::{tokens, ExpertOptions, ExpertParallel, Router, Routing};
use crate::error::{Error, Result};
use crate::layer::Builder;
use crate::mesh::Axis;

/// An expert: `[rows, width]` → `[rows, width]`, also for no rows.
pub type Expert = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send>;

/// A layer of experts, of which this rank has `experts / ep`.
///
/// # Example
/// ```
/// use phalanx_model_parallel::expert::{
///     mixtral_expert, ExpertOptions, ExpertParallel, MixtureOfExperts,
/// };
/// use phalanx_model_parallel::layer::{Builder, Init};
/// use tch::{nn, Device, Kind, Tensor};
///
/// let ep = ExpertParallel::alone()?; // or with the mesh's groups of Axes::EP and Axes::TP
/// let vs = nn::VarStore::new(Device::Cpu);
/// let builder = &Builder::new(vs.root(), 1) / "block_sparse_moe";
/// let init = Init::Normal { std: 0.02 };
/// let options = ExpertOptions::mixtral(8);
/// let layer = MixtureOfExperts::new(&builder, 16, options, &ep, |builder, _number| {
///     mixtral_expert(builder, (16, 40), init, &ep.of_experts())
/// })?;
/// let x = Tensor::ones([2, 5, 16], (Kind::Float, Device::Cpu));
/// let mixture = layer.forward(&x)?;
/// assert_eq!(mixture.output.size(), [2, 5, 16]);
/// // For the loss, a sum over tokens: + 0.01 · 10 · this.
/// assert_eq!(mixture.routing.balance_loss()?.numel(), 1);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
pub struct MixtureOfExperts {
    name: String,
    router: Router,
    options: ExpertOptions,
    width: i64,
    /// This rank's.
    experts: Vec<Expert>,
    parallel: ExpertParallel,
}

/// What came of a forward.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mixture {
    /// Of the input's shape and kind: the sum of a token's experts' outputs by their weights. What was dropped is missing from it, so that the
    /// residual connection around the layer passes the token on.
    pub output: Tensor,
    /// What the router said, with its losses.
    pub routing: Routing,
    /// `[experts]`: choices of this rank's tokens that were dropped.
    pub dropped: Vec<i64>,
}

impl MixtureOfExperts {
    /// `gate.weight`, and under `experts.N` this rank's experts as `make` builds them: N is the expert's number among all, which `make` gets, too.
    ///
    /// # Errors
    /// [`Error::BadSetting`]; [`Error::Indivisible`], with the sizes of `ep` that are possible; those of `make`; libtorch's own.
    pub fn new(
        builder: &Builder<'_>,
        width: i64,
        options: ExpertOptions,
        parallel: &ExpertParallel,
        mut make: impl FnMut(&Builder<'_>, i64) -> Result<Expert>,
    ) -> Result<Self> {
        options.check()?;
        let name = builder.path().components().collect::<Vec<_>>().join(".");
        let each = share(&name, options.experts, parallel.group.world_size())?;
        let router = Router::new(builder, width, &options)?;
        let first = i64::try_from(parallel.group.rank()).unwrap_or(0) * each;
        let of_all = builder / "experts";
        let experts = (first..first + each)
            .map(|number| make(&(&of_all / number), number))
            .collect::<Result<_>>()?;
        Ok(Self { name, router, options, width, experts, parallel: parallel.clone() })
    }

    /// `[…, width]` → the same; where `tp` cuts tokens, `[batch, tokens / n, width]`. Collective over `ep`, and so is the backward: every rank calls both, also one without tokens, and its loss
    /// must depend on the output.
    ///
    /// # Errors
    /// [`Error::BadInput`] before anything is sent; those of experts and of the group; libtorch's own.
    pub fn forward(&self, x: &Tensor) -> Result<Mixture> {
        let tp = &self.parallel.tp;
        let shape = x.size();
        let (least, form) = if tp.cuts_tokens() { (3, "batch, tokens") } else { (2, "…") };
        if shape.len() < least || shape.last() != Some(&self.width) {
            return Err(Error::BadInput {
                layer: self.name.clone(),
                actual: format!("a tensor of shape {shape:?}"),
                expected: format!("one of shape [{form}, {}]", self.width),
            });
        }
        if tp.cuts_tokens() {
            let x = tokens::gathered(x, tp, &self.name)?;
            let whole = self.mixed(&x)?;
            return Ok(Mixture { output: tokens::own(&whole.output, tp, &self.name)?, ..whole });
        }
        self.mixed(x)
    }

    /// Of all tokens of the rank.
    fn mixed(&self, x: &Tensor) -> Result<Mixture> {
        let shape = x.size();
        let count = shape[..shape.len() - 1].iter().product::<i64>();
        let tokens = x.f_reshape([count, self.width])?;
        let routing = self.router.route(&tokens)?;
        let plan = Plan::new(routing.choices(), routing.load().len(), self.options.capacity(count));
        let orders = Orders {
            choice_of_row: Tensor::f_from_slice(&plan.choice_of_row)?.f_to_device(x.device())?,
            row_of_choice: Tensor::f_from_slice(&plan.row_of_choice)?.f_to_device(x.device())?,
            k: self.options.top_k,
        };
        let rows = self.computed(&rows::spread(&tokens, &orders)?, &plan.counts)?;
        let by_choice = rows::collect(&rows, &orders)?;
        let weights = routing.weights().f_to_kind(by_choice.kind())?.f_unsqueeze(-1)?;
        let sum = by_choice.f_mul(&weights)?.f_sum_dim_intlist([1_i64].as_slice(), false, None)?;
        Ok(Mixture { output: sum.f_reshape(&shape)?, routing, dropped: plan.dropped })
    }

    /// What experts make of rows, which are ordered by expert.
    fn computed(&self, rows: &Tensor, counts: &[i64]) -> Result<Tensor> {
        let (ranks, each) = (self.parallel.group.world_size(), self.experts.len());
        let tag = |what: &str| format!("{}: {what}", self.name);
        let all = rows::counts_of_all(counts, &self.parallel.group, &tag("counts of tokens"))?;
        let own = self.parallel.group.rank() * each;
        // By rank and by expert of this one.
        let came: Vec<i64> =
            all.iter().flat_map(|of_rank| of_rank[own..own + each].iter().copied()).collect();
        let traffic = Traffic {
            sent: counts.chunks_exact(each).map(|of_rank| of_rank.iter().sum()).collect(),
            received: came.chunks_exact(each).map(|of_rank| of_rank.iter().sum()).collect(),
        };
        let came_here =
            rows::exchange(rows, &traffic, &self.parallel.group, &tag("tokens to experts"))?;
        let pieces = came_here.f_split_with_sizes(came.as_slice(), 0)?;
        let mut made: Vec<Vec<Tensor>> = Vec::with_capacity(each);
        for (local, expert) in self.experts.iter().enumerate() {
            let of_ranks: Vec<&Tensor> =
                (0..ranks).map(|rank| &pieces[rank * each + local]).collect();
            let output = expert(&Tensor::f_cat(&of_ranks, 0)?)?;
            let sizes: Vec<i64> = (0..ranks).map(|rank| came[rank * each + local]).collect();
            made.push(output.f_split_with_sizes(sizes.as_slice(), 0)?);
        }
        let by_rank: Vec<&Tensor> =
            (0..ranks).flat_map(|rank| made.iter().map(move |of_ranks| &of_ranks[rank])).collect();
        let (outputs, back) = (Tensor::f_cat(&by_rank, 0)?, traffic.reversed());
        Ok(rows::exchange(&outputs, &back, &self.parallel.group, &tag("tokens from experts"))?)
    }
}

/// How many of the experts each rank has.
fn share(layer: &str, experts: i64, ranks: usize) -> Result<i64> {
    let divides = |count: usize| experts % i64::try_from(count).unwrap_or(i64::MAX) == 0;
    if divides(ranks) {
        return Ok(experts / i64::try_from(ranks).unwrap_or(1));
    }
    let most = usize::try_from(experts).unwrap_or(usize::MAX);
    Err(Error::Indivisible {
        layer: layer.to_owned(),
        what: "experts",
        len: experts,
        axis: Axis::Ep,
        ranks,
        possible: (1..=most).filter(|&count| divides(count)).collect(),
    })
}

impl std::fmt::Debug for MixtureOfExperts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("MixtureOfExperts");
        shown.field("name", &self.name).field("options", &self.options);
        shown.field("own_experts", &self.experts.len()).finish_non_exhaustive()
    }
}
