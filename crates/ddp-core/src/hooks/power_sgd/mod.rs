//! Gradients of matrices that travel as products of thin ones.

mod low_rank;
mod matrices;
mod memory;

use std::collections::BTreeMap;

use phalanx_comm::Work;
use tch::{Kind, Tensor};

use super::{Bucket, Hook, Kept, Lossy, Progress, State, Wire};
use crate::{Error, Result};
use matrices::{Matrix, Parts};

/// The names of saved tensors begin with it.
const FACTOR: &str = "q";

/// Approximates the mean of each matrix's gradients M [n, m] by P Qᵀ of rank r: 2 (P−1)/P · 4 r (n + m) bytes instead of 4 n m.
///
/// In an exchange, with Q [m, r] of the one before made orthonormal: P = mean of M Q over the ranks, made orthonormal; Q = mean of Mᵀ P; the result is P Qᵀ. All
/// matrices of a bucket travel together, in one `all_reduce` for their P and one for their Q; with the first go the bucket's vectors and matrices too
/// small to gain, as they are. The mean is everywhere, also with [`Zero::One`](crate::Zero::One).
///
/// Meant for use in [`ErrorFeedback`](super::ErrorFeedback), as PyTorch has it by default. A parameter of more than two dimensions is the matrix of its first
/// dimension and the others. Products are those of libtorch, orthonormalisation and expansion ours, in f32.
///
/// # Source
/// Vogels, Karimireddy and Jaggi 2019, "`PowerSGD`"; `torch/distributed/algorithms/ddp_comm_hooks/powerSGD_hook.py`, whose
/// defaults these are. There a column of zeros makes NaN unless an epsilon is set; here it stays zero.
#[derive(Debug)]
pub struct PowerSgd {
    options: PowerSgdOptions,
    /// By parameter, as the last exchange left it: the same on every rank.
    factors: BTreeMap<String, Tensor>,
}

/// Settings of [`PowerSgd`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerSgdOptions {
    /// Columns of the thin matrices. Default 1.
    pub rank: usize,
    /// Exchanges before the first compressed one: early gradients change much. Default 1000; 10 % of all steps is a good begin.
    pub start_step: u64,
    /// How many times fewer numbers must travel for a matrix to be compressed. Default 2.
    pub min_compression: f64,
    /// Whether an exchange begins from the Q of the one before; else from a new one. Default true.
    pub warm_start: bool,
    /// Of the first Q. Default 0.
    pub seed: u64,
}

impl Default for PowerSgdOptions {
    fn default() -> Self {
        Self { rank: 1, start_step: 1000, min_compression: 2.0, warm_start: true, seed: 0 }
    }
}

impl PowerSgd {
    /// With settings.
    #[must_use]
    pub fn new(options: PowerSgdOptions) -> Self {
        Self { options, factors: BTreeMap::new() }
    }
}

