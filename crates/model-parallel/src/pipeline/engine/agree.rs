//! What stages give each other, agreed on before the first step.
//!
//! From the first stage to the last each says what it gives to the next, and all ranks hear it: what it was described with, or what comes out of micro-batch 0 when the
//! stage runs it without recording, on zeros in the place of its input. It takes as long as one micro-batch through the whole model.

use tch::{Device, Kind, Tensor};

use super::names::plain;
use super::stage::{Shaped, Stage};
use super::Pipeline;
use crate::error::{Error, Result};

/// Kinds that can be told, by number.
const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16];

impl Pipeline {
    /// Agrees on the shapes and kinds between stages. Collective over the pipeline; the first [`step`](Pipeline::step) calls it. To be called again where micro-batches
    /// change their shape.
    ///
    /// # Errors
    /// On every rank, and the groups are as good as before: [`Error::PipelineMismatch`], with the first stage that cannot take what the one before gives, or
    /// gives what cannot be sent. [`Error::Ddp`] where the group is dead.
    pub fn agree(&mut self, stage: &mut impl Stage) -> Result<()> {
        let mut outputs: Vec<Shaped> = Vec::with_capacity(self.schedule.stage_count());
        for index in 0..self.schedule.stage_count() {
            let Some((rank, chunk)) = self.schedule.place(index) else { break };
            let told = match rank == self.group.rank() {
                true => encode(self.outcome(stage, (index, chunk), outputs.last())),
                false => Vec::new(),
            };
            let tag = format!("what stage {index} gives to the next");
            let all = self.group.with_group(|group| group.tagged(&tag).all_gather_bytes(&told))?;
            match decode(&all[rank]) {
                Ok(output) => outputs.push(output),
                Err(what) => return Err(self.misfit(index, outputs.last(), what)),
            }
        }
        self.agreed = Some(outputs);
        Ok(())
    }

    /// What a stage of this rank gives to the next one.
    fn outcome(
        &self,
        stage: &mut impl Stage,
        (index, chunk): (usize, usize),
        given: Option<&Shaped>,
    ) -> Result<Shaped, String> {
        let output = match stage.output(chunk) {
            Some(output) => output,
            None => traced(stage, chunk, given, self.device)
                .map_err(|error| plain(&error.to_string()).to_owned())?,
        };
        if !KINDS.contains(&output.kind) {
            return Err(format!("it gives {output}, which has no gradient"));
        }
        let is_last = index + 1 == self.schedule.stage_count();
        if is_last && output.shape.iter().product::<i64>() != 1 {
            return Err(format!(
                "it returns {output}, and the last stage returns the sum of its losses, one number"
            ));
        }
        Ok(output)
    }

    fn misfit(&self, index: usize, given: Option<&Shaped>, what: String) -> Error {
        let rank = self.schedule.place(index).map_or(0, |(rank, _)| rank);
        let who = format!("stage {index}, on {}", self.names.of(rank));
        let expected = match given {
            Some(given) => format!("a stage that takes {given} from stage {}", index - 1),
            None => "a stage that runs micro-batch 0".to_owned(),
        };
        Error::PipelineMismatch { who, what, expected }
    }
}

fn traced(
    stage: &mut impl Stage,
    chunk: usize,
    given: Option<&Shaped>,
    device: Device,
) -> Result<Shaped> {
    let input = match given {
        Some(given) => Some(Tensor::f_zeros(given.shape.as_slice(), (given.kind, device))?),
        None => None,
    };
    let _unrecorded = tch::no_grad_guard();
    Shaped::of(&stage.forward(chunk, 0, input)?)
}

/// A number for the kind and those of the shape; or 255 and a text.
fn encode(outcome: Result<Shaped, String>) -> Vec<u8> {
    match outcome {
        Ok(Shaped { shape, kind }) => {
            let number = KINDS.iter().position(|one| *one == kind).unwrap_or(KINDS.len());
            let number = u8::try_from(number).unwrap_or(u8::MAX);
            std::iter::once(number).chain(shape.iter().flat_map(|len| len.to_le_bytes())).collect()
        }
        Err(text) => std::iter::once(u8::MAX).chain(text.into_bytes()).collect(),
    }
}

fn decode(told: &[u8]) -> Result<Shaped, String> {
    let (kind, rest) = told.split_first().unwrap_or((&u8::MAX, &[]));
    match KINDS.get(usize::from(*kind)) {
        Some(kind) => {
            let numbers = rest.chunks_exact(8);
            let number =
                |b: &[u8]| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
            Ok(Shaped { shape: numbers.map(number).collect(), kind: *kind })
        }
        None => Err(String::from_utf8_lossy(rest).into_owned()),
    }
}
