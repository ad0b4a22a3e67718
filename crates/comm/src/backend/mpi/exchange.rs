//! A reduction by messages: each rank gets what it reduces (see `cut`) from all others, folds it in rank
//! order, and for an all-reduce sends it to all others.
//!
//! Pieces go through two stages, at most [`WINDOW`] at a time, so that one is folded while the next
//! travels. The library's own reductions are not used: they fold in an order of their choice, round
//! halves at every step, and the non-blocking one takes twice as long as the blocking one on two ranks of
//! a machine (`OpenMPI` 4.1.4).

use std::collections::VecDeque;

use super::cut::ReductionCut;
use super::ffi::{Communicator, MpiAddress, MpiError, MpiRequest, Result};
use super::fold::fold;
use crate::dtype::DType;
use crate::memory::mapping::{self, Mapping};
use crate::reduce_op::Reduction;

/// Pieces under way.
const WINDOW: usize = 4;
/// What a library sends at once, its header included, is 4 KiB (Open MPI inside a machine) or more. Longer messages
/// wait for an answer first.
const MESSAGE_BYTES: usize = 4032;
/// Up to so many bytes, several short messages cost less than that wait.
const CUT_BYTES_MAX: usize = 24 << 10;

/// What every exchange of a group needs.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) communicator: Communicator,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// Memory for what is received, used again: fresh pages cost as much as the copy into them.
    pub(super) spare: Vec<Mapping>,
}

impl Context {
    /// Memory of at least `bytes`.
    fn staging(&mut self, bytes: usize) -> Result<Mapping> {
        if let Some(at) = self.spare.iter().position(|spare| spare.bytes() >= bytes) {
            return Ok(self.spare.swap_remove(at));
        }
        mapping::private(bytes).map_err(|error| MpiError {
            call: "mmap",
            code: error.raw_os_error().unwrap_or(0),
            what: format!("no {bytes} bytes for what other ranks send: {error}"),
        })
    }

    fn give_back(&mut self, staging: Mapping) {
        const KEPT_BYTES_MAX: usize = 8 << 20;
        if self.spare.len() < WINDOW && staging.bytes() <= KEPT_BYTES_MAX {
            self.spare.push(staging);
        }
    }

    /// The other ranks, the next one first: so that not all send to the same rank at once.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, ranks) = (self.rank, self.ranks);
        (1..ranks).map(move |distance| (rank + distance) % ranks)
    }
}

/// What is done with a buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    pub(super) at: MpiAddress,
    pub(super) cut: ReductionCut,
    /// `None` where nothing is reduced, only shared.
    pub(super) reduction: Option<(DType, Reduction)>,
    /// Whether everybody gets what each has reduced.
    pub(super) shares: bool,
    /// Its first tag.
    pub(super) tag: usize,
}

/// A task under way.
#[derive(Debug)]
pub(super) struct ReductionExchange {
    task: Task,
    started: usize,
    pieces: VecDeque<Piece>,
}

#[derive(Debug)]
struct Piece {
    index: usize,
    stage: Stage,
    requests: Vec<MpiRequest>,
    /// Of the requests, those from here on may not have ended.
    ended: usize,
    /// What the others sent: `ranks` − 1 times the part's length, by rank.
    staging: Option<Mapping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Gathering,
    Sharing,
    Done,
}

impl Piece {
    /// Starts to receive so many bytes.
    fn receive(
        &mut self,
        context: &Context,
        (to, bytes): (MpiAddress, usize),
        peer: usize,
        tag: usize,
    ) -> Result<()> {
        for (at, part) in messages(bytes) {
            self.requests.push(context.communicator.receive(to.at(at), part, peer, tag)?);
        }
        Ok(())
    }

    /// Starts to send so many bytes.
    fn send(
        &mut self,
        context: &Context,
        (from, bytes): (MpiAddress, usize),
        peer: usize,
        tag: usize,
    ) -> Result<()> {
        for (at, part) in messages(bytes) {
            self.requests.push(context.communicator.send(from.at(at), part, peer, tag)?);
        }
        Ok(())
    }
}

/// The messages that so many bytes travel in: where each begins, and how long it is. They arrive in order: one tag
/// does for all.
fn messages(bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    let one = if bytes <= CUT_BYTES_MAX { MESSAGE_BYTES } else { bytes };
    (0..bytes).step_by(one.max(1)).map(move |at| (at, one.min(bytes - at)))
}

impl ReductionExchange {
    pub(super) fn new(task: Task) -> Self {
        Self { task, started: 0, pieces: VecDeque::new() }
    }

    /// How many tags it uses.
    pub(super) fn tags(cut: &ReductionCut) -> usize {
        2 * cut.pieces()
    }

