//! The weights of a model that is in parts, as others exchange them: written by the world's first rank, which asks for each tensor when it comes to
//! it. The ranks of its copy of the model on which boxes of it count send them; where they have only segments (ZeRO-3), the ranks with the
//! same part gather them first. The writer has one whole tensor at a time.

use std::cell::RefCell;
use std::path::Path;

use phalanx_checkpoint::fs::Real;
use phalanx_checkpoint::{
    scatter, write_weights, Cause, Content as _, Extent, Plain, Spec, Tensors, WeightsOptions,
};
use tch::{Device, Tensor};

use super::keeper::CHUNK_BYTES;
use crate::part::{boxes, Both, Entry, Part};
use crate::shard::access;
use crate::store::flat::dense_bytes;
use crate::store::Store;
use crate::{Error, Result};

/// What the writer says to the others: the number of a tensor, or one of these.
const DONE: i64 = -1;
const FAILED: i64 = -2;

/// Writes all tensors of the whole model. Collective over the world.
pub(super) fn save(store: &mut Store, path: &Path, options: &WeightsOptions) -> Result<()> {
    if store.rank_of_all() == 0 {
        return write(store, path, options);
    }
    loop {
        let word = hear(store, 0)?;
        match usize::try_from(word) {
            Ok(number) => give(store, number).map_err(|error| ended(store, error))?,
            Err(_) if word == DONE => return Ok(()),
            Err(_) => {
                let source = std::io::Error::other("rank 0 could not, and says why");
                return Err(Error::Io { doing: "writing", path: path.to_owned(), source });
            }
        }
    }
}

fn write(store: &mut Store, path: &Path, options: &WeightsOptions) -> Result<()> {
    let source = Assembled::new(store);
    let written = write_weights(&Real, path, &source, options).map(drop);
    // What kept a tensor from coming is the error, not that it did not come.
    let trouble = source.trouble.into_inner();
    if let Some(error) = trouble {
        return Err(ended(store, error));
    }
    tell(store, if written.is_ok() { DONE } else { FAILED })?;
    Ok(written?)
}

/// An error in the middle of a tensor: others wait for its bytes, or for them to be taken, and hear of it.
fn ended(store: &mut Store, error: Error) -> Error {
    // Also where a group has failed: it may be one of two.
    if let Some(part) = &mut store.part {
        part.abort(&error.to_string());
    }
    error
}

fn tell(store: &mut Store, word: i64) -> Result<()> {
    hear(store, word).map(drop)
}

/// The word of the world's first rank, which says `mine`.
fn hear(store: &mut Store, mine: i64) -> Result<i64> {
    let mut word = [mine];
    store.everyone().tagged("weights that are written").broadcast(&mut word[..], 0)?.wait()?;
    Ok(word[0])
}

/// The tensor of this number, in the order of names.
fn entry(part: &Part, number: usize) -> Option<(&String, &Entry)> {
    part.table.tensors.iter().nth(number)
}

/// This rank's bytes of a tensor, if boxes of it count here, with the last dimension fastest. Collective among the ranks with the same part.
fn own_bytes(store: &mut Store, name: &str) -> Result<Option<(Vec<i64>, Tensor)>> {
    if store.part.as_ref().is_none_or(|part| !part.counts(name)) {
        return Ok(None);
    }
    let variable = store.model.variables.iter().position(|named| named.name == *name);
    if let Some(bucket) = variable.and_then(|variable| store.cut_bucket(variable)) {
        store.bring_bucket(bucket);
    }
    let mut all = store.model.variables.iter().chain(&store.model.buffers);
    let Some(named) = all.find(|named| named.name == *name) else { return Ok(None) };
    access::unseen(|| {
        let host = named.tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        Ok(Some((host.size(), host)))
    })
}

/// Sends this rank's boxes of a tensor to the writer, if it is of the same copy of the model.
fn give(store: &mut Store, number: usize) -> Result<()> {
    let Some(part) = &store.part else { return Ok(()) };
    let Some((name, _)) = entry(part, number) else { return Ok(()) };
    let (name, writer) = (name.clone(), part.model_ranks.iter().position(|&rank| rank == 0));
    let Some((_, tensor)) = own_bytes(store, &name)? else { return Ok(()) };
    let (Some(sending), Some(writer)) = (&mut store.part, writer) else { return Ok(()) };
    for chunk in dense_bytes(&name, &tensor)?.chunks(CHUNK_BYTES) {
        sending.model.tagged("weights that are written").send(chunk, writer)?.wait()?;
    }
    Ok(())
}

