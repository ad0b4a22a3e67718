//! Two machines as network namespaces, which the tests make and remove, and faults between them.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::{rank_environment, Ranks};

const PORT: u16 = 29_517;

/// Two namespaces joined by a pair of virtual interfaces; removed on drop.
pub(crate) struct Machines {
    names: [String; 2],
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("ip is not installed: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Machines {
    fn new() -> Result<Self, String> {
        // Tests of one process run at once.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("phx{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let machines = Self { names: [format!("{id}a"), format!("{id}b")] };
        let [a, b] = &machines.names;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("-n {a} link add veth0 type veth peer name veth0 netns {b}"))?;
        for (index, name) in machines.names.iter().enumerate() {
            ip(&format!("-n {name} addr add 10.99.0.{}/24 dev veth0", index + 1))?;
            ip(&format!("-n {name} link set veth0 up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(machines)
    }

    /// Runs a program on a machine and returns its output.
    fn on(&self, machine: usize, command: &str) -> String {
        let mut words = command.split(' ');
        let output = Command::new("ip")
            .args(["netns", "exec", &self.names[machine]])
            .args(&mut words)
            .output()
            .expect("ip runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {text}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Drops everything that machine 0 sends or gets: nobody is told.
    pub(crate) fn partition(&self) {
        self.on(0, "nft add table inet cut");
        for hook in ["input", "output"] {
            let rule = "priority 0; policy drop; }";
            self.on(0, &format!("nft add chain inet cut {hook} {{ type filter hook {hook} {rule}"));
        }
    }

    /// Takes the cable out.
    pub(crate) fn link_down(&self) {
        ip(&format!("-n {} link set veth0 down", self.names[0])).expect("the link is ours");
    }

    /// Resets one connection between the machines: of those that no store has, the busiest or the
    /// most idle. Both ends see a reset connection.
    pub(crate) fn reset(&self, busiest: bool) {
        let table = self.on(0, "ss -tniHO state established dst 10.99.0.2");
        let mut connections: Vec<(u64, &str, &str)> = table
            .lines()
            .filter(|line| !line.contains(&format!(":{PORT} ")))
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
        assert!(connections.len() >= 2, "a control and a data socket: {table}");
        let chosen = if busiest { connections.last() } else { connections.first() };
        let (_, ours, theirs) = chosen.expect("counted above");
        let killed = self.on(0, &format!("ss -K -tnH sport = :{ours} and dport = :{theirs}"));
        assert!(killed.contains(ours), "reset {ours} to {theirs}: {killed}");
    }

    /// Starts ranks placed as `place` says: the machine of each.
    pub(crate) fn start(&self, place: &[usize], role: &str) -> Ranks {
        let program = std::env::current_exe().expect("this test's own path");
        let mut children = Vec::new();
        for (rank, machine) in place.iter().enumerate() {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.names[*machine]]).arg(&program);
            rank_environment(&mut command, role, rank, place.len(), PORT);
            let local = place[..rank].iter().filter(|other| *other == machine).count();
            let locals = place.iter().filter(|other| *other == machine).count();
            command.env("LOCAL_RANK", local.to_string());
            command.env("LOCAL_WORLD_SIZE", locals.to_string());
            command.env("GROUP_RANK", machine.to_string()).env("GROUP_WORLD_SIZE", "2");
            command.env("MASTER_ADDR", "10.99.0.1");
            children.push(command.spawn().expect("a rank starts"));
        }
        Ranks::of(children)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have been made.
            drop(ip(&format!("netns del {name}")));
        }
    }
}

pub(crate) fn machines() -> Option<Machines> {
    match Machines::new() {
        Ok(machines) => Some(machines),
        Err(error) => {
            let required = std::env::var("PHALANX_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|what| what == "netns"), "netns is required: {error}");
            eprintln!("SKIPPED: no network namespaces here ({error})");
            None
        }
    }
}
