//! Do all ranks hold the same model? Every rank sends its signature to every other and comes to the same
//! verdict, so that all of them fail with the same words, or none.

use std::fmt::Write as _;

use phalanx_comm::Group;

use crate::{Error, Result};

/// Differences that are spelt out; the rest is counted.
const DIFFERENCES_SHOWN: usize = 8;

/// Compares the signature of all ranks, whose first line is the settings and the others a tensor each. Collective.
pub(crate) fn same_on_all_ranks(group: &mut Group, tag: &str, mine: &[String]) -> Result<()> {
    let gathered = group.tagged(tag).all_gather_bytes(mine.join("\n").as_bytes())?;
    let texts: Vec<String> =
        gathered.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let lines: Vec<Vec<&str>> = texts.iter().map(|text| text.split('\n').collect()).collect();
    match differences(&lines) {
        Some(report) => Err(Error::ModelMismatch { report }),
        None => Ok(()),
    }
}

/// Compares what is known of all ranks; the error says `what` differs. Pure.
pub(crate) fn compared(what: &'static str, all: &[Vec<String>]) -> Result<()> {
    let lines: Vec<Vec<&str>> =
        all.iter().map(|lines| lines.iter().map(String::as_str).collect()).collect();
    match differences(&lines) {
        Some(report) => Err(Error::RanksDiffer { what, report }),
        None => Ok(()),
    }
}

/// As [`same_on_all_ranks`], for what is no model: the error says `what` differs. Collective.
pub(crate) fn alike(
    group: &mut Group,
    tag: &str,
    what: &'static str,
    mine: &[String],
) -> Result<()> {
    same_on_all_ranks(group, tag, mine).map_err(|error| match error {
        Error::ModelMismatch { report } => Error::RanksDiffer { what, report },
        other => other,
    })
}

/// The report on `lines[rank]`, or nothing when all are equal. Pure.
fn differences(lines: &[Vec<&str>]) -> Option<String> {
    let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
    let differing: Vec<usize> = (0..longest)
        .filter(|&at| lines.iter().any(|rank_lines| rank_lines.get(at) != lines[0].get(at)))
        .collect();
    if differing.is_empty() {
        return None;
    }
    let mut report = String::new();
    for &at in differing.iter().take(DIFFERENCES_SHOWN) {
        // Writing to a String cannot fail.
        _ = match at.checked_sub(1) {
            None => writeln!(report, "  settings:"),
            Some(tensor) => writeln!(report, "  tensor {tensor}:"),
        };
        for (view, ranks) in views(lines, at) {
            _ = writeln!(report, "    {ranks}: {view}");
        }
    }
    if differing.len() > DIFFERENCES_SHOWN {
        _ = writeln!(report, "  and {} more", differing.len() - DIFFERENCES_SHOWN);
    }
    Some(report)
}

/// Who has what at position `at`: each distinct view with the ranks that hold it.
fn views<'a>(lines: &[Vec<&'a str>], at: usize) -> Vec<(&'a str, String)> {
    let mut seen: Vec<(&str, Vec<String>)> = Vec::new();
    for (rank, rank_lines) in lines.iter().enumerate() {
        let view = rank_lines.get(at).copied().unwrap_or("nothing");
        match seen.iter_mut().find(|(other, _)| *other == view) {
            Some((_, ranks)) => ranks.push(rank.to_string()),
            None => seen.push((view, vec![rank.to_string()])),
        }
    }
    let named = |ranks: &[String]| {
        let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
        format!("{noun} {}", ranks.join(", "))
    };
    seen.into_iter().map(|(view, ranks)| (view, named(&ranks))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_signatures_are_accepted() {
        assert_eq!(differences(&[vec!["s", "b"], vec!["s", "b"], vec!["s", "b"]]), None);
    }

    #[test]
    fn each_ranks_view_is_shown() {
        let report =
            differences(&[vec!["s", "a [3]", "b"], vec!["s", "a [4]", "b"], vec!["t", "a [3]"]])
                .unwrap();
        assert_eq!(
            report,
            "  settings:\n    ranks 0, 1: s\n    rank 2: t\n  \
             tensor 0:\n    ranks 0, 2: a [3]\n    rank 1: a [4]\n  \
             tensor 1:\n    ranks 0, 1: b\n    rank 2: nothing\n"
        );
    }

    #[test]
    fn many_differences_are_counted() {
        let left: Vec<String> = (0..20).map(|i| format!("p{i}")).collect();
        let right: Vec<String> = (0..20).map(|i| format!("q{i}")).collect();
        let borrow = |list: &'static [String]| list.iter().map(String::as_str).collect();
        let report = differences(&[borrow(left.leak()), borrow(right.leak())]).unwrap();
        assert!(report.ends_with("and 12 more\n"), "{report}");
    }
}
