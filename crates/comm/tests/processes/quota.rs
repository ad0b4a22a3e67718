//! Ranks that get little CPU time are slow, not dead: a control group holds them to half a core.
//!
//! `PHALANX_STEPS_FOR=3600 cargo test --release -p phalanx-comm --test processes -- --ignored --nocapture half_a_core`

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::silence::steps_for;
use crate::support::Ranks;

/// Half of one core, for all processes of the test together.
const QUOTA_US: u64 = 50_000;
const PERIOD_US: u64 = 100_000;

/// A control group with a CPU quota; removed on drop.
struct Quota(PathBuf);

impl Quota {
    /// In the hierarchy of its own that version 1 has for CPU time, or in the single one of version 2.
    fn new() -> Result<Self, String> {
        let name = format!("phalanx-test-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/cpu");
        let is_first = first.join("cpu.cfs_quota_us").exists();
        let path = if is_first { first } else { Path::new("/sys/fs/cgroup") }.join(name);
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let quota = Self(path);
        if is_first {
            quota.write("cpu.cfs_period_us", &PERIOD_US.to_string())?;
            quota.write("cpu.cfs_quota_us", &QUOTA_US.to_string())?;
        } else {
            quota.write("cpu.max", &format!("{QUOTA_US} {PERIOD_US}"))?;
        }
        Ok(quota)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), String> {
        fs::write(self.0.join(file), text).map_err(|error| format!("{file}: {error}"))
    }

    fn throttled(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("cpu.stat")).expect("the group is ours");
        let line = text.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        line.and_then(|count| count.parse().ok()).expect("a count")
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Its processes are gone: they were waited for.
        drop(fs::remove_dir(&self.0));
    }
}

#[test]
#[ignore = "takes as long as PHALANX_STEPS_FOR says: the figures of docs/errors.md"]
fn ranks_on_half_a_core_miss_nobody() {
    let quota = match Quota::new() {
        Ok(quota) => quota,
        Err(error) => {
            eprintln!("SKIPPED: no control group for CPU time here ({error})");
            return;
        }
    };
    let start = Instant::now();
    let jobs = ["auto", "tcp"].map(|link| {
        let ranks = Ranks::start("counts", 2, link);
        for rank in 0..2 {
            quota.write("cgroup.procs", &ranks.pid(rank).to_string()).expect("the group is ours");
        }
        ranks
    });
    // The second job is not waited for before the first has ended, which takes as long.
    for ranks in jobs {
        for ended in ranks.finish(steps_for() + Duration::from_secs(60)) {
            let line = ended.output.lines().find(|line| line.contains("no error in"));
            println!("{}", line.unwrap_or_else(|| panic!("{}", ended.output)));
        }
    }
    let throttled = quota.throttled();
    println!("{:.0?}, throttled in {throttled} periods", start.elapsed());
    assert!(throttled > 20, "the quota had no effect");
}
