//! [`Join`]: ranks that run out of batches at different times.

use crate::reduce::{self, Shared};
use crate::{Error, Result};

/// While it lives, every exchange says which ranks take part, and means are over those: over their number after
/// plain backwards, over their weights after [`Ddp::backward`](crate::Ddp::backward). A rank that has no
/// batch left calls [`Join::finish`].
///
/// Every exchange waits, at its first bucket, until all ranks have begun theirs.
///
/// # Example
/// ```
/// # use phalanx_comm::{Group, GroupOptions};
/// # use phalanx_ddp_core::optim::{AdamW, Optimizer, ParameterGroups};
/// # use phalanx_ddp_core::{Ddp, DdpOptions, Sync};
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut group = Group::single(GroupOptions::default())?;
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root() / "fc", 4, 1, Default::default());
/// # let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
/// # let mut optimizer = Optimizer::new(&ddp, AdamW::default(), ParameterGroups::default())?;
/// # let my_batches = [Tensor::ones([8, 4], (Kind::Float, Device::Cpu))];
/// let join = ddp.join()?;
/// for batch in &my_batches {            // as many as this rank has
///     ddp.backward(&net.forward(batch).square().sum(Kind::Float), 8.0, Sync::Reduce)?;
///     optimizer.step(None)?;
/// }
/// join.finish(|| optimizer.step(None).map(drop))?; // until every rank is through
/// # Ok(())
/// # }
/// ```
///
/// # Source
/// `torch/distributed/algorithms/join.py`. There a joined rank's model falls behind and is replaced at the end; here it
/// steps with the others, so that all are equal throughout.
#[derive(Debug)]
#[must_use = "a rank that leaves without `finish` lets the others wait"]
pub struct Join<'a> {
    shared: &'a Shared,
}

impl<'a> Join<'a> {
    pub(crate) fn begin(shared: &'a Shared) -> Result<Self> {
        let mut reducer = reduce::lock(shared)?;
        if reducer.options.shard_accumulation {
            let (setting, value) = ("shard_accumulation", "true".to_owned());
            let expected = "false beside Ddp::join: all ranks exchange each micro-batch";
            return Err(Error::BadSetting { setting, value, expected });
        }
        if reducer.weighing.is_some() {
            return Err(Error::BadSetting {
                setting: "join",
                value: "of a Ddp with weigh_over".to_owned(),
                expected: "as many batches on every rank",
            });
        }
        reducer.joining = true;
        reducer.heed_differences();
        Ok(Self { shared })
    }

    /// Takes part in the other ranks' exchanges with nothing of its own, until no rank has anything left, and
    /// calls `step` after each: there the optimizer makes the same step as everywhere.
    ///
    /// What this rank has accumulated and not exchanged goes into the first of them. Collective.
    ///
    /// # Errors
    /// Those of `step`, and of [`Ddp::exchange`](crate::Ddp::exchange).
    pub fn finish(self, mut step: impl FnMut() -> Result<()>) -> Result<()> {
        while reduce::lock(self.shared)?.shadow()? > 0 {
            step()?;
        }
        Ok(())
    }
}

impl Drop for Join<'_> {
    fn drop(&mut self) {
        if let Ok(mut reducer) = self.shared.lock() {
            reducer.joining = false;
            reducer.heed_differences();
        }
    }
}
