//! A program from a seed: first what is right, then, in some programs, one mistake.

use phalanx_comm::environment::HostLink;
use phalanx_ddp_core::{Buffers, NonFinite, Zero};
use tch::Kind;

use crate::draw::Draw;
use crate::mistakes;
use crate::program::{
    Loss, Mistake, Model, Optimizer, Parameter, Part, Program, Settings, Statement, Who,
};

/// Sizes on both sides of an alignment, of a block, and of a bucket.
const LENS: [i64; 8] = [1, 7, 63, 64, 65, 130, 1000, 1025];

const OPTIMIZERS: [Optimizer; 8] = [
    Optimizer::TchSgd,
    Optimizer::TchMomentum,
    Optimizer::TchAdamW,
    Optimizer::Sgd,
    Optimizer::Momentum,
    Optimizer::AdamW,
    Optimizer::Adam,
    Optimizer::Lamb,
];

/// What [`Program`] does not say by itself: what holds while it is made.
#[derive(Debug)]
pub(crate) struct Maker {
    pub(crate) draw: Draw,
    pub(crate) program: Program,
    /// By model and parameter: whether it trains at this point.
    pub(crate) trains: Vec<Vec<bool>>,
    /// By model and parameter, for static graphs: whether exchanged backwards leave it out.
    pub(crate) left_out: Vec<Vec<bool>>,
    pub(crate) uses_step_numbers: bool,
    /// Whether each step zeroes gradients before its backwards instead of after its optimizer step.
    zeroes_first: bool,
    salt: i64,
}

/// The program of a seed.
pub(crate) fn program(seed: u64) -> Program {
    let mut draw = Draw::new(seed);
    let mistake = draw.percent(40).then(|| draw.of(&Mistake::ALL));
    let mut maker = begun(draw, mistake);
    if let Some(mistake) = mistake {
        mistakes::prepare(&mut maker, mistake);
    }
    maker.settle();
    let steps = 3 + maker.draw.below(4);
    // The last step is right: it gives the library the chance to say what was wrong before.
    let wrong = maker.draw.below(steps - 1);
    for step in 0..steps {
        let mut statements = maker.step(step);
        if let Some(mistake) = mistake.filter(|_| step == wrong) {
            mistakes::insert(&mut maker, mistake, step, &mut statements);
        }
        maker.program.steps.push(statements);
    }
    maker.program
}

fn begun(mut draw: Draw, mistake: Option<Mistake>) -> Maker {
    let world_size = 1 + draw.below(3);
    let models: Vec<Model> = (0..draw.of(&[1, 1, 1, 2])).map(|_| model(&mut draw)).collect();
    let (find_unused_parameters, static_graph) =
        draw.of(&[(false, false), (false, false), (true, false), (false, true)]);
    let settings = Settings {
        bucket_bytes: draw.of(&[[1, 1], [256, 400], [300, 5000], [1 << 20, 1 << 20]]).to_vec(),
        zero: draw.of(&[Zero::Off, Zero::One, Zero::Two, Zero::Three]),
        link: draw.of(&[HostLink::Auto, HostLink::Tcp]),
        buffers: draw.of(&[Buffers::RankZero, Buffers::Mean, Buffers::Own]),
        find_unused_parameters,
        static_graph,
        gradient_kind: draw.of(&[None, None, Some(Kind::Double)]),
        non_finite: draw.of(&[
            NonFinite::Error,
            NonFinite::Error,
            NonFinite::SkipStep,
            NonFinite::Warn,
            NonFinite::Ignore,
        ]),
        fingerprint_interval: draw.of(&[1, 3]),
    };
    let program = Program {
        world_size,
        models,
        settings,
        optimizer: draw.of(&OPTIMIZERS),
        clip: draw.percent(25).then_some(2.0),
        grouped: draw.percent(30),
        weighted: draw.percent(40),
        join: None,
        steps: Vec::new(),
        ends_with_compare: draw.percent(20),
        mistake,
    };
    let uses_step_numbers = draw.percent(30);
    let zeroes_first = draw.percent(40);
    let (trains, left_out) = (Vec::new(), Vec::new());
    Maker { draw, program, trains, left_out, uses_step_numbers, zeroes_first, salt: 0 }
}

fn model(draw: &mut Draw) -> Model {
    let count = 1 + draw.below(6);
    let parameter = |_| Parameter {
        len: draw.of(&LENS),
        kind: if draw.percent(10) { Kind::Double } else { Kind::Float },
        places: draw.of(&[1, 1, 1, 2]),
        frozen: draw.percent(8),
    };
    let mut parameters: Vec<Parameter> = (0..count).map(parameter).collect();
    // Something trains.
    parameters[count - 1].frozen = false;
    Model { parameters, has_buffers: draw.percent(30) }
}

