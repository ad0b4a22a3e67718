//! Averages of weights: their formula, every stage, what comes back from a checkpoint.

use std::path::Path;

use phalanx_comm::testing::run_ranks;
use phalanx_comm::Group;
use phalanx_ddp_core::checkpoint::{load_safetensors, Checkpointer, CheckpointerOptions, OnError};
use phalanx_ddp_core::{
    AdamW, Ddp, DdpOptions, Ema, Error, Optimizer, ParameterGroups, Sgd, Sync, Zero,
};
use tch::{Device, Kind, Tensor};

use super::stages::{STAGES, WORLD_SIZES};
use super::support::{options, values, wrapped, Model};

/// One after the other: bits of parameters.
type Bits = Vec<u32>;

/// A training whose bits depend on neither the stage nor the number of ranks: gradients are whole numbers, and there are
/// two halves of a step. `steps` are those that are made now.
struct Trained {
    /// The parameters after each step.
    parameters: Vec<Bits>,
    averages: Bits,
    update_count: u64,
}

fn train(group: &mut Group, zero: Zero, folder: Option<&Path>, to: i64) -> Trained {
    let (model, ddp) = wrapped(group, options(zero));
    let rule = AdamW { lr: 0.01, ..AdamW::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
    let mut ema = Ema::with_warm_up(&ddp, 0.75).unwrap();
    let quiet =
        CheckpointerOptions { heed_signals: false, on_error: OnError::Fail, ..Default::default() };
    let mut checkpointer =
        folder.map(|folder| Checkpointer::new(folder, &ddp, quiet).unwrap().with_ema(&ema));
    let resumed = checkpointer.as_mut().and_then(|c| c.resume(Some(&mut optimizer)).unwrap());
    let done = resumed.map_or(0, |resumed| resumed.step as i64);
    let mut parameters = Vec::new();
    let micro = 12 / group.world_size() as i64;
    for step in done..to {
        let start = step * 12 + group.rank() as i64 * micro;
        ddp.backward(&model.whole_loss_sum(start..start + micro), micro as f64, Sync::Reduce)
            .unwrap();
        let _step = optimizer.step(None).unwrap();
        ema.update().unwrap();
        parameters.push(model.bits());
    }
    if let Some(checkpointer) = &mut checkpointer {
        checkpointer.save(to as u64, Some(&mut optimizer), || ()).unwrap();
        checkpointer.finish().unwrap();
    }
    let averages = ema.with_averaged(|| model.bits()).unwrap();
    assert!(Some(&model.bits()) == parameters.last(), "parameters come back, bit for bit");
    ddp.compare_parameters().unwrap();
    Trained { parameters, averages, update_count: ema.update_count().unwrap() }
}

/// The formula, with the operations of f32 that the averages have.
fn oracle(parameters: &[Bits]) -> Bits {
    let values = |bits: &[u32]| bits.iter().map(|bits| f32::from_bits(*bits)).collect::<Vec<_>>();
    let mut averages = values(&parameters[0]);
    for (n, parameters) in (2..).zip(&parameters[1..]) {
        let decay = 0.75_f64.min((1.0 + f64::from(n)) / (10.0 + f64::from(n)));
        let (keep, take) = (decay as f32, (1.0 - decay) as f32);
        for (average, parameter) in averages.iter_mut().zip(values(parameters)) {
            *average *= keep;
            *average += parameter * take;
        }
    }
    averages.into_iter().map(f32::to_bits).collect()
}

#[test]
fn averages_are_their_formula_in_every_stage_and_number_of_ranks() {
    for world_size in WORLD_SIZES {
        for zero in STAGES {
            for of_rank in run_ranks(world_size, move |mut group| train(&mut group, zero, None, 5))
            {
                let expected = oracle(&of_rank.parameters);
                assert!(of_rank.averages == expected, "{zero:?} on {world_size} ranks");
                assert!(Some(&of_rank.averages) != of_rank.parameters.last());
            }
        }
    }
}

#[test]
fn averages_come_back_in_any_stage_on_any_number_of_ranks() {
    let whole = run_ranks(1, |mut group| train(&mut group, Zero::Off, None, 6)).remove(0);
    let legs = [(3, Zero::One), (2, Zero::Off), (4, Zero::One), (1, Zero::One)];
    for first in 0..legs.len() {
        let folder = tempfile::tempdir().unwrap();
        for (leg, to) in [(first, 2), ((first + 1) % legs.len(), 4), ((first + 2) % legs.len(), 6)]
        {
            let ((world_size, zero), path) = (legs[leg], folder.path().to_owned());
            let all =
                run_ranks(world_size, move |mut group| train(&mut group, zero, Some(&path), to));
            for of_rank in all {
                assert_eq!(of_rank.update_count, to as u64);
                if to == 6 {
                    assert!(of_rank.parameters.last() == whole.parameters.last(), "{first}");
                    assert!(of_rank.averages == whole.averages, "{first}");
                }
            }
        }
    }
}

#[test]
fn where_a_checkpoint_has_no_averages_they_begin_as_its_weights_are() {
    for zero in STAGES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        run_ranks(2, move |mut group| {
            let quiet = || CheckpointerOptions { heed_signals: false, ..Default::default() };
            let bits = {
                let (model, ddp) = wrapped(&mut group, options(zero));
                let rule = Sgd { lr: 0.1, ..Sgd::default() };
                let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
                ddp.backward(&model.loss_sum(0..4), 4.0, Sync::Reduce).unwrap();
                let _step = optimizer.step(None).unwrap();
                let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap();
                checkpointer.save(1, Some(&mut optimizer), || ()).unwrap();
                checkpointer.finish().unwrap();
                model.bits()
            };
            let (model, ddp) = wrapped(&mut group, options(zero));
            let mut ema = Ema::new(&ddp, 0.5).unwrap();
            let mut optimizer =
                Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
            let mut checkpointer = Checkpointer::new(&path, &ddp, quiet()).unwrap().with_ema(&ema);
            checkpointer.resume(Some(&mut optimizer)).unwrap();
            assert_eq!(ema.update_count().unwrap(), 0);
            assert!(ema.with_averaged(|| model.bits()).unwrap() == bits);
        });
    }
}

