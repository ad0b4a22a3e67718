//! Every optimizer in every stage of sharding: the bits of unsharded training. One table each of stages, of rules and of
//! ways to clip; another one of each is a line.

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::optim::{AdjustLr, Rule};
use phalanx_ddp_core::{
    Adafactor, Adam, AdamW, Clip, DdpOptions, Lamb, Lars, Lion, Muon, Optimizer, ParameterGroup,
    ParameterGroups, Sgd, Sync, Zero,
};

use tch::Kind;

use super::support::{options, wrapped};

pub(crate) const WORLD_SIZES: [usize; 4] = [1, 2, 3, 4];

/// The first is what the others are compared with.
pub(crate) const STAGES: [Zero; 4] = [Zero::Off, Zero::One, Zero::Two, Zero::Three];

/// Makes a rule.
pub(crate) type Make = fn() -> Box<dyn Rule>;

/// Every rule, with everything on that it has.
pub(crate) const RULES: [Make; 10] = [
    || Box::new(AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() }),
    || Box::new(Adam { lr: 0.01, weight_decay: 0.1, ..Adam::default() }),
    || Box::new(Sgd { lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.1, dampening: 0.0 }),
    || Box::new(Lamb { lr: 0.02, weight_decay: 0.1, ..Lamb::default() }),
    || Box::new(Lars { lr: 0.5, weight_decay: 0.1, nesterov: true, ..LARS }),
    || Box::new(Lion { lr: 0.004, weight_decay: 0.1, ..Lion::default() }),
    || Box::new(muon()),
    || Box::new(Muon { adjust_lr: AdjustLr::MatchRmsAdamW, nesterov: false, ..muon() }),
    || Box::new(Muon { in_bf16: true, ..muon() }),
    || Box::new(Adafactor { lr: 0.02, weight_decay: 0.1, ..Adafactor::default() }),
];

const LARS: Lars = Lars {
    lr: 1.0,
    momentum: 0.9,
    nesterov: false,
    trust_coefficient: 0.02,
    eps: 1e-8,
    weight_decay: 0.0,
};

/// The model's last matrix is its head.
pub(crate) fn muon() -> Muon {
    let adamw = AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() };
    Muon { lr: 0.02, others: vec!["three.*".into()], adamw, ..Muon::default() }
}

/// Ways to clip; each does something in every step of the training below.
const CLIPS: [fn() -> Clip; 6] = [
    || Clip::norm(0.5),
    || Clip::p_norm(4.0, 1.0),
    || Clip::p_norm(0.2, 2.5),
    || Clip::p_norm(0.05, f64::INFINITY),
    || Clip::value(0.01),
    Clip::none,
];

pub(crate) fn groups() -> ParameterGroups {
    let plain = ParameterGroup::matching(["*bias", "norm*"]);
    ParameterGroups::default()
        .with(plain.weight_decay(0.0).without_trust_ratio())
        .with(ParameterGroup::matching(["two.*"]).lr(0.004))
}

/// Trains 3 steps on batches of 12 samples, cut over the ranks and into micro-batches.
fn train(group: Group, zero: Zero, by: (Make, Clip), accumulate: i64) -> Trained {
    train_with(group, options(zero), by, accumulate)
}

/// The bits of all parameters, and the norms of the steps.
type Trained = (Vec<u32>, Vec<Option<u64>>);

fn train_with(
    mut group: Group,
    options: DdpOptions,
    (rule, clip): (Make, Clip),
    accumulate: i64,
) -> Trained {
    let (model, ddp) = wrapped(&mut group, options);
    let mut optimizer = Optimizer::new(&ddp, rule(), groups()).unwrap();
    let (rank, world_size) = (group.rank() as i64, group.world_size() as i64);
    let micro = 12 / (world_size * accumulate);
    let mut norms = Vec::new();
    for step in 0..3 {
        for part in 0..accumulate {
            let start = step * 12 + (rank * accumulate + part) * micro;
            let sync = if part + 1 == accumulate { Sync::Reduce } else { Sync::Accumulate };
            let loss = model.loss_sum(start..start + micro);
            ddp.backward(&loss, micro as f64, sync).unwrap();
        }
        assert!(ddp.statistics().unwrap().bucket_count >= 3);
        norms.push(optimizer.step(clip).unwrap().gradient_norm.map(f64::to_bits));
    }
    (model.bits(), norms)
}

#[test]
fn every_stage_has_the_bits_of_unsharded_training() {
    for (number, rule) in RULES.into_iter().enumerate() {
        for world_size in WORLD_SIZES {
            // Every rule meets several ways to clip, every way several numbers of ranks.
            let clip = CLIPS[(number + world_size) % CLIPS.len()]();
            let accumulate = if world_size == 4 { 3 } else { 2 };
            let run = |zero| {
                run_ranks(world_size, move |group| train(group, zero, (rule, clip), accumulate))
            };
            let unsharded = run(STAGES[0]);
            for stage in &STAGES[1..] {
                assert!(
                    run(*stage) == unsharded,
                    "{:?} {clip:?} {stage:?} on {world_size} ranks",
                    rule()
                );
            }
        }
    }
}

#[test]
fn offloaded_state_gives_the_same_bits() {
    for (number, rule) in RULES.into_iter().enumerate() {
        let clip = CLIPS[number % CLIPS.len()]();
        let zero = STAGES[number % STAGES.len()];
        for parameter_kind in [None, Some(Kind::BFloat16)] {
            let run = |offload_optimizer| {
                run_ranks(2 + number % 2, move |group| {
                    let options = DdpOptions { offload_optimizer, ..options(zero) };
                    let options = DdpOptions { parameter_kind, ..options };
                    train_with(group, options, (rule, clip), 2)
                })
            };
            assert!(run(true) == run(false), "{:?} {clip:?} {zero:?} {parameter_kind:?}", rule());
        }
    }
}

#[test]
fn every_way_to_clip_has_the_same_bits_in_every_stage_and_does_something() {
    let rule = RULES[2];
    let mut all = Vec::new();
    for clip in CLIPS {
        for world_size in [2, 3] {
            let run =
                |zero| run_ranks(world_size, move |group| train(group, zero, (rule, clip()), 1));
            let unsharded = run(STAGES[0]);
            for stage in &STAGES[1..] {
                assert!(run(*stage) == unsharded, "{:?} {stage:?} on {world_size} ranks", clip());
            }
            all.push(unsharded[0].0.clone());
        }
    }
    for (at, bits) in all.iter().enumerate() {
        assert!(!all[..at].contains(bits) || at % 2 == 1, "two ways to clip are one");
    }
}

/// That of one stage is that of all.
#[test]
fn ranks_and_micro_batches_give_the_same_bits() {
    let zero = STAGES[STAGES.len() - 1];
    for (number, rule) in RULES.into_iter().enumerate() {
        let clip = CLIPS[number % CLIPS.len()]();
        for parts in [2, 3, 4] {
            let ranks = run_ranks(parts, move |group| train(group, zero, (rule, clip), 1));
            let alone =
                run_ranks(1, move |group| train(group, STAGES[0], (rule, clip), parts as i64));
            for (rank, outcome) in ranks.iter().enumerate() {
                let rule = rule();
                assert!(*outcome == alone[0], "{rule:?} {clip:?}: rank {rank} of {parts} differs");
            }
        }
    }
}