impl Maker {
    /// Makes the settings ones that go together.
    fn settle(&mut self) {
        let program = &mut self.program;
        let settings = &mut program.settings;
        if program.mistake != Some(Mistake::ShardedWithTch) && program.optimizer.is_tchs() {
            settings.zero = Zero::Off;
        }
        if settings.zero == Zero::Three {
            // Where ranks share no memory all must run the same operations on parameters; here they do not.
            settings.link = HostLink::Auto;
        }
        // tch's AdamW wants gradients of the parameter's kind, and its clipping adds up in the gradient's.
        let is_plain = program.optimizer.is_tchs() && program.clip.is_some();
        if is_plain || program.optimizer == Optimizer::TchAdamW {
            settings.gradient_kind = None;
        }
        let is_joined = program.mistake.is_none() && self.draw.percent(15);
        if is_joined {
            program.models.truncate(1);
            self.uses_step_numbers = false;
        }
        for model in &program.models {
            let trains: Vec<bool> = model.parameters.iter().map(|p| !p.frozen).collect();
            let mut left_out = vec![false; trains.len()];
            if settings.static_graph {
                left_out = trains.iter().map(|_| self.draw.percent(20)).collect();
                // Something is used.
                left_out[trains.len() - 1] = false;
            }
            self.left_out.push(left_out);
            self.trains.push(trains);
        }
        if is_joined {
            program.join = Some((0..program.world_size).map(|_| 1 + self.draw.below(6)).collect());
        }
    }

    /// One step without a mistake.
    fn step(&mut self, number: usize) -> Vec<Statement> {
        let mut statements = Vec::new();
        if self.uses_step_numbers {
            statements.push(Statement::AtStep(vec![number as u64; self.program.world_size]));
        }
        let toggles = self.program.mistake.is_none() && self.program.join.is_none();
        if toggles && self.draw.percent(15) {
            statements.extend(self.toggle());
        }
        let count = self.program.models.len();
        let rounds: Vec<Vec<usize>> = match count {
            1 => vec![vec![0]],
            _ if self.draw.percent(40) => vec![(0..count).collect()],
            _ => self.draw.order(count).into_iter().map(|model| vec![model]).collect(),
        };
        if self.zeroes_first {
            statements.extend((0..count).map(|model| self.zero(model)));
        }
        let is_first = number == 0;
        let mut stepped = Vec::new();
        for models in rounds {
            let goes_on = self.round(&models, is_first, &mut statements);
            if goes_on {
                stepped.extend(models);
            }
        }
        for model in stepped {
            statements.push(Statement::Step { who: Who::All, model });
        }
        // Plain gradients may add up over steps.
        let is_plain = !self.program.weighted && self.program.optimizer.is_tchs();
        // Clipping changes them.
        let may_keep = is_plain && self.program.clip.is_none();
        let keeps = may_keep && self.draw.percent(10);
        if !self.zeroes_first && !keeps {
            statements.extend((0..count).map(|model| self.zero(model)));
        }
        statements
    }

    /// Freezes or unfreezes a parameter on all ranks.
    fn toggle(&mut self) -> Option<Statement> {
        let model = self.draw.below(self.trains.len());
        let parameter = self.draw.below(self.trains[model].len());
        let others = (0..self.trains[model].len()).filter(|&other| other != parameter);
        let others = others.filter(|&p| self.trains[model][p] && !self.left_out[model][p]);
        // What was frozen when a static graph was counted is to be used from then on.
        if others.count() == 0 || self.left_out[model][parameter] {
            return None;
        }
        let trains = !self.trains[model][parameter];
        self.trains[model][parameter] = trains;
        Some(Statement::SetTrains { who: Who::All, model, parameter, trains })
    }

    fn zero(&mut self, model: usize) -> Statement {
        match self.draw.percent(70) {
            true => Statement::ZeroGrad { model },
            false => Statement::Release { model },
        }
    }

    /// Micro-batches, then what exchanges them; says whether the models can step.
    fn round(&mut self, models: &[usize], is_first: bool, statements: &mut Vec<Statement>) -> bool {
        let is_joined = self.program.join.is_some();
        let count = self.draw.of(&[0, 0, 1, 2]).min(if is_joined { 1 } else { 2 });
        for _ in 0..count {
            let parts = self.parts(models, false, is_first);
            statements.push(Statement::Backward { parts, sync: false, tolerated: false });
        }
        let mut parts = self.parts(models, true, is_first);
        if !is_joined {
            self.balance(&mut parts, &statements[statements.len() - count..]);
        }
        let is_right = self.program.mistake.is_none();
        let is_not_finite = is_right && self.draw.percent(6) && self.spoil(&mut parts);
        let fails = is_not_finite && self.program.settings.non_finite == NonFinite::Error;
        // An error of one model leaves the other's gradients where they are.
        let tolerated = fails && models.len() == 1 && !is_joined;
        if fails && !tolerated {
            heal(&mut parts);
        }
        statements.push(Statement::Backward { parts, sync: true, tolerated });
        let may_add = !self.program.weighted && self.program.settings.zero == Zero::Off;
        if !tolerated && may_add && self.program.join.is_none() && self.draw.percent(12) {
            let parts = self.parts(models, true, false);
            statements.push(Statement::Backward { parts, sync: true, tolerated: false });
        }
        !tolerated
    }

