//! The product whose inputs are cut: each rank multiplies the columns that it has, and the products are summed.
//!
//! With sequence parallelism each rank gets the sum of its own tokens alone, and the backward gathers the gradient of all. The sum of some rows goes on while
//! the next are multiplied, and those that were gathered are multiplied while the rest comes ([`Chunks`]).

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::chunked::Beside;
use super::cut;
use super::parallel::{Later, TensorParallel};
use super::product::{check_width, flat, layer_name, LinearOptions, Side, Weight};
use super::rows::Chunks;
use crate::layer::none;
use crate::layer::{Builder, Deferred, Init};

/// A linear layer of whose inputs each rank has 1/n. Every rank has the bias whole, and it is added once.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::Builder;
/// use phalanx_model_parallel::tensor::{LinearOptions, RowLinear, TensorParallel};
/// use tch::{nn, Device, Kind, Tensor};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let builder = Builder::new(vs.root(), 1);
/// let tp = TensorParallel::alone()?;
/// let layer = RowLinear::new(&(&builder / "proj"), 32, 8, LinearOptions::default(), &tp)?;
/// let x = Tensor::ones([2, 4, 32], (Kind::Float, Device::Cpu)); // 32 / n
/// assert_eq!(layer.forward(&x)?.size(), [2, 4, 8]);
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Debug)]
pub struct RowLinear {
    product: Product,
    inputs: i64,
}

impl RowLinear {
    /// Variables `weight` and `bias` of a layer that takes `inputs` columns, of which each rank has 1/n, and gives `outputs`. `parts` are of no use here.
    ///
    /// # Errors
    /// [`Error::Indivisible`](crate::Error::Indivisible) where the inputs cannot be cut over the ranks; libtorch's own.
    #[expect(clippy::needless_pass_by_value, reason = "options are written where they are used")]
    pub fn new(
        builder: &Builder<'_>,
        inputs: i64,
        outputs: i64,
        options: LinearOptions,
        tp: &TensorParallel,
    ) -> crate::Result<Self> {
        let name = layer_name(builder);
        if inputs % tp.size() != 0 {
            return Err(cut::indivisible(&name, "columns", inputs, tp.size()));
        }
        let pieces = cut::even(&name, "columns", (&[inputs], 1), (tp.rank(), tp.size()))?;
        let side = (Side::In, pieces.as_slice());
        let weight = Weight::new(builder, (inputs, outputs), &options, side)?;
        let bias = match options.bias {
            true => Some(builder.whole("bias", &[outputs], Init::Constant(0.0))?),
            false => None,
        };
        let product = Product { weight, bias, tp: tp.clone(), chunks: tp.chunks(), name };
        Ok(Self { product, inputs: inputs / tp.size() })
    }

    /// The same, cut into rows in another way than [`Chunks::of`] the group. All ranks alike.
    #[must_use]
    pub fn with_chunks(mut self, chunks: Chunks) -> Self {
        self.product.chunks = chunks;
        self
    }

    /// `[…, in/n] → […, out]`; with sequence parallelism `[batch, tokens, in/n] → [batch, tokens/n, out]`.
    ///
    /// # Errors
    /// [`Error::BadInput`](crate::Error::BadInput); those of the group; libtorch's own.
    pub fn forward(&self, x: &Tensor) -> crate::Result<Tensor> {
        check_width(&self.product.name, x, self.inputs)?;
        self.product.tp.check_tokens(&self.product.name, x)?;
        let mut outputs = self.product.again().apply(x)?;
        Ok(outputs.swap_remove(0))
    }

    /// How many inputs this rank has.
    #[must_use]
    pub(crate) fn inputs(&self) -> i64 {
        self.inputs
    }
}

#[derive(Debug)]
struct Product {
    weight: Weight,
    bias: Option<Tensor>,
    tp: TensorParallel,
    chunks: Chunks,
    name: String,
}

impl Product {
    fn again(&self) -> Self {
        Self {
            weight: self.weight.again(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            tp: self.tp.clone(),
            chunks: self.chunks,
            name: self.name.clone(),
        }
    }

    fn apply(self, x: &Tensor) -> Result<Vec<Tensor>> {
        let deferred = Deferred::active();
        let owned = self.again();
        let mut inputs = vec![x, &owned.weight.tensor];
        inputs.extend(&owned.bias);
        Function::new("row_linear").apply(
            &inputs,
            move |saving, inputs| {
                saving.save(inputs[0]);
                saving.save(inputs[1]);
                Ok((vec![self.forward(inputs[0])?], self))
            },
            move |backward, gradients| {
                let needs = &backward.needs_input_grad;
                let Some(gradient) = &gradients[0] else { return Ok(none(needs.len())) };
                backward.state.backward(&backward.saved, needs, gradient, deferred.as_ref())
            },
        )
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.tp.ranks() == 1 {
            return self.weight.forward(x, self.bias.as_ref());
        }
        let tag = self.tag("output");
        let mut sum = self.beside(&tag).start_sum(&[(x, self.weight.factor(None)?)])?.wait()?;
        if let Some(bias) = &self.bias {
            drop(sum.f_add_(bias)?);
        }
        Ok(sum)
    }

    fn backward(
        &self,
        saved: &[Tensor],
        needs: &[bool],
        gradient: &Tensor,
        deferred: Option<&Deferred>,
    ) -> Result<Vec<Option<Tensor>>> {
        let (x, weight) = (&saved[0], self.weight.with(&saved[1]));
        let needs_bias = needs.get(2).copied().unwrap_or(false);
        let tag = self.tag("gradient of the output");
        let gathering = self.beside(&tag).start_gather(gradient)?;
        let of_bias = match needs_bias {
            true => Some(flat(gradient)?.f_sum_dim_intlist([0_i64].as_slice(), false, None)?),
            false => None,
        };
        let factor = match needs[0] {
            true => vec![weight.backward_factor(gradient.kind())?],
            false => Vec::new(),
        };
        let (whole, of_x) = gathering.multiplied(&factor)?;
        // The bias is whole and its gradient that of the rank's own tokens.
        let of_bias = match of_bias {
            Some(of_bias) if self.tp.cuts_tokens() => {
                let its_tag = self.tag("gradient of the bias");
                Some(Later::Coming(self.tp.group.start_all_reduce(&of_bias, &its_tag)?))
            }
            Some(of_bias) => Some(Later::Here(of_bias)),
            None => None,
        };
        let of_weight = match deferred {
            None => self.weight.gradients(x, &whole, (needs[1], false))?.0,
            Some(deferred) => {
                self.leave(deferred, x, whole, needs[1]);
                None
            }
        };
        let of_bias = of_bias.map(Later::wait).transpose()?;
        let mut all = vec![of_x.into_iter().next(), of_weight];
        all.extend((needs.len() > 2).then_some(of_bias));
        Ok(all)
    }

    /// Puts off the gradient of the weight.
    fn leave(&self, deferred: &Deferred, x: &Tensor, gradient: Tensor, wants: bool) {
        let (weight, x) = (self.weight.again(), x.shallow_clone());
        deferred.leave(move || {
            let (of_weight, _) = weight.gradients(&x, &gradient, (wants, false))?;
            Ok(of_weight.map(|of_weight| (weight.tensor, of_weight)).into_iter().collect())
        });
    }

    fn beside<'a>(&'a self, tag: &'a str) -> Beside<'a> {
        Beside { tp: &self.tp, chunks: self.chunks, tag }
    }

    fn tag(&self, what: &str) -> String {
        format!("{}: {what}", self.name)
    }
}
