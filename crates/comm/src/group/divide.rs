//! Groups made of parts of a group.

use std::sync::Arc;
use std::time::Instant;

use super::Group;
use crate::environment::World;
use crate::error::{Error, Result};
use crate::recorder::GroupPart;

impl Group {
    /// Divides the group: ranks of equal `color` form one, ordered by `key` and then by rank; `None`
    /// joins none. Collective. The new group is independent: the failure of one does not end the
    /// other, but a rank that dies ends both. With NCCL a group that fails takes the GPU side of all groups
    /// of the process with it: NCCL asks that all communicators are aborted together.
    ///
    /// Collectives of two groups have no common order. Over NCCL that matters where both work on one GPU at once: each
    /// takes a part of it, and ranks that begin them in different orders can wait for each other until the time limit
    /// is over. Wait for those of one group before those of the other start, or let all ranks start and wait alike.
    ///
    /// # Errors
    ///
    /// The group is dead, or the ranks of the new one could not connect.
    #[track_caller]
    pub fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        let mut mine = [0; 9];
        mine[0] = u8::from(color.is_some());
        mine[1..5].copy_from_slice(&color.unwrap_or(0).to_le_bytes());
        mine[5..9].copy_from_slice(&key.to_le_bytes());
        let all = self.all_gather_bytes(&mine)?;
        let mut members: Vec<(i32, usize)> = all
            .iter()
            .enumerate()
            .filter(|(_, theirs)| color.is_some() && theirs[..5] == mine[..5])
            .map(|(rank, theirs)| {
                (i32::from_le_bytes([theirs[5], theirs[6], theirs[7], theirs[8]]), rank)
            })
            .collect();
        members.sort_unstable();
        let members: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        let places = self.places()?;
        let part = self.part(&members, &places);
        // In the group of all ranks, of which this one may itself be a part.
        let ranks = members.iter().map(|member| self.core.peers.part.ranks[*member]).collect();
        let recorded = GroupPart { group: self.part_number(color), ranks };
        let options = self.options.clone();
        // Ranks that join no group still take part in the exchange of cards.
        let mut group = match part {
            None => {
                self.all_gather_bytes(&[])?;
                None
            }
            Some(world) if world.world_size == 1 => {
                self.all_gather_bytes(&[])?;
                Some(Self::over(world, options, recorded, &mut |_, _| Ok(Vec::new())))
            }
            Some(world) => {
                let mut has_exchanged = false;
                let made = Self::over(world, options, recorded, &mut |card, _| {
                    has_exchanged = true;
                    let cards = self.all_gather_bytes(card)?;
                    Ok(members.iter().map(|member| cards[*member].clone()).collect())
                });
                if !has_exchanged {
                    // The others are at it: they are not to take what comes next for this.
                    self.all_gather_bytes(&[])?;
                }
                Some(made)
            }
        };
        if let Some(Ok(made)) = &mut group {
            made.neighbours = Arc::clone(&self.neighbours);
        }
        if self.transport.is_in_stream_order() {
            let mut colors: Vec<_> =
                all.iter().filter(|theirs| theirs[0] == 1).map(|theirs| &theirs[1..5]).collect();
            colors.sort_unstable();
            colors.dedup();
            let number = colors.iter().position(|one| **one == mine[1..5]);
            return self.divide_communicator(group, number.unwrap_or(0));
        }
        let mut group = group.transpose()?;
        if let Some(group) = &mut group {
            group.open()?;
        }
        Ok(group)
    }

    /// Gives the part of the group a part of the communicator. Collective, also for those without a part.
    fn divide_communicator(
        &mut self,
        part: Option<Result<Self>>,
        color: usize,
    ) -> Result<Option<Self>> {
        let deadline = Instant::now() + self.options.connect_timeout;
        let rank = self.rank();
        // Nobody waits in NCCL for a rank whose part has failed before.
        let trouble = match &part {
            Some(Err(error)) => error.to_string(),
            _ => String::new(),
        };
        let troubles = self.all_gather_bytes(trouble.as_bytes())?;
        let mut part = part.transpose()?;
        if let Some(of) = troubles.iter().position(|one| !one.is_empty()) {
            let what = format!(
                "rank {of} could not connect to its part of the group: {}",
                String::from_utf8_lossy(&troubles[of])
            );
            return Err(Error::World { rank, what });
        }
        let Some(lane) = self.transport.lane(true) else { return Ok(part) };
        if !lane.wait_idle(deadline) {
            let what =
                "calls that were made before have not ended: wait for them before the group is \
                        divided";
            return Err(self.core.peers.fail(Error::World { rank, what: what.to_owned() }));
        }
        let core = part.as_ref().map(|part| (&part.core, color));
        let divided = self.transport.divide(&self.core, core, deadline);
        let divided = divided.map_err(|error| self.core.peers.fail(error))?;
        if let (Some(part), Some(divided)) = (&mut part, divided) {
            part.transport = divided;
        }
        Ok(part)
    }

    /// The node of every rank.
    #[track_caller]
    fn places(&mut self) -> Result<Vec<u64>> {
        let mut nodes = vec![0_u64; self.world_size()];
        let node = self.world.node_rank as u64;
        for (rank, bytes) in self.all_gather_bytes(&node.to_le_bytes())?.iter().enumerate() {
            if let Ok(bytes) = bytes[..].try_into() {
                nodes[rank] = u64::from_le_bytes(bytes);
            }
        }
        Ok(nodes)
    }

    /// This rank's world in the group of `members`, if it is one of them.
    fn part(&self, members: &[usize], nodes: &[u64]) -> Option<World> {
        let rank = members.iter().position(|member| *member == self.rank())?;
        let node_of = |member: &usize| nodes[*member];
        let own = nodes[self.rank()];
        let mut used: Vec<u64> = members.iter().map(node_of).collect();
        used.sort_unstable();
        used.dedup();
        let local = |member: &&usize| node_of(member) == own;
        Some(World {
            rank,
            world_size: members.len(),
            local_rank: members[..rank].iter().filter(local).count(),
            local_world_size: members.iter().filter(local).count(),
            node_rank: used.iter().position(|node| *node == own).unwrap_or(0),
            // Where addresses are chosen, "several nodes" must stay true for the part too.
            node_count: used.len(),
            ..self.world.clone()
        })
    }

    /// A group of the same ranks with an order of collectives of its own. Collective.
    ///
    /// # Errors
    ///
    /// As [`Group::split`].
    #[track_caller]
    pub fn duplicate(&mut self) -> Result<Self> {
        let rank = i32::try_from(self.rank()).unwrap_or(i32::MAX);
        let same = self.split(Some(0), rank)?;
        same.ok_or_else(|| Error::World {
            rank: self.world.rank,
            what: "a duplicate without this rank".to_owned(),
        })
    }
}
