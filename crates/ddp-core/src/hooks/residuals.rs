//! An f32 value for each element of each parameter that a hook keeps from exchange to exchange:
//! laid out as the buckets are, saved under the parameters' names.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::{Bucket, Kept, Placed};
use crate::Result;

/// One flat tensor a bucket; parameters are ranges of it.
#[derive(Debug, Default)]
pub(super) struct Residuals {
    flats: Vec<Option<Laid>>,
    /// By parameter: its elements, in the order of its memory, and their shape.
    pieces: BTreeMap<String, (Placed, Tensor)>,
    /// Of a saved state, in their shape, until their bucket comes.
    loaded: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Laid {
    parameters: Vec<Placed>,
    flat: Tensor,
}

impl Residuals {
    /// That of a bucket, zero at first.
    pub(super) fn of(&mut self, bucket: &Bucket<'_>) -> Result<Tensor> {
        let index = bucket.index();
        if self.flats.len() <= index {
            self.flats.resize_with(index + 1, || None);
        }
        if let Some(laid) = &self.flats[index] {
            if laid.parameters == bucket.parameters() && laid.flat.numel() == bucket.len() {
                return Ok(laid.flat.shallow_clone());
            }
        }
        let (_, len) = super::bucket::as_i64(&(0..bucket.len()))?;
        let flat = Tensor::f_zeros([len], (Kind::Float, bucket.device()))?;
        for placed in bucket.parameters() {
            let mut piece = placed.of(&flat)?;
            if let Some((_, old)) = self.pieces.get(&placed.name) {
                piece.f_copy_(old)?;
            } else if let Some(saved) = self.loaded.remove(&placed.name) {
                placed.shaped(&flat)?.f_copy_(&saved)?;
            }
            let at_zero = Placed { range: 0..placed.range.len(), ..placed.clone() };
            self.pieces.insert(placed.name.clone(), (at_zero, piece));
        }
        let laid = Laid { parameters: bucket.parameters().to_vec(), flat: flat.shallow_clone() };
        self.flats[index] = Some(laid);
        Ok(flat)
    }

    /// Zero again.
    pub(super) fn reset(&mut self) {
        self.flats.clear();
        self.pieces.clear();
        self.loaded.clear();
    }

    /// By parameter, in its shape.
    pub(super) fn saved(&self, what: &str) -> Result<BTreeMap<String, Kept>> {
        let name = |parameter: &str| format!("{what}/{parameter}");
        let mut all = BTreeMap::new();
        for (parameter, tensor) in &self.loaded {
            all.insert(name(parameter), Kept::ByRank(tensor.shallow_clone()));
        }
        for (parameter, (placed, piece)) in &self.pieces {
            all.insert(name(parameter), Kept::ByRank(placed.shaped(piece)?));
        }
        Ok(all)
    }

    /// Takes over what [`saved`](Self::saved) gave.
    pub(super) fn load(&mut self, what: &str, tensors: &BTreeMap<String, Kept>) {
        self.reset();
        for (name, kept) in tensors {
            let parameter = name.strip_prefix(what).and_then(|rest| rest.strip_prefix('/'));
            if let Some(parameter) = parameter {
                self.loaded.insert(parameter.to_owned(), kept.tensor().shallow_clone());
            }
        }
    }
}
