//! The LAMB step. Plain tensor operations, each a single IEEE operation per element, so that the bits do not
//! depend on how libtorch cuts the work.

use tch::Tensor;

use super::Optimizer;
use crate::flat::Flat;
use crate::reducer::Reducer;
use crate::Result;

/// The steps of the elements that this rank owns, before their scaling; one for each storage.
#[derive(Debug)]
pub(super) struct Scratch {
    steps: Vec<Flat>,
}

impl Scratch {
    pub(super) fn new(steps: Vec<Flat>) -> Self {
        Self { steps }
    }
}

impl Optimizer {
    pub(super) fn lamb_step(&mut self, reducer: &mut Reducer, divisor: f64) -> Result<()> {
        for bucket in 0..self.owned.len() {
            self.moments_and_steps(reducer, bucket, divisor)?;
        }
        let ratios = self.trust_ratios(reducer)?;
        let mut works = Vec::new();
        for bucket in 0..self.owned.len() {
            let owned = &self.owned[bucket];
            for piece in &owned.pieces {
                let step = self.step_of(owned.storage, &piece.run.state)?;
                let factor = self.rule.settings.lr * ratios[piece.parameter];
                let mut parameter = reducer.parameters[owned.storage].range(&piece.run.range)?;
                let scaled = step.f_mul_scalar(factor)?;
                tch::no_grad(|| parameter.f_sub_(&scaled).map(drop))?;
            }
            works.extend(super::start_gather(reducer, bucket)?);
        }
        super::wait_all(works)
    }

    fn step_of(&self, storage: usize, state: &std::ops::Range<usize>) -> Result<Tensor> {
        let scratch = self.lamb.as_ref().ok_or(crate::Error::NoGradients)?;
        scratch.steps[storage].range(state)
    }

    /// m, v and the step m̂ / (√v̂ + ε) + λp of a bucket's own runs.
    fn moments_and_steps(&self, reducer: &Reducer, bucket: usize, divisor: f64) -> Result<()> {
        let settings = &self.rule.settings;
        let count = i32::try_from(self.step_count).unwrap_or(i32::MAX);
        let (correct1, correct2) =
            (1.0 - settings.beta1.powi(count), 1.0 - settings.beta2.powi(count));
        let owned = &self.owned[bucket];
        for run in &owned.runs {
            let gradient = reducer.gradients[owned.storage].range(&run.range)?;
            let gradient = if divisor > 1.0 { gradient.f_div_scalar(divisor)? } else { gradient };
            let mut first = self.moments.first[owned.storage].range(&run.state)?;
            let mut second = self.moments.second[owned.storage].range(&run.state)?;
            drop(first.f_mul_scalar_(settings.beta1)?);
            drop(first.f_add_(&gradient.f_mul_scalar(1.0 - settings.beta1)?)?);
            drop(second.f_mul_scalar_(settings.beta2)?);
            let square = gradient.f_mul(&gradient)?;
            drop(second.f_add_(&square.f_mul_scalar(1.0 - settings.beta2)?)?);
            let mut root = second.f_div_scalar(correct2)?;
            drop(root.f_sqrt_()?);
            drop(root.f_add_scalar_(settings.eps)?);
            let mut step = first.f_div_scalar(correct1)?;
            drop(step.f_div_(&root)?);
            if run.decays && settings.weight_decay > 0.0 {
                let parameter = reducer.parameters[owned.storage].range(&run.range)?;
                drop(step.f_add_(&parameter.f_mul_scalar(settings.weight_decay)?)?);
            }
            self.step_of(owned.storage, &run.state)?.f_copy_(&step)?;
        }
        Ok(())
    }

    /// ‖parameter‖ / ‖step‖ of every parameter; 1 where either is zero.
    fn trust_ratios(&self, reducer: &mut Reducer) -> Result<Vec<f64>> {
        let parameters = Flat::sums_of_squares(&reducer.parameters, &self.cells.places())?;
        let steps = self.step_sums()?;
        let parameters = self.cells.gather(&mut reducer.group, &parameters)?;
        let steps = self.cells.gather(&mut reducer.group, &steps)?;
        let mut sums = vec![(0.0, 0.0); reducer.model.parameters.len()];
        for (&(index, parameter), &(_, step)) in parameters.iter().zip(&steps) {
            let (parameter_sum, step_sum): &mut (f64, f64) = &mut sums[index];
            *parameter_sum += parameter;
            *step_sum += step;
        }
        let ratio = |(parameter, step): (f64, f64)| {
            if parameter > 0.0 && step > 0.0 {
                parameter.sqrt() / step.sqrt()
            } else {
                1.0
            }
        };
        Ok(sums.into_iter().map(ratio).collect())
    }

    /// Sums of squares of the steps, cell by cell: the cells of this rank's pieces, which lie in the
    /// scratch at other offsets than in the storage.
    fn step_sums(&self) -> Result<Vec<f64>> {
        let Some(scratch) = &self.lamb else { return Ok(Vec::new()) };
        let mut pieces = self.owned.iter().flat_map(|o| o.pieces.iter().map(|p| (o.storage, p)));
        let mut current = pieces.next();
        let mut cells = Vec::with_capacity(self.cells.mine.len());
        for cell in &self.cells.mine {
            while let Some((storage, piece)) = current {
                if storage == cell.storage && piece.run.range.contains(&cell.range.start) {
                    let start = piece.run.state.start + (cell.range.start - piece.run.range.start);
                    cells.push((storage, start..start + cell.range.len()));
                    break;
                }
                current = pieces.next();
            }
        }
        Flat::sums_of_squares(&scratch.steps, &cells)
    }
}
