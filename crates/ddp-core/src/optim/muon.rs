//! Muon: momentum, made orthogonal matrix by matrix; everything that is no hidden matrix goes to an AdamW.

use tch::{Kind, Tensor};

use super::groups::describes;
use super::rule::{check_lr_and_decay, check_momentum, check_setting, divided};
use super::{AdamW, Now, Rule, Runs, Whole};
use crate::{Error, Result};

/// How the step of a matrix follows from its shape, rows A by columns B.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdjustLr {
    /// √max(1, A / B): Jordan's. Learning rates are Muon's own.
    #[default]
    Original,
    /// 0.2 √max(A, B): elements move as AdamW's do, and its learning rates and decays serve (Liu et al. 2025).
    MatchRmsAdamW,
}

/// Muon, for the matrices of hidden layers: SGD with momentum whose step is made orthogonal.
///
/// With gradient *g*, momentum *m*, matrix *p*, learning rate γ, momentum's decay μ and weight decay λ:
///
/// m ← μ m + (1 − μ) g; u = μ m + (1 − μ) g with Nesterov's, else m; p ← (1 − γ λ) p − γ a NS(u)
///
/// where *a* is [`AdjustLr`] and NS makes all singular values about 1: X = u / ‖u‖, then five times
/// X ← 3.4445 X − 4.7750 (X Xᵀ) X + 2.0315 (X Xᵀ)² X. A wide matrix is iterated as it is, a tall one transposed.
///
/// A parameter is such a matrix if it has two dimensions and no pattern of [`others`](Self::others) describes its name.
/// All the rest (embeddings, heads, biases, norms) has [`adamw`](Self::adamw). State: four bytes an element of a
/// matrix, eight of the rest.
///
/// The learning rate that [`Optimizer::set_lr`](super::Optimizer::set_lr) sets is that of matrices; AdamW's follows in
/// proportion. A group's own learning rate and decay are those of all its parameters.
///
/// # Determinism
/// A matrix is iterated on one rank, whole, also where it is sharded: the same bits in every stage and on any number of
/// ranks that compute with equally many threads.
///
/// # Source
/// Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; `torch.optim.Muon`, which
/// iterates in bf16 and takes matrices alone. Liu et al. 2025, "Muon is Scalable for LLM Training".
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other"
)]
pub struct Muon {
    /// Learning rate of matrices.
    pub lr: f64,
    /// Weight decay of matrices, times the learning rate.
    pub weight_decay: f64,
    /// Decay of the momentum.
    pub momentum: f64,
    /// Whether the step looks ahead along the momentum.
    pub nesterov: bool,
    /// Iterations.
    pub steps: u32,
    /// What the norm that a matrix is divided by is at least.
    pub eps: f64,
    /// How the step follows from the shape.
    pub adjust_lr: AdjustLr,
    /// Whether the iteration computes in bf16, as PyTorch's does: for processors that multiply bf16 faster. Else
    /// it computes in the kind that masters have.
    pub in_bf16: bool,
    /// Whether kernels of convolutions are matrices, too: output channels by all else.
    pub flattens: bool,
    /// Names of matrices that are not to be made orthogonal; `*` stands for any characters.
    pub others: Vec<String>,
    /// What all other parameters have.
    pub adamw: AdamW,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            weight_decay: 0.1,
            momentum: 0.95,
            nesterov: true,
            steps: 5,
            eps: 1e-7,
            adjust_lr: AdjustLr::Original,
            in_bf16: false,
            flattens: false,
            others: ["*embed*", "*head*"].map(str::to_owned).into(),
            adamw: AdamW::default(),
        }
    }
}

