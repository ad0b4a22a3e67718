//! The product whose outputs are cut: each rank has some columns of the result.
//!
//! Forward: nothing is sent, or with sequence parallelism the tokens are gathered, and multiplied while the rest of them comes ([`Chunks`]). Backward: the input's gradient is a sum over the ranks, which
//! goes on while the gradients of the weights are computed. The gathered tokens are not kept: the backward gathers them again, while it
//! computes the input's gradient.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::Result;
use tch::Tensor;

use super::chunked::{Beside, Summing};
use super::cut::{self, Piece};
use super::parallel::TensorParallel;
use super::product::{check_width, layer_name, LinearOptions, Side, Weight};
use super::repeated;
use super::rows::Chunks;
use crate::layer::none;
use crate::layer::{Builder, Deferred, Init};

/// A linear layer of whose outputs each rank has 1/n.
///
/// # Example
/// ```
/// use phalanx_model_parallel::layer::Builder;
/// use phalanx_model_parallel::tensor::{ColumnLinear, LinearOptions, TensorParallel};
/// use tch::{nn, Device, Kind, Tensor};
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let builder = Builder::new(vs.root(), 1);
/// let tp = TensorParallel::alone()?;
/// let layer = ColumnLinear::new(&(&builder / "fc"), 8, 32, LinearOptions::default(), &tp)?;
/// let x = Tensor::ones([2, 4, 8], (Kind::Float, Device::Cpu));
/// assert_eq!(layer.forward(&x)?.size(), [2, 4, 32]); // 32 / n
/// # Ok::<(), phalanx_model_parallel::Error>(())
/// ```
#[derive(Debug)]
pub struct ColumnLinear {
    part: Part,
    inputs: i64,
    name: String,
    tp: TensorParallel,
    chunks: Chunks,
}

/// What a product needs of a layer.
#[derive(Debug)]
struct Part {
    weight: Weight,
    bias: Option<Tensor>,
    pieces: Vec<Piece>,
}

impl ColumnLinear {
    /// Variables `weight` and `bias` of a layer that takes `inputs` columns and gives `outputs`.
    ///
    /// # Errors
    /// [`Error::Indivisible`](crate::Error::Indivisible) where a part cannot be cut over the ranks; [`Error::BadSetting`](crate::Error::BadSetting) where parts are not `outputs`
    /// together; libtorch's own.
    #[expect(clippy::needless_pass_by_value, reason = "options are written where they are used")]
    pub fn new(
        builder: &Builder<'_>,
        inputs: i64,
        outputs: i64,
        options: LinearOptions,
        tp: &TensorParallel,
    ) -> crate::Result<Self> {
        let parts = if options.parts.is_empty() { vec![outputs] } else { options.parts.clone() };
        if parts.iter().sum::<i64>() != outputs {
            return Err(crate::Error::BadSetting {
                setting: "parts",
                value: format!("{parts:?}"),
                expected: "as many columns together as the layer has outputs",
            });
        }
        let name = layer_name(builder);
        let what = if options.unit > 1 { "heads" } else { "columns" };
        let pieces = cut::even(&name, what, (&parts, options.unit), (tp.rank(), tp.size()))?;
        let side = (Side::Out, pieces.as_slice());
        let weight = Weight::new(builder, (inputs, outputs), &options, side)?;
        let ranges = pieces.iter().map(|piece| piece.range.clone()).collect();
        let bias = match options.bias {
            true => Some(builder.part("bias", &[outputs], 0, ranges, Init::Constant(0.0))?),
            false => None,
        };
        let part = Part { weight, bias, pieces };
        Ok(Self { part, inputs, name, tp: tp.clone(), chunks: tp.chunks() })
    }

    /// The same, cut into rows in another way than [`Chunks::of`] the group. All ranks alike; of several layers with one input the first's counts.
    #[must_use]
    pub fn with_chunks(self, chunks: Chunks) -> Self {
        Self { chunks, ..self }
    }

