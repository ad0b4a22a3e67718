//! Weights that add up over other ranks than gradients do.

use phalanx_comm::Group;

use crate::reduce::{self, notes::Notes, Reducer};
use crate::{Ddp, Error, Result};

impl Reducer {
    /// Ends all groups, with this reason.
    pub(crate) fn abort(&mut self, reason: &str) {
        self.store.abort(reason);
        self.weighing.iter_mut().for_each(|group| group.abort(reason));
    }
}

impl Ddp {
    /// Divides gradients by the weights of the ranks of `group` (by their number after plain backwards), where it would be by those of its own group.
    ///
    /// It is for parameters whose gradients have those other ranks' samples in them already: an expert's, to which tokens of other ranks have been sent.
    /// `group` contains this `Ddp`'s; all its ranks have such a `Ddp` and exchange alike. Collective over `group`, before the first backward; a
    /// duplicate of it is kept.
    ///
    /// # Errors
    /// [`Error::BadSetting`] while ranks [join](Ddp::join), or where gradients have come that are not exchanged; errors of the group.
    pub fn weigh_over(&self, group: &mut Group) -> Result<()> {
        let mut group = group.duplicate()?;
        let head = Notes::new(&mut group)?;
        let mut reducer = reduce::lock(self.shared())?;
        if reducer.joining || reducer.has_pending() {
            return Err(Error::BadSetting {
                setting: "weigh_over",
                value: "between backwards".to_owned(),
                expected: "a call before the first of them, and without Ddp::join",
            });
        }
        reducer.head = head;
        reducer.weighing = Some(group);
        Ok(())
    }
}
