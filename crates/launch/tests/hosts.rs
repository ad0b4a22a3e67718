//! Jobs on the hosts of a file, with a stand-in for ssh that starts everything here.

mod support;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use phalanx_comm::testing::free_port;
use rustix::process::Signal;
use support::{assert_gone, command, sorted, Job, LIMIT};

/// It leaves its command line in a file, and fails for the host `down`.
const STAND_IN: &str = "#!/bin/sh\nhost=$1; shift\necho \"$host $*\" >> \"$0.log\"\n\
    [ $host = down ] && { echo no route to host >&2; exit 255; }\nexec sh -c \"$*\"\n";

struct Site {
    folder: tempfile::TempDir,
    port: u16,
}

impl Site {
    fn new(hosts: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("hosts"), hosts).expect("written");
        let ssh = folder.path().join("ssh");
        std::fs::write(&ssh, STAND_IN).expect("written");
        std::fs::set_permissions(&ssh, Permissions::from_mode(0o755)).expect("executable");
        Self { folder, port: free_port() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, options: &str) -> Job {
        let shown = |path: &Path| path.display().to_string();
        let (hosts, ssh, port) = (shown(&self.path("hosts")), shown(&self.path("ssh")), self.port);
        Job::of(command(&format!(
            "--hostfile {hosts} --ssh {ssh} --master-addr 127.0.0.1 --master-port {port} {options}"
        )))
    }
}

#[test]
fn every_host_starts_its_slots() {
    let site = Site::new("here slots=2\n# a comment\nthere slots=1\n");
    let finished = site.start("--act join").finish();
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let expected = [0, 1, 2].map(|rank| format!("[rank {rank}] joined 0,1,2"));
    assert_eq!(sorted(finished.output), expected);
    let log = std::fs::read_to_string(site.path("ssh.log")).expect("it was called");
    assert!(log.starts_with("there exec sh -c "), "{log}");
    let is_secret = |word: &str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let mut words = log.split(|c: char| !c.is_alphanumeric());
    assert!(!words.any(is_secret), "the job token is in a command line: {log}");
}

#[test]
fn a_failure_on_another_host_ends_the_job() {
    let site = Site::new("here\nthere\n");
    let finished = site.start("--act exit --rank 1 --code 74").finish();
    assert_eq!(finished.code, Some(74), "{:#?}", finished.errors);
    let reports = finished.errors.iter().filter(|line| line.starts_with("error[PHX0702]: rank 1"));
    assert_eq!(reports.count(), 2, "its own launcher's line, and ours: {:#?}", finished.errors);
}

#[test]
fn restarts_go_for_all_hosts() {
    let site = Site::new("here\nthere\n");
    let finished = site.start("--act train --rank 1 --fault kill --max-restarts 1").finish();
    assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
    let done = finished.output.iter().filter(|line| line.ends_with("done in attempt 1"));
    assert_eq!(done.count(), 2, "{:#?}", finished.output);
}

#[test]
fn a_host_that_cannot_be_reached_is_named_at_once() {
    let site = Site::new("here\ndown\n");
    let finished = site.start("--act wait").finish();
    assert_eq!(finished.code, Some(69), "{:#?}", finished.errors);
    let text = finished.errors.join("\n");
    assert!(text.contains("no route to host"), "{text}");
    assert!(
        text.contains("node 1 will not come: the command that was to start it on down"),
        "{text}"
    );
}

#[test]
fn a_host_that_cannot_be_reached_is_not_waited_for_where_ranks_may_be_restarted() {
    let site = Site::new("here\ndown\n");
    let finished = site.start("--act wait --max-restarts 1").finish();
    assert_eq!(finished.code, Some(69), "{:#?}", finished.errors);
    let text = finished.errors.join("\n");
    assert!(text.contains("no route to host") && text.contains("PHX0705"), "{text}");
}

#[test]
fn ctrl_c_ends_the_ranks_of_all_hosts() {
    let site = Site::new("here\nthere\n");
    let job = site.start("--act polite");
    let pids = job.numbers("pid", 2);
    job.signal(Signal::INT);
    let finished = job.finish();
    assert_eq!(finished.code, Some(130), "{:#?}", finished.errors);
    assert_eq!(sorted(finished.output), ["[rank 0] saved", "[rank 1] saved"]);
    assert_gone(&pids, LIMIT);
}

#[test]
fn nothing_is_left_on_any_host_when_the_launcher_is_killed() {
    let site = Site::new("here\nthere\n");
    let job = site.start("--act wait");
    let pids = job.numbers("pid", 2);
    job.kill();
    assert_gone(&pids, LIMIT);
}

#[test]
fn what_is_wrong_with_the_file_is_said() {
    for (hosts, options, code, said) in [
        ("here\nthere slots\n", "", 64, "line 2 of "),
        ("here\nthere\n", "--nnodes 3", 64, "--nnodes 3 is not the number of hosts"),
        ("# nobody\n", "", 64, "the number of hosts"),
    ] {
        let finished = Site::new(hosts).start(&format!("--act wait {options}")).finish();
        assert_eq!(finished.code, Some(code), "{:#?}", finished.errors);
        assert!(finished.errors.join("\n").contains(said), "{:#?}", finished.errors);
    }
    let absent = Job::of(command("--hostfile /no/such/file --act wait")).finish();
    assert_eq!(absent.code, Some(74), "{:#?}", absent.errors);
}
