//! A step of one optimizer, or of several whose models one loss trains: all are made or none, and gradients are clipped to one norm.
//!
//! The order is the same on every rank: what came of each model's exchange; the norm, whose sums are exact until they are all
//! together; the updates.

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use super::numbers::Changes;
use super::piece::{Owned, Piece};
use super::{pieces, Clip, Optimizer, Step};
use crate::reduce::{self, Outcome, Reducer, Shared};
use crate::store::norm::{self, Own, Power};
use crate::store::Store;
use crate::{Error, Result};

/// Reducers behind their locks.
pub(super) type Locked<'a> = [MutexGuard<'a, Reducer>];

/// A step of gradients of a loss that was multiplied by `loss_scale`.
pub(super) fn step(all: &mut [&mut Optimizer], clip: Clip, loss_scale: f64) -> Result<Step> {
    clip.check()?;
    let shared: Vec<Shared> = all.iter().map(|one| Shared::clone(&one.shared)).collect();
    check_each_once(&shared)?;
    let mut reducers = shared.iter().map(reduce::lock).collect::<Result<Vec<_>>>()?;
    let made_with = [clip.bytes(), loss_scale.to_le_bytes().to_vec()].concat();
    let Some(gradients) = outcomes(all, &mut reducers, &made_with)? else {
        return Ok(Step { gradient_norm: Some(f64::NAN), skipped: true });
    };
    for (one, reducer) in all.iter_mut().zip(&mut reducers) {
        reducer.store.heed_written()?;
        one.fit(&mut reducer.store)?;
    }
    let is_scaled = (loss_scale - 1.0).abs() > 0.0;
    let norm = match clip.power().or(is_scaled.then_some(Power::Two)) {
        Some(power) => Some(norm_of(all, &mut reducers, (&gradients, power))? / loss_scale),
        None => None,
    };
    if norm.is_some_and(|norm| !norm.is_finite()) && clip.skips(&mut reducers, (is_scaled, norm))? {
        release(&mut reducers)?;
        return Ok(Step { gradient_norm: norm, skipped: true });
    }
    let changes = Changes {
        divisor: clip.divisor(norm) * loss_scale,
        value_max: clip.value_max().map(|max| max * loss_scale),
    };
    for ((one, reducer), has_gradient) in all.iter_mut().zip(&mut reducers).zip(&gradients) {
        one.update(reducer, has_gradient, changes)?;
        let stepped = &mut reducer.store.optimizer;
        stepped.steps += 1;
        stepped.lr = one.lr;
        stepped.settings = crc32c::crc32c_append(stepped.settings, &made_with);
        one.step_count += 1;
        reducer.store.forget_unrounded();
        reducer.release_gradients()?;
    }
    Ok(Step { gradient_norm: norm, skipped: false })
}

/// An error for none, or for two optimizers of one model.
fn check_each_once(shared: &[Shared]) -> Result<()> {
    let is_known =
        |(at, one): (usize, &Shared)| shared[..at].iter().any(|other| Arc::ptr_eq(other, one));
    if !shared.is_empty() && !shared.iter().enumerate().any(is_known) {
        return Ok(());
    }
    let (setting, value) = ("optimizers of a step", shared.len().to_string());
    Err(Error::BadSetting { setting, value, expected: "at least one, and one for each Ddp" })
}

/// By model: which parameters have gradients; none where the step is left out.
fn outcomes(
    all: &[&mut Optimizer],
    reducers: &mut Locked<'_>,
    made_with: &[u8],
) -> Result<Option<Vec<Vec<bool>>>> {
    let (mut reduced, mut is_skipped, mut trouble) = (Vec::new(), false, None);
    // All of them, also after an error: ranks stay in step.
    for (one, reducer) in all.iter().zip(reducers.iter_mut()) {
        match reducer.take_outcome(one.lr, made_with) {
            Ok(Outcome::Reduced(has_gradient)) => reduced.push(has_gradient),
            Ok(Outcome::Skipped) => is_skipped = true,
            Ok(Outcome::Refused(refusal)) => trouble = trouble.or(Some(refusal.into())),
            Ok(Outcome::Nothing) => trouble = trouble.or(Some(Error::NoGradients)),
            Err(error) => trouble = trouble.or(Some(error)),
        }
    }
    if let Some(error) = trouble {
        if reducers.len() > 1 {
            release(reducers)?;
        }
        return Err(error);
    }
    if is_skipped {
        if reducers.len() > 1 {
            release(reducers)?;
        }
        return Ok(None);
    }
    let checked = reduced.into_iter().zip(reducers).map(|(has, reducer)| {
        let has_gradient = reducer.steppable(has)?;
        reducer.store.meet()?;
        Ok(has_gradient)
    });
    checked.collect::<Result<_>>().map(Some)
}

fn release(reducers: &mut Locked<'_>) -> Result<()> {
    reducers.iter_mut().try_for_each(|reducer| reducer.release_gradients())
}

/// The norm of all gradients of all models.
fn norm_of(
    all: &[&mut Optimizer],
    reducers: &mut Locked<'_>,
    (gradients, power): (&[Vec<bool>], Power),
) -> Result<f64> {
    let mut sum: Option<Own> = None;
    for ((one, reducer), has_gradient) in all.iter().zip(reducers).zip(gradients) {
        let start = Instant::now();
        let store = &mut reducer.store;
        let counted = one.owned(store, &store.counted(has_gradient));
        let own = norm::of(&gradient_parts(store, &counted), 1, power)?;
        let computed = start.elapsed();
        let of_model = store.summed_over_model(own)?;
        reducer.waited(start.elapsed().saturating_sub(computed));
        sum = Some(match sum {
            Some(sum) => sum.with(of_model),
            None => of_model,
        });
    }
    Ok(power.norm(sum.map_or(0.0, |sum| sum.values()[0])))
}

/// The gradients of this rank's pieces, all for one sum.
fn gradient_parts<'a>(store: &'a Store, owned: &[Owned]) -> Vec<norm::NormPart<'a>> {
    let of = |(storage, piece): (usize, &Piece)| {
        let (memory, range) =
            store.storages[storage].gradients.at(&piece.run.range, &piece.run.segment);
        norm::NormPart { memory, range, sum: 0 }
    };
    pieces(owned).map(of).collect()
}
