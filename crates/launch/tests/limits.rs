//! What a control group does to a job: a rank that is killed for lack of memory (F29), no room for its ranks (F36).

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Finished, Job};

/// A control group with a limit; removed on drop.
struct ControlGroup(PathBuf);

impl ControlGroup {
    /// In the hierarchy that version 1 has for `controller`, or in the single one of version 2.
    fn new(controller: &str, name: &str, limits: [(&str, &str); 2]) -> Result<Self, String> {
        let first = Path::new("/sys/fs/cgroup").join(controller);
        let (parent, (file, limit)) = match first.join("cgroup.procs").exists() {
            true => (first, limits[0]),
            false => (PathBuf::from("/sys/fs/cgroup"), limits[1]),
        };
        let group = Self(parent.join(format!("phalanx-{name}-{}", std::process::id())));
        fs::create_dir(&group.0).map_err(|error| format!("{}: {error}", group.0.display()))?;
        let limited = fs::write(group.0.join(file), limit);
        limited.map_err(|error| format!("{file}: {error}"))?;
        // What memory does not hold must not go to swap space, where there is some.
        for (swap, most) in [("memory.memsw.limit_in_bytes", limit), ("memory.swap.max", "0")] {
            let path = group.0.join(swap);
            if controller == "memory" && path.exists() {
                fs::write(path, most).map_err(|error| format!("{swap}: {error}"))?;
            }
        }
        Ok(group)
    }

    /// The launcher and its ranks in this group, to their end.
    fn run(&self, args: &str) -> Finished {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join("cgroup.procs"));
        let launcher = support::command(args);
        command.arg(launcher.get_program()).args(launcher.get_args()).stdin(Stdio::null());
        for (name, value) in launcher.get_envs() {
            assert_eq!(value, None, "only removed");
            command.env_remove(name);
        }
        Job::of(command).finish()
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // Its processes are gone: they were waited for.
        drop(fs::remove_dir(&self.0));
    }
}

#[expect(clippy::print_stderr, reason = "a test that is left out says so")]
fn control_group(controller: &str, name: &str, limits: [(&str, &str); 2]) -> Option<ControlGroup> {
    let group = ControlGroup::new(controller, name, limits);
    group.inspect_err(|error| eprintln!("SKIPPED: no control group here ({error})")).ok()
}

#[test]
fn a_rank_that_is_killed_for_lack_of_memory_is_reported_as_that() {
    let limits = [("memory.limit_in_bytes", "67108864"), ("memory.max", "67108864")];
    let Some(group) = control_group("memory", "memory", limits) else { return };
    let finished = group.run("--nproc-per-node 2 --act eat --rank 1");
    assert_eq!(finished.code, Some(70), "{:#?}", finished.errors);
    let report = finished.report();
    for part in [
        "error[PHX0701]: rank 1 on ",
        "signal 9 (SIGKILL)",
        ": out of memory: its control group's count of such kills has risen, the limit is 64.0 MiB",
        "help: a smaller micro-batch",
    ] {
        assert!(report.contains(part), "{part:?}: {report}");
    }
}

/// Beside it somebody else kills with the same signal, in a group in which nobody has run out of memory.
#[test]
fn a_rank_that_somebody_kills_has_not_run_out_of_memory() {
    let limits = [("memory.limit_in_bytes", "1073741824"), ("memory.max", "1073741824")];
    let Some(group) = control_group("memory", "killed", limits) else { return };
    let finished = group.run("--nproc-per-node 2 --act kill --rank 1");
    let report = finished.report();
    assert!(report.contains("signal 9 (SIGKILL)"), "{report}");
    assert!(!report.contains(": out of memory: "), "{report}");
}

#[test]
fn too_few_processes_are_said_before_a_rank_begins() {
    let limits = [("pids.max", "24"), ("pids.max", "24")];
    let Some(group) = control_group("pids", "pids", limits) else { return };
    let finished = group.run("--nproc-per-node 40 --act wait");
    assert_eq!(finished.code, Some(71), "{:#?}", finished.errors);
    let said = finished.errors.join("\n");
    assert!(said.contains("allows 24 processes and threads and has "), "{said}");
    assert!(said.contains("40 ranks need at least 40 more"), "{said}");
    assert!(said.contains("raise its pids.max"), "{said}");
    assert_eq!(finished.output, Vec::<String>::new(), "no rank has begun");
}

#[test]
fn with_room_for_its_processes_it_is_a_job_like_any() {
    let wide = [("pids.max", "200"), ("pids.max", "200")];
    let Some(roomy) = control_group("pids", "room", wide) else { return };
    let good = roomy.run("--nproc-per-node 4 --act environment");
    assert_eq!(good.code, Some(0), "{:#?}", good.errors);
}