    pub(super) fn is_done(&self) -> bool {
        self.pieces.is_empty() && self.started == self.task.cut.pieces()
    }

    /// Does what can be done without waiting; whether that was anything.
    pub(super) fn advance(&mut self, context: &mut Context) -> Result<bool> {
        let mut moved = false;
        while self.pieces.len() < WINDOW && self.started < self.task.cut.pieces() {
            let piece = self.task.gather(context, self.started)?;
            self.pieces.push_back(piece);
            self.started += 1;
            moved = true;
        }
        for piece in &mut self.pieces {
            moved |= self.task.advance(context, piece)?;
        }
        while self.pieces.front().is_some_and(|piece| piece.stage == Stage::Done) {
            self.pieces.pop_front();
        }
        Ok(moved)
    }
}

impl Task {
    fn tag(&self, stage: Stage, piece: usize) -> usize {
        let stage = usize::from(stage == Stage::Sharing);
        self.tag + stage * self.cut.pieces() + piece
    }

    /// Sends each rank what it reduces, and receives what this rank reduces.
    fn gather(&self, context: &mut Context, index: usize) -> Result<Piece> {
        let mut piece = Piece {
            index,
            stage: Stage::Gathering,
            requests: Vec::with_capacity(2 * context.ranks),
            ended: 0,
            staging: None,
        };
        if self.reduction.is_none() {
            return Ok(piece);
        }
        match self.post(context, &mut piece) {
            Ok(()) => Ok(piece),
            Err(error) => {
                // Some of its requests may be under way.
                _ = std::mem::ManuallyDrop::new(piece);
                Err(error)
            }
        }
    }

    fn post(&self, context: &mut Context, piece: &mut Piece) -> Result<()> {
        let index = piece.index;
        let tag = self.tag(Stage::Gathering, index);
        let own = self.cut.part(context.rank, index);
        if !own.is_empty() {
            let staging = context.staging(own.len() * (context.ranks - 1))?;
            let staging = MpiAddress(piece.staging.insert(staging).base());
            for peer in context.others() {
                let to = staging.at(slot(context.rank, peer) * own.len());
                piece.receive(context, (to, own.len()), peer, tag)?;
            }
        }
        for peer in context.others() {
            let part = self.cut.part(peer, index);
            if !part.is_empty() {
                let from = self.at.at(part.start);
                piece.send(context, (from, part.len()), peer, tag)?;
            }
        }
        Ok(())
    }

    fn advance(&self, context: &mut Context, piece: &mut Piece) -> Result<bool> {
        let mut moved = false;
        while let Some(request) = piece.requests.get_mut(piece.ended) {
            if !request.test()? {
                return Ok(moved);
            }
            piece.ended += 1;
            moved = true;
        }
        match piece.stage {
            Stage::Gathering => {
                self.fold(context, piece);
                piece.stage = Stage::Done;
                if self.shares {
                    self.share(context, piece)?;
                }
                moved = true;
            }
            Stage::Sharing => {
                piece.stage = Stage::Done;
                moved = true;
            }
            Stage::Done => {}
        }
        Ok(moved)
    }

    fn fold(&self, context: &mut Context, piece: &mut Piece) {
        let own = self.cut.part(context.rank, piece.index);
        let (Some(reduction), Some(staging)) = (self.reduction, piece.staging.take()) else {
            return;
        };
        let target = self.at.at(own.start);
        let sources: Vec<*const u8> = (0..context.ranks)
            .map(|rank| {
                if rank == context.rank {
                    return target.0.cast_const();
                }
                staging.base().wrapping_add(slot(context.rank, rank) * own.len()).cast_const()
            })
            .collect();
        fold(reduction, &sources, target, own.len());
        context.give_back(staging);
    }

    /// Sends everybody what this rank has reduced, and receives what they have.
    fn share(&self, context: &Context, piece: &mut Piece) -> Result<()> {
        piece.stage = Stage::Sharing;
        piece.requests.clear();
        piece.ended = 0;
        let tag = self.tag(Stage::Sharing, piece.index);
        let own = self.cut.part(context.rank, piece.index);
        for peer in context.others() {
            let theirs = self.cut.part(peer, piece.index);
            if !theirs.is_empty() {
                let to = self.at.at(theirs.start);
                piece.receive(context, (to, theirs.len()), peer, tag)?;
            }
        }
        for peer in context.others() {
            if !own.is_empty() {
                let from = self.at.at(own.start);
                piece.send(context, (from, own.len()), peer, tag)?;
            }
        }
        Ok(())
    }
}

/// Where `peer`'s bytes lie among those of the others.
fn slot(rank: usize, peer: usize) -> usize {
    if peer < rank {
        peer
    } else {
        peer - 1
    }
}
