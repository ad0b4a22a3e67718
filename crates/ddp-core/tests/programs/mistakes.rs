//! One mistake for a program: what it needs, and where it goes.

use phalanx_ddp_core::{NonFinite, Zero};

use crate::generate::Maker;
use crate::program::{Conversion, Mistake, Optimizer, Part, Statement, Who};

/// Changes what the program is made of such that the mistake can be made.
pub(crate) fn prepare(maker: &mut Maker, mistake: Mistake) {
    let needs_peers = matches!(
        mistake,
        Mistake::SkippedBackward
            | Mistake::ExtraBackward
            | Mistake::FrozenOnOneRank
            | Mistake::UnfrozenOnOneRank
            | Mistake::Poked
            | Mistake::WrongStepNumber
            | Mistake::ModelsDiffer
    );
    let draw = &mut maker.draw;
    let program = &mut maker.program;
    if needs_peers && program.world_size == 1 {
        program.world_size = 2;
    }
    let may_wait =
        needs_peers || mistake == Mistake::StaticGraphBroken || mistake == Mistake::MixedWeights;
    if may_wait && mistake != Mistake::Poked {
        // With two, ranks may wait for each other in groups that know nothing of each other: that takes a timeout.
        program.models.truncate(1);
    }
    let settings = &mut program.settings;
    let is_late = |percent| percent < 50;
    match mistake {
        Mistake::SkippedBackward | Mistake::ExtraBackward | Mistake::Poked => {
            program.ends_with_compare = true;
        }
        Mistake::FrozenOnOneRank | Mistake::UnfrozenOnOneRank | Mistake::FrozenWithGradients => {
            let first = &mut program.models[0];
            if first.parameters.len() == 1 {
                first.parameters.push(first.parameters[0]);
            }
            first.parameters[0].frozen = mistake == Mistake::UnfrozenOnOneRank;
            settings.static_graph = false;
        }
        Mistake::StepOnLocalGradients => {
            program.optimizer =
                draw.of(&[Optimizer::TchSgd, Optimizer::TchMomentum, Optimizer::TchAdamW]);
        }
        Mistake::Unused => {
            settings.find_unused_parameters = false;
            settings.static_graph = false;
        }
        Mistake::StaticGraphBroken => {
            settings.find_unused_parameters = false;
            settings.static_graph = true;
            let parameters = &mut program.models[0].parameters;
            if parameters.len() == 1 {
                parameters.push(parameters[0]);
            }
            parameters[0].frozen = false;
        }
        Mistake::ExchangedTwice if is_late(draw.below(100)) => program.weighted = true,
        Mistake::ExchangedTwice => {
            settings.zero = Zero::One;
            program.optimizer = draw.of(&[Optimizer::Sgd, Optimizer::AdamW, Optimizer::Lamb]);
        }
        Mistake::ShardedWithTch => {
            settings.zero = Zero::One;
            program.optimizer = Optimizer::TchSgd;
        }
        Mistake::NotFinite => settings.non_finite = NonFinite::Error,
        Mistake::WrongStepNumber => maker.uses_step_numbers = true,
        Mistake::StepWithoutGradients => {
            program.optimizer = draw.of(&[Optimizer::Sgd, Optimizer::AdamW, Optimizer::Lamb]);
        }
        Mistake::LateVariable
        | Mistake::Converted
        | Mistake::MixedWeights
        | Mistake::ModelsDiffer => {}
    }
}

