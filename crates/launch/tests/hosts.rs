//! Jobs on the hosts of a file, with a stand-in for ssh that starts everything here, and with OpenSSH: a client and a server
//! of its own for each host, which talk through a pipe, so that no port is open.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use phalanx_comm::testing::free_port;
use rustix::process::Signal;
use support::{assert_gone, command, sorted, Job, LIMIT};

/// It leaves its command line in a file, and fails for the host `down`.
const STAND_IN: &str = "#!/bin/sh\nhost=$1; shift\necho \"$host $*\" >> \"$0.log\"\n\
    [ $host = down ] && { echo no route to host >&2; exit 255; }\nexec sh -c \"$*\"\n";

struct Site {
    folder: tempfile::TempDir,
    port: u16,
    is_real: bool,
}

impl Site {
    fn new(hosts: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("hosts"), hosts).expect("written");
        let ssh = folder.path().join("ssh");
        fs::write(&ssh, STAND_IN).expect("written");
        fs::set_permissions(&ssh, Permissions::from_mode(0o755)).expect("executable");
        Self { folder, port: free_port(), is_real: false }
    }

    /// With OpenSSH instead of the stand-in, where it is installed.
    fn real(hosts: &str) -> Option<Self> {
        let site = Self { is_real: true, ..Self::new(hosts) };
        let server = Path::new("/usr/sbin/sshd");
        if !server.is_file() {
            skip("no sshd");
            return None;
        }
        // Where a server of root's keeps what it separates from its privileges; a service makes it at its start.
        if rustix::process::geteuid().is_root() {
            fs::create_dir_all("/run/sshd").expect("a folder for sshd");
        }
        for key in ["host_key", "user_key"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(site.path(key));
            assert!(keygen.status().expect("ssh-keygen starts").success());
        }
        let folder = site.folder.path().display();
        let server_says = format!(
            "HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n\
             UsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
        );
        fs::write(site.path("sshd_config"), server_says).expect("written");
        let client_says = format!(
            "Host *\nProxyCommand {} -i -f {folder}/sshd_config -E {folder}/sshd.log\n\
             IdentityFile {folder}/user_key\nIdentitiesOnly yes\nBatchMode yes\n\
             StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n",
            server.display()
        );
        fs::write(site.path("ssh_config"), client_says).expect("written");
        let mut login = Command::new("ssh");
        login.arg("-F").arg(site.path("ssh_config")).args(["there", "true"]);
        login.stdin(Stdio::null());
        let attempt = Job::of(login).finish();
        if attempt.code != Some(0) {
            let log = fs::read_to_string(site.path("sshd.log")).unwrap_or_default();
            let said = attempt.errors.join("\n");
            skip(&format!("nobody can log in here through sshd: {said}{log}"));
            return None;
        }
        Some(site)
    }

    /// Both, as far as they are there.
    fn both(hosts: &str) -> impl Iterator<Item = Self> {
        [Some(Self::new(hosts)), Self::real(hosts)].into_iter().flatten()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, options: &str) -> Job {
        let shown = |path: &Path| path.display().to_string();
        let (hosts, port) = (shown(&self.path("hosts")), self.port);
        let mut job = command(&format!(
            "--hostfile {hosts} --master-addr 127.0.0.1 --master-port {port} {options}"
        ));
        job.arg("--ssh").arg(match self.is_real {
            true => format!("ssh -F {}", shown(&self.path("ssh_config"))),
            false => shown(&self.path("ssh")),
        });
        Job::of(job)
    }
}

/// Says loudly that OpenSSH is not tested, or fails where `PHALANX_REQUIRE` names it.
#[expect(clippy::print_stderr, reason = "a skipped test is loud")]
fn skip(why: &str) {
    let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|what| what == "ssh"), "ssh is required: {why}");
    eprintln!("SKIPPED: OpenSSH is not tested: {why} (scripts/setup.sh --test-extras)");
}

#[test]
fn every_host_starts_its_slots() {
    for site in Site::both("here slots=2\n# a comment\nthere slots=1\n") {
        let finished = site.start("--act join").finish();
        assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
        let expected = [0, 1, 2].map(|rank| format!("[rank {rank}] joined 0,1,2"));
        assert_eq!(sorted(finished.output), expected);
        if site.is_real {
            continue;
        }
        let log = fs::read_to_string(site.path("ssh.log")).expect("it was called");
        assert!(log.starts_with("there exec sh -c "), "{log}");
        let is_secret =
            |word: &str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
        let mut words = log.split(|c: char| !c.is_alphanumeric());
        assert!(!words.any(is_secret), "the job token is in a command line: {log}");
    }
}

#[test]
fn a_failure_on_another_host_ends_the_job() {
    for site in Site::both("here\nthere\n") {
        let finished = site.start("--act exit --rank 1 --code 74").finish();
        assert_eq!(finished.code, Some(74), "{:#?}", finished.errors);
        let reports =
            finished.errors.iter().filter(|line| line.starts_with("error[PHX0702]: rank 1"));
        assert_eq!(reports.count(), 2, "its own launcher's line, and ours: {:#?}", finished.errors);
    }
}

#[test]
fn restarts_go_for_all_hosts() {
    for site in Site::both("here\nthere\n") {
        let finished = site.start("--act train --rank 1 --fault kill --max-restarts 1").finish();
        assert_eq!(finished.code, Some(0), "{:#?}", finished.errors);
        let done = finished.output.iter().filter(|line| line.ends_with("done in attempt 1"));
        assert_eq!(done.count(), 2, "{:#?}", finished.output);
    }
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
    for site in Site::both("here\nthere\n") {
        let job = site.start("--act polite");
        let pids = job.numbers("pid", 2);
        job.signal(Signal::INT);
        let finished = job.finish();
        assert_eq!(finished.code, Some(130), "{:#?}", finished.errors);
        assert_eq!(sorted(finished.output), ["[rank 0] saved", "[rank 1] saved"]);
        assert_gone(&pids, LIMIT);
    }
}

#[test]
fn nothing_is_left_on_any_host_when_the_launcher_is_killed() {
    for site in Site::both("here\nthere\n") {
        let job = site.start("--act wait");
        let pids = job.numbers("pid", 2);
        job.kill();
        assert_gone(&pids, LIMIT);
    }
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