    /// `[…, in] → […, out/n]`; with sequence parallelism `[batch, tokens/n, in] → [batch, tokens, out/n]`.
    ///
    /// # Errors
    /// [`Error::BadInput`](crate::Error::BadInput); those of the group; libtorch's own.
    pub fn forward(&self, x: &Tensor) -> crate::Result<Tensor> {
        Ok(Self::forward_all(&[self], x)?.swap_remove(0))
    }

    /// The same of several layers with one input, which is gathered, and its gradient summed, once. All of one group.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_all(layers: &[&Self], x: &Tensor) -> crate::Result<Vec<Tensor>> {
        let Some(first) = layers.first() else { return Ok(Vec::new()) };
        for layer in layers {
            check_width(&layer.name, x, layer.inputs)?;
        }
        let parts = layers.iter().map(|layer| layer.part.again()).collect();
        let (tp, chunks, name) = (first.tp.clone(), first.chunks, first.name.clone());
        Ok(Products { parts, tp, chunks, name }.apply(x)?)
    }

    /// How many outputs this rank has.
    #[must_use]
    pub(crate) fn outputs(&self) -> i64 {
        self.part.pieces.iter().map(Piece::len).sum()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// How many columns this rank has of each of the parts.
    pub(super) fn widths(&self) -> Vec<i64> {
        self.part.pieces.iter().map(Piece::len).collect()
    }

    pub(super) fn tp(&self) -> &TensorParallel {
        &self.tp
    }
}

impl Part {
    fn again(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight: self.weight.again(), bias, pieces: self.pieces.clone() }
    }
}

/// Products of one input.
#[derive(Debug)]
struct Products {
    parts: Vec<Part>,
    tp: TensorParallel,
    chunks: Chunks,
    name: String,
}

/// Of each product: whether the gradients of its weight and bias are wanted.
type Wants = Vec<(bool, bool)>;

/// Of each product: the gradients of its weight and bias.
type OfVariables = Vec<(Option<Tensor>, Option<Tensor>)>;

