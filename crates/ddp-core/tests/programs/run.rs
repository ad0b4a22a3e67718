//! One rank of a program, as a user would write it.

use std::panic::{catch_unwind, AssertUnwindSafe};

use phalanx_comm::Group;
use phalanx_ddp_core::optim::Rule;
use phalanx_ddp_core::{
    Adam, AdamW, Ddp, DdpOptions, Lamb, Optimizer as Ours, ParameterGroup, ParameterGroups, Sgd,
    Sync,
};
use tch::nn::OptimizerConfig as _;
use tch::{nn, Device, Kind, Tensor};

use crate::program::{
    Conversion, Loss, Mistake, Model, Optimizer, Part, Program, Settings, Statement,
};

/// Weights by model, in the order of their names, then buffers.
pub(crate) type Values = Vec<Vec<f64>>;

/// What a rank ends with: the weights, or the first error's text.
pub(crate) type Ended = Result<Values, String>;

/// Whole numbers in f32 and their quotients by the weights of `Maker::balance` are exact with these.
const UNIT: i64 = 60;

/// The gradient of one place of a parameter in one loss of a rank.
pub(crate) fn coefficients(
    len: i64,
    salt: i64,
    rank: usize,
    at: (usize, usize),
    place: u64,
) -> Tensor {
    let small = |number: usize| i64::try_from(number).expect("small");
    let index = Tensor::arange(len, (Kind::Int64, Device::Cpu));
    let seed =
        salt * 31 + small(rank) * 7 + small(at.0) * 3 + small(at.1) * 5 + 11 * place.cast_signed();
    let mixed = &index * &index * 3 + &index * (seed % 13) + (seed * seed % 1009);
    (mixed.remainder(5) - 2) * UNIT
}

/// What a loss adds to a rank's buffers.
pub(crate) fn statistics(salt: i64, rank: usize) -> f64 {
    let seed = salt + 3 * i64::try_from(rank).expect("small");
    6.0 * f64::from(i32::try_from(seed % 17).expect("small"))
}

/// The rule of one of our optimizers; what tch has is carried by none.
pub(crate) fn rule(optimizer: Optimizer) -> Box<dyn Rule> {
    let sgd = Sgd { lr: 0.125, ..Sgd::default() };
    match optimizer {
        Optimizer::Momentum => Box::new(Sgd { momentum: 0.5, nesterov: true, ..sgd }),
        Optimizer::AdamW => Box::new(AdamW { lr: 0.015625, ..AdamW::default() }),
        Optimizer::Adam => Box::new(Adam { lr: 0.015625, ..Adam::default() }),
        Optimizer::Lamb => Box::new(Lamb { lr: 0.015625, ..Lamb::default() }),
        _ => Box::new(sgd),
    }
}

pub(crate) fn groups(program: &Program) -> ParameterGroups {
    let none = ParameterGroups::default();
    match program.grouped {
        true => none.with(ParameterGroup::matching(["*.p1"]).lr(0.0078125).weight_decay(0.5)),
        false => none,
    }
}

pub(crate) fn tchs(optimizer: Optimizer, vs: &nn::VarStore) -> nn::Optimizer {
    let built = match optimizer {
        Optimizer::TchAdamW => nn::AdamW::default().build(vs, 0.015625),
        Optimizer::TchMomentum => nn::Sgd { momentum: 0.5, ..nn::Sgd::default() }.build(vs, 0.125),
        _ => nn::Sgd::default().build(vs, 0.125),
    };
    built.expect("tch builds it")
}

pub(crate) fn options(settings: &Settings) -> DdpOptions {
    DdpOptions {
        bucket_bytes: settings.bucket_bytes.clone(),
        zero: settings.zero,
        buffers: settings.buffers,
        find_unused_parameters: settings.find_unused_parameters,
        static_graph: settings.static_graph,
        gradient_kind: settings.gradient_kind,
        non_finite: settings.non_finite,
        fingerprint_interval: settings.fingerprint_interval,
        ..DdpOptions::default()
    }
}