/// Each update adds a thousandth of the difference, which is less than half a last bit of bf16.
#[test]
fn averages_of_half_precision_keep_small_steps() {
    for zero in STAGES {
        let all = run_ranks(2, move |mut group| {
            let weight =
                Tensor::ones([3000], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
            let parameters = vec![("w".to_owned(), weight.shallow_clone())];
            let ddp = Ddp::from_tensors(parameters, vec![], &mut group, options(zero)).unwrap();
            let mut ema = Ema::new(&ddp, 0.999).unwrap();
            let rule = Sgd { lr: 1.0, ..Sgd::default() };
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            ema.update().unwrap();
            (-&weight).sum(Kind::Float).backward();
            let _step = optimizer.step(None).unwrap();
            for _ in 0..1000 {
                ema.update().unwrap();
            }
            let averages = || values(&weight.to_kind(Kind::Float));
            let averaged = ema.with_averaged(averages).unwrap();
            // Masters are what they were.
            (-&weight).sum(Kind::Float).backward();
            let _step = optimizer.step(None).unwrap();
            (averaged[0], averaged[2999], averages()[7])
        });
        // 2 − 0.999^1000 = 1.6323, whose nearest number of bf16 is 1.6328125.
        assert_eq!(all, [(1.632_812_5, 1.632_812_5, 3.0); 2], "{zero:?}");
    }
}

#[test]
fn the_averaged_model_is_written_whole() {
    for zero in STAGES {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("averages.safetensors");
        run_ranks(3, move |mut group| {
            let (model, ddp) = wrapped(&mut group, options(zero));
            let mut optimizer =
                Optimizer::new(&ddp, Sgd::default(), ParameterGroups::default()).unwrap();
            let mut ema = Ema::new(&ddp, 0.5).unwrap();
            for _ in 0..2 {
                ddp.backward(&model.loss_sum(0..4), 4.0, Sync::Reduce).unwrap();
                let _step = optimizer.step(None).unwrap();
                ema.update().unwrap();
            }
            ema.save_safetensors(&file).unwrap();
            let averages = ema.with_averaged(|| model.bits()).unwrap();
            let other = Model::new(5);
            let unknown = load_safetensors(&file, &other.vs).unwrap();
            assert!(unknown.is_empty() && other.bits() == averages);
        });
    }
}

#[test]
fn settings_that_differ_or_cannot_be_are_errors() {
    let errors = run_ranks(2, |mut group| {
        let (_model, ddp) = wrapped(&mut group, options(Zero::One));
        let own = if group.rank() == 0 { 0.5 } else { 0.25 };
        let differs = Ema::new(&ddp, own).unwrap_err();
        assert!(matches!(differs, Error::RanksDiffer { .. }), "{differs}");
        Ema::new(&ddp, 1.0).unwrap_err().to_string()
    });
    assert_eq!(errors, ["decay is 1, expected a number in [0, 1)"; 2]);
}

#[test]
fn parameters_that_begin_to_train_later_begin_to_be_averaged_then() {
    for zero in STAGES {
        let all = run_ranks(2, move |mut group| {
            let make = || Tensor::zeros([300], (Kind::Float, Device::Cpu));
            let (early, late) = (make().set_requires_grad(true), make());
            let named = [("early", &early), ("late", &late)];
            let parameters = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
            let options = DdpOptions { bucket_bytes: vec![1], ..options(zero) };
            let ddp = Ddp::from_tensors(parameters.into(), vec![], &mut group, options).unwrap();
            let rule = Sgd { lr: 1.0, ..Sgd::default() };
            let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default()).unwrap();
            let mut ema = Ema::new(&ddp, 0.5).unwrap();
            for step in 0..2 {
                if step == 1 {
                    let _same = late.set_requires_grad(true);
                }
                (-(&early + &late)).sum(Kind::Float).backward();
                let _step = optimizer.step(None).unwrap();
                ema.update().unwrap();
            }
            ema.with_averaged(|| [values(&early)[299], values(&late)[299]]).unwrap()
        });
        // 1, then (1 + 2) / 2; the other begins as it is when it is first seen, after its step.
        assert_eq!(all, [[1.5, 1.0]; 2], "{zero:?}");
    }
}
