//! A segment's scales and codes in a wire: by the pure functions in memory of the host, by libtorch's on a GPU.

use tch::{Kind, Tensor};

use super::blocks;
use crate::hooks::Wire;
use crate::store::flat::{dense_bytes, dense_bytes_mut};
use crate::Result;

/// How a segment of `len` values lies in a row: its scales, and its codes behind them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) len: usize,
    pub(super) block: usize,
}

impl Rows {
    pub(super) fn bytes(self) -> usize {
        self.scale_bytes() + self.len
    }

    fn scale_bytes(self) -> usize {
        self.len / self.block * size_of::<f32>()
    }

    /// Row `index` of a wire.
    pub(super) fn row(self, wire: &Wire, index: usize) -> Result<Coded> {
        let at = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let row = wire.tensor().f_narrow(0, at(index * self.bytes()), at(self.bytes()))?;
        let scales = row.f_narrow(0, 0, at(self.scale_bytes()))?.f_view_dtype(Kind::Float)?;
        let codes = row.f_narrow(0, at(self.scale_bytes()), at(self.len))?;
        Ok(Coded { block: self.block, scales, codes })
    }
}

/// A segment's scales, f32, and codes, u8.
#[derive(Debug)]
pub(super) struct Coded {
    block: usize,
    scales: Tensor,
    codes: Tensor,
}

impl Coded {
    fn is_on_host(&self) -> bool {
        !self.codes.device().is_cuda()
    }

    /// Puts `values` here; adds what that loses, times a weight, where it is wanted.
    pub(super) fn encode(&self, values: &Tensor, lost: Option<(Tensor, f32)>) -> Result<()> {
        if !self.is_on_host() {
            return tch::no_grad(|| self.encode_on_device(values, lost));
        }
        let (mut scales, mut codes) = (self.scales.shallow_clone(), self.codes.shallow_clone());
        let scales = bytemuck::cast_slice_mut(dense_bytes_mut("scales", &mut scales)?);
        let codes = dense_bytes_mut("codes", &mut codes)?;
        let (mut lost, weight) = lost.unzip();
        let lost = match &mut lost {
            Some(lost) => Some(bytemuck::cast_slice_mut(dense_bytes_mut("lost", lost)?)),
            None => None,
        };
        let values = bytemuck::cast_slice(dense_bytes("values", values)?);
        blocks::encode(values, self.block, (scales, codes), lost.zip(weight));
        Ok(())
    }

    fn encode_on_device(&self, values: &Tensor, lost: Option<(Tensor, f32)>) -> Result<()> {
        let block = i64::try_from(self.block).unwrap_or(i64::MAX);
        let shaped = values.f_view([-1, block])?;
        let largest = shaped.f_abs()?.f_amax([1_i64].as_slice(), true)?;
        let is_tiny = largest.f_lt(f64::from(blocks::TINY))?;
        let scale = largest.f_div_scalar(127.0)?.f_masked_fill(&is_tiny, 0.0)?;
        let inverse = largest.f_reciprocal()?.f_mul_scalar(127.0)?.f_masked_fill(&is_tiny, 0.0)?;
        let codes = shaped.f_mul(&inverse)?.f_round()?.f_clamp(-127.0, 127.0)?;
        let codes = codes.f_to_kind(Kind::Int8)?;
        self.scales.shallow_clone().f_copy_(&scale.f_view([-1])?)?;
        let bytes = codes.f_view_dtype(Kind::Uint8)?.f_view([-1])?;
        self.codes.shallow_clone().f_copy_(&bytes)?;
        if let Some((mut lost, weight)) = lost {
            let off = values.f_sub(&self.meant()?)?.f_mul_scalar(f64::from(weight))?;
            drop(lost.f_add_(&off)?);
        }
        Ok(())
    }

    /// What it means, by libtorch.
    fn meant(&self) -> Result<Tensor> {
        let block = i64::try_from(self.block).unwrap_or(i64::MAX);
        let codes = self.codes.f_view_dtype(Kind::Int8)?.f_view([-1, block])?;
        let scales = self.scales.f_view([-1, 1])?;
        Ok(codes.f_to_kind(Kind::Float)?.f_mul(&scales)?.f_view([-1])?)
    }

    /// Replaces `values` by what it means.
    pub(super) fn decode(&self, values: &mut Tensor) -> Result<()> {
        if !self.is_on_host() {
            let meant = self.meant()?;
            return tch::no_grad(|| Ok(values.f_copy_(&meant).map(drop)?));
        }
        let scales = bytemuck::cast_slice(dense_bytes("scales", &self.scales)?);
        let codes = dense_bytes("codes", &self.codes)?;
        let values = bytemuck::cast_slice_mut(dense_bytes_mut("values", values)?);
        blocks::decode(values, self.block, (scales, codes));
        Ok(())
    }

    /// Adds what it means to `values`.
    pub(super) fn add_to(&self, values: &mut Tensor) -> Result<()> {
        if !self.is_on_host() {
            let meant = self.meant()?;
            return tch::no_grad(|| Ok(values.f_add_(&meant).map(drop)?));
        }
        let scales = bytemuck::cast_slice(dense_bytes("scales", &self.scales)?);
        let codes = dense_bytes("codes", &self.codes)?;
        let values = bytemuck::cast_slice_mut(dense_bytes_mut("values", values)?);
        blocks::add(values, self.block, (scales, codes));
        Ok(())
    }
}