/// A model's variables.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) vs: nn::VarStore,
    pub(crate) parameters: Vec<Tensor>,
    pub(crate) buffers: Vec<Tensor>,
    late: Option<Tensor>,
}

impl Built {
    /// Every rank starts from other values; those of rank 0 count.
    pub(crate) fn new(spec: &Model, number: usize, rank: usize) -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let path = vs.root() / format!("m{number}");
        let mut parameters = Vec::new();
        for (index, parameter) in spec.parameters.iter().enumerate() {
            let values = coefficients(parameter.len, 1, rank, (number, index), 7) / 30;
            let values = values.to_kind(parameter.kind);
            let made = path.add(&format!("p{index}"), values, true);
            parameters.push(made.set_requires_grad(!parameter.frozen));
        }
        let mut buffers = Vec::new();
        if spec.has_buffers {
            buffers.push(path.zeros_no_train("mean", &[3]));
        }
        Self { vs, parameters, buffers, late: None }
    }

    fn values(&self) -> (Vec<f64>, Vec<f64>) {
        (joined(&self.parameters), joined(&self.buffers))
    }
}

/// All elements in a row; what is not a number is the same NaN.
pub(crate) fn joined(tensors: &[Tensor]) -> Vec<f64> {
    let mut all = Vec::new();
    for tensor in tensors {
        let flat = tensor.detach().to_kind(Kind::Double).contiguous().reshape([-1]);
        let values = Vec::<f64>::try_from(&flat).expect("a flat tensor of f64");
        all.extend(values.into_iter().map(|value| if value.is_nan() { f64::NAN } else { value }));
    }
    all
}

enum Stepper {
    Tch(nn::Optimizer),
    Ours(Ours),
}

struct Rank<'a> {
    program: &'a Program,
    rank: usize,
    // Hooks end before the variables.
    ddps: Vec<Ddp>,
    models: Vec<Built>,
    steppers: Vec<Stepper>,
}

