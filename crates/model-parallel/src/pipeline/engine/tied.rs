//! Weights that the first and the last stage share: an embedding that is the head's matrix, too.
//!
//! Both stages have a copy, which begin alike. In a step each adds up the gradients of its own; after the last backward the two send each other what they have, both add
//! the first stage's and the last stage's in this order, and then the ordinary exchange follows, under any stage of ZeRO. The copies get the same gradient, to the bit, and the
//! optimizer makes the same of it: elementwise ones and those that look at a parameter as a whole.
//!
//! Source: Megatron-LM's `finalize_model_grads` (embedding gradients over a group of the two stages).

use phalanx_ddp_core::collective::{MessageCall, StartedMessage};
use tch::Tensor;

use super::stage::Shaped;
use super::Pipeline;
use crate::error::{Error, Result};

/// A weight of two ranks.
#[derive(Debug)]
pub(super) struct Tied {
    name: String,
    variable: Tensor,
    peer: usize,
}

impl Pipeline {
    /// Ties a weight of two stages. Collective over the pipeline: the two ranks give their copy, the others nothing; to be called before [`Ddp`](phalanx_ddp_core::Ddp)
    /// wraps the model. The copy of the later rank becomes that of the earlier one. Where one rank alone gives it nothing is done: the
    /// stages of that rank use the same variable.
    ///
    /// Stages with a tied weight exchange their gradients after the last backward of a step, not within it.
    ///
    /// # Errors
    /// [`Error::PipelineMismatch`], on every rank: copies of different shapes or kinds, or more than two; [`Error::Ddp`] where the group is dead.
    pub fn tie(&mut self, name: &str, variable: Option<&Tensor>) -> Result<()> {
        let mine = match variable {
            Some(variable) => Shaped::of(variable)?.to_string(),
            None => String::new(),
        };
        let tag = format!("tied weight {name}");
        let all =
            self.group.with_group(|group| group.tagged(&tag).all_gather_bytes(mine.as_bytes()))?;
        let having: Vec<usize> = (0..all.len()).filter(|rank| !all[*rank].is_empty()).collect();
        let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        let misfit = |rank: usize, what: String, expected: String| {
            let who = format!("tied weight {name} on {}", self.names.of(rank));
            Err(Error::PipelineMismatch { who, what, expected })
        };
        match *having.as_slice() {
            [] => misfit(0, "no rank has it".to_owned(), "a rank or two that give it".to_owned()),
            [_] => Ok(()),
            [first, last] if all[first] != all[last] => misfit(last, text(last), text(first)),
            [first, last] => self.tie_two(name, variable, first, last),
            [_, _, more, ..] => misfit(more, "a third copy".to_owned(), "two at most".to_owned()),
        }
    }

    fn tie_two(
        &mut self,
        name: &str,
        variable: Option<&Tensor>,
        first: usize,
        last: usize,
    ) -> Result<()> {
        let Some(variable) = variable else { return Ok(()) };
        let is_first = self.group.rank() == first;
        let peer = if is_first { last } else { first };
        let tied = Tied { name: name.to_owned(), variable: variable.shallow_clone(), peer };
        let theirs = self.swapped(&tied, &variable.f_detach()?)?;
        if !is_first {
            let mut variable = variable.f_detach()?;
            variable.f_copy_(&theirs)?;
        }
        self.tied.push(tied);
        Ok(())
    }

    /// Adds up the gradients of tied weights: after the last backward, before the exchange.
    pub(super) fn add_tied(&self) -> Result<()> {
        for tied in &self.tied {
            let mut mine = tied.variable.f_grad()?;
            if !mine.defined() {
                return Err(Error::BadInput {
                    layer: format!("tied weight {}", tied.name),
                    actual: "it has no gradient".to_owned(),
                    expected: "a stage that uses it, in a model that trains".to_owned(),
                });
            }
            let theirs = self.swapped(tied, &mine)?;
            let _unrecorded = tch::no_grad_guard();
            // Whoever adds, a + b has the bits of b + a.
            drop(mine.f_add_(&theirs)?);
        }
        Ok(())
    }

    /// Sends a tensor to the other rank, and gets that one's.
    fn swapped(&self, tied: &Tied, mine: &Tensor) -> Result<Tensor> {
        let (shape, kind, device) = (mine.size(), mine.f_kind()?, mine.device());
        let (peer, tag) = (tied.peer, format!("tied weight {}", tied.name));
        let started = self.group.start_together(&[
            MessageCall::Send { tensor: mine, peer, tag: &tag },
            MessageCall::Receive { shape: &shape, kind, device, peer, tag: &tag },
        ])?;
        let mut theirs = None;
        for one in started {
            match one {
                StartedMessage::Sending(sending) => sending.wait()?,
                StartedMessage::Receiving(receiving) => theirs = Some(receiving.wait()?),
            }
        }
        theirs.ok_or_else(|| Error::NotThere { what: format!("tied weight {}", tied.name) })
    }
}
