//! Several data sets as one, drawn from by weight.

use std::ops::Range;
use std::sync::Arc;

use super::Samples;
use crate::batches::column::longest_max;
use crate::batches::{Column, Rows, Scratch};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, Fingerprinter};
use crate::order::{mixing, MixtureComponent};

/// A mixture: at every place of the order each part has its share of the samples, by the weights as
/// they were given: to less than one sample, or less than two where more than four weights have no
/// common period up to 65 536. Samples of a part come in the loader's order; when all have come,
/// the next round begins in another order.
///
/// All parts have the same columns; how long padded rows can be may differ. A loader needs
/// [`Tail::Wrap`](crate::Tail::Wrap). An epoch is as many samples as all parts have together;
/// samples of an epoch are not each one exactly once.
pub struct Mixture {
    parts: Vec<(Arc<dyn Samples>, f64)>,
    /// The number of each part's first sample, and of the one after the last.
    starts: Vec<u64>,
    columns: Vec<Column>,
    fingerprint: Fingerprint,
}

impl std::fmt::Debug for Mixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mixture").field("starts", &self.starts).finish_non_exhaustive()
    }
}

impl Mixture {
    /// Parts and their weights: 0.7 and 0.3, or 7 and 3.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for no part, parts of different columns, and a part that is a
    /// mixture itself: give its parts, with their weights multiplied.
    pub fn new(parts: Vec<(Arc<dyn Samples>, f64)>) -> Result<Self> {
        let Some((first, _)) = parts.first() else {
            return Err(Error::option("parts", 0, "a mixture has at least one part"));
        };
        let mut columns = first.columns().to_vec();
        let mut sum = Fingerprinter::new("mixture").number(u64::from(mixing::VERSION));
        let (mut starts, mut end) = (vec![0], 0_u64);
        for (number, (part, weight)) in parts.iter().enumerate() {
            if !join(&mut columns, part.columns()) {
                let reason = "its columns differ from those of part 0: names, types and shapes must agree, but for how long \
                              padded rows can be";
                return Err(Error::option("parts", format!("part {number}"), reason));
            }
            // A loader asks only the outermost mixture for weights.
            if part.parts().len() > 1 {
                let reason = "it is a mixture itself, whose weights would be lost: give its parts, each with the product of both weights";
                return Err(Error::option("parts", format!("part {number}"), reason));
            }
            end = end.saturating_add(part.sample_count());
            starts.push(end);
            sum = sum.number(part.fingerprint().0).number(weight.to_bits());
        }
        Ok(Mixture { parts, starts, columns, fingerprint: sum.finish() })
    }

    /// The part of a sample, and the sample's number there.
    fn place(&self, id: u64) -> Result<(usize, u64)> {
        let part = self.starts.partition_point(|&start| start <= id).saturating_sub(1);
        if part >= self.parts.len() {
            return Err(Error::NoSuchSample { sample: id, samples: self.sample_count() });
        }
        Ok((part, id - self.starts[part]))
    }
}

/// Makes columns hold those of one more part, whose padded rows may be longer or shorter. `false`:
/// they are others.
fn join(columns: &mut [Column], more: &[Column]) -> bool {
    let same = |(own, other): (&mut Column, &Column)| {
        if own.padded && other.padded {
            if let (Some(longest), Some(&size)) = (own.shape.first_mut(), other.shape.first()) {
                *longest = size.max(*longest);
            }
        }
        let shape =
            |column: &Column| column.shape.get(usize::from(column.padded)..).map(<[_]>::to_vec);
        own.name == other.name
            && own.dtype == other.dtype
            && own.padded == other.padded
            && own.shape.len() == other.shape.len()
            && shape(own) == shape(other)
    };
    columns.len() == more.len() && columns.iter_mut().zip(more).all(same)
}

impl Samples for Mixture {
    fn sample_count(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn sample_len(&self, id: u64, scratch: &mut Scratch) -> Result<usize> {
        let (part, own) = self.place(id)?;
        let part = &self.parts[part].0;
        // What is too long for its own part is cut there.
        let longest = longest_max(part.columns());
        Ok(part.sample_len(own, scratch)?.min(longest))
    }

    fn parts(&self) -> Vec<MixtureComponent> {
        let part = |(samples, weight): &(Arc<dyn Samples>, f64)| MixtureComponent {
            samples: samples.sample_count(),
            weight: *weight,
        };
        self.parts.iter().map(part).collect()
    }

    fn damaged(&self) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        for ((part, _), start) in self.parts.iter().zip(&self.starts) {
            // A part's damage may end in what is too short for a sample: that is not the next
            // part's first.
            let count = part.sample_count();
            let of_part = part.damaged()?.into_iter();
            let within = of_part.map(|range| range.start.min(count)..range.end.min(count));
            all.extend(within.map(|range| start + range.start..start + range.end));
        }
        Ok(all)
    }

    fn will_need(&self, samples: Range<u64>, scratch: &mut Scratch) {
        for ((part, _), bounds) in self.parts.iter().zip(self.starts.windows(2)) {
            let (start, end) = (samples.start.max(bounds[0]), samples.end.min(bounds[1]));
            if start < end {
                part.will_need(start - bounds[0]..end - bounds[0], scratch);
            }
        }
    }

    fn fill(&self, seed: u64, rows: &mut Rows<'_>, scratch: &mut Scratch) -> Result<()> {
        let mut renamed = std::mem::take(&mut scratch.renamed);
        let mut start = 0;
        while start < rows.len() {
            // Neighbours of the same part go together.
            let (part, _) = self.place(rows.sample(start).0.id)?;
            renamed.clear();
            for sample in &rows.samples()[start..] {
                let (other, own) = self.place(sample.id)?;
                if other != part {
                    break;
                }
                renamed.push(crate::order::Sample { id: own, ..*sample });
            }
            let end = start + renamed.len();
            let mut of_part = rows.part(start..end);
            self.parts[part].0.fill(seed, &mut of_part.renamed(&renamed), scratch)?;
            start = end;
        }
        scratch.renamed = renamed;
        Ok(())
    }
}
