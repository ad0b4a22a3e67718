//! Faults between two machines, which are network namespaces, and ranks on them.

use crate::namespaces::{namespaces, Namespaces, ADDRESSES};
use crate::support::{rank_environment, Ranks};

const PORT: u16 = 29_517;

/// Two machines that ranks can run on, and faults between them.
pub(crate) struct Machines(Namespaces);

impl Machines {
    /// Drops everything that machine 0 sends or gets: nobody is told.
    pub(crate) fn partition(&self) {
        self.0.on(0, "nft add table inet cut");
        for hook in ["input", "output"] {
            let rule = "priority 0; policy drop; }";
            self.0
                .on(0, &format!("nft add chain inet cut {hook} {{ type filter hook {hook} {rule}"));
        }
    }

    /// Takes the cable out.
    pub(crate) fn link_down(&self) {
        self.0.link_down();
    }

    /// The connections between the machines that no store has: the most idle first, the busiest last.
    pub(crate) fn connections(&self) -> Vec<(String, String)> {
        self.0.connections(PORT)
    }

    /// Where ranks of machine 0 listen, the store apart.
    pub(crate) fn doors(&self) -> Vec<String> {
        let table = self.0.on(0, "ss -tlnH");
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
    pub(crate) fn reset(&self, connection: &(String, String)) {
        self.0.reset(connection);
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
