//! What the loaders of all ranks must have alike: gathered by who can talk to the others, compared
//! here.
//!
//! A rank with other data, another seed or another list of damage would train on, and no one would
//! notice.

use std::fmt::Write as _;

use crate::error::{Error, Result};

/// What a loader would have in common with those of the other ranks: names and values. See
/// [`Loader::agreement`](crate::Loader::agreement).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    fields: Vec<(String, String)>,
}

/// The one field that is to differ: a rank's value is its place among the ranks.
const RANK: &str = "rank";

impl Agreement {
    pub(crate) fn of_rank(rank: usize) -> Self {
        Agreement::default().with(RANK, rank)
    }

    /// One more thing that ranks must have alike.
    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        // Fields are sent as lines, with a tab between name and value.
        let plain = |text: &str| text.replace(['\n', '\t'], " ");
        self.fields.push((plain(name), plain(&format!("{value}"))));
        self
    }

    /// To be sent to the others.
    pub fn to_bytes(&self) -> Vec<u8> {
        let lines = self.fields.iter().map(|(name, value)| format!("{name}\t{value}\n"));
        lines.collect::<String>().into_bytes()
    }

    /// Reads what another rank's [`to_bytes`](Self::to_bytes) gave. Lines that are no field are
    /// left out, so that the comparison finds them missing.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let fields = text.lines().filter_map(|line| line.split_once('\t'));
        Agreement { fields: fields.map(|(a, b)| (a.to_owned(), b.to_owned())).collect() }
    }

    fn get(&self, name: &str) -> &str {
        let found = self.fields.iter().find(|(own, _)| own == name);
        found.map_or("nothing", |(_, value)| value)
    }

    /// Compares what all ranks have, given in the order of ranks. The same verdict on every rank.
    ///
    /// # Errors
    /// [`Error::RanksDisagree`] names what differs, and who has what.
    pub fn compare(ranks: &[Agreement]) -> Result<()> {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in ranks.iter().flat_map(|one| &one.fields) {
            if !names.contains(&&**name) {
                names.push(name);
            }
        }
        let differences: Vec<String> =
            names.into_iter().filter_map(|name| difference(ranks, name)).collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::RanksDisagree { differences: differences.join("; ") })
    }
}

/// Who has what under a name, unless all have the same.
fn difference(ranks: &[Agreement], name: &str) -> Option<String> {
    if name == RANK {
        let wrong = (0..).zip(ranks).find(|(rank, own)| own.get(RANK) != i32::to_string(rank));
        return wrong.map(|(rank, own)| {
            format!("rank: the loader of rank {rank} was made for rank {}", own.get(RANK))
        });
    }
    let mut views: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, own) in ranks.iter().enumerate() {
        let value = own.get(name);
        match views.iter_mut().find(|(other, _)| *other == value) {
            Some((_, holders)) => holders.push(rank),
            None => views.push((value, vec![rank])),
        }
    }
    if views.len() < 2 {
        return None;
    }
    let mut text = format!("{name}:");
    for (at, (value, holders)) in views.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        _ = write!(text, "{comma} {} {value}", named(holders));
    }
    Some(text)
}

/// The first few of them; a thousand ranks would hide the message.
fn named(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = ranks.iter().take(SHOWN).map(usize::to_string).collect();
    let more = match ranks.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match ranks {
        [one] => format!("rank {one} has"),
        _ => format!("ranks {}{more} have", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rank: usize, seed: u64) -> Agreement {
        Agreement::of_rank(rank).with("seed", seed).with("tail", "drop")
    }

    #[test]
    fn equal_ranks_agree_and_bytes_are_read_back() {
        let all: Vec<Agreement> = (0..3).map(|rank| of(rank, 7)).collect();
        assert!(Agreement::compare(&all).is_ok());
        for one in &all {
            assert_eq!(Agreement::from_bytes(&one.to_bytes()), *one);
        }
        let odd = Agreement::default().with("a\tb", "c\nd");
        assert_eq!(Agreement::from_bytes(&odd.to_bytes()), odd);
    }

    #[test]
    fn a_difference_names_the_field_the_ranks_and_both_values() {
        let says = |all: &[Agreement], expected: &str| {
            let text = Agreement::compare(all).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
            assert!(!text.contains("tail: ") || expected.contains("nothing"), "{text}");
        };
        says(&[of(0, 7), of(1, 8), of(2, 7)], "seed: ranks 0, 2 have 7, rank 1 has 8");
        says(&[of(0, 7), of(0, 7)], "the loader of rank 1 was made for rank 0");
        let rubbish = Agreement::from_bytes(b"rubbish");
        says(&[of(0, 7), rubbish], "seed: rank 0 has 7, rank 1 has nothing");
        let many: Vec<Agreement> = (0..50).map(|rank| of(rank, u64::from(rank == 49))).collect();
        says(&many, "7 and 41 more have 0, rank 49 has 1");
    }
}
