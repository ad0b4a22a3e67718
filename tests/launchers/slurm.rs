//! A Slurm of four nodes on this machine: munge, a controller and four daemons of its own, gone when it is dropped.
//!
//! The nodes are called 127.0.0.1 to 127.0.0.4, so that their names lead somewhere.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use phalanx_comm::testing::free_ports;

use super::program;
use super::support::{skip, Owned};

const NODES: usize = 4;
/// Everything starts in two seconds when the machine is idle.
const START_MAX: Duration = Duration::from_secs(150);

pub(crate) struct Cluster {
    /// In the order of their start; dropped in that order, munge last.
    daemons: Vec<Owned>,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// `None`, loudly, where Slurm or munge is not installed.
    pub(crate) fn start() -> Option<Self> {
        let names = ["munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo"];
        let missing: Vec<&str> = names.into_iter().filter(|name| program(name).is_none()).collect();
        if !missing.is_empty() {
            skip("slurm", &format!("no {}", missing.join(", ")));
            return None;
        }
        // Steps run in this folder's daemons: short names, for sockets have short paths.
        let folder = tempfile::Builder::new().prefix("slurm").tempdir_in("/tmp").expect("/tmp");
        let mut cluster = Self { daemons: Vec::new(), folder };
        cluster.write_files();
        let place = cluster.folder.path().to_path_buf();
        let at = |name: &str| place.join(name).display().to_string();
        cluster.daemon(
            "munged",
            &[
                "--foreground",
                "--force",
                "--num-threads=2",
                &format!("--socket={}", at("munge.socket")),
                &format!("--key-file={}", at("munge.key")),
                &format!("--log-file={}", at("munged.log")),
                &format!("--pid-file={}", at("munged.pid")),
                &format!("--seed-file={}", at("munge.seed")),
            ],
        );
        cluster.wait("munge's socket", &String::new, &|| place.join("munge.socket").exists());
        cluster.daemon("slurmctld", &["-D", "-f", &at("slurm.conf")]);
        for node in 1..=NODES {
            let name = format!("127.0.0.{node}");
            cluster.daemon("slurmd", &["-D", "-N", &name, "-f", &at("slurm.conf")]);
        }
        cluster.wait("four idle nodes", &String::new, &|| {
            let mut sinfo = cluster.client("sinfo");
            let sinfo = sinfo.args(["--noheader", "--states=idle", "--format=%D"]);
            let idle = sinfo.stderr(Stdio::null()).output().expect("sinfo starts").stdout;
            String::from_utf8_lossy(&idle).trim() == NODES.to_string()
        });
        Some(cluster)
    }

    /// A client of this Slurm.
    pub(crate) fn client(&self, name: &str) -> Command {
        let mut command = Command::new(program(name).expect("looked for before"));
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf"));
        command
    }

    /// srun, which does not wait for ever.
    pub(crate) fn srun(&self, options: &[&str]) -> Command {
        let mut srun = self.client("srun");
        srun.args(["--immediate=30", "--kill-on-bad-exit=1"]).args(options);
        srun
    }

    fn daemon(&mut self, name: &str, arguments: &[&str]) {
        let log =
            fs::File::create(self.folder.path().join(format!("{name}.{}.out", self.daemons.len())));
        let log = log.expect("a log");
        let mut command = Command::new(program(name).expect("looked for before"));
        command.args(arguments).stdout(log.try_clone().expect("a handle")).stderr(log);
        self.daemons.push(Owned::start(&mut command));
    }