/// What is under way of a bucket.
#[derive(Debug)]
pub enum Factoring {
    /// Before the first compressed exchange.
    Plain(Work<'static>),
    /// The P of all matrices, and what is not compressed.
    First(Wire, Work<'static>),
    /// The Q; each P, orthonormal.
    Second(Vec<Tensor>, Option<(Wire, Work<'static>)>),
}

impl Hook for PowerSgd {
    type Pending = Factoring;

    fn name(&self) -> String {
        let PowerSgdOptions { rank, start_step, min_compression, warm_start, seed } = self.options;
        let warm = if warm_start { "warm" } else { "cold" };
        format!("powersgd of rank {rank} from step {start_step}, compression {min_compression}, {warm}, seed {seed}")
    }

    fn check(&self) -> Result<()> {
        let PowerSgdOptions { rank, min_compression, .. } = self.options;
        if rank == 0 {
            let (setting, value) = ("rank of PowerSgd", rank.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number > 0" });
        }
        if min_compression.is_nan() || min_compression <= 0.0 {
            let (setting, value) = ("min_compression of PowerSgd", min_compression.to_string());
            return Err(Error::BadSetting { setting, value, expected: "a number > 0" });
        }
        Ok(())
    }

    fn start(&mut self, bucket: &mut Bucket<'_>) -> Result<Self::Pending> {
        if bucket.exchange() < self.options.start_step {
            return Ok(Factoring::Plain(bucket.reduce_in_place(bucket.scale())?));
        }
        let parts = self.parts(bucket);
        let wire = bucket.take(travelling(bucket.kind()), parts.first_len)?;
        let gradients = bucket.gradients()?;
        tch::no_grad(|| -> Result<()> {
            for matrix in &parts.matrices {
                let q = self.start_of(bucket, matrix)?;
                let p = memory::matrix(&gradients, matrix)?.f_mm(&q)?;
                memory::p(&wire, matrix)?.f_copy_(&p)?;
            }
            for (range, at) in &parts.rest {
                let values = bucket.part(&gradients, range)?;
                bucket.part(wire.tensor(), at)?.f_copy_(&values)?;
            }
            Ok(())
        })?;
        let work = bucket.all_reduce("P of its matrices", &wire, bucket.scale())?;
        Ok(Factoring::First(wire, work))
    }

    fn finish(
        &mut self,
        bucket: &mut Bucket<'_>,
        pending: Self::Pending,
    ) -> Result<Progress<Self::Pending>> {
        match pending {
            Factoring::Plain(work) => {
                bucket.wait(work)?;
                Ok(Progress::Done)
            }
            Factoring::First(wire, work) => {
                bucket.wait(work)?;
                let second = self.second(bucket, wire)?;
                Ok(Progress::Again(second))
            }
            Factoring::Second(ps, None) => {
                debug_assert!(ps.is_empty(), "without matrices nothing travels");
                Ok(Progress::Done)
            }
            Factoring::Second(ps, Some((wire, work))) => {
                bucket.wait(work)?;
                self.expand(bucket, &ps, &wire)?;
                bucket.put_back(wire);
                Ok(Progress::Done)
            }
        }
    }

    fn reset(&mut self) {
        self.factors.clear();
    }

    fn state(&self) -> Result<State> {
        let name = |parameter: &str| format!("{FACTOR}/{parameter}");
        let factors = self.factors.iter();
        let tensors = factors.map(|(of, q)| (name(of), Kept::Alike(q.shallow_clone()))).collect();
        Ok(State { tensors, ..State::default() })
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.factors.clear();
        for (name, kept) in state.inner(FACTOR).tensors {
            self.factors.insert(name, kept.tensor().shallow_clone());
        }
        Ok(())
    }
}

impl Lossy for PowerSgd {}

impl PowerSgd {
    fn parts(&self, bucket: &Bucket<'_>) -> Parts {
        let PowerSgdOptions { rank, min_compression, .. } = self.options;
        Parts::of(bucket.parameters(), rank, min_compression)
    }

    /// The Q that this exchange begins from, orthonormal.
    fn start_of(&self, bucket: &Bucket<'_>, matrix: &Matrix) -> Result<Tensor> {
        let Matrix { columns, rank, parameter, .. } = *matrix;
        let name = &bucket.parameters()[parameter].name;
        let shape = [columns, rank].map(|size| i64::try_from(size).unwrap_or(i64::MAX));
        let kept = self.factors.get(name).filter(|q| q.size() == shape);
        let mut q = match kept.filter(|_| self.options.warm_start) {
            // Of a saved state it may be elsewhere.
            Some(q) => q.f_to_device(bucket.device())?.f_detach_copy()?,
            None => {
                let exchange = if self.options.warm_start { 0 } else { bucket.exchange() };
                let seed = self.options.seed.wrapping_add(exchange);
                let value = |index| low_rank::first_value(seed, name, index);
                let values: Vec<f32> = (0..columns * rank).map(value).collect();
                Tensor::f_from_slice(&values)?.f_view(shape)?.f_to_device(bucket.device())?
            }
        };
        memory::orthonormalise(&mut q)?;
        Ok(q)
    }

    /// Makes each P orthonormal and starts to exchange the Q that belong to them.
    fn second(&self, bucket: &mut Bucket<'_>, first: Wire) -> Result<Factoring> {
        let parts = self.parts(bucket);
        let gradients = bucket.gradients()?;
        let mut ps = Vec::with_capacity(parts.matrices.len());
        tch::no_grad(|| -> Result<()> {
            for (range, at) in &parts.rest {
                let mean = bucket.part(first.tensor(), at)?;
                bucket.part(&gradients, range)?.f_copy_(&mean)?;
            }
            for matrix in &parts.matrices {
                let mut p = memory::p(&first, matrix)?.f_to_kind(Kind::Float)?.f_detach_copy()?;
                memory::orthonormalise(&mut p)?;
                ps.push(p);
            }
            Ok(())
        })?;
        bucket.put_back(first);
        if parts.matrices.is_empty() {
            return Ok(Factoring::Second(ps, None));
        }
        let wire = bucket.take(travelling(bucket.kind()), parts.second_len)?;
        tch::no_grad(|| -> Result<()> {
            for (matrix, p) in parts.matrices.iter().zip(&ps) {
                let q = memory::matrix(&gradients, matrix)?.f_tr()?.f_mm(p)?;
                memory::q(&wire, matrix)?.f_copy_(&q)?;
            }
            Ok(())
        })?;
        let work = bucket.all_reduce("Q of its matrices", &wire, bucket.scale())?;
        Ok(Factoring::Second(ps, Some((wire, work))))
    }

    /// Writes the products to the bucket.
    fn expand(&mut self, bucket: &Bucket<'_>, ps: &[Tensor], wire: &Wire) -> Result<()> {
        let parts = self.parts(bucket);
        let gradients = bucket.gradients()?;
        let lost = bucket.lost();
        for (matrix, p) in parts.matrices.iter().zip(ps) {
            let q = memory::q(wire, matrix)?.f_to_kind(Kind::Float)?.f_detach_copy()?;
            let lost = lost.as_ref().map(|lost| bucket.part(lost, &matrix.range)).transpose()?;
            memory::expand((p, &q), &bucket.part(&gradients, &matrix.range)?, lost)?;
            if self.options.warm_start {
                let name = &bucket.parameters()[matrix.parameter].name;
                self.factors.insert(name.clone(), q);
            }
        }
        Ok(())
    }
}

/// In which kind thin matrices travel.
fn travelling(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => kind,
        _ => Kind::Float,
    }
}
