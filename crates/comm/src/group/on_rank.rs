//! Work of one rank alone: writing a file, printing, downloading.

use super::Group;
use crate::error::{Error, Result};

impl Group {
    /// Runs `body` on `rank` and returns what it returns there, `None` elsewhere. The others go on at once: use
    /// [`Group::barrier`] where they have to wait.
    ///
    /// `body` cannot start collectives, which the other ranks would not take part in: the group is borrowed.
    ///
    /// ```compile_fail,E0499
    /// # use phalanx_comm::{Group, GroupOptions};
    /// let mut group = Group::single(GroupOptions::default()).unwrap();
    /// group.on_rank(0, || group.barrier().unwrap().wait()); // the others never come
    /// ```
    ///
    /// A buffer that a collective still works on is out of its reach, too:
    ///
    /// ```compile_fail,E0502
    /// # use phalanx_comm::{Group, GroupOptions, Sum};
    /// let mut group = Group::single(GroupOptions::default()).unwrap();
    /// let mut loss = [1.0_f32];
    /// let work = group.all_reduce(&mut loss[..], Sum).unwrap();
    /// group.on_rank(0, || println!("{}", loss[0])); // not reduced yet
    /// work.wait().unwrap();
    /// ```
    ///
    /// And an average of integers does not exist for any rank:
    ///
    /// ```compile_fail,E0277
    /// # use phalanx_comm::{Avg, Group, GroupOptions};
    /// let mut group = Group::single(GroupOptions::default()).unwrap();
    /// group.all_reduce(&mut [1_i64, 2][..], Avg).unwrap().wait().unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// `rank` is no rank of the group. The group is still good.
    ///
    /// # Example
    ///
    /// ```
    /// # use phalanx_comm::{Group, GroupOptions, Sum};
    /// let mut group = Group::single(GroupOptions::default())?;
    /// let mut loss = [1.5_f32];
    /// group.all_reduce(&mut loss[..], Sum)?.wait()?;
    /// let line = group.on_rank(0, || format!("loss {}", loss[0]))?;
    /// assert_eq!(line.as_deref(), Some("loss 1.5"));
    /// # Ok::<(), phalanx_comm::Error>(())
    /// ```
    pub fn on_rank<R>(&mut self, rank: usize, body: impl FnOnce() -> R) -> Result<Option<R>> {
        let world_size = self.world_size();
        if rank >= world_size {
            return Err(Error::NoSuchRank { op: "on_rank", rank, world_size });
        }
        Ok((rank == self.rank()).then(body))
    }
}