impl Rule for Muon {
    fn name(&self) -> &'static str {
        "Muon"
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn states(&self) -> &'static [&'static str] {
        self.adamw.states()
    }

    fn check(&self) -> Result<()> {
        check_lr_and_decay(self.lr, self.weight_decay)?;
        check_momentum(self.momentum)?;
        check_setting("eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "a number > 0")?;
        if !(1..100).contains(&self.steps) {
            let (setting, value) = ("steps", self.steps.to_string());
            return Err(Error::BadSetting { setting, value, expected: "from 1 to 99" });
        }
        let of_others = self.adamw.lr;
        let is_right = self.lr > 0.0 || of_others <= 0.0;
        let expected = "0 beside an lr of 0 of matrices, which it follows in proportion";
        check_setting("adamw.lr", of_others, is_right, expected)?;
        self.adamw.check()
    }

    fn update(&self, now: &Now, runs: &Runs) -> Result<()> {
        if !now.is_whole {
            return self.adamw.update(now, runs);
        }
        for (at, direction) in runs.directions.iter().enumerate() {
            let new = divided(now, &runs.gradients[at])?.f_mul_scalar(1.0 - self.momentum)?;
            let mut momentum = runs.states[0][at].shallow_clone();
            drop(momentum.f_mul_scalar_(self.momentum)?);
            drop(momentum.f_add_(&new)?);
            let mut direction = direction.shallow_clone();
            direction.f_copy_(&momentum)?;
            if self.nesterov {
                drop(direction.f_mul_scalar_(self.momentum)?);
                drop(direction.f_add_(&new)?);
            }
        }
        Ok(())
    }

    fn whole(&self) -> Option<&dyn Whole> {
        Some(self)
    }

    fn apply(&self, now: &Now, factor: f64, runs: &Runs) -> Result<()> {
        for (parameter, direction) in runs.parameters.iter().zip(&runs.directions) {
            let mut parameter = parameter.shallow_clone();
            tch::no_grad(|| -> Result<()> {
                if now.weight_decay > 0.0 {
                    drop(parameter.f_mul_scalar_(1.0 - now.lr * now.weight_decay)?);
                }
                drop(parameter.f_sub_(&direction.f_mul_scalar(now.lr * factor)?)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Whole for Muon {
    fn takes(&self, name: &str, shape: &[i64]) -> bool {
        let is_matrix = shape.len() == 2 || (self.flattens && shape.len() > 2);
        is_matrix && !self.others.iter().any(|pattern| describes(pattern, name))
    }

    fn states(&self) -> &'static [&'static str] {
        &["momentum_buffer"]
    }

    fn others(&self) -> (f64, f64) {
        (self.adamw.lr, self.adamw.weight_decay)
    }

    fn turn(&self, _now: &Now, direction: &Tensor, _kept: &[Tensor]) -> Result<Tensor> {
        let (shape, kind) = (direction.size(), direction.kind());
        if direction.numel() == 0 {
            return Ok(direction.shallow_clone());
        }
        let matrix = direction.f_reshape([shape[0], -1])?;
        let computed = if self.in_bf16 { Kind::BFloat16 } else { kind };
        // Memory of its own, so that it is aligned alike wherever it comes from.
        let mut own = Tensor::f_empty(matrix.size(), (computed, matrix.device()))?;
        own.f_copy_(&matrix)?;
        let turned = orthogonal(own, self.steps, self.eps)?.f_to_kind(kind)?;
        Ok(turned.f_mul_scalar(self.factor(&matrix.size()))?.f_reshape(shape.as_slice())?)
    }
}

impl Muon {
    #[expect(clippy::cast_precision_loss, reason = "sizes of matrices are far below 2^53")]
    fn factor(&self, shape: &[i64]) -> f64 {
        let (rows, columns) = (shape[0] as f64, shape[1] as f64);
        match self.adjust_lr {
            AdjustLr::Original => (rows / columns).max(1.0).sqrt(),
            AdjustLr::MatchRmsAdamW => 0.2 * rows.max(columns).sqrt(),
        }
    }
}

/// The iteration of Newton and Schulz, of the fifth degree, with Jordan's coefficients: their slope at zero is large, and
/// they bring singular values near 1 without converging to it. Costs 4 min² max + 2 min³ multiplications an
/// iteration.
fn orthogonal(matrix: Tensor, steps: u32, eps: f64) -> Result<Tensor> {
    const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
    let [a, b, c] = COEFFICIENTS;
    let is_tall = matrix.size()[0] > matrix.size()[1];
    let mut x = if is_tall { matrix.f_tr()?.f_contiguous()? } else { matrix };
    let mut norm = x.f_norm()?;
    drop(norm.f_clamp_min_(eps)?);
    drop(x.f_div_(&norm)?);
    for _ in 0..steps {
        let gram = x.f_mm(&x.f_tr()?)?;
        let mut polynomial = gram.f_mm(&gram)?;
        drop(polynomial.f_mul_scalar_(c)?);
        drop(polynomial.f_add_(&gram.f_mul_scalar(b)?)?);
        let turned = polynomial.f_mm(&x)?;
        drop(x.f_mul_scalar_(a)?);
        drop(x.f_add_(&turned)?);
    }
    Ok(if is_tall { x.f_tr()? } else { x })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// Values in (−1, 1) that look random and are not.
    fn matrix(rows: i64, columns: i64) -> Tensor {
        let at = Tensor::arange(rows * columns, (Kind::Double, Device::Cpu));
        ((&at * &at * 0.37 + at * 12.9898).sin()).to_kind(Kind::Float).reshape([rows, columns])
    }

    fn singular_values(of: &Tensor) -> Vec<f64> {
        let (_, values, _) = of.to_kind(Kind::Double).svd(true, true);
        Vec::try_from(&values).unwrap()
    }

    /// One step of the scalar iteration, which is what each singular value goes through.
    fn iterated(mut value: f64, steps: u32) -> f64 {
        for _ in 0..steps {
            value = 3.4445 * value - 4.7750 * value.powi(3) + 2.0315 * value.powi(5);
        }
        value.abs()
    }

    #[test]
    fn each_singular_value_goes_through_the_polynomial() {
        for (rows, columns) in [(7, 7), (5, 23), (23, 5), (1, 9), (9, 1), (64, 33)] {
            let from = matrix(rows, columns);
            let norm = from.to_kind(Kind::Double).norm().double_value(&[]);
            let mut expected: Vec<f64> =
                singular_values(&from).iter().map(|value| iterated(value / norm, 5)).collect();
            expected.sort_by(|left, right| right.total_cmp(left));
            let values = singular_values(&orthogonal(from, 5, 1e-7).unwrap());
            for (found, right) in values.iter().zip(&expected) {
                // Errors of a step are multiplied by its slope, at most 3.4445 (and less than 7 in magnitude above 1);
                // a product over k elements is off by k roundings at most.
                let bound = 3.4445_f64.powi(5) * 64.0 * f64::from(f32::EPSILON);
                assert!((found - right).abs() <= bound, "{rows} × {columns}: {found} {right}");
            }
        }
    }

    #[test]
    fn in_bf16_singular_values_come_near_one_too() {
        let muon = Muon { in_bf16: true, ..Muon::default() };
        let now_of_nothing = crate::optim::numbers::tests_now();
        let turned = muon.turn(&now_of_nothing, &matrix(16, 48), &[]).unwrap();
        assert_eq!(turned.kind(), Kind::Float);
        for value in singular_values(&turned) {
            assert!((0.5..1.5).contains(&value), "{value}");
        }
    }

    #[test]
    fn hidden_matrices_are_taken_and_nothing_else() {
        let muon = Muon { others: vec!["*.word_embeddings.*".into()], ..Muon::default() };
        assert!(muon.takes("encoder.0.weight", &[3, 4]));
        assert!(!muon.takes("encoder.0.bias", &[3]));
        assert!(!muon.takes("bert.word_embeddings.weight", &[3, 4]));
        assert!(!muon.takes("conv.weight", &[3, 4, 5, 5]));
        assert!(Muon { flattens: true, ..muon }.takes("conv.weight", &[3, 4, 5, 5]));
        let factor = |adjust_lr, shape| Muon { adjust_lr, ..Muon::default() }.factor(shape);
        let near = |left: f64, right: f64| assert!((left - right).abs() < 1e-15, "{left} {right}");
        near(factor(AdjustLr::Original, &[8, 2]), 2.0);
        near(factor(AdjustLr::Original, &[2, 8]), 1.0);
        near(factor(AdjustLr::MatchRmsAdamW, &[25, 4]), 1.0);
    }
}