    /// Waits until `is_there`; `log` is shown where that does not come.
    pub(crate) fn wait(&self, what: &str, log: &dyn Fn() -> String, is_there: &dyn Fn() -> bool) {
        let end = Instant::now() + START_MAX;
        while !is_there() {
            let is_late = Instant::now() >= end;
            assert!(!is_late, "no {what} after {START_MAX:?}:\n{}\n{}", log(), self.logs());
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// The ends of what the daemons said.
    fn logs(&self) -> String {
        let files = fs::read_dir(self.folder.path()).into_iter().flatten().flatten();
        let is_log =
            |path: &PathBuf| path.extension().is_some_and(|end| end == "out" || end == "log");
        let end_of = |path: PathBuf| {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(5)..].join("\n");
            format!("{}:\n{last}\n", path.display())
        };
        files.map(|file| file.path()).filter(is_log).map(end_of).collect()
    }

    fn write_files(&self) {
        let folder = self.folder.path();
        // The daemons' user must be able to come here.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("our own folder");
        let mut key = [0; 64];
        let mut random = fs::File::open("/dev/urandom").expect("random bytes");
        random.read_exact(&mut key).expect("random bytes");
        fs::write(folder.join("munge.key"), key).expect("written");
        fs::set_permissions(folder.join("munge.key"), fs::Permissions::from_mode(0o600))
            .expect("our own file");
        for name in ["state".to_owned()].into_iter().chain((1..=NODES).flat_map(places)) {
            fs::create_dir(folder.join(name)).expect("a folder");
        }
        fs::write(folder.join("slurm.conf"), configuration(folder)).expect("written");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Daemons end their own steps when they are asked to.
        for daemon in self.daemons.iter().rev() {
            daemon.signal("-TERM");
        }
        let end = Instant::now() + Duration::from_secs(5);
        while let Some(mut daemon) = self.daemons.pop() {
            while Instant::now() < end && matches!(daemon.0.try_wait(), Ok(None)) {
                std::thread::park_timeout(Duration::from_millis(10));
            }
            drop(daemon); // kills what is left
        }
        // Step daemons are sessions of their own; they are known by their configuration's path.
        let place = self.folder.path().display().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains(&place) {
                let pid = entry.file_name();
                drop(Command::new("kill").arg("-KILL").arg(pid).stderr(Stdio::null()).status());
            }
        }
    }
}

/// Whether some step of a job still has its daemon.
pub(crate) fn has_daemon(job: &str) -> bool {
    let title = format!("slurmstepd: [{job}.");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let title_of = |process: fs::DirEntry| fs::read(process.path().join("cmdline"));
    let mut titles = processes.filter_map(|process| title_of(process).ok());
    titles.any(|name| String::from_utf8_lossy(&name).contains(&title))
}

/// What each node would have to itself on a machine of its own. The pmix plugin keeps its sockets in `TmpFS`.
fn places(node: usize) -> [String; 2] {
    ["spool", "tmp"].map(|name| format!("{name}-127.0.0.{node}"))
}

fn configuration(folder: &Path) -> String {
    let folder = folder.display();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("a host name");
    let host = host.trim().split('.').next().expect("a first part").to_owned();
    let user = Command::new("id").arg("-un").output().expect("id").stdout;
    let user = String::from_utf8_lossy(&user).trim().to_owned();
    let port = free_ports(1 + u16::try_from(NODES).expect("few"));
    let (first, last) = (port + 1, port + u16::try_from(NODES).expect("few"));
    // Of a job's number its ranks make the port where they meet: clusters beside each other must not count alike.
    format!(
        "ClusterName=virtual\n\
         SlurmctldHost={host}(127.0.0.1)\n\
         FirstJobId={port}0\n\
         SlurmctldPort={port}\n\
         SlurmUser={user}\n\
         SlurmdUser={user}\n\
         AuthType=auth/munge\n\
         AuthInfo=socket={folder}/munge.socket\n\
         CredType=cred/munge\n\
         MpiDefault=none\n\
         ProctrackType=proctrack/linuxproc\n\
         TaskPlugin=task/none\n\
         SlurmdParameters=config_overrides\n\
         SchedulerType=sched/builtin\n\
         SelectType=select/cons_tres\n\
         SelectTypeParameters=CR_CPU\n\
         JobAcctGatherType=jobacct_gather/none\n\
         AccountingStorageType=accounting_storage/none\n\
         ReturnToService=2\n\
         KillWait=3\n\
         StateSaveLocation={folder}/state\n\
         SlurmdSpoolDir={folder}/spool-%n\n\
         TmpFS={folder}/tmp-%n\n\
         SlurmctldPidFile={folder}/slurmctld.pid\n\
         SlurmdPidFile={folder}/slurmd-%n.pid\n\
         SlurmctldLogFile={folder}/slurmctld.log\n\
         SlurmdLogFile={folder}/slurmd-%n.log\n\
         NodeName=127.0.0.[1-{NODES}] NodeHostname={host} Port=[{first}-{last}] CPUs=8\n\
         PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    )
}
