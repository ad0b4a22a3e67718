//! Two machines as network namespaces that a test makes and removes.
#![allow(dead_code, reason = "each test uses its part")]

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Two namespaces joined by a pair of virtual interfaces; removed on drop.
pub(crate) struct Namespaces {
    pub(crate) names: [String; 2],
}

/// The address of each.
pub(crate) const ADDRESSES: [&str; 2] = ["10.99.0.1", "10.99.0.2"];

pub(crate) fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("ip is not installed: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Namespaces {
    fn new() -> Result<Self, String> {
        // Tests of one process run at once.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("phx{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let both = Self { names: [format!("{id}a"), format!("{id}b")] };
        let [a, b] = &both.names;
        {
            // The first one on a machine mounts the folder of names, which must not happen over a name that another has just made.
            let folder = "/run";
            let one_at_a_time = std::fs::File::open(folder).and_then(|file| {
                rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
                Ok(file)
            });
            let _one_at_a_time = one_at_a_time.map_err(|error| format!("{folder}: {error}"))?;
            ip(&format!("netns add {a}"))?;
            ip(&format!("netns add {b}"))?;
        }
        ip(&format!("-n {a} link add veth0 type veth peer name veth0 netns {b}"))?;
        for (name, address) in both.names.iter().zip(ADDRESSES) {
            ip(&format!("-n {name} addr add {address}/24 dev veth0"))?;
            ip(&format!("-n {name} link set veth0 up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(both)
    }

    /// `program`, to be run on a machine.
    pub(crate) fn command(&self, machine: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[machine]]).arg(program);
        command
    }

    /// Runs a program on a machine and returns its output.
    pub(crate) fn on(&self, machine: usize, command: &str) -> String {
        let mut words = command.split(' ');
        let program = words.next().expect("a program");
        let output = self.command(machine, program).args(words).output().expect("ip runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {text}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Takes the cable out.
    pub(crate) fn link_down(&self) {
        ip(&format!("-n {} link set veth0 down", self.names[0])).expect("the link is ours");
    }

    /// The connections between the machines beside those of `store`'s port, as the ports of both ends: the most idle first, the
    /// busiest last.
    pub(crate) fn connections(&self, store: u16) -> Vec<(String, String)> {
        let table = self.on(0, "ss -tniHO state established dst 10.99.0.2");
        let mut connections: Vec<(u64, &str, &str)> = table
            .lines()
            .filter(|line| !line.contains(&format!(":{store} ")))
            .filter_map(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let number = |name: &str| {
                    let field = fields.iter().find_map(|field| field.strip_prefix(name));
                    field.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
                };
                let (_, ours) = fields.get(2)?.rsplit_once(':')?;
                let (_, theirs) = fields.get(3)?.rsplit_once(':')?;
                Some((number("bytes_sent:") + number("bytes_received:"), ours, theirs))
            })
            .collect();
        connections.sort_unstable();
        let ports = |(_, ours, theirs): (_, &str, &str)| (ours.to_owned(), theirs.to_owned());
        connections.into_iter().map(ports).collect()
    }

    /// Resets a connection: both ends see that.
    pub(crate) fn reset(&self, (ours, theirs): &(String, String)) {
        let killed = self.on(0, &format!("ss -K -tnH sport = :{ours} and dport = :{theirs}"));
        assert!(killed.contains(ours), "reset {ours} to {theirs}: {killed}");
    }

    /// A program for MPI launchers to start others on a machine with, as they would use `ssh`: `agent ADDRESS COMMAND…`. Each
    /// machine gets a host name of its own.
    pub(crate) fn write_agent(&self, file: &std::path::Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let [a, b] = &self.names;
        let text = format!(
            "#!/bin/sh\n\
             while [ \"${{1#-}}\" != \"$1\" ]; do shift; done\n\
             case $1 in {}) name={a} ;; {}) name={b} ;; *) exit 1 ;; esac\n\
             shift\n\
             exec ip netns exec $name unshare --uts sh -c \"hostname $name; $*\"\n",
            ADDRESSES[0], ADDRESSES[1]
        );
        std::fs::write(file, text).expect("written");
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).expect("our file");
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have been made.
            drop(ip(&format!("netns del {name}")));
        }
    }
}

/// `None`, said aloud, where namespaces cannot be made; a failure when `PHALANX_REQUIRE` names them.
pub(crate) fn namespaces() -> Option<Namespaces> {
    match Namespaces::new() {
        Ok(namespaces) => Some(namespaces),
        Err(error) => {
            let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|what| what == "netns"), "netns is required: {error}");
            eprintln!("SKIPPED: no network namespaces here ({error})");
            None
        }
    }
}
