//! Text from the model: one token after the other.
//!
//! The prompt goes through the stages once, then one token at a time: blocks keep keys and values of those before. Where tokens are cut over ranks (context and sequence
//! parallelism), every token is a forward of the whole sequence, padded to its final length: what is behind a token does not change it. All ranks of a
//! model compute together, and the last stage tells the others which token it was.

use std::collections::BTreeMap;

use anyhow::Result;
use phalanx_data::text::Detokenizer;
use phalanx_ddp_core::amp;
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::{Pass, Tokens};
use phalanx_model_parallel::pipeline::schedule::ScheduleKind;
use phalanx_model_parallel::pipeline::{Pipeline, Shaped, Stage};
use phalanx_model_parallel::tensor::KeyValues;
use tch::{Kind, Tensor};

use super::data::Text;
use super::train::{single_pass, Trainer};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice {
    /// 0 is the most likely one always.
    pub(crate) temperature: f64,
    /// What chance comes from.
    pub(crate) seed: u64,
    /// Whether blocks keep keys and values, where a rank has all tokens.
    pub(crate) keeps: bool,
}

/// What the blocks of this rank keep of the tokens so far, by chunk and micro-batch: a schedule may send one sequence through several times.
type Kept = BTreeMap<(usize, usize), Vec<KeyValues>>;

/// One sequence, or the next tokens of it, on its way through the stages.
struct Sequence<'t> {
    trainer: &'t Trainer,
    ids: Tensor,
    /// The number of the first of them.
    first: i64,
    /// The one whose logits are wanted, among them.
    at: i64,
    kept: Option<&'t mut Kept>,
    logits: Option<Tensor>,
}

impl Stage for Sequence<'_> {
    fn forward(
        &mut self,
        chunk: usize,
        micro_batch: usize,
        input: Option<Tensor>,
    ) -> phalanx_model_parallel::Result<Tensor> {
        let Trainer { network, place, plan, .. } = self.trainer;
        let hidden = match &mut self.kept {
            Some(kept) => {
                let pass = Pass { tokens: Tokens::from(self.first), ..Pass::evaluation() };
                let before = kept.entry((chunk, micro_batch)).or_default();
                network.next_hidden(chunk, (&self.ids, input), (&pass, before))?
            }
            None => {
                let tokens = place.together.context.tokens(self.ids.size()[1])?;
                let pass = Pass { tokens, ..Pass::evaluation() };
                network.hidden(chunk, (&self.ids, input), (&pass, 0.0))?
            }
        };
        if !network.ends(chunk) {
            return Ok(hidden);
        }
        let logits = network.logits(chunk, &hidden)?;
        self.logits = Some(logits.f_select(1, self.at)?.f_select(0, 0)?.f_to_kind(Kind::Float)?);
        Ok(Tensor::f_zeros([], (Kind::Float, plan.device))?)
    }

    fn output(&self, chunk: usize) -> Option<Shaped> {
        let Trainer { network, plan, .. } = self.trainer;
        let shape = match network.ends(chunk) {
            true => Vec::new(),
            false => vec![1, self.ids.size()[1] / plan.token_parts, plan.width],
        };
        Some(Shaped { shape, kind: plan.kind })
    }
}

/// The tokens behind `prompt`. Collective over the ranks of a model, with the same prompt.
pub(crate) fn generate(
    trainer: &Trainer,
    kind: ScheduleKind,
    (prompt, count): (&[i64], usize),
    choice: Choice,
) -> Result<Vec<i64>> {
    let _unrecorded = tch::no_grad_guard();
    let (stages, plan) = (&trainer.place.stages, &trainer.plan);
    let schedule = single_pass(kind, stages.world_size())?;
    let pipeline = || Pipeline::new(stages.clone(), schedule.clone(), plan.device);
    let keeps = choice.keeps && plan.tokens_of == 1;
    let mut kept = Kept::new();
    let mut tokens = prompt.to_vec();
    if !keeps {
        tokens.resize((prompt.len() + count).next_multiple_of(plan.tokens_of), 0);
    }
    let mut through = pipeline()?;
    let last = stages.world_size() - 1;
    for at in prompt.len()..prompt.len() + count {
        // The prompt, then a token at a time; or all of them.
        let first = if keeps && at > prompt.len() { at - 1 } else { 0 };
        if first == prompt.len() {
            through = pipeline()?; // for another shape
        }
        let ids =
            Tensor::f_from_slice(&tokens[first..])?.f_unsqueeze(0)?.f_to_device(plan.device)?;
        let (first, before) = (i64::try_from(first)?, i64::try_from(at)? - 1);
        let kept = keeps.then_some(&mut kept);
        let mut sequence = Sequence { trainer, ids, first, at: before - first, kept, logits: None };
        match plan.autocasts {
            false => through.evaluate(&mut sequence)?,
            true => {
                amp::autocast(plan.device, Kind::BFloat16, || through.evaluate(&mut sequence))??
            }
        };
        let mine = match &sequence.logits {
            Some(logits) => chosen(logits, choice, at as u64)?,
            None => 0,
        };
        let told = stages
            .with_group(|group| group.tagged("token").all_gather_bytes(&mine.to_le_bytes()))?;
        let token = i64::from_le_bytes(told[last].as_slice().try_into()?);
        match keeps {
            true => tokens.push(token),
            false => tokens[at] = token,
        }
    }
    Ok(tokens[prompt.len()..prompt.len() + count].to_vec())
}

/// The most likely token, or one by its probability.
fn chosen(logits: &Tensor, choice: Choice, place: u64) -> Result<i64> {
    if choice.temperature <= 0.0 {
        return Ok(logits.f_argmax(-1, false)?.f_int64_value(&[])?);
    }
    let probabilities = logits.f_div_scalar(choice.temperature)?.f_softmax(-1, Kind::Double)?;
    let up_to: Vec<f64> =
        Vec::try_from(probabilities.f_cumsum(-1, Kind::Double)?.f_to_device(tch::Device::Cpu)?)?;
    let wanted = Key::of_seed(choice.seed).named("sample").uniform(place);
    let total = up_to.last().copied().unwrap_or(1.0);
    let token = up_to.iter().position(|sum| *sum > wanted * total).unwrap_or(0);
    Ok(i64::try_from(token)?)
}

/// How the tokens read, where it is known which words they are.
pub(crate) fn text(of: &Text, tokens: &[i64]) -> Result<String> {
    let tokenizer = match &of.tokenizer {
        Some(folder) => Detokenizer::open(folder)?,
        None => None,
    };
    Ok(match tokenizer {
        Some(tokenizer) => tokenizer.decode(tokens)?,
        None => tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
    })
}
