//! What the NCCL backend reads of the environment. NCCL itself reads its own variables.

/// The file of libnccl (`PHALANX_NCCL_LIBRARY`), where the loader should not look for it.
pub fn nccl_library() -> Option<String> {
    read("PHALANX_NCCL_LIBRARY")
}

/// `NCCL_HOSTID`: the machine's name as far as NCCL is concerned.
pub fn nccl_host_id() -> Option<String> {
    read("NCCL_HOSTID")
}

/// What a version of NCCL is the first to know: a variable, and which values of it.
type Newer = (&'static str, i32, fn(&str) -> bool);

const NEWER: [Newer; 2] = [
    ("NCCL_LAUNCH_ORDER_IMPLICIT", 22_600, |value| value != "0"),
    ("NCCL_ALGO", 22_300, |value| {
        // `^`: not these; per collective (`allgather:pat;allreduce:ring`) from 2.24 on.
        let mut names = value.split([',', ':', ';', ' ']);
        !value.starts_with('^') && names.any(|name| name.eq_ignore_ascii_case("pat"))
    }),
];

/// What the environment asks of NCCL that `version` (22809 is 2.28.9) would not hear of; an older one ignores it in
/// silence.
pub fn nccl_lacks(version: i32) -> Option<String> {
    lacks(version, read)
}

fn lacks(version: i32, read: impl Fn(&str) -> Option<String>) -> Option<String> {
    let asks = |(variable, first, asks): &&Newer| {
        version < *first && read(variable).is_some_and(|value| asks(&value))
    };
    let (variable, first, _) = NEWER.iter().find(asks)?;
    let shown = |number: i32| format!("{}.{}", number / 10_000, number / 100 % 100);
    let value = read(variable).unwrap_or_default();
    Some(format!(
        "{variable}={value} is known from NCCL {} on: install a newer one than this {}, or leave it out",
        shown(*first),
        shown(version)
    ))
}

fn read(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether `PHALANX_REQUIRE` names what a test needs: then it fails instead of skipping itself.
#[cfg(any(test, feature = "testing"))]
#[must_use]
pub fn is_required(what: &str) -> bool {
    read("PHALANX_REQUIRE").unwrap_or_default().split(',').any(|name| name == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_library_does_not_know_is_refused() {
        let lacks = |version, variable: &str, value: &str| {
            lacks(version, |name| (name == variable).then(|| value.to_owned()))
        };
        const ORDER: &str = "NCCL_LAUNCH_ORDER_IMPLICIT";
        let text = lacks(22_503, ORDER, "1").unwrap();
        assert!(text.contains("from NCCL 2.26 on") && text.contains("this 2.25"), "{text}");
        assert_eq!(lacks(22_602, ORDER, "1"), None);
        assert_eq!(lacks(22_503, ORDER, "0"), None);
        assert_eq!(lacks(21_805, "NCCL_OTHER", "1"), None);
        for asked in ["PAT", "ring,pat", "allgather:pat;allreduce:ring"] {
            let refused = lacks(22_203, "NCCL_ALGO", asked).unwrap();
            assert!(refused.contains(&format!("NCCL_ALGO={asked}")), "{refused}");
            assert_eq!(lacks(22_304, "NCCL_ALGO", asked), None);
        }
        for others in ["^PAT", "Ring,Tree", "NVLSTree"] {
            assert_eq!(lacks(22_203, "NCCL_ALGO", others), None);
        }
    }
}
