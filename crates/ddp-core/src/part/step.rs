//! What the ranks of a model agree on before a step: whether gradients came, whether they are finite, and that all take the same
//! step. One small collective a step.

use phalanx_comm::recorder;
use serde::{Deserialize, Serialize};

use crate::reduce::{is_due, Outcome, Reducer};
use crate::store::agree;
use crate::{Error, Result};

/// Gradients that are not finite, where that is to be an error: which the step tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// Of the world.
    pub(crate) rank: usize,
    pub(crate) name: String,
    pub(crate) count: usize,
    pub(crate) total: usize,
    pub(crate) exchange: u64,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let Refusal { rank, name, count, total, exchange } = refusal;
        Self::NonFinite { rank, name, count, total, exchange }
    }
}

/// How the exchange of a rank ended, as a number.
const REDUCED: i64 = 0;
const SKIPPED: i64 = 1;
const REFUSED: i64 = 2;
const NOTHING: i64 = 3;

/// Numbers that a rank tells.
const LEN: usize = 4;

impl Reducer {
    /// Takes what came of the last exchange, on all ranks of the model: a step that is left out on one is on all. `made_with` is what all must
    /// step with. Collective over the model's ranks where there is a part.
    pub(crate) fn take_outcome(&mut self, lr: f64, made_with: &[u8]) -> Result<Outcome> {
        let mine = std::mem::take(&mut self.outcome);
        if self.store.part.is_none() {
            return Ok(mine);
        }
        let worst = self.tell_step(&mine, lr, made_with)?;
        match worst {
            NOTHING => {
                self.outcome = mine;
                Ok(Outcome::Nothing)
            }
            REFUSED => {
                let refusal = self.first_refusal(&mine)?;
                self.release_gradients()?;
                let error = Error::from(refusal);
                recorder::tell_shared_error(&error.to_string());
                Err(error)
            }
            SKIPPED => {
                self.release_gradients()?;
                Ok(Outcome::Skipped)
            }
            _ => {
                let number = self.store.optimizer.steps + 1;
                if is_due(number, self.options.fingerprint_interval) {
                    let compared = self.compare_parts();
                    if let Err(error @ Error::PartsDiffer { .. }) = &compared {
                        recorder::tell_shared_error(&error.to_string());
                    }
                    compared?;
                }
                Ok(mine)
            }
        }
    }

    /// Tells how the exchange ended and how the step is made; gives the worst end.
    fn tell_step(&mut self, mine: &Outcome, lr: f64, made_with: &[u8]) -> Result<i64> {
        let code = match mine {
            Outcome::Reduced(_) => REDUCED,
            Outcome::Skipped => SKIPPED,
            Outcome::Refused(_) => REFUSED,
            Outcome::Nothing => NOTHING,
        };
        let made = i64::try_from(self.store.optimizer.steps).unwrap_or(i64::MAX);
        let told = [code, made, lr.to_bits().cast_signed(), i64::from(crc32c::crc32c(made_with))];
        let Some(part) = &mut self.store.part else { return Ok(code) };
        let mut all = vec![0_i64; LEN * part.model.world_size()];
        part.model.tagged("whether a step is made").all_gather(&told, &mut all[..])?.wait()?;
        let (rows, _) = all.as_chunks::<LEN>();
        if rows.iter().any(|row| row[1..] != told[1..]) {
            let line = |(rank, [_, steps, bits, with]): (usize, &[i64; LEN])| {
                let (rank, next) = (part.model_ranks[rank], f64::from_bits(bits.cast_unsigned()));
                vec![
                    "steps".to_owned(),
                    format!("{steps} steps, the next with lr {next}; clipping and scale {with:08x} (rank {rank} of the world)"),
                ]
            };
            let lines: Vec<Vec<String>> = rows.iter().enumerate().map(line).collect();
            return agree::compared("the steps of their parts", &lines).map(|()| code);
        }
        Ok(rows.iter().map(|row| row[0]).max().unwrap_or(code))
    }

    /// What the first rank of the model refused. Collective.
    fn first_refusal(&mut self, mine: &Outcome) -> Result<Refusal> {
        let mine = match mine {
            Outcome::Refused(refusal) => serde_json::to_string(refusal).unwrap_or_default(),
            _ => String::new(),
        };
        let Some(part) = &mut self.store.part else { return Err(Error::NoGradients) };
        let text = part.objected("gradients that are not finite", &mine)?.unwrap_or_default();
        serde_json::from_str(&text).map_err(Error::closure)
    }
}