/// Puts the mistake into a step.
pub(crate) fn insert(
    maker: &mut Maker,
    mistake: Mistake,
    step: usize,
    statements: &mut Vec<Statement>,
) {
    let rank = maker.draw.below(maker.program.world_size);
    let who = if maker.draw.percent(50) { Who::All } else { Who::Only(rank) };
    let sync = exchanging(statements);
    // After the step's number and what makes gradients zero.
    let start = statements.iter().position(|s| matches!(s, Statement::Backward { .. }));
    let start = start.unwrap_or(0);
    match mistake {
        Mistake::SkippedBackward => parts(statements, sync)[rank] = Part::Nothing,
        Mistake::ExtraBackward => extra(maker, rank, sync, statements),
        Mistake::FrozenOnOneRank | Mistake::UnfrozenOnOneRank => {
            let trains = mistake == Mistake::UnfrozenOnOneRank;
            let who = Who::Only(rank);
            statements.insert(start, Statement::SetTrains { who, model: 0, parameter: 0, trains });
        }
        Mistake::FrozenWithGradients => freeze_with_gradients(maker, start, statements),
        Mistake::LateVariable => {
            let used = maker.draw.percent(50);
            for statement in statements.iter_mut() {
                let Statement::Backward { parts, .. } = statement else { continue };
                use_late(parts, |rank| used && who.has(rank));
            }
            statements.insert(start, Statement::Late { who });
        }
        Mistake::Converted => {
            let parameter = maker.draw.below(maker.program.models[0].parameters.len());
            let how = maker.draw.of(&[
                Conversion::Half,
                Conversion::Double,
                Conversion::ThereAndBack,
                Conversion::SetData(parameter),
            ]);
            statements.insert(start, Statement::Convert { who, how });
        }
        Mistake::StepOnLocalGradients => step_on_local(maker, who, start, statements),
        Mistake::Unused => leave_out(maker, who, statements),
        Mistake::StaticGraphBroken => break_static_graph(maker, who, step, statements),
        Mistake::MixedWeights => mix(maker, who, start, statements),
        Mistake::ExchangedTwice => {
            let again = statements[sync].clone();
            statements.insert(sync + 1, again);
        }
        Mistake::NotFinite => {
            let spoilt = (0..40).any(|_| maker.spoil(parts(statements, sync)));
            assert!(spoilt, "some loss uses a parameter that trains");
        }
        Mistake::Poked => {
            let count = maker.program.models[0].parameters.len();
            let trained: Vec<usize> = (0..count).filter(|&p| maker.trains[0][p]).collect();
            let parameter = maker.draw.of(&trained);
            statements.insert(start, Statement::Poke { rank, parameter });
        }
        Mistake::WrongStepNumber => {
            if let Some(Statement::AtStep(numbers)) = statements.first_mut() {
                numbers[rank] = 9;
            }
        }
        Mistake::StepWithoutGradients => {
            statements.push(Statement::Step { who, model: 0 });
        }
        Mistake::ShardedWithTch | Mistake::ModelsDiffer => {}
    }
}

/// The first statement that exchanges model 0.
fn exchanging(statements: &[Statement]) -> usize {
    let is_it = |statement: &Statement| match statement {
        Statement::Backward { parts, sync: true, .. } => parts.iter().any(|part| match part {
            Part::Loss(loss) => loss.reaches(0),
            _ => false,
        }),
        _ => false,
    };
    statements.iter().position(is_it).expect("every step exchanges")
}

fn parts(statements: &mut [Statement], at: usize) -> &mut Vec<Part> {
    match &mut statements[at] {
        Statement::Backward { parts, .. } => parts,
        other => panic!("{other:?} is no backward"),
    }
}

fn use_late(parts: &mut [Part], uses: impl Fn(usize) -> bool) {
    for (rank, part) in parts.iter_mut().enumerate() {
        if let Part::Loss(loss) = part {
            loss.late = uses(rank);
        }
    }
}

/// A backward of model 0 in which every rank takes part.
fn backward(maker: &mut Maker, sync: bool) -> Statement {
    let ranks = 0..maker.program.world_size;
    let parts = ranks.map(|_| Part::Loss(maker.loss(&[0], sync, 0))).collect();
    Statement::Backward { parts, sync, tolerated: false }
}

fn extra(maker: &mut Maker, rank: usize, sync: usize, statements: &mut Vec<Statement>) {
    let mut extra = backward(maker, true);
    if let Statement::Backward { parts, .. } = &mut extra {
        for (other, part) in parts.iter_mut().enumerate() {
            if other != rank {
                *part = Part::Nothing;
            }
        }
    }
    let at = if maker.draw.percent(50) { sync + 1 } else { statements.len() };
    statements.insert(at, extra);
}

/// Model 0's first parameter is frozen while it holds gradients that were not exchanged.
fn freeze_with_gradients(maker: &mut Maker, start: usize, statements: &mut Vec<Statement>) {
    let mut micro = backward(maker, false);
    if let Statement::Backward { parts, .. } = &mut micro {
        for part in parts {
            if let Part::Loss(loss) = part {
                loss.terms.retain(|&term| term != (0, 0));
                loss.terms.push((0, 0));
            }
        }
    }
    statements.insert(start, micro);
    let frozen = Statement::SetTrains { who: Who::All, model: 0, parameter: 0, trains: false };
    statements.insert(start + 1, frozen);
    maker.trains[0][0] = false;
    let last = maker.trains[0].len() - 1;
    statements.iter_mut().for_each(|statement| also_use(statement, last));
}

