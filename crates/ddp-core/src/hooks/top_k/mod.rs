//! Only the largest gradients travel.

mod select;

use phalanx_comm::Work;
use tch::{Kind, Tensor};

use super::{Bucket, Hook, Lossy, Progress, Wire};
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::{Error, Result};

/// Each rank sends its k = ⌈fraction · n⌉ gradients of largest magnitude of each bucket with their places, 8 bytes each, to all: (P−1) · 8k bytes. The mean
/// is scale · Σ over the ranks, in rank order in f32, of what each has sent, and zero elsewhere.
///
/// Of equal magnitudes the first are taken (on a GPU libtorch chooses). Meant for use in [`ErrorFeedback`](super::ErrorFeedback), without which small
/// gradients never count. It sends less than [`Plain`](super::Plain) where fraction < 1/P.
///
/// # Source
/// Aji and Heafield 2017, "Sparse Communication for Distributed Gradient Descent"; Stich et al. 2018, "Sparsified SGD with Memory".
#[derive(Clone, Copy, Debug)]
pub struct TopK {
    /// The share of gradients that travel: above 0, at most 1.
    pub fraction: f64,
}

impl Hook for TopK {
    /// A row for each rank: places, and the bits of values.
    type Pending = (Wire, Work<'static>);

    fn name(&self) -> String {
        format!("topk of {}", self.fraction)
    }

    fn check(&self) -> Result<()> {
        if self.fraction > 0.0 && self.fraction <= 1.0 {
            return Ok(());
        }
        let (setting, value) = ("fraction of TopK", self.fraction.to_string());
        Err(Error::BadSetting { setting, value, expected: "a number above 0, at most 1" })
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        let count = self.count(bucket);
        let wire = bucket.take(Kind::Int, 2 * count * bucket.world_size())?;
        let gradients = bucket.gradients()?.f_to_kind(Kind::Float)?;
        let places = largest(&gradients, count)?;
        let values = gradients.f_index_select(0, &places)?;
        let (mut to_places, to_values) = row(&wire, bucket.rank(), count)?;
        tch::no_grad(|| -> Result<()> {
            to_places.f_copy_(&places)?;
            to_values.f_view_dtype(Kind::Float)?.f_copy_(&values)?;
            let Some(mut lost) = bucket.lost() else { return Ok(()) };
            drop(lost.f_add_(&gradients)?);
            // Not less than what was added: they are gone exactly.
            let kept = lost.f_index_select(0, &places)?.f_sub(&values)?;
            drop(lost.f_index_copy_(0, &places, &kept)?);
            Ok(())
        })?;
        let work = bucket.all_gather("the largest", &wire)?;
        Ok((wire, work))
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        (wire, work): Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        bucket.wait(work)?;
        let count = self.count(bucket);
        let mut gradients = bucket.gradients()?;
        let mut sum = gradients.f_to_kind(Kind::Float)?;
        tch::no_grad(|| -> Result<()> {
            drop(sum.f_zero_()?);
            for rank in 0..bucket.world_size() {
                let (places, values) = row(&wire, rank, count)?;
                add(&mut sum, &places, &values.f_view_dtype(Kind::Float)?)?;
            }
            drop(sum.f_mul_scalar_(bucket.scale())?);
            if gradients.kind() != Kind::Float {
                gradients.f_copy_(&sum)?;
            }
            Ok(())
        })?;
        bucket.put_back(wire);
        Ok(Progress::Done)
    }
}

impl Lossy for TopK {}

impl TopK {
    /// How many of a bucket travel.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "lengths of buckets are far below 2^52, and the product is between 0 and the length"
    )]
    fn count(self, bucket: &Bucket<'_>) -> usize {
        // Of what parameters have: the padding is never largest.
        let len: usize = bucket.parameters().iter().map(|placed| placed.range.len()).sum();
        ((len as f64 * self.fraction).ceil() as usize).clamp(1, bucket.len())
    }
}

/// The places and the bits of the values that a rank has sent, each `count` long.
fn row(wire: &Wire, rank: usize, count: usize) -> Result<(Tensor, Tensor)> {
    let at = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    let part = |part: usize| wire.tensor().f_narrow(0, at((2 * rank + part) * count), at(count));
    Ok((part(0)?, part(1)?))
}

/// The places of the largest, as i64, in ascending order.
fn largest(values: &Tensor, count: usize) -> Result<Tensor> {
    if values.device().is_cuda() {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let (_, places) = values.f_abs()?.f_topk(count, 0, true, false)?;
        return Ok(places.f_sort(0, false)?.0);
    }
    let values: &[f32] = bytemuck::cast_slice(dense_bytes("gradients", values)?);
    let places: Vec<i64> = select::largest(values, count).into_iter().map(i64::from).collect();
    Ok(Tensor::f_from_slice(&places)?)
}

/// Adds `values` at `places`, which are all different.
fn add(sum: &mut Tensor, places: &Tensor, values: &Tensor) -> Result<()> {
    if sum.device().is_cuda() {
        drop(sum.f_index_add_(0, &places.f_to_kind(Kind::Int64)?, values)?);
        return Ok(());
    }
    let places: &[i32] = bytemuck::cast_slice(dense_bytes("places", places)?);
    let values: &[f32] = bytemuck::cast_slice(dense_bytes("values", values)?);
    let sum: &mut [f32] = bytemuck::cast_slice_mut(dense_bytes_mut("sum", sum)?);
    for (&place, &value) in places.iter().zip(values) {
        if let Some(at) = usize::try_from(place).ok().and_then(|place| sum.get_mut(place)) {
            *at += value;
        }
    }
    Ok(())
}