/// All tensors of the whole model, on the writer.
struct Assembled<'a> {
    store: RefCell<&'a mut Store>,
    /// By number: name, kind and shape.
    tensors: Vec<(String, phalanx_checkpoint::Dtype, Vec<u64>)>,
    /// The number of the tensor that is here, and its bytes.
    here: RefCell<(Option<usize>, Vec<u8>)>,
    trouble: RefCell<Option<Error>>,
}

impl<'a> Assembled<'a> {
    fn new(store: &'a mut Store) -> Self {
        let numbers =
            |shape: &[i64]| shape.iter().map(|&n| u64::try_from(n).unwrap_or(0)).collect();
        let tensors = store.part.as_ref().map_or_else(Vec::new, |part| {
            let all = part.table.tensors.iter();
            all.map(|(name, entry)| (name.clone(), entry.dtype, numbers(&entry.shape))).collect()
        });
        let here = RefCell::new((None, Vec::new()));
        Self { store: RefCell::new(store), tensors, here, trouble: RefCell::new(None) }
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.tensors.iter().position(|(other, ..)| other == name)
    }

    /// Brings a tensor here.
    fn bring(&self, number: usize) -> Result<()> {
        let mut here = self.here.borrow_mut();
        if here.0 == Some(number) {
            return Ok(());
        }
        let (name, dtype, shape) = &self.tensors[number];
        let store = &mut **self.store.borrow_mut();
        tell(store, i64::try_from(number).unwrap_or(FAILED))?;
        let element_bytes = dtype.bytes();
        let bytes = usize::try_from(Extent::whole(shape).elements()).unwrap_or(0) * element_bytes;
        here.0 = None;
        here.1.clear();
        here.1.resize(bytes, 0);
        let own = own_bytes(store, name)?;
        let Some(part) = &mut store.part else { return Ok(()) };
        let Some(entry) = part.table.tensors.get(name).cloned() else { return Ok(()) };
        for piece in &entry.pieces {
            let cut = piece.slice.as_ref().map(|slice| slice.cut(&entry.shape));
            let part_shape =
                cut.as_ref().map_or_else(|| entry.shape.clone(), crate::Cut::part_shape);
            let part_shape: Vec<u64> =
                part_shape.iter().map(|&n| u64::try_from(n).unwrap_or(0)).collect();
            let all = Extent::whole(&part_shape);
            let len = usize::try_from(all.elements()).unwrap_or(0) * element_bytes;
            let sender = piece.ranks[0];
            let received;
            let values = match &own {
                Some((_, tensor)) if sender == part.model.rank() => dense_bytes(name, tensor)?,
                _ => {
                    received = receive(part, sender, len)?;
                    &received
                }
            };
            for both in boxes(cut.as_ref(), &all) {
                copy((values, &all), &both, (&mut here.1, shape), element_bytes)?;
            }
        }
        here.0 = Some(number);
        Ok(())
    }
}

fn receive(part: &mut Part, sender: usize, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(CHUNK_BYTES) {
        part.model.tagged("weights that are written").receive(chunk, sender)?.wait()?;
    }
    Ok(bytes)
}

/// Copies a box of a part's bytes to where it lies in the whole's.
fn copy(
    (values, all): (&[u8], &Extent),
    both: &Both,
    (whole, shape): (&mut [u8], &[u64]),
    element_bytes: usize,
) -> Result<()> {
    let mut strides = vec![1; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim] * shape[dim];
    }
    let len = usize::try_from(both.part.elements()).unwrap_or(0) * element_bytes;
    let mut run = vec![0; len];
    Plain::new(values, all, element_bytes).copy(&both.part, &mut run).map_err(Error::closure)?;
    Ok(scatter(&both.whole, &run, whole, (&strides, 0), element_bytes)?)
}

impl Tensors for Assembled<'_> {
    fn names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, ..)| name.as_str()).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec<'_>> {
        let (_, dtype, shape) = &self.tensors[self.number(name)?];
        Some(Spec { dtype: *dtype, shape })
    }

    fn read(&self, name: &str, extent: &Extent, out: &mut [u8]) -> phalanx_checkpoint::Result<()> {
        let copied = match self.number(name) {
            None => Err(Cause::from("the model has no such tensor")),
            Some(number) => match self.bring(number) {
                Ok(()) => {
                    let (_, dtype, shape) = &self.tensors[number];
                    let here = self.here.borrow();
                    Plain::new(&here.1, &Extent::whole(shape), dtype.bytes()).copy(extent, out)
                }
                Err(error) => {
                    let text = error.to_string();
                    *self.trouble.borrow_mut() = Some(error);
                    Err(Cause::from(text))
                }
            },
        };
        copied.map_err(|cause| phalanx_checkpoint::Error::Content {
            tensor: name.to_owned(),
            extent: extent.to_string(),
            cause,
        })
    }
}
