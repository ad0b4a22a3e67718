//! The control groups that this process and its ranks are in, of both versions, and how many processes they leave room for.
//!
//! # Source
//!
//! Linux, `Documentation/admin-guide/cgroup-v1/pids.rst` and `cgroup-v2.rst`.

use std::fs;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Version {
    One,
    Two,
}

/// The folders of the groups by which `controller` limits this process, the innermost first. Inside a container the path may not be
/// visible; its root is. `root` is `/` but in tests.
pub(crate) fn enclosing(root: &Path, controller: &str) -> Vec<(PathBuf, Version)> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let all = root.join("sys/fs/cgroup");
        let (mount, version) = if controllers.is_empty() {
            (all, Version::Two)
        } else if controllers.split(',').any(|name| name == controller) {
            (all.join(controller), Version::One)
        } else {
            continue;
        };
        let innermost = mount.join(path.trim_start_matches('/'));
        let enclosing = innermost.ancestors().take_while(|folder| folder.starts_with(&mount));
        groups.extend(enclosing.map(|folder| (folder.to_owned(), version)));
    }
    groups
}

/// The number behind a name at the start of a line.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let (_, value) = lines.find(|(key, _)| *key == name)?;
    value.split_whitespace().next()?.parse().ok()
}

/// A group that has a limit of processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Crowd {
    pub(crate) group: PathBuf,
    pub(crate) limit: u64,
    /// How many there are, threads included.
    pub(crate) current: u64,
}

/// The group that has the least room for processes. `None`: none has a limit, as far as can be seen.
pub(crate) fn most_crowded(root: &Path) -> Option<Crowd> {
    let of = |(group, _): (PathBuf, Version)| {
        let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse().ok();
        // "max" is no number: no limit.
        let (limit, current) = (number("pids.max")?, number("pids.current")?);
        Some(Crowd { group, limit, current })
    };
    let crowds = enclosing(root, "pids").into_iter().filter_map(of);
    crowds.min_by_key(|crowd| crowd.limit.saturating_sub(crowd.current))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_with_the_least_room_is_found_in_both_versions() {
        for (groups, mount) in
            [("8:pids:/a/b\n", "sys/fs/cgroup/pids"), ("0::/a/b\n", "sys/fs/cgroup")]
        {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path();
            fs::create_dir_all(root.join("proc/self")).unwrap();
            fs::write(root.join("proc/self/cgroup"), groups).unwrap();
            assert_eq!(most_crowded(root), None);
            let innermost = root.join(mount).join("a/b");
            fs::create_dir_all(&innermost).unwrap();
            for (group, limit, current) in
                [("", "max", "90"), ("a", "100", "95"), ("a/b", "20", "7")]
            {
                fs::write(root.join(mount).join(group).join("pids.max"), limit).unwrap();
                fs::write(root.join(mount).join(group).join("pids.current"), current).unwrap();
            }
            let expected = Crowd { group: root.join(mount).join("a"), limit: 100, current: 95 };
            assert_eq!(most_crowded(root), Some(expected));
        }
    }
}
