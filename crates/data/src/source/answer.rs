//! Pure: what a web server's answer to a range request means.
//! Source: RFC 9110, sections 14.4 (Content-Range) and 15 (status codes).

/// Why an answer is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Asking again may help.
    Later(String),
    /// It will not.
    Never(String),
    /// There is no such file.
    Absent(String),
    /// It is another file by now.
    Changed(String),
}

/// What an answer to the request for `start..end` brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    /// Bytes that follow, from `start` on; at least one and at most as many as were asked for.
    pub(super) len: u64,
    /// Size of the whole file.
    pub(super) total: u64,
}

/// Reads status and `Content-Range`. `start` is below `end`.
pub(super) fn part(
    status: u16,
    content_range: Option<&str>,
    start: u64,
    end: u64,
) -> Result<ContentRange, Refusal> {
    match status {
        206 => {}
        200 => {
            return Err(Refusal::Never(
                "the server sends whole files: it must support range requests".to_owned(),
            ))
        }
        408 | 425 | 429 | 500..=599 => {
            return Err(Refusal::Later(format!("the server answered {status}")))
        }
        412 | 416 => {
            return Err(Refusal::Changed(format!(
                "the server answered {status} to bytes {start} to {end}"
            )))
        }
        404 | 410 => {
            return Err(Refusal::Absent(format!("the server answered {status}: check the address")))
        }
        401 | 403 => {
            return Err(Refusal::Never(format!(
                "the server answered {status}: check the address and who may read it, and who may list the folder, for some servers answer so for files that are not there"
            )))
        }
        _ => {
            return Err(Refusal::Never(format!(
                "the server answered {status}: check the address and who may read it"
            )))
        }
    }
    let value = content_range.unwrap_or("");
    let bad = || Refusal::Never(format!("it sent bytes `{value}`, not {start} to {end}"));
    let (first, last, total) = content_range.and_then(numbers).ok_or_else(bad)?;
    if first != start || last < first || last >= end || last >= total {
        return Err(bad());
    }
    Ok(ContentRange { len: last - first + 1, total })
}

/// `bytes 0-99/1234`
fn numbers(value: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| -> Option<u64> {
        text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok())?
    };
    Some((number(first)?, number(last)?, number(total)?))
}

/// The size in `bytes */1234`, which comes with status 416.
pub(super) fn size_of_unsatisfied(value: &str) -> Option<u64> {
    value.trim().strip_prefix("bytes */")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_begins_where_it_was_asked_for_and_is_no_longer() {
        assert_eq!(part(206, Some("bytes 5-9/20"), 5, 10), Ok(ContentRange { len: 5, total: 20 }));
        assert_eq!(part(206, Some("bytes 5-5/20"), 5, 10), Ok(ContentRange { len: 1, total: 20 }));
        let bad = [
            "bytes 4-9/20",
            "bytes 5-10/20",
            "bytes 5-4/20",
            "bytes 5-9/9",
            "bytes 5-9/*",
            "5-9/20",
            "bytes 5-9",
            "bytes 5-9/-1",
            "bytes +5-9/20",
            "",
            "bytes 99999999999999999999-1/2",
        ];
        for value in bad {
            let answer = part(206, Some(value), 5, 10);
            assert!(matches!(answer, Err(Refusal::Never(_))), "{value}: {answer:?}");
        }
        assert!(matches!(part(206, None, 5, 10), Err(Refusal::Never(_))));
    }

    #[test]
    fn statuses_say_whether_asking_again_helps() {
        for status in [408, 429, 500, 502, 503, 504] {
            assert!(matches!(part(status, None, 0, 1), Err(Refusal::Later(_))));
        }
        for status in [200, 204, 301, 400, 401, 403] {
            assert!(matches!(part(status, None, 0, 1), Err(Refusal::Never(_))));
        }
        for status in [404, 410] {
            assert!(matches!(part(status, None, 0, 1), Err(Refusal::Absent(_))));
        }
        assert!(matches!(part(416, Some("bytes */3"), 5, 6), Err(Refusal::Changed(_))));
        assert_eq!(size_of_unsatisfied("bytes */0"), Some(0));
    }

    proptest::proptest! {
        #[test]
        fn any_answer_is_a_part_or_a_refusal(
            status: u16, value in ".{0,40}", start in 0..u64::MAX - 1000, len in 1..1000_u64
        ) {
            if let Ok(part) = part(status, Some(&value), start, start + len) {
                proptest::prop_assert!((1..=len).contains(&part.len));
            }
        }

        #[test]
        fn any_numbers_are_a_part_or_a_refusal(a: u64, b: u64, total: u64, start in 0..50_u64, len in 1..50_u64) {
            for (a, b) in [(a, b), (start, b % 100), (a % 100, b % 100)] {
                let value = format!("bytes {a}-{b}/{total}");
                if let Ok(part) = part(206, Some(&value), start, start + len) {
                    proptest::prop_assert!((1..=len).contains(&part.len) && start + part.len <= total);
                }
            }
        }
    }
}