fn step_on_local(maker: &mut Maker, who: Who, start: usize, statements: &mut Vec<Statement>) {
    let micro = backward(maker, false);
    let mut inserted = vec![micro, Statement::Step { who, model: 0 }];
    if maker.draw.percent(50) {
        inserted.push(Statement::ZeroGrad { model: 0 });
    }
    statements.splice(start..start, inserted);
}

/// A parameter that trains is in no loss of the step, on some ranks.
fn leave_out(maker: &mut Maker, who: Who, statements: &mut Vec<Statement>) {
    statements.retain(|s| !matches!(s, Statement::Backward { sync: false, .. }));
    let count = maker.trains[0].len();
    let parameter = maker.draw.of(&(0..count).filter(|&p| maker.trains[0][p]).collect::<Vec<_>>());
    // Else the graph might hold nothing that trains.
    let is_alone = maker.trains[0].iter().filter(|&&trains| trains).count() == 1;
    if is_alone {
        maker.trains[0].push(true);
        maker.left_out[0].push(false);
        let added =
            crate::program::Parameter { frozen: false, ..maker.program.models[0].parameters[0] };
        maker.program.models[0].parameters.push(added);
        for step in &mut maker.program.steps {
            step.iter_mut().for_each(|statement| also_use(statement, count));
        }
        statements.iter_mut().for_each(|statement| also_use(statement, count));
    }
    let sync = exchanging(statements);
    for (rank, part) in parts(statements, sync).iter_mut().enumerate() {
        if matches!(part, Part::Exchange) {
            *part = Part::Loss(maker.loss(&[0], true, 0));
        }
        if let Part::Loss(loss) = part {
            if who.has(rank) {
                loss.terms.retain(|&term| term != (0, parameter));
            }
        }
    }
}

fn also_use(statement: &mut Statement, parameter: usize) {
    let Statement::Backward { parts, .. } = statement else { return };
    for part in parts {
        if let Part::Loss(loss) = part {
            if loss.reaches(0) && !loss.terms.contains(&(0, parameter)) {
                loss.terms.push((0, parameter));
            }
        }
    }
}

/// Uses a parameter less than the first exchanged backward did, or more.
fn break_static_graph(maker: &mut Maker, who: Who, step: usize, statements: &mut Vec<Statement>) {
    let is_more = maker.draw.percent(40);
    // In the first backward nothing can be broken: another parameter is counted there.
    let first = 0;
    if step == 0 {
        let mut counting = statements.clone();
        counting.retain(|s| !matches!(s, Statement::SetTrains { .. }));
        maker.program.steps.push(counting);
    }
    for statement in maker.program.steps.iter_mut().flatten().chain(statements.iter_mut()) {
        let Statement::Backward { parts, .. } = statement else { continue };
        for part in parts {
            if let Part::Loss(loss) = part {
                if loss.reaches(0) {
                    loss.terms.retain(|&term| term != (0, first));
                    let used = if is_more { maker.trains[0].len() - 1 } else { first };
                    if !loss.terms.contains(&(0, used)) {
                        loss.terms.push((0, used));
                    }
                }
            }
        }
    }
    maker.left_out[0][first] = is_more;
    statements.retain(|s| !matches!(s, Statement::Backward { sync: false, .. }));
    let sync = exchanging(statements);
    for (rank, part) in parts(statements, sync).iter_mut().enumerate() {
        if matches!(part, Part::Exchange) {
            *part = Part::Loss(maker.loss(&[0], true, 0));
        }
        let Part::Loss(loss) = part else { continue };
        loss.terms.retain(|&term| term != (0, first));
        if who.has(rank) == is_more {
            loss.terms.push((0, first));
        }
    }
}

/// Weighed and plain losses in one step.
fn mix(maker: &mut Maker, who: Who, start: usize, statements: &mut Vec<Statement>) {
    let mut micro = backward(maker, false);
    let Statement::Backward { parts, .. } = &mut micro else { return };
    for (rank, part) in parts.iter_mut().enumerate() {
        if let Part::Loss(loss) = part {
            loss.mixed = who.has(rank);
        }
    }
    statements.insert(start, micro);
}
