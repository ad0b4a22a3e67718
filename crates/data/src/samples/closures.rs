//! Samples that a closure makes, and samples that a closure changes.

use std::ops::Range;
use std::sync::Arc;

use super::Samples;
use crate::batches::column::longest_max;
use crate::batches::{Column, Rows, Scratch};
use crate::error::Result;
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::order::{MixtureComponent, Sample};

/// Samples that a closure makes, row by row.
///
/// ```
/// use phalanx_data::{from_fn, Column, DType};
///
/// // x and x²: column 0 and column 1.
/// let columns = vec![Column::new("x", DType::F32, []), Column::new("y", DType::F32, [])];
/// let samples = from_fn(1000, columns, "squares", |sample, _seed, row| {
///     let x = sample.id as f32;
///     let [xs, ys] = row.columns_mut::<f32, 2>([0, 1])?;
///     (xs[0], ys[0]) = (x, x * x);
///     Ok(())
/// });
/// # let mut loader = phalanx_data::Loader::new(std::sync::Arc::new(samples), Default::default())?;
/// # let step = loader.next_step()?;
/// # let (x, y) = (step.micro_batches[0].get::<f32>("x")?, step.micro_batches[0].get::<f32>("y")?);
/// # assert!(x.iter().zip(y).all(|(x, y)| x * x == *y) && x.len() == 32);
/// # Ok::<(), phalanx_data::Error>(())
/// ```
pub fn from_fn<F>(sample_count: u64, columns: Vec<Column>, version: &str, fill: F) -> FromFn<F>
where
    F: Fn(Sample, u64, &mut Rows<'_>) -> Result<()> + Send + Sync + 'static,
{
    let fingerprint = Fingerprinter::new("from-fn 1").bytes(version.as_bytes());
    let fingerprint = fingerprint.number(sample_count).finish();
    FromFn { sample_count, columns, fingerprint, len: None, fill }
}

/// How long a sample is, by its number.
type Len = Box<dyn Fn(u64) -> Result<usize> + Send + Sync>;

/// See [`from_fn`].
pub struct FromFn<F> {
    sample_count: u64,
    columns: Vec<Column>,
    fingerprint: Fingerprint,
    len: Option<Len>,
    fill: F,
}

impl<F> FromFn<F> {
    /// Says how long a sample is in padded columns ([`Column::padded`]): rows are as long as the
    /// longest sample of their batch, and samples of similar length can come together. Without it
    /// every sample is as long as can be.
    ///
    /// ```
    /// use phalanx_data::{from_fn, Column, DType, Loader, LoaderOptions};
    ///
    /// // Sample n: n times the number n, padded with -1.
    /// let columns = vec![Column::padded("n", DType::I64, [100])];
    /// let samples = from_fn(100, columns, "v1", |sample, _seed, row| {
    ///     let values = row.column::<i64>(0)?;
    ///     values.fill(-1);
    ///     values[..sample.id as usize].fill(sample.id as i64);
    ///     Ok(())
    /// })
    /// .with_len(|id| Ok(id as usize));
    /// let options = LoaderOptions { bucketing: 12, global_batch: 8, ..Default::default() };
    /// let mut loader = Loader::new(std::sync::Arc::new(samples), options)?;
    /// let step = loader.next_step()?;
    /// let longest = step.micro_batches[0].samples().iter().map(|sample| sample.id).max();
    /// assert_eq!(Some(step.micro_batches[0].sequence_len() as u64), longest);
    /// # Ok::<(), phalanx_data::Error>(())
    /// ```
    #[must_use]
    pub fn with_len(self, len: impl Fn(u64) -> Result<usize> + Send + Sync + 'static) -> Self {
        FromFn { len: Some(Box::new(len)), ..self }
    }
}

impl<F> std::fmt::Debug for FromFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let FromFn { sample_count, columns, .. } = self;
        f.debug_struct("FromFn")
            .field("sample_count", sample_count)
            .field("columns", columns)
            .finish()
    }
}

impl<F> Samples for FromFn<F>
where
    F: Fn(Sample, u64, &mut Rows<'_>) -> Result<()> + Send + Sync + 'static,
{
    fn sample_count(&self) -> u64 {
        self.sample_count
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn sample_len(&self, id: u64, _scratch: &mut Scratch) -> Result<usize> {
        let longest = longest_max(&self.columns);
        self.len.as_ref().map_or(Ok(longest), |len| len(id))
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, _scratch: &mut Scratch) -> Result<()> {
        for at in 0..rows.len() {
            let (sample, _) = rows.sample(at);
            (self.fill)(sample, seed, &mut rows.part(at..at + 1))?;
        }
        Ok(())
    }
}

/// Samples whose rows a closure changes once they are filled: noise, crops, labels of another kind.
/// What is random in it must be a function of seed and sample, as ever.
///
/// `version` names what the closure does: it is part of the fingerprint, and states of another
/// version do not fit.
///
/// ```
/// use std::sync::Arc;
/// use phalanx_data::samples::map;
/// use phalanx_data::{from_fn, Column, DType, Loader};
///
/// let columns = vec![Column::new("x", DType::F32, [])];
/// let whole = from_fn(1000, columns, "v1", |sample, _seed, row| {
///     row.column::<f32>(0)?.fill(sample.id as f32);
///     Ok(())
/// });
/// let halves = map(Arc::new(whole), "halves", |_sample, _seed, row| {
///     row.column::<f32>(0)?.iter_mut().for_each(|x| *x /= 2.0);
///     Ok(())
/// });
/// let step = Loader::new(Arc::new(halves), Default::default())?.next_step()?;
/// let batch = &step.micro_batches[0];
/// let ids = batch.samples().iter().map(|sample| sample.id as f32);
/// assert!(batch.get::<f32>("x")?.iter().zip(ids).all(|(x, id)| *x == id / 2.0));
/// # Ok::<(), phalanx_data::Error>(())
/// ```
pub fn map<F>(samples: Arc<dyn Samples>, version: &str, change: F) -> Map<F>
where
    F: Fn(Sample, u64, &mut Rows<'_>) -> Result<()> + Send + Sync + 'static,
{
    let sum = Fingerprinter::new("map 1").bytes(version.as_bytes());
    let fingerprint = sum.number(samples.fingerprint().0).finish();
    Map { samples, fingerprint, change }
}

/// See [`map`].
pub struct Map<F> {
    samples: Arc<dyn Samples>,
    fingerprint: Fingerprint,
    change: F,
}

impl<F> std::fmt::Debug for Map<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

impl<F> Samples for Map<F>
where
    F: Fn(Sample, u64, &mut Rows<'_>) -> Result<()> + Send + Sync + 'static,
{
    fn sample_count(&self) -> u64 {
        self.samples.sample_count()
    }

    fn columns(&self) -> &[Column] {
        self.samples.columns()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn sample_len(&self, id: u64, scratch: &mut Scratch) -> Result<usize> {
        self.samples.sample_len(id, scratch)
    }

    fn parts(&self) -> Vec<MixtureComponent> {
        self.samples.parts()
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        self.samples.damaged()
    }

    fn will_need(&self, samples: Range<u64>, scratch: &mut Scratch) {
        self.samples.will_need(samples, scratch);
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        self.samples.fill(seed, rows, scratch)?;
        for at in 0..rows.len() {
            let (sample, _) = rows.sample(at);
            (self.change)(sample, seed, &mut rows.part(at..at + 1))?;
        }
        Ok(())
    }
}