    /// What each rank does in a backward.
    pub(crate) fn parts(&mut self, models: &[usize], sync: bool, is_first: bool) -> Vec<Part> {
        let world_size = self.program.world_size;
        let may_exchange = sync
            && models.len() == 1
            && self.program.join.is_none()
            && !(is_first && self.program.settings.static_graph);
        let is_joined = self.program.join.is_some();
        let common = self.draw.number();
        let mut parts: Vec<Part> = (0..world_size)
            .map(|_| match self.draw.percent(9) {
                true if may_exchange => Part::Exchange,
                // With several models, ranks that agree on what trains may wait for each other crosswise.
                true if !sync && !is_joined && models.len() == 1 => Part::Nothing,
                _ => Part::Loss(self.loss(models, sync, common)),
            })
            .collect();
        if !parts.iter().any(|part| matches!(part, Part::Loss(_))) {
            parts[0] = Part::Loss(self.loss(models, sync, common));
        }
        parts
    }

    /// A loss that reaches `models`; `common` decides the order of terms where ranks have the same.
    pub(crate) fn loss(&mut self, models: &[usize], sync: bool, common: u64) -> Loss {
        self.salt += 1;
        let own = self.draw.number();
        let mut order = Draw::new(if self.draw.percent(75) { common } else { own });
        let mut terms = Vec::new();
        for &model in models {
            let count = self.trains[model].len();
            let order = order.order(count);
            let must = order.iter().copied().find(|&p| self.must_use(model, p));
            for parameter in order {
                if Some(parameter) == must || self.uses(model, parameter, sync) {
                    terms.push((model, parameter));
                }
            }
        }
        let weight = if self.program.join.is_some() { 2 } else { self.draw.of(&[1, 1, 2, 3]) };
        Loss { salt: self.salt, terms, weight, nan: None, mixed: false, late: false }
    }

    /// Whether a parameter may be the one that is used at least.
    fn must_use(&self, model: usize, parameter: usize) -> bool {
        self.trains[model][parameter] && !self.left_out[model][parameter]
    }

    fn uses(&mut self, model: usize, parameter: usize, sync: bool) -> bool {
        if !self.trains[model][parameter] {
            return self.draw.percent(70);
        }
        let settings = &self.program.settings;
        if sync && settings.static_graph {
            return !self.left_out[model][parameter];
        }
        let is_free = !sync || settings.find_unused_parameters;
        !(is_free && self.draw.percent(25))
    }

    /// Changes the weights of an exchange, in which all ranks take part, such that quotients are exact: see `run::coefficients`.
    pub(crate) fn balance(&self, parts: &mut [Part], micro: &[Statement]) {
        /// Products of these with their rounded inverses round to 1, and 60 is a multiple of them but for powers of two.
        const EXACT: [u32; 12] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24];
        let weight = |part: &Part| match part {
            Part::Loss(loss) => loss.weight,
            _ => 0,
        };
        let of_micro = micro.iter().flat_map(|statement| match statement {
            Statement::Backward { parts, .. } => parts.as_slice(),
            _ => &[],
        });
        let sum: u32 = of_micro.chain(parts.iter()).map(weight).sum();
        let wanted = EXACT.into_iter().find(|&exact| exact >= sum).unwrap_or(24);
        let first = parts.iter_mut().find_map(|part| match part {
            Part::Loss(loss) => Some(loss),
            _ => None,
        });
        if let Some(loss) = first {
            loss.weight += wanted - sum;
        }
    }

    /// Makes a gradient of one loss not finite, if a parameter that trains is in one.
    pub(crate) fn spoil(&mut self, parts: &mut [Part]) -> bool {
        let at = self.draw.below(parts.len());
        let Part::Loss(loss) = &mut parts[at] else { return false };
        let trains = |&&(model, parameter): &&(usize, usize)| self.trains[model][parameter];
        loss.nan = loss.terms.iter().find(trains).copied();
        loss.nan.is_some()
    }
}

fn heal(parts: &mut [Part]) {
    for part in parts {
        if let Part::Loss(loss) = part {
            loss.nan = None;
        }
    }
}
