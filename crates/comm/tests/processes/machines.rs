//! Faults between two machines, which are network namespaces, and ranks on them.

use crate::namespaces::{ip, namespaces, Namespaces, ADDRESSES};
use crate::support::{rank_environment, Ranks};

const PORT: u16 = 29_517;

/// Two machines that ranks can run on, and faults between them.
pub(crate) struct Machines(Namespaces);

impl Machines {
    /// Runs a program on a machine and returns its output.
    fn on(&self, machine: usize, command: &str) -> String {
        let mut words = command.split(' ');
        let program = words.next().expect("a program");
        let output = self.0.command(machine, program).args(words).output().expect("ip runs");
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
        ip(&format!("-n {} link set veth0 down", self.0.names[0])).expect("the link is ours");
    }

    /// The connections between the machines that no store has, as the ports of both ends: the most idle
    /// first, the busiest last.
    pub(crate) fn connections(&self) -> Vec<(String, String)> {
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
        let ports = |(_, ours, theirs): (_, &str, &str)| (ours.to_owned(), theirs.to_owned());
        connections.into_iter().map(ports).collect()
    }

    /// Where ranks of machine 0 listen, the store apart.
    pub(crate) fn doors(&self) -> Vec<String> {
        let table = self.on(0, "ss -tlnH");
        let places = table.lines().filter_map(|line| line.split_whitespace().nth(3));
        places.filter(|place| !place.ends_with(&format!(":{PORT}"))).map(str::to_owned).collect()
    }

    /// Starts a process on machine 1 that is no rank, with `arguments` in its environment.
    pub(crate) fn stranger(&self, role: &str, arguments: &str) -> Ranks {
        let program = std::env::current_exe().expect("this test's own path");
        let mut command = self.0.command(1, &program);
        rank_environment(&mut command, role, 0, 1, PORT);
        command.env("PHALANX_TEST_ARGUMENTS", arguments);
        Ranks::of(vec![command.spawn().expect("a stranger starts")])
    }

    /// Resets a connection: both ends see that.
    pub(crate) fn reset(&self, (ours, theirs): &(String, String)) {
        let killed = self.on(0, &format!("ss -K -tnH sport = :{ours} and dport = :{theirs}"));
        assert!(killed.contains(ours), "reset {ours} to {theirs}: {killed}");
    }

    /// Starts ranks placed as `place` says: the machine of each.
    pub(crate) fn start(&self, place: &[usize], role: &str) -> Ranks {
        let program = std::env::current_exe().expect("this test's own path");
        let mut children = Vec::new();
        for (rank, machine) in place.iter().enumerate() {
            let mut command = self.0.command(*machine, &program);
            rank_environment(&mut command, role, rank, place.len(), PORT);
            let local = place[..rank].iter().filter(|other| *other == machine).count();
            let locals = place.iter().filter(|other| *other == machine).count();
            command.env("LOCAL_RANK", local.to_string());
            command.env("LOCAL_WORLD_SIZE", locals.to_string());
            command.env("GROUP_RANK", machine.to_string()).env("GROUP_WORLD_SIZE", "2");
            command.env("MASTER_ADDR", ADDRESSES[0]);
            children.push(command.spawn().expect("a rank starts"));
        }
        Ranks::of(children)
    }
}

pub(crate) fn machines() -> Option<Machines> {
    namespaces().map(Machines)
}
