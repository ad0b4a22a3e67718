//! What ranks tell each other beside gradients: a few numbers from each to all, in memory of the host.
//!
//! The *head* of an exchange is told before its first bucket, where the divisor depends on all ranks; the *tail*
//! after its last, in every exchange: what each rank found in its gradients, and what its time went for.

use std::time::Duration;

use phalanx_comm::{Group, Region, Work};

use crate::Result;

/// A few numbers from each rank to all.
#[derive(Debug)]
pub(crate) struct Notes<const N: usize> {
    region: Region<f64>,
}

impl<const N: usize> Notes<N> {
    /// Collective: allocates the memory.
    pub(crate) fn new(group: &mut Group) -> Result<Self> {
        Ok(Self { region: group.allocate_on_host(N * group.world_size())? })
    }

    /// Tells `mine` to all.
    pub(crate) fn start(
        &self,
        group: &mut Group,
        tag: &str,
        mine: [f64; N],
    ) -> Result<Work<'static>> {
        self.region.write(group.rank() * N, &mine);
        Ok(group.tagged(tag).all_gather_in_place(self.region.full())?)
    }

    /// What each rank told, after the work was waited for.
    pub(crate) fn read(&self) -> Vec<[f64; N]> {
        let all = self.region.read(0..self.region.len());
        all.chunks_exact(N).map(|row| std::array::from_fn(|at| row[at])).collect()
    }
}

/// Told before the first bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "two answers to two questions")]
pub(crate) struct Head {
    /// Samples or tokens.
    pub(crate) weight: f64,
    /// Whether gradients are divided by weights; not told by a rank that only shadows the others.
    pub(crate) is_weighted: bool,
    /// Whether this rank has gradients of its own.
    pub(crate) takes_part: bool,
}

impl Head {
    pub(crate) const LEN: usize = 3;

    pub(crate) fn encode(self) -> [f64; Self::LEN] {
        let flag = |on: bool| if on { 1.0 } else { 0.0 };
        [self.weight, flag(self.is_weighted), flag(self.takes_part)]
    }

    pub(crate) fn decode(row: [f64; Self::LEN]) -> Self {
        let [weight, is_weighted, takes_part] = row;
        Self { weight, is_weighted: is_weighted > 0.0, takes_part: takes_part > 0.0 }
    }
}

/// Told after the last bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tail {
    /// The first parameter in which this rank found what is not finite, and how many elements of it.
    pub(crate) non_finite: Option<(usize, usize)>,
    /// A hash of the parameters, where it is time for it.
    pub(crate) fingerprint: Option<u32>,
    /// Steps of this library's optimizers, the last one's learning rate, and a hash of what else they were made with.
    pub(crate) stepped: (u64, f64, u32),
    /// From the end of the exchange before to the beginning of this backward, without waiting for others.
    pub(crate) outside: Duration,
    /// This rank's own part of backward, without waiting for others.
    pub(crate) backward: Duration,
}

impl Tail {
    pub(crate) const LEN: usize = 8;

    #[expect(clippy::cast_precision_loss, reason = "counts of elements are far below 2^53")]
    pub(crate) fn encode(self) -> [f64; Self::LEN] {
        let (parameter, count) =
            self.non_finite.map_or((0, 0), |(index, count)| (index + 1, count));
        [
            parameter as f64,
            count as f64,
            self.fingerprint.map_or(-1.0, f64::from),
            self.outside.as_secs_f64(),
            self.backward.as_secs_f64(),
            self.stepped.0 as f64,
            self.stepped.1,
            f64::from(self.stepped.2),
        ]
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole numbers that `encode` wrote"
    )]
    pub(crate) fn decode(row: [f64; Self::LEN]) -> Self {
        let [parameter, count, fingerprint, outside, backward, steps, lr, settings] = row;
        let seconds = |value: f64| Duration::try_from_secs_f64(value).unwrap_or_default();
        Self {
            non_finite: (parameter > 0.0).then(|| (parameter as usize - 1, count as usize)),
            fingerprint: (fingerprint >= 0.0).then_some(fingerprint as u32),
            outside: seconds(outside),
            backward: seconds(backward),
            stepped: (steps as u64, lr, settings as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_back_as_they_were() {
        let head = Head { weight: 12.5, is_weighted: true, takes_part: false };
        assert_eq!(Head::decode(head.encode()), head);
        let tail = Tail {
            non_finite: Some((0, 7)),
            fingerprint: Some(u32::MAX),
            outside: Duration::from_millis(250),
            backward: Duration::from_millis(500),
            stepped: (12, 0.125, u32::MAX),
        };
        assert_eq!(Tail::decode(tail.encode()), tail);
        assert_eq!(Tail::decode(Tail::default().encode()), Tail::default());
    }
}
