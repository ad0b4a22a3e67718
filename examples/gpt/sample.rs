//! Text from the model: one token after the other.
//!
//! Every token is a forward of the whole sequence, padded to its final length: what is behind a token does not change it. All ranks of a
//! model compute together, and the last stage tells the others which token it was.

use anyhow::Result;
use phalanx_data::text::Detokenizer;
use phalanx_ddp_core::amp;
use phalanx_model_parallel::layer::random::Key;
use phalanx_model_parallel::layer::Pass;
use phalanx_model_parallel::pipeline::schedule::ScheduleKind;
use phalanx_model_parallel::pipeline::{Pipeline, Shaped, Stage};
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
}

/// One sequence on its way through the stages.
struct Sequence<'t> {
    trainer: &'t Trainer,
    ids: Tensor,
    /// The token whose logits are wanted.
    at: i64,
    logits: Option<Tensor>,
}

impl Stage for Sequence<'_> {
    fn forward(
        &mut self,
        chunk: usize,
        _micro_batch: usize,
        input: Option<Tensor>,
    ) -> phalanx_model_parallel::Result<Tensor> {
        let Trainer { network, place, plan, .. } = self.trainer;
        let tokens = place.together.context.tokens(self.ids.size()[1])?;
        let pass = Pass { tokens, ..Pass::evaluation() };
        let hidden = network.hidden(chunk, (&self.ids, input), (&pass, 0.0))?;
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
    let stages = &trainer.place.stages;
    let schedule = single_pass(kind, stages.world_size())?;
    let mut pipeline = Pipeline::new(stages.clone(), schedule, trainer.plan.device)?;
    let mut tokens = prompt.to_vec();
    tokens.resize((prompt.len() + count).next_multiple_of(trainer.plan.tokens_of), 0);
    let last = stages.world_size() - 1;
    for at in prompt.len()..prompt.len() + count {
        let ids =
            Tensor::f_from_slice(&tokens)?.f_unsqueeze(0)?.f_to_device(trainer.plan.device)?;
        let before = i64::try_from(at)? - 1;
        let mut sequence = Sequence { trainer, ids, at: before, logits: None };
        match trainer.plan.autocasts {
            false => pipeline.evaluate(&mut sequence)?,
            true => {
                let device = trainer.plan.device;
                amp::autocast(device, Kind::BFloat16, || pipeline.evaluate(&mut sequence))??
            }
        };
        let mine = match &sequence.logits {
            Some(logits) => chosen(logits, choice, at as u64)?,
            None => 0,
        };
        let told = stages
            .with_group(|group| group.tagged("token").all_gather_bytes(&mine.to_le_bytes()))?;
        tokens[at] = i64::from_le_bytes(told[last].as_slice().try_into()?);
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
