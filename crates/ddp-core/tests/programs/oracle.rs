//! What a program means: one process that holds every rank's gradients and adds them up by hand.
//!
//! Gradients are whole numbers (`run::coefficients`), so that their sums and means are exact here and there. An
//! optimizer gets the means as gradients of Σ parameter × mean: tch's as it is, one of ours through a group of one rank.

use phalanx_comm::{Group, GroupOptions};
use phalanx_ddp_core::{Buffers, Ddp, DdpOptions, NonFinite, Optimizer as Ours, Sync};
use tch::{nn, Kind, Tensor};

use crate::program::{Loss, Part, Program, Statement};
use crate::run::{self, coefficients, statistics, Built, Values};

/// A model, and what each rank holds of it beside its parameters.
struct Held {
    built: Built,
    trains: Vec<bool>,
    /// By rank and parameter.
    gradients: Vec<Vec<Option<Vec<f64>>>>,
    /// By rank and parameter: whether the gradient was not exchanged.
    pending: Vec<Vec<bool>>,
    /// By rank: what was weighed since the last exchange.
    weights: Vec<f64>,
    /// By rank.
    buffers: Vec<Vec<f64>>,
    /// By parameter: whether an exchange since the last step gave it a gradient, if there was one.
    exchanged: Option<Vec<bool>>,
    stepper: Stepper,
}

enum Stepper {
    Tch(nn::Optimizer),
    Ours(Ours, Ddp),
}

pub(crate) struct Oracle<'a> {
    program: &'a Program,
    models: Vec<Held>,
}

/// The values that every rank ends with.
pub(crate) fn values(program: &Program) -> Vec<Values> {
    let mut oracle = Oracle::new(program);
    match &program.join {
        None => program.steps.iter().flatten().for_each(|s| oracle.execute(s, &|_| true)),
        Some(counts) => {
            for (number, step) in program.steps.iter().enumerate() {
                if counts.iter().all(|&count| count <= number) {
                    break;
                }
                step.iter().for_each(|s| oracle.execute(s, &|rank| number < counts[rank]));
            }
        }
    }
    let weights = oracle.models.iter().map(|model| run::joined(&model.built.parameters));
    let weights: Values = weights.collect();
    let of_rank = |rank: usize| {
        let buffers = oracle.models.iter().map(|model| model.buffers[rank].clone());
        weights.iter().cloned().chain(buffers).collect()
    };
    (0..program.world_size).map(of_rank).collect()
}

impl<'a> Oracle<'a> {
    fn new(program: &'a Program) -> Self {
        let held = |(number, spec): (usize, &crate::program::Model)| {
            let built = Built::new(spec, number, 0);
            let trains: Vec<bool> = spec.parameters.iter().map(|p| !p.frozen).collect();
            for parameter in &built.parameters {
                drop(parameter.set_requires_grad(true));
            }
            let stepper = match program.optimizer.is_tchs() {
                true => Stepper::Tch(run::tchs(program.optimizer, &built.vs)),
                false => ours(program, &built),
            };
            let ranks = program.world_size;
            let buffer = if spec.has_buffers { vec![0.0; 3] } else { Vec::new() };
            Held {
                gradients: vec![vec![None; trains.len()]; ranks],
                pending: vec![vec![false; trains.len()]; ranks],
                weights: vec![0.0; ranks],
                buffers: vec![buffer; ranks],
                exchanged: None,
                built,
                trains,
                stepper,
            }
        };
        let models = program.models.iter().enumerate().map(held).collect();
        Self { program, models }
    }

    fn execute(&mut self, statement: &Statement, takes_part: &dyn Fn(usize) -> bool) {
        match statement {
            Statement::Backward { parts, sync, .. } => self.backward(parts, *sync, takes_part),
            Statement::SetTrains { model, parameter, trains, .. } => {
                self.models[*model].trains[*parameter] = *trains;
            }
            Statement::Step { model, .. } => self.models[*model].step(self.program),
            Statement::ZeroGrad { model } | Statement::Release { model } => {
                self.models[*model].release();
            }
            // No number of this world depends on it, or it is a mistake.
            Statement::AtStep(_)
            | Statement::Late { .. }
            | Statement::Convert { .. }
            | Statement::Poke { .. } => {}
        }
    }

    fn backward(&mut self, parts: &[Part], sync: bool, takes_part: &dyn Fn(usize) -> bool) {
        let program = self.program;
        let losses = parts.iter().enumerate().filter_map(|(rank, part)| match part {
            Part::Loss(loss) if takes_part(rank) => Some((rank, loss)),
            _ => None,
        });
        let losses: Vec<(usize, &Loss)> = losses.collect();
        for (number, model) in self.models.iter_mut().enumerate() {
            let reaching = losses.iter().filter(|(_, loss)| loss.reaches(number));
            let mut is_reached = false;
            let mut used = vec![vec![false; model.trains.len()]; program.world_size];
            for &(rank, loss) in reaching {
                is_reached = true;
                model.weights[rank] += f64::from(loss.weight);
                for &(_, index) in loss.terms.iter().filter(|term| term.0 == number) {
                    if model.trains[index] {
                        model.add(program, (rank, loss), (number, index));
                        used[rank][index] = true;
                        model.pending[rank][index] |= !sync;
                    }
                }
                model.buffers[rank].iter_mut().for_each(|b| *b += statistics(loss.salt, rank));
            }
            if sync && is_reached {
                model.exchange(program, &used, takes_part);
            }
        }
    }
}

