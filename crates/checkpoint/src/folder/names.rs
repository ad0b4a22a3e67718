//! What folders of checkpoints are called. Pure.
//!
//! | name | what |
//! |---|---|
//! | `step-00000120` | a checkpoint |
//! | `step-00000120.old-…` | a checkpoint that another of the same step takes the place of; as good as the first where that is not there |
//! | `step-00000120.tmp-…` | one that is being written or removed: never read |

/// What a folder is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Partial,
    Replaced,
    Complete,
}

/// The name of a checkpoint.
pub(crate) fn complete(step: u64) -> String {
    format!("step-{step:08}")
}

/// A name for what is not complete. `nonce` keeps the leftovers of other runs apart.
pub(crate) fn partial(step: u64, nonce: u64) -> String {
    format!("{}.tmp-{nonce:016x}", complete(step))
}

/// A name for what is about to be replaced.
pub(crate) fn replaced(step: u64, nonce: u64) -> String {
    format!("{}.old-{nonce:016x}", complete(step))
}

/// What a name of ours says.
pub(crate) fn parse(name: &str) -> Option<(u64, Kind)> {
    let digits = name.strip_prefix("step-")?;
    let len = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let (digits, end) = digits.split_at(len);
    let step: u64 = digits.parse().ok()?;
    let kind = match end {
        "" => Kind::Complete,
        end if end.starts_with(".old-") => Kind::Replaced,
        end if end.starts_with(".tmp-") => Kind::Partial,
        _ => return None,
    };
    // `step-120` and `step-0000000120` are somebody else's.
    name.starts_with(&complete(step)).then_some((step, kind)).filter(|_| digits.len() >= 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_step_and_kind_and_others_nothing() {
        for step in [0, 120, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(parse(&complete(step)), Some((step, Kind::Complete)));
            assert_eq!(parse(&partial(step, 7)), Some((step, Kind::Partial)));
            assert_eq!(parse(&replaced(step, u64::MAX)), Some((step, Kind::Replaced)));
        }
        for other in
            ["step-120", "step-000000120", "step-", "step-00000120.bak", "latest", "step-0000012x"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
