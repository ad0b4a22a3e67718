//! Whether a manifest describes files and tensors that can be. Pure.

use super::{FileEntry, Manifest, TensorEntry, BLOCK_BYTES};
use crate::cast::to_u64;
use crate::cover::{self, Flaw};
use crate::extent;
use crate::plan::byte_count;

/// The bytes of a file that a piece takes: where they start and end.
type Spans = Vec<(u64, u64)>;

impl Manifest {
    /// What contradicts itself.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.block_bytes != to_u64(BLOCK_BYTES) {
            return Err(format!(
                "its blocks have {} bytes, expected {BLOCK_BYTES}",
                self.block_bytes
            ));
        }
        if self.world_size != self.rank_values.len() {
            let (size, found) = (self.world_size, self.rank_values.len());
            return Err(format!("{found} ranks have values, expected {size}"));
        }
        let total = self.files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.bytes));
        total.ok_or("the sizes of its files overflow")?;
        for (at, file) in self.files.iter().enumerate() {
            check_file(file)?;
            if self.files[..at].last().is_some_and(|before| before.name >= file.name) {
                return Err(format!("file `{}` is not in order", file.name));
            }
        }
        let mut spans = vec![Spans::new(); self.files.len()];
        for (at, tensor) in self.tensors.iter().enumerate() {
            if at > 0 && self.tensors[at - 1].name >= tensor.name {
                return Err(format!("tensor `{}` is not in order", tensor.name));
            }
            self.check_tensor(tensor, &mut spans)?;
        }
        self.files.iter().zip(&mut spans).try_for_each(|(file, spans)| check_spans(file, spans))
    }

    fn check_tensor(&self, tensor: &TensorEntry, spans: &mut [Spans]) -> Result<(), String> {
        let TensorEntry { name, dtype, shape, pieces } = tensor;
        let Some(elements) =
            extent::elements(shape).filter(|_| extent::bytes(shape, dtype.bytes()).is_some())
        else {
            return Err(format!("tensor `{name}`: shape {shape:?} is too large"));
        };
        for piece in pieces {
            if !piece.extent.fits(shape) {
                return Err(format!("tensor `{name}`: a piece is no box of shape {shape:?}"));
            }
            let end = piece.offset.checked_add(byte_count(&piece.extent, *dtype));
            let file = self.files.get(piece.file);
            match (file, end, spans.get_mut(piece.file)) {
                (Some(file), Some(end), Some(spans)) if end <= file.bytes => {
                    spans.push((piece.offset, end));
                }
                _ => return Err(format!("tensor `{name}`: a piece lies outside of its file")),
            }
        }
        let boxes = pieces.iter().map(|piece| &piece.extent).filter(|one| !one.is_empty());
        match cover::check(elements, &boxes.collect::<Vec<_>>()) {
            Ok(()) => Ok(()),
            Err(Flaw::Overlap(..)) => Err(format!("tensor `{name}`: pieces overlap")),
            Err(Flaw::Missing(n)) => Err(format!("tensor `{name}`: {n} elements lie nowhere")),
            Err(Flaw::Tangled) => Err(format!("tensor `{name}`: too many pieces lie across")),
        }
    }
}

fn check_file(file: &FileEntry) -> Result<(), String> {
    let FileEntry { name, bytes, crc32c } = file;
    if name.is_empty() || name.contains(['/', '\\', '\0']) || name == "." || name == ".." {
        return Err(format!("file `{name}` is not a plain file name"));
    }
    let (blocks, found) = (bytes.div_ceil(to_u64(BLOCK_BYTES)), crc32c.0.len());
    if to_u64(found) != blocks {
        return Err(format!("file `{name}` has {found} checksums, expected {blocks}"));
    }
    Ok(())
}

/// Whether pieces fill a file from its header to its end, none over another.
fn check_spans(file: &FileEntry, spans: &mut Spans) -> Result<(), String> {
    spans.retain(|(start, end)| start < end);
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].1 != pair[1].0 {
            return Err(format!("file `{}`: pieces overlap or leave holes", file.name));
        }
    }
    match spans.last() {
        Some((_, end)) if *end != file.bytes => {
            Err(format!("file `{}`: bytes at its end belong to no tensor", file.name))
        }
        _ => Ok(()),
    }
}
