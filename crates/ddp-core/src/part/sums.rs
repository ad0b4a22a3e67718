//! Norms over all parts of a model. They are exact until they are read ([`ExactSum`]), first over the ranks with the same part and then over the
//! parts: every rank comes to the same bits.

use phalanx_comm::Sum;

use crate::store::exact::{ExactSum, WORDS};
use crate::store::norm::{self, Own};
use crate::store::Store;
use crate::Result;

impl Store {
    /// What the whole model has, of what counts on this rank; exact still. Collective.
    pub(crate) fn summed_over_model(&mut self, own: Own) -> Result<Own> {
        let of_part = self.summed(own)?;
        match &mut self.part {
            Some(part) => norm::summed(&mut part.model, of_part),
            None => Ok(of_part),
        }
    }

    /// The values of sums of which each parameter has `of_each`, parameter k's at k, k + count …; those of a parameter that is cut are over
    /// its whole. Collective.
    pub(crate) fn over_parameters(&mut self, own: Own, of_each: usize) -> Result<Vec<f64>> {
        if self.part.is_none() {
            return self.over_ranks(own);
        }
        let of_part = self.summed(own)?;
        let mut values = of_part.values();
        let (Some(part), Own::Sums(sums)) = (&mut self.part, of_part) else { return Ok(values) };
        // The same list on all ranks of the model.
        let cut = part.table.tensors.iter().filter(|(_, entry)| entry.is_cut());
        let names: Vec<String> = cut.map(|(name, _)| name.clone()).collect();
        if names.is_empty() {
            return Ok(values);
        }
        let count = sums.len() / of_each.max(1);
        let places: Vec<Option<usize>> = names
            .iter()
            .map(|name| self.model.parameters().position(|named| named.name == *name))
            .collect();
        let mut words = vec![0_i64; names.len() * of_each * WORDS];
        let mut rooms = words.chunks_exact_mut(WORDS);
        for (name, place) in names.iter().zip(&places) {
            for number in 0..of_each {
                let Some(room) = rooms.next() else { continue };
                let mine = place.filter(|_| part.counts(name));
                if let Some(slot) = mine {
                    room.copy_from_slice(&sums[slot + number * count].clone().into_words());
                }
            }
        }
        part.model
            .tagged("norms of parameters that are cut")
            .all_reduce(&mut words[..], Sum)?
            .wait()?;
        let mut whole = words.chunks_exact(WORDS).map(ExactSum::of_words);
        for place in places {
            for number in 0..of_each {
                let sum = whole.next().flatten();
                if let (Some(slot), Some(sum)) = (place, sum) {
                    values[slot + number * count] = sum.value();
                }
            }
        }
        Ok(values)
    }

    /// Elements of the whole of a parameter.
    pub(crate) fn whole_len(&self, slot: usize) -> usize {
        let len = self.plan.places[slot].range.len();
        let cut = self.cut(&self.model.parameter(slot).name);
        cut.map_or(len, |cut| {
            usize::try_from(cut.shape().iter().product::<i64>()).unwrap_or(usize::MAX)
        })
    }
}
