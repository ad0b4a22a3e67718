//! The weights of a model that no rank has whole, as others exchange them: written by rank 0, which asks for each bucket when it
//! comes to one of its tensors; the others follow and gather it with it. So no rank ever has more than a few buckets.

use std::cell::RefCell;
use std::path::Path;

use phalanx_checkpoint::fs::Real;
use phalanx_checkpoint::{
    write_weights, Cause, Content as _, Dtype, Extent, Spec, Strided, Tensors, WeightsOptions,
};
use tch::{Device, Tensor};

use super::assembled;
use super::held::dtype_of;
use crate::reduce::Reducer;
use crate::shard::access;
use crate::store::flat::{dense_bytes, dense_strides};
use crate::store::Store;
use crate::{Error, Result};

/// What rank 0 says to those who follow: the number of a bucket, or one of these.
const DONE: i64 = -1;
const FAILED: i64 = -2;

/// Writes all variables and buffers. Collective.
pub(crate) fn save(reducer: &mut Reducer, path: &Path, options: &WeightsOptions) -> Result<()> {
    let store = &mut reducer.store;
    store.meet()?;
    store.heed_written()?;
    if store.part.is_some() {
        return assembled::save(store, path, options);
    }
    if store.group.rank() != 0 {
        return follow(store, path);
    }
    let written = write(store, path, options);
    tell(store, if written.is_ok() { DONE } else { FAILED })?;
    written
}

fn write(store: &mut Store, path: &Path, options: &WeightsOptions) -> Result<()> {
    let source = Whole::new(store)?;
    Ok(write_weights(&Real, path, &source, options).map(drop)?)
}

/// Gathers what rank 0 asks for.
fn follow(store: &mut Store, path: &Path) -> Result<()> {
    loop {
        let mut word = [0_i64];
        store.group.tagged("weights that are written").broadcast(&mut word[..], 0)?.wait()?;
        match (word[0], usize::try_from(word[0])) {
            (_, Ok(bucket)) => store.bring_bucket(bucket),
            (DONE, _) => return Ok(()),
            _ => {
                let source = std::io::Error::other("rank 0 could not, and says why");
                return Err(Error::Io { doing: "writing", path: path.to_owned(), source });
            }
        }
    }
}

fn tell(store: &mut Store, word: i64) -> Result<()> {
    let mut words = [word];
    Ok(store.group.tagged("weights that are written").broadcast(&mut words[..], 0)?.wait()?)
}

/// All tensors of the model, on rank 0.
struct Whole<'a> {
    store: RefCell<&'a mut Store>,
    /// Sorted by name.
    tensors: Vec<Described>,
}

/// A tensor of the model.
struct Described {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    tensor: Tensor,
    /// The bucket that must be here.
    bucket: Option<usize>,
}

impl<'a> Whole<'a> {
    fn new(store: &'a mut Store) -> Result<Self> {
        let mut tensors = Vec::new();
        for (variable, named) in store.model.variables.iter().enumerate() {
            tensors.push((named, store.cut_bucket(variable)));
        }
        tensors.extend(store.model.buffers.iter().map(|named| (named, None)));
        let describe = |(named, bucket): (&crate::store::model::Named, Option<usize>)| {
            let shape = named.tensor.size();
            Ok(Described {
                name: named.name.clone(),
                dtype: dtype_of(&named.name, named.tensor.kind())?,
                shape: shape.iter().map(|&size| u64::try_from(size).unwrap_or(0)).collect(),
                tensor: named.tensor.shallow_clone(),
                bucket,
            })
        };
        let mut tensors = tensors.into_iter().map(describe).collect::<Result<Vec<_>>>()?;
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { store: RefCell::new(store), tensors })
    }

    fn find(&self, name: &str) -> Option<&Described> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn copy(&self, found: &Described, extent: &Extent, out: &mut [u8]) -> Result<(), Cause> {
        if let Some(bucket) = found.bucket {
            let mut store = self.store.borrow_mut();
            if !store.is_here(bucket) {
                tell(&mut store, i64::try_from(bucket).unwrap_or(FAILED))?;
                store.bring_bucket(bucket);
            }
        }
        access::unseen(|| {
            let host = found.tensor.f_detach()?.f_to_device(Device::Cpu)?;
            let strides = dense_strides(&found.name, &host)?;
            let strides: Vec<u64> =
                strides.iter().map(|&stride| u64::try_from(stride).unwrap_or(0)).collect();
            let bytes = dense_bytes(&found.name, &host)?;
            Strided::new(bytes, &strides, 0, found.dtype.bytes()).copy(extent, out)
        })
    }
}

impl Tensors for Whole<'_> {
    fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        self.find(name).map(|found| Spec { dtype: found.dtype, shape: &found.shape })
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> phalanx_checkpoint::Result<()> {
        let copied = match self.find(name) {
            Some(found) => self.copy(found, extent, out),
            None => Err("the model has no such tensor".into()),
        };
        copied.map_err(|cause| phalanx_checkpoint::Error::Content {
            tensor: name.to_owned(),
            extent: extent.to_string(),
            cause,
        })
    }
}
