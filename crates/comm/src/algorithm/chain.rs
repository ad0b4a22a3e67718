//! The reduction: a pipelined chain over stages. Pure.
//!
//! The first stage sums its ranks' values of a piece and passes the partial sum on, in accumulators
//! (`f32` for halves); each stage goes on with its own ranks in order; the last finishes and passes
//! the result back, as far as somebody there needs it. Pieces follow each other: up to [`WINDOW`] are
//! under way, so links carry partial sums one way and results the other at once. Steps and bytes are
//! in this folder's `README.md`.
//!
//! # Source
//!
//! The pipelined chain of Open MPI's `coll/base` (`ompi_coll_base_reduce_intra_chain`) and NCCL's
//! intra-node chains, here in fixed rank order so that the sum has one order everywhere.

use std::ops::Range;

use super::topology::RankPlace;

/// Pieces that a stage sends ahead of the results it takes back.
pub(crate) const WINDOW: usize = 8;

/// Who gets a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    All,
    Rank(usize),
}

/// A piece of the buffer (in elements) and who gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainPiece {
    pub(crate) range: Range<usize>,
    pub(crate) delivery: Delivery,
    /// The first stage that has a rank it is delivered to.
    pub(crate) lowest_stage: usize,
}

/// How bytes get from this rank to others of its lane.
pub(crate) trait Exchange {
    type Error;
    /// Sends without waiting.
    fn post(&mut self, peer: usize, bytes: &[u8]) -> Result<(), Self::Error>;
    /// Waits for exactly so many bytes.
    fn receive(&mut self, peer: usize, into: &mut [u8]) -> Result<(), Self::Error>;
}

/// What a stage does with its own ranks' memory.
pub(crate) trait Arithmetic {
    /// Bytes of `elements` as accumulators.
    fn partial_bytes(&self, elements: usize) -> usize;
    /// Bytes of `elements` as they are in the buffer.
    fn result_bytes(&self, elements: usize) -> usize;
    /// Goes on with `partial` (or starts) over the stage's ranks in order.
    fn fold(&mut self, range: Range<usize>, partial: Option<&[u8]>, onward: &mut [u8]);
    /// As `fold`, and finishes: into the stage's memory as far as `delivery` says, and into `back`.
    fn finish(
        &mut self,
        range: Range<usize>,
        partial: Option<&[u8]>,
        delivery: Delivery,
        back: Option<&mut [u8]>,
    );
    /// Writes a result that came back into the stage's memory as far as `delivery` says.
    fn write(&mut self, range: Range<usize>, result: &[u8], delivery: Delivery);
}

/// Runs this rank's lane over `pieces`, which are the same on every rank of the lane.
pub(crate) fn reduce<X: Exchange>(
    place: &RankPlace,
    pieces: &[ChainPiece],
    exchange: &mut X,
    arithmetic: &mut impl Arithmetic,
) -> Result<(), X::Error> {
    let mut buffers = (Vec::new(), Vec::new());
    for step in 0..pieces.len() + WINDOW {
        if let Some(piece) = pieces.get(step) {
            forward(place, piece, exchange, arithmetic, &mut buffers)?;
        }
        let returning = step.checked_sub(WINDOW).and_then(|index| pieces.get(index));
        if let (Some(piece), Some(next)) = (returning, place.next) {
            backward(place, next, piece, exchange, arithmetic, &mut buffers.0)?;
        }
    }
    Ok(())
}

fn forward<X: Exchange>(
    place: &RankPlace,
    piece: &ChainPiece,
    exchange: &mut X,
    arithmetic: &mut impl Arithmetic,
    (incoming, outgoing): &mut (Vec<u8>, Vec<u8>),
) -> Result<(), X::Error> {
    let range = piece.range.clone();
    let partial = match place.previous {
        None => None,
        Some(previous) => {
            incoming.resize(arithmetic.partial_bytes(range.len()), 0);
            exchange.receive(previous, incoming)?;
            Some(&incoming[..])
        }
    };
    if let Some(next) = place.next {
        outgoing.resize(arithmetic.partial_bytes(range.len()), 0);
        arithmetic.fold(range, partial, outgoing);
        return exchange.post(next, outgoing);
    }
    match place.previous {
        Some(previous) if piece.lowest_stage < place.stage => {
            outgoing.resize(arithmetic.result_bytes(range.len()), 0);
            arithmetic.finish(range, partial, piece.delivery, Some(outgoing));
            exchange.post(previous, outgoing)
        }
        _ => {
            arithmetic.finish(range, partial, piece.delivery, None);
            Ok(())
        }
    }
}

fn backward<X: Exchange>(
    place: &RankPlace,
    next: usize,
    piece: &ChainPiece,
    exchange: &mut X,
    arithmetic: &mut impl Arithmetic,
    incoming: &mut Vec<u8>,
) -> Result<(), X::Error> {
    if piece.lowest_stage > place.stage {
        return Ok(());
    }
    incoming.resize(arithmetic.result_bytes(piece.range.len()), 0);
    exchange.receive(next, incoming)?;
    arithmetic.write(piece.range.clone(), incoming, piece.delivery);
    match place.previous {
        Some(previous) if piece.lowest_stage < place.stage => exchange.post(previous, incoming),
        _ => Ok(()),
    }
}
