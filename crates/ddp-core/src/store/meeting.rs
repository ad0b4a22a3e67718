//! Ranks that may run different operations ([`Ddp::join`](crate::Ddp::join), `find_unused_parameters`) where parameters are gathered.
//!
//! Gathering is collective, and an operation of one rank starts it. So before anything that all ranks do together (a bucket of gradients, the
//! end of an exchange, a step) they meet: each says which buckets an operation of its program needs, if it has come to one, and all
//! gather what any of them needs, in one order. Whoever needed some goes on; whoever needed none has come to what is
//! common, and meets the others again, until none needs any. A rank that runs nothing thus follows those that do, and every rank
//! has the same buckets in the same buffers at any time.
//!
//! A meeting costs an exchange of one number, and ranks wait for each other in it; where operations are the same on all ranks there
//! is none.

use super::gathering::sharing;
use super::Store;
use crate::Result;

/// Set in the number of a bucket that does not train.
const FROZEN: i64 = 1 << 40;

impl Store {
    /// Whether ranks may run different operations from here on: on all ranks alike.
    pub(crate) fn set_programs_differ(&mut self, differ: bool) {
        self.meets = differ && self.sharding.gathers_on_access();
    }

    /// This rank has come to what all ranks do together: returns when all have. Collective, where ranks may run different operations.
    pub(crate) fn meet(&mut self) -> Result<()> {
        if !self.meets {
            return Ok(());
        }
        while self.gather_what_any_needs(&[])? {}
        Ok(())
    }

    /// An operation takes what is not here: of each gatherer with a number its buckets with these numbers. Collective.
    pub(crate) fn bring_for_operation(&mut self, wanted: &[(u64, Vec<usize>)]) {
        let frozen = self.frozen.gatherer_id();
        if !self.meets {
            for (id, buckets) in wanted {
                self.bring(frozen == Some(*id), buckets);
            }
            return;
        }
        let mut needed = Vec::new();
        for (id, buckets) in wanted {
            let mark = if frozen == Some(*id) { FROZEN } else { 0 };
            needed.extend(buckets.iter().map(|&bucket| i64::try_from(bucket).unwrap_or(0) | mark));
        }
        if let Err(error) = self.gather_what_any_needs(&needed) {
            self.gatherers().for_each(|gatherer| gatherer.fail(&error));
        }
    }

    /// Gathers what this rank and the others need; whether that was anything. Collective.
    fn gather_what_any_needs(&mut self, mine: &[i64]) -> Result<bool> {
        let needed = self.needed_by_any(mine)?;
        for are_frozen in [false, true] {
            let of = needed.iter().filter(|&&number| (number & FROZEN != 0) == are_frozen);
            let buckets = of.filter_map(|number| usize::try_from(number & !FROZEN).ok());
            let buckets: Vec<usize> = buckets.collect();
            if !buckets.is_empty() {
                self.bring(are_frozen, &buckets);
            }
        }
        let failed = self.gatherers().find_map(|gatherer| gatherer.failure());
        match failed {
            Some(failed) => Err(crate::Error::Closure(failed.into())),
            None => Ok(!needed.is_empty()),
        }
    }

    /// What any rank needs, each once, in the order of the ranks. Collective.
    fn needed_by_any(&mut self, mine: &[i64]) -> Result<Vec<i64>> {
        let group = sharing(&mut self.within, &mut self.group);
        let mut counts = vec![0_i64; group.world_size()];
        let count = [i64::try_from(mine.len()).unwrap_or(i64::MAX)];
        group.tagged("how many buckets of parameters a rank needs");
        group.all_gather(&count, &mut counts[..])?.wait()?;
        let most = counts.iter().copied().max().and_then(|most| usize::try_from(most).ok());
        let most = most.unwrap_or(0);
        if most == 0 {
            return Ok(Vec::new());
        }
        let mut padded = mine.to_vec();
        padded.resize(most, -1);
        let mut all = vec![-1_i64; most * counts.len()];
        group.tagged("buckets of parameters that a rank needs");
        group.all_gather(&padded, &mut all[..])?.wait()?;
        let mut needed = Vec::new();
        for number in all.into_iter().filter(|&number| number >= 0) {
            if !needed.contains(&number) {
                needed.push(number);
            }
        }
        Ok(needed)
    }
}