/// One of our optimizers over a group of one rank, whose gradients are looked at by nobody.
fn ours(program: &Program, built: &Built) -> Stepper {
    let mut group = Group::single(GroupOptions::default()).expect("one rank");
    let options = DdpOptions {
        find_unused_parameters: true,
        non_finite: NonFinite::Ignore,
        bucket_bytes: program.settings.bucket_bytes.clone(),
        ..DdpOptions::default()
    };
    let ddp = Ddp::new(&built.vs, &mut group, options).expect("a model");
    let ours = Ours::new(&ddp, run::rule(program.optimizer), run::groups(program));
    Stepper::Ours(ours.expect("right settings"), ddp)
}

impl Held {
    /// Adds a parameter's gradient in a loss to what its rank has.
    fn add(&mut self, program: &Program, of: (usize, &Loss), at: (usize, usize)) {
        let (rank, loss) = of;
        let spec = program.models[at.0].parameters[at.1];
        for place in 0..spec.places {
            let factors = coefficients(spec.len, loss.salt, rank, at, place);
            let mut values = run::joined(&[factors]);
            if loss.nan == Some(at) {
                values[0] = f64::NAN;
            }
            match &mut self.gradients[rank][at.1] {
                Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                none => *none = Some(values),
            }
        }
    }

    fn exchange(
        &mut self,
        program: &Program,
        used: &[Vec<bool>],
        takes_part: &dyn Fn(usize) -> bool,
    ) {
        let ranks = 0..program.world_size;
        let counted = ranks.clone().filter(|&rank| takes_part(rank)).count();
        let total = match program.weighted {
            true => self.weights.iter().sum::<f64>(),
            false => f64::from(u32::try_from(counted).expect("few ranks")),
        };
        let is_free = program.settings.find_unused_parameters || program.settings.static_graph;
        let mut flags = vec![false; self.trains.len()];
        for index in (0..self.trains.len()).filter(|&index| self.trains[index]) {
            let has = |rank: usize| used[rank][index] || self.pending[rank][index];
            if is_free && !ranks.clone().any(has) {
                continue;
            }
            flags[index] = true;
            let mut mean = vec![0.0; self.built.parameters[index].numel()];
            for rank in ranks.clone().filter(|&rank| takes_part(rank)) {
                if let Some(values) = &self.gradients[rank][index] {
                    mean.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                }
            }
            mean.iter_mut().for_each(|sum| *sum /= total);
            for rank in ranks.clone() {
                self.gradients[rank][index] = Some(mean.clone());
            }
        }
        self.pending.iter_mut().for_each(|of_rank| of_rank.fill(false));
        self.weights.fill(0.0);
        self.judge(program, flags);
        let is_refused = self.exchanged.is_none() && self.is_empty();
        if !(is_refused && program.settings.non_finite == NonFinite::Error) {
            self.share_buffers(program, takes_part);
        }
    }

    /// What becomes of gradients that are not finite.
    fn judge(&mut self, program: &Program, flags: Vec<bool>) {
        let mut values = self.gradients[0].iter().flatten().flatten();
        let is_finite = values.all(|value| value.is_finite());
        let policy = program.settings.non_finite;
        if !is_finite && matches!(policy, NonFinite::Error | NonFinite::SkipStep) {
            self.release();
            return;
        }
        let before = self.exchanged.take().unwrap_or_else(|| vec![false; flags.len()]);
        let trains = self.trains.iter();
        let merged = before.into_iter().zip(flags).zip(trains).map(|((b, f), &t)| (b || f) && t);
        self.exchanged = Some(merged.collect());
    }

    fn is_empty(&self) -> bool {
        self.gradients.iter().flatten().all(Option::is_none)
    }

    fn share_buffers(&mut self, program: &Program, takes_part: &dyn Fn(usize) -> bool) {
        let ranks = 0..program.world_size;
        match program.settings.buffers {
            Buffers::Own => {}
            Buffers::RankZero => {
                // A rank that only exchanges takes part as well, but for those that have joined.
                let leader = ranks.clone().find(|&rank| takes_part(rank)).unwrap_or(0);
                let leaders = self.buffers[leader].clone();
                self.buffers.fill(leaders);
            }
            Buffers::Mean => {
                let count = f64::from(u32::try_from(program.world_size).expect("few ranks"));
                let len = self.buffers[0].len();
                let mean =
                    |at: usize| self.buffers.iter().map(|of_rank| of_rank[at]).sum::<f64>() / count;
                let means: Vec<f64> = (0..len).map(mean).collect();
                self.buffers.fill(means);
            }
        }
    }

    fn release(&mut self) {
        self.gradients.iter_mut().for_each(|of_rank| of_rank.fill(None));
        self.pending.iter_mut().for_each(|of_rank| of_rank.fill(false));
        self.weights.fill(0.0);
        self.exchanged = None;
    }

    fn step(&mut self, program: &Program) {
        let is_ours = matches!(self.stepper, Stepper::Ours(..));
        let mut total = Tensor::from(0.0_f64);
        let mut any = false;
        for (index, parameter) in self.built.parameters.iter().enumerate() {
            let has = !is_ours || self.exchanged.as_ref().is_some_and(|flags| flags[index]);
            let Some(mean) = self.gradients[0][index].as_ref().filter(|_| has) else { continue };
            any = true;
            let mean = Tensor::from_slice(mean).to_kind(parameter.kind());
            total = &total + (parameter * mean).sum(Kind::Double);
        }
        match &mut self.stepper {
            Stepper::Tch(optimizer) => {
                optimizer.zero_grad();
                if any {
                    total.backward();
                }
                if let Some(norm_max) = program.clip.filter(|_| any) {
                    optimizer.clip_grad_norm(norm_max);
                }
                optimizer.step();
            }
            Stepper::Ours(optimizer, ddp) => {
                if any {
                    ddp.backward(&total, 1.0, Sync::Reduce).expect("an exchange alone");
                    _ = optimizer.step(program.clip).expect("a step");
                }
                self.release();
            }
        }
    }
}
