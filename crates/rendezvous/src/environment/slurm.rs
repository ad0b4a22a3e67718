//! Slurm's compact notations, expanded without `scontrol` (containers do not have it).
//!
//! Source: `hostlist(3)` of LLNL and Slurm's `src/common/hostlist.c` for node lists; `sbatch(1)` for tasks per node.

/// Most nodes that a list may expand to; the list comes from the environment, and `n[0-999999999]` must not eat the memory.
const NODES_MAX: usize = 1 << 17;

/// Expands `n[1-4]`, `a[01-03,07]b,c2`, `r[1-2]n[1-3]` into host names, in order. `None` when ill-formed.
pub(super) fn expand_nodes(list: &str) -> Option<Vec<String>> {
    let mut nodes = Vec::new();
    for item in split_outside_brackets(list)? {
        let expanded = expand_item(item)?;
        if nodes.len() + expanded.len() > NODES_MAX {
            return None;
        }
        nodes.extend(expanded);
    }
    Some(nodes)
}

/// Expands `5,1(x3)` into `[5, 1, 1, 1]`. `None` when ill-formed.
pub(super) fn expand_tasks(list: &str) -> Option<Vec<usize>> {
    let mut tasks = Vec::new();
    for item in list.split(',') {
        let (count, times) = match item.split_once("(x") {
            None => (number(item)?, 1),
            Some((count, rest)) => (number(count)?, number(rest.strip_suffix(')')?)?),
        };
        if count == 0 || times == 0 || tasks.len().checked_add(times)? > NODES_MAX {
            return None;
        }
        tasks.extend(std::iter::repeat_n(count, times));
    }
    Some(tasks)
}

/// Digits and nothing else: `parse` alone would take `+5`.
fn number(text: &str) -> Option<usize> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let mut items = Vec::new();
    let mut inside = false;
    let mut start = 0;
    for (at, byte) in list.bytes().enumerate() {
        match byte {
            b'[' if !inside => inside = true,
            b']' if inside => inside = false,
            b'[' | b']' => return None,
            b',' if !inside => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&list[start..]);
    (!inside).then_some(items)
}

/// One item: literal text and any number of bracket groups; the last group runs fastest.
fn expand_item(item: &str) -> Option<Vec<String>> {
    if item.is_empty() {
        return None;
    }
    let mut names = vec![String::new()];
    let mut rest = item;
    while let Some((literal, tail)) = rest.split_once('[') {
        let (inner, tail) = tail.split_once(']')?;
        let indices = expand_ranges(inner)?;
        if names.len().checked_mul(indices.len())? > NODES_MAX {
            return None;
        }
        names = names
            .iter()
            .flat_map(|name| indices.iter().map(move |index| format!("{name}{literal}{index}")))
            .collect();
        rest = tail;
    }
    for name in &mut names {
        name.push_str(rest);
    }
    Some(names)
}

/// `01-03,07` into `01 02 03 07`: the width of the first bound is the zero padding.
fn expand_ranges(inner: &str) -> Option<Vec<String>> {
    let mut indices = Vec::new();
    for range in inner.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let width = low.len();
        let (low, high) = (number(low)?, number(high)?);
        if high < low || high - low >= NODES_MAX - indices.len() {
            return None;
        }
        indices.extend((low..=high).map(|index| format!("{index:0width$}")));
    }
    Some(indices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: &str, expected: &[&str]) {
        assert_eq!(
            expand_nodes(list).as_deref(),
            Some(expected)
                .map(|e| e.iter().map(ToString::to_string).collect::<Vec<_>>())
                .as_deref(),
            "{list}"
        );
    }

    #[test]
    fn node_lists_expand_in_order_with_their_padding() {
        check("n1", &["n1"]);
        check("n[1-4]", &["n1", "n2", "n3", "n4"]);
        check("a[01-03,07],b2", &["a01", "a02", "a03", "a07", "b2"]);
        check("n[9-11]", &["n9", "n10", "n11"]);
        check("n[099-101]", &["n099", "n100", "n101"]);
        check("r[1-2]n[1-2]x", &["r1n1x", "r1n2x", "r2n1x", "r2n2x"]);
        check("host.domain-with-dash", &["host.domain-with-dash"]);
    }

    #[test]
    fn ill_formed_node_lists_are_refused() {
        for list in [
            "",
            ",",
            "a,",
            "n[",
            "n]",
            "n[1-",
            "n[1-2",
            "n[[1]]",
            "n[2-1]",
            "n[a-b]",
            "n[]",
            "n[1,]",
            "n[+1-2]",
            "n[0-999999999]",
            "n[0-99999]m[0-99999]",
        ] {
            assert_eq!(expand_nodes(list), None, "{list}");
        }
    }

    #[test]
    fn tasks_per_node_may_be_uneven() {
        assert_eq!(expand_tasks("5,1(x3)"), Some(vec![5, 1, 1, 1]));
        assert_eq!(expand_tasks("2"), Some(vec![2]));
        for list in ["", "a", "2(x", "2(x0)", "0", "2(3)", "1(x99999999999)", "-1"] {
            assert_eq!(expand_tasks(list), None, "{list}");
        }
    }
}
