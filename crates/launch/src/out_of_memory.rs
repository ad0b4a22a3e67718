//! Whether a rank that was killed was killed for lack of memory: what control groups count, of both versions.
//!
//! The kernel's out-of-memory killer sends SIGKILL, like anybody. It counts its victims, for the control group of each and for the
//! machine: a count that has risen since the ranks were started tells it from others who kill.
//!
//! # Source
//!
//! Linux, `Documentation/admin-guide/cgroup-v1/memory.rst` (`memory.oom_control`), `cgroup-v2.rst` (`memory.events`, `memory.max`) and
//! `mm/oom_kill.c` (`oom_kill` of `/proc/vmstat`).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::control_group::{enclosing, field, Version};

/// What the out-of-memory killer has counted.
#[derive(Clone, Copy, Debug, Default)]
struct Victims {
    /// In this launcher's control group, where its ranks are too.
    of_group: Option<u64>,
    of_machine: Option<u64>,
}

/// A rank that was killed for lack of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// The limit of the control group; `None`: none is known, or the machine's memory was used up.
    pub limit_bytes: Option<u64>,
    /// What the rank had in memory when it was looked at last.
    pub resident_bytes: Option<u64>,
    /// Whether the count of its control group has risen; else that of the machine has, and the victim may be another process.
    pub is_of_group: bool,
}

/// The counts when the ranks were started.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    /// `/` but in tests.
    root: PathBuf,
    before: Victims,
}

impl MemoryWatch {
    pub(crate) fn new() -> Self {
        Self::under(Path::new("/"))
    }

    fn under(root: &Path) -> Self {
        Self { root: root.to_owned(), before: victims(root) }
    }

    /// The ranks are started (again).
    pub(crate) fn begin(&mut self) {
        self.before = victims(&self.root);
    }

    /// What is known of a rank that SIGKILL has ended, and that had so much in memory.
    pub(crate) fn verdict(&self, resident_bytes: Option<u64>) -> Option<OutOfMemory> {
        let now = victims(&self.root);
        let has_risen =
            |before: Option<u64>, now: Option<u64>| before.zip(now).is_some_and(|(b, n)| n > b);
        if has_risen(self.before.of_group, now.of_group) {
            let limit_bytes = limit(&self.root);
            return Some(OutOfMemory { limit_bytes, resident_bytes, is_of_group: true });
        }
        has_risen(self.before.of_machine, now.of_machine).then_some(OutOfMemory {
            limit_bytes: None,
            resident_bytes,
            is_of_group: false,
        })
    }
}

/// What a process has in memory. `None`: it has ended.
pub(crate) fn resident_bytes(process: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    Some(field(&text, "VmRSS:")? * 1024)
}

fn victims(root: &Path) -> Victims {
    let of = |path: PathBuf| field(&fs::read_to_string(path).ok()?, "oom_kill");
    let mut groups = enclosing(root, "memory").into_iter();
    let of_group = groups.find_map(|(folder, version)| {
        of(folder.join(match version {
            Version::One => "memory.oom_control",
            Version::Two => "memory.events",
        }))
    });
    Victims { of_group, of_machine: of(root.join("proc/vmstat")) }
}

/// The least limit of the control groups that this process is in.
fn limit(root: &Path) -> Option<u64> {
    let of = |(folder, version): (PathBuf, Version)| -> Option<u64> {
        let name = match version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        // "max" is no number, and version 1 has an absurd one: no limit.
        let bytes = fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok();
        bytes.filter(|bytes| *bytes < 1 << 62)
    };
    enclosing(root, "memory").into_iter().filter_map(of).min()
}

fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_of_group {
            "out of memory: its control group's count of such kills has risen"
        } else {
            "probably out of memory: the machine's count of such kills has risen"
        })?;
        if let Some(bytes) = self.limit_bytes {
            write!(f, ", the limit is {}", mib(bytes))?;
        }
        if let Some(bytes) = self.resident_bytes {
            write!(f, ", the rank had {} when last looked at", mib(bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_count_that_rises_is_told_in_both_versions() {
        let cases = [
            (
                "4:memory:/a/b\n1:cpu:/\n",
                "sys/fs/cgroup/memory/",
                "memory.oom_control",
                "memory.limit_in_bytes",
            ),
            ("0::/a/b\n", "sys/fs/cgroup/", "memory.events", "memory.max"),
        ];
        for (groups, mount, events, limit) in cases {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path();
            write(root, "proc/self/cgroup", groups);
            write(root, "proc/vmstat", "nr_free_pages 7\noom_kill 3\n");
            write(root, &format!("{mount}a/b/{events}"), "low 0\noom 5\noom_kill 2\n");
            write(root, &format!("{mount}a/b/{limit}"), "max\n");
            write(root, &format!("{mount}a/{limit}"), "67108864\n");
            write(root, &format!("{mount}{limit}"), "9223372036854771712\n");
            let mut watch = MemoryWatch::under(root);
            assert_eq!(watch.verdict(None), None);
            write(root, &format!("{mount}a/b/{events}"), "low 0\noom 5\noom_kill 3\n");
            let told = watch.verdict(Some(63 << 20)).unwrap().to_string();
            assert_eq!(
                told,
                "out of memory: its control group's count of such kills has risen, the limit is 64.0 MiB, the rank had 63.0 MiB when last looked at"
            );
            // It was told: what happens from here on is another matter.
            watch.begin();
            assert_eq!(watch.verdict(None), None);
            write(root, "proc/vmstat", "nr_free_pages 7\noom_kill 4\n");
            assert!(!watch.verdict(None).unwrap().is_of_group);
        }
    }

    #[test]
    fn in_a_container_the_root_of_its_groups_counts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        write(root, "proc/self/cgroup", "0::/not/visible/here\n");
        write(root, "sys/fs/cgroup/memory.events", "oom_kill 0\n");
        write(root, "sys/fs/cgroup/memory.max", "1048576\n");
        let watch = MemoryWatch::under(root);
        write(root, "sys/fs/cgroup/memory.events", "oom_kill 1\n");
        assert_eq!(watch.verdict(None).unwrap().limit_bytes, Some(1 << 20));
    }

    #[test]
    fn a_system_that_does_not_count_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MemoryWatch::under(folder.path()).verdict(Some(1)), None);
        assert!(resident_bytes(i32::try_from(std::process::id()).unwrap()).unwrap() > 0);
        assert_eq!(resident_bytes(-1), None);
    }
}