/// Runs the program as one rank.
pub(crate) fn rank(program: &Program, group: Group) -> Ended {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut group = group;
        Rank::begun(program, &mut group).and_then(|mut rank| rank.run())
    }));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl<'a> Rank<'a> {
    fn begun(program: &'a Program, group: &mut Group) -> Result<Self, String> {
        let rank = group.rank();
        let mut begun =
            Self { program, rank, ddps: Vec::new(), models: Vec::new(), steppers: Vec::new() };
        for (number, spec) in program.models.iter().enumerate() {
            let mut spec = spec.clone();
            if program.mistake == Some(Mistake::ModelsDiffer) && rank == 1 {
                spec.parameters[0].len += 1;
            }
            let model = Built::new(&spec, number, rank);
            let ddp = Ddp::new(&model.vs, group, options(&program.settings)).map_err(text)?;
            begun.steppers.push(match program.optimizer.is_tchs() {
                true => Stepper::Tch(tchs(program.optimizer, &model.vs)),
                false => {
                    let ours = Ours::new(&ddp, rule(program.optimizer), groups(program));
                    Stepper::Ours(ours.map_err(text)?)
                }
            });
            begun.models.push(model);
            begun.ddps.push(ddp);
        }
        Ok(begun)
    }

    fn run(&mut self) -> Ended {
        match &self.program.join {
            None => {
                for statement in self.program.steps.iter().flatten() {
                    self.execute(statement)?;
                }
            }
            Some(counts) => self.run_joined(counts[self.rank])?,
        }
        if self.program.ends_with_compare {
            for ddp in &self.ddps {
                ddp.compare_parameters().map_err(text)?;
            }
        }
        let (mut weights, mut buffers) = (Vec::new(), Vec::new());
        for model in &self.models {
            let (of_model, of_buffers) = model.values();
            weights.push(of_model);
            buffers.push(of_buffers);
        }
        Ok(weights.into_iter().chain(buffers).collect())
    }

    /// As many steps as this rank has; then it follows the others.
    fn run_joined(&mut self, count: usize) -> Result<(), String> {
        // Lent to `execute_on` and to the join at once.
        let ddps = std::mem::take(&mut self.ddps);
        let join = ddps[0].join().map_err(text)?;
        let program = self.program;
        for statement in program.steps.iter().take(count).flatten() {
            self.execute_on(&ddps, statement)?;
        }
        // What every step ends with, after its exchange.
        let after: Vec<&Statement> = after_exchange(&program.steps[0]);
        let followed = join.finish(|| {
            for statement in &after {
                if let Err(text) = self.execute_on(&ddps, statement) {
                    panic!("{text}");
                }
            }
            Ok(())
        });
        followed.map_err(text)?;
        self.ddps = ddps;
        Ok(())
    }

    fn execute(&mut self, statement: &Statement) -> Result<(), String> {
        let ddps = std::mem::take(&mut self.ddps);
        let done = self.execute_on(&ddps, statement);
        self.ddps = ddps;
        done
    }

    fn execute_on(&mut self, ddps: &[Ddp], statement: &Statement) -> Result<(), String> {
        match statement {
            Statement::AtStep(numbers) => {
                ddps.iter().try_for_each(|ddp| ddp.at_step(numbers[self.rank])).map_err(text)
            }
            Statement::Backward { parts, sync, tolerated } => {
                let done = self.backward(ddps, &parts[self.rank], parts, *sync);
                match done {
                    Err(text) if *tolerated && text.contains("are not finite") => Ok(()),
                    Ok(()) if *tolerated => Err(String::from("nobody saw what is not finite")),
                    other => other,
                }
            }
            Statement::SetTrains { who, model, parameter, trains } => {
                if who.has(self.rank) {
                    let parameter = &self.models[*model].parameters[*parameter];
                    drop(parameter.set_requires_grad(*trains));
                }
                Ok(())
            }
            Statement::Step { who, model } if who.has(self.rank) => self.step(*model),
            Statement::Step { .. } => Ok(()),
            Statement::ZeroGrad { model } => match &mut self.steppers[*model] {
                Stepper::Tch(optimizer) => {
                    optimizer.zero_grad();
                    Ok(())
                }
                Stepper::Ours(_) => ddps[*model].release_gradients().map_err(text),
            },
            Statement::Release { model } => ddps[*model].release_gradients().map_err(text),
            Statement::Late { who } => {
                if who.has(self.rank) {
                    let model = &mut self.models[0];
                    let path = model.vs.root() / "m0";
                    model.late = Some(path.ones("late", &[3]));
                }
                Ok(())
            }
            Statement::Convert { who, how } => {
                if who.has(self.rank) {
                    self.convert(*how);
                }
                Ok(())
            }
            Statement::Poke { rank, parameter } => {
                if *rank == self.rank {
                    let mut poked = self.models[0].parameters[*parameter].shallow_clone();
                    drop(tch::no_grad(|| poked.g_add_scalar_(1.0)));
                }
                Ok(())
            }
        }
    }

    fn convert(&mut self, how: Conversion) {
        let model = &mut self.models[0];
        match how {
            Conversion::Half => model.vs.half(),
            Conversion::Double => model.vs.set_kind(Kind::BFloat16),
            Conversion::ThereAndBack => {
                let other = |kind| if kind == Kind::Float { Kind::Double } else { Kind::Float };
                for parameter in &mut model.parameters {
                    let kind = parameter.kind();
                    let there = parameter.detach().to_kind(other(kind));
                    parameter.set_data(&there);
                    let back = there.to_kind(kind);
                    parameter.set_data(&back);
                }
            }
            Conversion::SetData(parameter) => {
                let parameter = &mut model.parameters[parameter];
                let copy = parameter.detach().copy();
                parameter.set_data(&copy);
            }
        }
    }

    fn step(&mut self, model: usize) -> Result<(), String> {
        match &mut self.steppers[model] {
            Stepper::Tch(optimizer) => {
                // tch cannot clip nothing.
                let is_there = |variable: &Tensor| variable.grad().defined();
                let any = optimizer.trainable_variables().iter().any(is_there);
                if let Some(norm_max) = self.program.clip.filter(|_| any) {
                    optimizer.clip_grad_norm(norm_max);
                }
                optimizer.step();
                Ok(())
            }
            Stepper::Ours(optimizer) => optimizer.step(self.program.clip).map(drop).map_err(text),
        }
    }

    fn backward(
        &self,
        ddps: &[Ddp],
        part: &Part,
        parts: &[Part],
        sync: bool,
    ) -> Result<(), String> {
        let weighted = self.program.weighted;
        match part {
            Part::Nothing => Ok(()),
            Part::Exchange => {
                let losses = parts.iter().filter_map(|part| match part {
                    Part::Loss(loss) => Some(loss),
                    _ => None,
                });
                let model = losses.map(|loss| loss.terms[0].0).next().unwrap_or(0);
                match weighted {
                    true => ddps[model].exchange_weighted().map_err(text),
                    false => ddps[model].exchange().map_err(text),
                }
            }
            Part::Loss(loss) => {
                let summed = self.loss(loss);
                let first = loss.terms[0].0;
                if weighted != loss.mixed {
                    let sync = if sync { Sync::Reduce } else { Sync::Accumulate };
                    return ddps[first]
                        .backward(&summed, f64::from(loss.weight), sync)
                        .map_err(text);
                }
                if sync {
                    // Plain tch: an error is a panic.
                    return match loss.salt % 2 {
                        0 => summed.f_backward().map_err(text),
                        _ => std::panic::catch_unwind(AssertUnwindSafe(|| summed.backward()))
                            .map_err(|panic| {
                                panic.downcast_ref::<String>().cloned().unwrap_or_default()
                            }),
                    };
                }
                let other = loss.terms.iter().map(|term| term.0).find(|&model| model != first);
                let both = || match other {
                    None => Ok(summed.f_backward()),
                    Some(other) => ddps[other].no_sync(|| summed.f_backward()),
                };
                let done = ddps[first].no_sync(both).map_err(text)?;
                done.map_err(text)?.map_err(text)
            }
        }
    }

    /// The loss, and what its forward does to buffers.
    fn loss(&self, loss: &Loss) -> Tensor {
        let mut total = Tensor::from(0.0_f32);
        for &(model, index) in &loss.terms {
            let parameter = &self.models[model].parameters[index];
            let spec = self.program.models[model].parameters[index];
            for place in 0..spec.places {
                let len = i64::try_from(parameter.numel()).expect("small");
                let factors = coefficients(len, loss.salt, self.rank, (model, index), place);
                let factors = factors.to_kind(Kind::Float);
                if loss.nan == Some((model, index)) {
                    drop(factors.get(0).fill_(f64::NAN));
                }
                total = &total + (parameter * factors).sum(Kind::Float);
            }
        }
        if let Some(late) = self.models[0].late.as_ref().filter(|_| loss.late) {
            total = &total + late.sum(Kind::Float);
        }
        for (number, model) in self.models.iter().enumerate() {
            for buffer in model.buffers.iter().filter(|_| loss.reaches(number)) {
                let mut buffer = buffer.shallow_clone();
                drop(tch::no_grad(|| buffer.g_add_scalar_(statistics(loss.salt, self.rank))));
            }
        }
        total
    }
}

/// What a step does after its exchange.
fn after_exchange(step: &[Statement]) -> Vec<&Statement> {
    let last = step.iter().rposition(|s| matches!(s, Statement::Backward { .. }));
    step.iter().skip(last.map_or(0, |last| last + 1)).collect()
}
