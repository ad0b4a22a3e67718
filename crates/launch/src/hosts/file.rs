//! A file of hosts: who the nodes of a job are. Pure.
//!
//! Source: Open MPI's and `DeepSpeed`'s hostfiles: one host a line, `slots=N` for its ranks, `#` begins a comment.

/// A host, and how many ranks it starts (`None`: what the flags say).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) slots: Option<usize>,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadLine {
    /// From 1.
    pub(crate) number: usize,
    pub(crate) text: String,
}

/// The hosts, in the order of their lines: the first one is node 0.
pub(crate) fn parse(text: &str) -> Result<Vec<Host>, BadLine> {
    let mut hosts = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let content = line.split('#').next().unwrap_or_default().trim();
        if content.is_empty() {
            continue;
        }
        let bad = || BadLine { number: at + 1, text: line.trim().to_owned() };
        hosts.push(host(content).ok_or_else(bad)?);
    }
    Ok(hosts)
}

fn host(content: &str) -> Option<Host> {
    let mut words = content.split_ascii_whitespace();
    let name = words.next()?;
    // What begins with a dash would be an option to ssh.
    let is_name = !name.starts_with('-') && name.bytes().all(is_of_name);
    let slots = match words.next() {
        None => None,
        Some(word) => Some(word.strip_prefix("slots=")?.parse().ok().filter(|slots| *slots > 0)?),
    };
    (is_name && words.next().is_none()).then(|| Host { name: name.to_owned(), slots })
}

/// Names, addresses of both kinds, and `user@host`.
const fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'@' | b'%')
}

/// A word as a POSIX shell reads it back.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/=:,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_stand_one_a_line_with_or_without_slots() {
        let text =
            "# the cluster\nn0 slots=8\n\n  me@n1  # no slots\n10.0.0.3 slots=4\nfe80::1%eth0\n";
        let host = |name: &str, slots| Host { name: name.to_owned(), slots };
        let expected = [
            host("n0", Some(8)),
            host("me@n1", None),
            host("10.0.0.3", Some(4)),
            host("fe80::1%eth0", None),
        ];
        assert_eq!(parse(text).expect("well-formed"), expected);
        assert_eq!(parse("\n# nobody\n"), Ok(vec![]));
    }

    #[test]
    fn a_bad_line_is_named() {
        for line in
            ["n0 slots=0", "n0 slots=a", "n0 8", "n0 slots=2 more", "-oProxyCommand=x", "a;b"]
        {
            let bad = BadLine { number: 2, text: line.to_owned() };
            assert_eq!(parse(&format!("ok\n{line}\n")), Err(bad), "{line}");
        }
    }

    #[test]
    fn words_survive_a_shell() {
        for (word, expected) in
            [("a/b-c=1", "a/b-c=1"), ("", "''"), ("a b", "'a b'"), ("it's $x", r"'it'\''s $x'")]
        {
            assert_eq!(quoted(word), expected);
        }
    }
}