impl Products {
    fn apply(self, x: &Tensor) -> Result<Vec<Tensor>> {
        let deferred = Deferred::active();
        let owned = self.again();
        let mut inputs = vec![x];
        for part in &owned.parts {
            inputs.push(&part.weight.tensor);
            inputs.extend(&part.bias);
        }
        Function::new("column_linear").apply(
            &inputs,
            move |saving, inputs| {
                saving.save(inputs[0]);
                self.parts.iter().for_each(|part| saving.save(&part.weight.tensor));
                Ok((self.forward(inputs[0])?, self))
            },
            move |backward, gradients| {
                let (products, saved) = (backward.state, &backward.saved);
                products.backward(saved, &backward.needs_input_grad, gradients, deferred.as_ref())
            },
        )
    }

    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        if !self.tp.cuts_tokens() {
            let product = |part: &Part| part.weight.forward(x, part.bias.as_ref());
            return self.parts.iter().map(product).collect();
        }
        let tag = self.tag("input");
        let gathering = self.beside(&tag).start_gather(x)?;
        let factor = |part: &Part| part.weight.factor(part.bias.as_ref());
        let factors = self.parts.iter().map(factor).collect::<Result<Vec<_>>>()?;
        Ok(gathering.multiplied(&factors)?.1)
    }

    fn backward(
        &self,
        saved: &[Tensor],
        needs: &[bool],
        gradients: &[Option<Tensor>],
        deferred: Option<&Deferred>,
    ) -> Result<Vec<Option<Tensor>>> {
        if gradients.iter().all(Option::is_none) {
            return Ok(none(needs.len()));
        }
        let wants = self.wants(needs);
        let wants_any = wants.iter().any(|wants| wants.0);
        let x = &saved[0];
        let now = deferred.is_none();
        let tag = self.tag("input again");
        // First, so that it goes on while the input's gradient is computed.
        let gather = match now && wants_any {
            true => Some(self.tp.start_gather(x, &tag)?),
            false => None,
        };
        let summing = if needs[0] { Some(self.of_input(&saved[1..], gradients)?) } else { None };
        let of_variables = match deferred {
            None => {
                let whole = match gather {
                    Some(gather) => gather.wait()?,
                    None => x.f_detach()?,
                };
                self.of_variables(&whole, gradients, &wants)?
            }
            Some(deferred) => {
                self.leave(deferred, x, gradients, wants);
                self.parts.iter().map(|_| (None, None)).collect()
            }
        };
        let mut all = vec![summing.map(Summing::wait).transpose()?];
        for (part, (of_weight, of_bias)) in self.parts.iter().zip(of_variables) {
            all.push(of_weight);
            all.extend(part.bias.is_some().then_some(of_bias));
        }
        Ok(all)
    }

    /// The sum that is the input's gradient.
    fn of_input(&self, weights: &[Tensor], gradients: &[Option<Tensor>]) -> Result<Summing> {
        let tag = self.tag("gradient of the input");
        let (mut products, mut kind) = (Vec::new(), None);
        for ((part, weight), gradient) in self.parts.iter().zip(weights).zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let kind = *kind.get_or_insert(gradient.kind());
            products.push((gradient, part.weight.with(weight).backward_factor(kind)?));
        }
        self.beside(&tag).start_sum(&products)
    }

    fn of_variables(
        &self,
        x: &Tensor,
        gradients: &[Option<Tensor>],
        wants: &Wants,
    ) -> Result<OfVariables> {
        let (mut all, mut views) = (Vec::new(), Vec::new());
        for ((part, gradient), own) in self.parts.iter().zip(gradients).zip(wants) {
            let Some(gradient) = gradient else {
                all.push((None, None));
                continue;
            };
            let (weight, bias) = part.weight.gradients(x, gradient, *own)?;
            if let Some(weight) = &weight {
                views.extend(repeated::views(weight, part.weight.outputs(), &part.pieces)?);
            }
            if let Some(bias) = &bias {
                views.extend(repeated::views(bias, 0, &part.pieces)?);
            }
            all.push((weight, bias));
        }
        repeated::sum(&self.tp, &self.tag("gradients of shared heads"), views)?;
        Ok(all)
    }

    /// Puts off the gradients of the variables. What they need of other ranks is sent then, by all ranks alike.
    fn leave(&self, deferred: &Deferred, x: &Tensor, gradients: &[Option<Tensor>], wants: Wants) {
        let (products, x) = (self.again(), x.shallow_clone());
        let gradients: Vec<Option<Tensor>> =
            gradients.iter().map(|gradient| gradient.as_ref().map(Tensor::shallow_clone)).collect();
        deferred.leave(move || {
            let whole = products.tp.start_gather(&x, &products.tag("input again"))?.wait()?;
            let of_variables = products.of_variables(&whole, &gradients, &wants)?;
            let mut pairs = Vec::new();
            for (part, (of_weight, of_bias)) in products.parts.into_iter().zip(of_variables) {
                pairs.extend(of_weight.map(|gradient| (part.weight.tensor, gradient)));
                pairs.extend(part.bias.zip(of_bias));
            }
            Ok(pairs)
        });
    }

    fn wants(&self, needs: &[bool]) -> Wants {
        let mut needs = needs[1..].iter().copied();
        let mut next = || needs.next().unwrap_or(false);
        self.parts.iter().map(|part| (next(), part.bias.is_some() && next())).collect()
    }

    fn again(&self) -> Self {
        let parts = self.parts.iter().map(Part::again).collect();
        Self { parts, tp: self.tp.clone(), chunks: self.chunks, name: self.name.clone() }
    }

    fn beside<'a>(&'a self, tag: &'a str) -> Beside<'a> {
        Beside { tp: &self.tp, chunks: self.chunks, tag }
    }

    fn tag(&self, what: &str) -> String {
        format!("{}: {what}", self.name)
    }
}
