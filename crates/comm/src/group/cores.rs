//! Which of this machine's cores are this rank's to compute with.
//!
//! Launchers differ: torchrun starts ranks that may run everywhere, Open MPI and Slurm often bind each to cores of its own, or all
//! of a socket to that socket. So each core is divided by the ranks that may run on it, whoever has bound them.
//! Source: `proc(5)` for `Cpus_allowed_list` in `/proc/PID/status`.

use super::Group;

/// More than any kernel knows.
const CORE_MAX: usize = 1 << 16;

impl Group {
    /// How many of this machine's cores are this rank's: of each that it may run on the part that falls to it when
    /// all ranks of the machine that may run there share it, of whatever group this one is a part. Less where a control group's
    /// quota leaves less; at least 1. What other programs take does not count.
    #[must_use]
    pub fn core_share(&self) -> usize {
        let usable = std::thread::available_parallelism().map_or(1, usize::from);
        let mine = std::process::id();
        let Some(own) = allowed(mine) else { return (usable / self.neighbours.len()).max(1) };
        // Who cannot be seen (in another namespace) is taken to run where this rank does.
        let of = |pid: &u32| allowed(*pid).unwrap_or_else(|| own.clone());
        // This process is among them.
        let all: Vec<Vec<usize>> = self.neighbours.iter().map(of).collect();
        share(&own, &all, usable)
    }

    /// How many ranks this machine has, of the group of all ranks: emulated nodes are on one machine.
    #[must_use]
    pub fn machine_world_size(&self) -> usize {
        self.neighbours.len()
    }
}

/// The cores that a process of this machine may run on.
fn allowed(pid: u32) -> Option<Vec<usize>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cores(list.trim()).filter(|cores| !cores.is_empty())
}

/// The numbers of a list like `0-3,8,10-11`.
fn cores(list: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= CORE_MAX {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// The share of a rank that may run on `own`, of which a quota leaves `usable`; `all` are the cores of every rank of the
/// machine, this one included.
fn share(own: &[usize], all: &[Vec<usize>], usable: usize) -> usize {
    // In 1/720720 of a core, which up to 16 ranks divide without a rest, and more of them nearly so.
    const CORE: usize = 720_720;
    let ranks_on = |core: &usize| all.iter().filter(|cores| cores.contains(core)).count().max(1);
    let parts: usize = own.iter().map(|core| CORE / ranks_on(core)).sum();
    let (of, left) = (own.len().max(1), usable.min(own.len()));
    // Rounded to the nearest part, for rests that were lost.
    let parts = parts * left / of + own.len();
    (parts / CORE).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(cores("0-3,8,10-11"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(cores("7"), Some(vec![7]));
        for garbage in ["", "a", "1-", "0-4294967295", "3,,4"] {
            assert_eq!(cores(garbage), None, "{garbage}");
        }
        assert!(!allowed(std::process::id()).expect("/proc").is_empty());
        assert_eq!(allowed(u32::MAX), None);
    }

    #[test]
    fn ranks_that_may_run_everywhere_share_evenly() {
        let machine: Vec<usize> = (0..64).collect();
        for (ranks, expected) in [(1, 64), (2, 32), (3, 21), (8, 8), (17, 3), (64, 1), (100, 1)] {
            assert_eq!(share(&machine, &vec![machine.clone(); ranks], 64), expected, "{ranks}");
        }
    }

    #[test]
    fn a_rank_that_is_bound_has_its_cores_alone() {
        let bound: Vec<Vec<usize>> =
            (0..8).map(|rank| (rank * 8..rank * 8 + 8).collect()).collect();
        for own in &bound {
            assert_eq!(share(own, &bound, 8), 8);
        }
    }

    #[test]
    fn ranks_of_a_socket_share_that_socket() {
        let socket = |number: usize| -> Vec<usize> { (number * 32..number * 32 + 32).collect() };
        let all: Vec<Vec<usize>> = (0..8).map(|rank| socket(rank / 4)).collect();
        assert_eq!(share(&socket(0), &all, 32), 8);
    }

    #[test]
    fn a_quota_is_shared_as_well() {
        let machine: Vec<usize> = (0..64).collect();
        assert_eq!(share(&machine, &vec![machine.clone(); 4], 16), 4);
        assert_eq!(share(&machine, &vec![machine.clone(); 4], 2), 1);
    }
}
