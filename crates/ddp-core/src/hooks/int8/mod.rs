//! Gradients that travel as a byte each.

mod blocks;
mod memory;

use super::{Bucket, Crossing, Hook, Lossy, Progress, Wire};
use crate::{Error, Result};
use memory::{Coded, Rows};
use phalanx_comm::Work;
use tch::{Kind, Tensor};

/// Quantises gradients to 8 bits, block by block: 2 (P−1)/P · (1 + 4/block) n bytes.
///
/// A block of `block` values with the largest magnitude a travels as its scale s = a/127 and whole numbers q = x/s to the nearest, from −127 to 127. Each rank
/// sends segment r to rank r (`all_to_all`), which adds the ranks' values in f32 in rank order, multiplies by the scale of the mean,
/// quantises the mean again and sends it to all (`all_gather`). So each element of the mean is off by at most the mean of the ranks' a/254, and a'/254 of
/// the mean's own block. With [`ErrorFeedback`](super::ErrorFeedback) both are made good: the second by the rank whose segment it is.
///
/// With [`Zero::One`](crate::Zero::One) the second half is not sent; the bits are the same.
///
/// # Source
/// Block-wise quantisation as Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; the two steps as in Wang et al. 2023, `ZeRO++`
/// (qgZ), and Tang et al. 2019, "`DoubleSqueeze`", for feeding back both.
#[derive(Clone, Copy, Debug)]
pub struct Int8Blocks {
    /// Values that share a scale: 32, 64, …, 1024. Default 256.
    pub block: usize,
}

impl Default for Int8Blocks {
    fn default() -> Self {
        Self { block: 256 }
    }
}

/// What is under way of a bucket.
#[derive(Debug)]
pub enum Quantised {
    /// Segments go to the ranks that add them.
    Crossing(Crossing),
    /// Means come back.
    Gathering(Wire, Work<'static>),
}

impl Hook for Int8Blocks {
    type Pending = Quantised;

    fn name(&self) -> String {
        format!("int8 in blocks of {}", self.block)
    }

    fn check(&self) -> Result<()> {
        if self.block.is_power_of_two() && (32..=1024).contains(&self.block) {
            return Ok(());
        }
        let (setting, value) = ("block of Int8Blocks", self.block.to_string());
        Err(Error::BadSetting { setting, value, expected: "32, 64, 128, 256, 512 or 1024" })
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        let rows = self.rows(bucket);
        let wire = bucket.take(Kind::Uint8, rows.bytes() * bucket.world_size())?;
        let gradients = bucket.gradients()?.f_to_kind(Kind::Float)?;
        let lost = bucket.lost();
        for rank in 0..bucket.world_size() {
            let segment = bucket.segment_of(rank);
            let lost = lost.as_ref().map(|lost| bucket.part(lost, &segment)).transpose()?;
            let values = bucket.part(&gradients, &segment)?;
            rows.row(&wire, rank)?.encode(&values, lost.map(|lost| (lost, 1.0)))?;
        }
        Ok(Quantised::Crossing(bucket.all_to_all("int8 to the ranks that add", wire)?))
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        let rows = self.rows(bucket);
        match pending {
            Quantised::Crossing(crossing) => {
                let arrived = bucket.arrived(crossing)?;
                let own = bucket.segment_of(bucket.rank());
                let mean = sum(bucket, rows, &arrived)?;
                // What arrived has been read: its own row takes the mean, where all need it.
                let coded = rows.row(&arrived, bucket.rank())?;
                let lost = bucket.lost();
                let lost = lost.map(|lost| bucket.part(&lost, &own)).transpose()?;
                #[expect(clippy::cast_precision_loss, reason = "world sizes are small")]
                let weight = bucket.world_size() as f32;
                coded.encode(&mean, lost.map(|lost| (lost, weight)))?;
                if bucket.is_everywhere() {
                    let work = bucket.all_gather("int8 means", &arrived)?;
                    return Ok(Progress::Again(Quantised::Gathering(arrived, work)));
                }
                decode(bucket, &coded, bucket.rank())?;
                bucket.put_back(arrived);
            }
            Quantised::Gathering(wire, work) => {
                bucket.wait(work)?;
                for rank in 0..bucket.world_size() {
                    decode(bucket, &rows.row(&wire, rank)?, rank)?;
                }
                bucket.put_back(wire);
            }
        }
        Ok(Progress::Done)
    }
}

impl Lossy for Int8Blocks {}

impl Int8Blocks {
    fn rows(self, bucket: &Bucket<'_>) -> Rows {
        Rows { len: bucket.segment_of(0).len(), block: self.block }
    }
}

/// The mean of this rank's segment, in f32: the ranks' values in rank order, times the factor.
fn sum(bucket: &Bucket<'_>, rows: Rows, arrived: &Wire) -> Result<Tensor> {
    let own = bucket.segment_of(bucket.rank());
    let target = bucket.part(&bucket.gradients()?, &own)?;
    // The same memory where that is f32.
    let mut sum = target.f_to_kind(Kind::Float)?;
    rows.row(arrived, 0)?.decode(&mut sum)?;
    for rank in 1..bucket.world_size() {
        rows.row(arrived, rank)?.add_to(&mut sum)?;
    }
    tch::no_grad(|| sum.f_mul_scalar_(bucket.scale()).map(drop))?;
    Ok(sum)
}

/// Writes what a row means to the segment of `rank`.
fn decode(bucket: &Bucket<'_>, row: &Coded, rank: usize) -> Result<()> {
    let mut target = bucket.part(&bucket.gradients()?, &bucket.segment_of(rank))?;
    let mut values = target.f_to_kind(Kind::Float)?;
    row.decode(&mut values)?;
    if target.kind() != Kind::Float {
        tch::no_grad(|| target.f_copy_(&values).map(drop))?;
    }
    Ok(())
}
