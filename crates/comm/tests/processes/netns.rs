//! Two machines of two ranks: shared memory inside, TCP between, in network namespaces that the
//! test makes and removes.

use std::process::Command;
use std::time::Duration;

use crate::support::{rank_environment, Ranks};
use phalanx_comm::{Group, GroupOptions, Sum, Work};

const PORT: u16 = 29_517;

/// What a rank does.
pub(crate) fn rank() {
    let options = GroupOptions::default().with_timeout(Duration::from_secs(20));
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let (rank, world) = (group.rank(), group.world_size());
    // Values whose sum depends on the order: only ((g0 + g1) + g2) + g3 gives these bits.
    let value = |of: usize, i: usize| ((i * 7919 + of * 104_729) % 1_000_003) as f32 / 977.0;
    let expected = |i: usize| (1..world).fold(value(0, i), |sum, of| sum + value(of, i));
    for len in [0, 1, 5, 1000, 10_007, 1_000_004, 4_000_000] {
        let mine: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
        let right = |values: &[f32]| values.iter().enumerate().all(|(i, v)| *v == expected(i));
        let mut slice = mine.clone();
        group.all_reduce(&mut slice[..], Sum).and_then(Work::wait).expect("slice");
        assert!(right(&slice), "slice of {len}");
        let region = group.allocate::<f32>(len).expect("memory");
        region.write(0, &mine);
        group.all_reduce(region.full(), Sum).and_then(Work::wait).expect("region");
        assert!(right(&region.read(0..len)), "region of {len}");
        if len % world == 0 {
            let segment = len / world;
            let own = rank * segment..(rank + 1) * segment;
            region.write(0, &mine);
            group.reduce_scatter_in_place(region.full(), Sum).and_then(Work::wait).expect("rs");
            let got = region.read(own.clone());
            assert!(got.iter().zip(own.clone()).all(|(v, i)| *v == expected(i)));
            group.all_gather_in_place(region.full()).and_then(Work::wait).expect("ag");
            assert!(right(&region.read(0..len)), "gathered {len}");
        }
        group.broadcast(&mut slice[..], 3).and_then(Work::wait).expect("broadcast");
    }
    println!("all right: {} of {} here", group.local_rank(), group.local_world_size());
}

/// Two namespaces joined by a pair of virtual interfaces; removed on drop.
struct Machines {
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
        let pid = std::process::id();
        let machines = Self { names: [format!("phx{pid}a"), format!("phx{pid}b")] };
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

    /// Starts ranks placed as `place` says: the machine of each.
    fn start(&self, place: [usize; 4], role: &str) -> Ranks {
        let program = std::env::current_exe().expect("this test's own path");
        let mut children = Vec::new();
        for (rank, machine) in place.iter().enumerate() {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.names[*machine]]).arg(&program);
            rank_environment(&mut command, role, rank, place.len(), PORT);
            let local = place[..rank].iter().filter(|other| *other == machine).count();
            command.env("LOCAL_RANK", local.to_string()).env("LOCAL_WORLD_SIZE", "2");
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

fn machines() -> Option<Machines> {
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

#[test]
fn two_machines_of_two_ranks_give_the_bits_of_one_process() {
    let Some(machines) = machines() else { return };
    // In blocks, and round robin: a stage of two ranks each, and four of one.
    for place in [[0, 0, 1, 1], [0, 1, 0, 1]] {
        for ended in machines.start(place, "mixed").finish(Duration::from_secs(60)) {
            assert!(ended.status.success(), "{}", ended.output);
            assert!(ended.output.contains("all right"), "{}", ended.output);
        }
    }
}
