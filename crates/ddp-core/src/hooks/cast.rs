//! Gradients that travel in half precision.

use std::any::Any;

use phalanx_comm::Work;
use tch::{Kind, Tensor};

use super::{Bucket, Hook, Lossy, Plain, Progress, State, Wire};
use crate::{Error, Result};

/// Rounds gradients to a kind of two bytes, lets another hook exchange those, and widens the mean: 2 (P−1)/P · 2n bytes with [`Plain`] inside.
///
/// With [`Plain`], g a rank's gradient and r(x) the rounding to the nearest, ties to even: mean = r(scale · Σ r(g)), the sum in rank order in f32. PyTorch's
/// hooks divide first and add in half precision. In f16 gradients are multiplied by P · scale before they are rounded (1 unless they are weighted), so
/// what travels is of a mean's size; beyond ±65504 it is infinite.
///
/// In bf16, with [`Plain`] inside and ranks that share memory, nothing travels: gradients are rounded as they are added, in their place, to the same bits.
///
/// # Source
/// `bf16_compress_hook`, `fp16_compress_wrapper` of `torch/distributed/algorithms/ddp_comm_hooks/default_hooks.py`.
#[derive(Clone, Copy, Debug)]
pub struct Cast<H = Plain> {
    kind: Kind,
    inner: H,
}

impl Cast {
    /// bf16: the range of f32, 8 bits.
    #[must_use]
    pub fn bf16() -> Self {
        Self::around(Kind::BFloat16, Plain)
    }

    /// f16: 11 bits from 6·10⁻⁵ to 65504, fewer below.
    #[must_use]
    pub fn fp16() -> Self {
        Self::around(Kind::Half, Plain)
    }
}

impl<H: Hook> Cast<H> {
    /// Rounds to `kind` ([`Kind::BFloat16`] or [`Kind::Half`]) what `inner` exchanges.
    pub fn around(kind: Kind, inner: H) -> Self {
        Self { kind, inner }
    }

    /// By what gradients are multiplied before they are rounded.
    fn factor(&self, bucket: &Bucket<'_>) -> f64 {
        if self.kind == Kind::Half {
            bucket.factor()
        } else {
            1.0
        }
    }
}

/// What is under way of a bucket.
#[derive(Debug)]
pub enum Casting<P> {
    /// Gradients that were of the kind already, with the hook inside.
    Alike(P),
    /// Rounded gradients, and the factor that the hook inside works with.
    Rounded(Wire, f64, P),
    /// Gradients that are rounded as they are added.
    InPlace(Work<'static>),
}

impl<H: Hook> Hook for Cast<H> {
    type Pending = Casting<H::Pending>;

    fn name(&self) -> String {
        let kind = if self.kind == Kind::Half { "fp16" } else { "bf16" };
        match self.inner.name().as_str() {
            "plain" => kind.to_owned(),
            inner => format!("{kind} around {inner}"),
        }
    }

    fn check(&self) -> Result<()> {
        if !matches!(self.kind, Kind::Half | Kind::BFloat16) {
            let (setting, value) = ("kind of a cast", format!("{:?}", self.kind));
            return Err(Error::BadSetting { setting, value, expected: "Half or BFloat16" });
        }
        self.inner.check()
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        if bucket.kind() == self.kind {
            return Ok(Casting::Alike(self.inner.start(bucket)?));
        }
        let is_plain = (&self.inner as &dyn Any).is::<Plain>();
        if is_plain && self.kind == Kind::BFloat16 && bucket.lost().is_none() {
            if let Some(work) = bucket.reduce_as_bf16()? {
                return Ok(Casting::InPlace(work));
            }
        }
        let factor = self.factor(bucket);
        let scale = bucket.scale() / factor;
        let wire = bucket.take(self.kind, bucket.len())?;
        let gradients = bucket.gradients()?;
        tch::no_grad(|| round(&gradients, factor, &wire, bucket.lost().as_ref()))?;
        let inner = self.inner.start(&mut bucket.over(&wire, scale))?;
        Ok(Casting::Rounded(wire, scale, inner))
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        let (wire, scale, inner) = match pending {
            Casting::Alike(inner) => {
                return Ok(self.inner.finish(bucket, inner)?.map(Casting::Alike));
            }
            Casting::InPlace(work) => return bucket.wait(work).map(|()| Progress::Done),
            Casting::Rounded(wire, scale, inner) => (wire, scale, inner),
        };
        match self.inner.finish(&mut bucket.over(&wire, scale), inner)? {
            Progress::Again(inner) => Ok(Progress::Again(Casting::Rounded(wire, scale, inner))),
            Progress::Done => {
                let segment = bucket.segment();
                let mut target = bucket.part(&bucket.gradients()?, &segment)?;
                let mean = bucket.part(wire.tensor(), &segment)?;
                tch::no_grad(|| target.f_copy_(&mean).map(drop))?;
                bucket.put_back(wire);
                Ok(Progress::Done)
            }
        }
    }

    fn drifts(&self) -> bool {
        self.inner.drifts()
    }

    fn reset(&mut self) {
        self.inner.reset();
    }

    fn state(&self) -> Result<State> {
        self.inner.state()
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.inner.load(state)
    }
}

impl<H: Lossy> Lossy for Cast<H> {}
/// It loses nothing itself.
impl Lossy for Plain {}

/// Rounds gradients times `factor` to a wire, and adds what that loses.
fn round(gradients: &Tensor, factor: f64, wire: &Wire, lost: Option<&Tensor>) -> Result<()> {
    let mut target = wire.tensor().shallow_clone();
    if (factor - 1.0).abs() > 0.0 {
        target.f_copy_(&gradients.f_mul_scalar(factor)?)?;
    } else {
        target.f_copy_(gradients)?;
    }
    let Some(lost) = lost else { return Ok(()) };
    let rounded = target.f_to_kind(Kind::Float)?.f_div_scalar(factor)?;
    drop(lost.shallow_clone().f_add_(&gradients.f_sub(&rounded)?)?);
    Ok(())
}
