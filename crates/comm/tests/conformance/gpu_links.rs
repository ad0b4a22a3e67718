//! Faults of the network between two machines whose ranks compute over NCCL, on the stand-in for it. NCCL's own data does not pass that
//! network here: what is tested is that the ranks do not wait for NCCL to notice.

use std::path::Path;
use std::time::{Duration, Instant};

use phalanx_comm::{Group, GroupOptions, Sum, Work};

use crate::launched::{ranks_of, Running};
use crate::namespaces::{namespaces, Namespaces, ADDRESSES};
use crate::without_gpu::{complain, complaints, libraries, Exchange, LIMIT};

/// Of the store; the machines are the test's own.
const PORT: u16 = 29_518;

/// What a rank does: collectives until there is an error, or until the test has seen enough.
pub(crate) fn goes_on(options: GroupOptions) {
    let folder = std::env::var("DOUBLE_FOLDER").expect("of the test");
    let file = |name: &str| Path::new(&folder).join(name);
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let region = group.allocate::<f32>(1000).expect("memory");
    let mut enough = [0_u8];
    for step in 0_u64.. {
        let start = Instant::now();
        let sum = group.all_reduce(region.full(), Sum).and_then(Work::synchronize);
        // Both end with the same step.
        enough[0] = u8::from(group.rank() == 0 && file("enough").exists());
        if let Err(error) =
            sum.and_then(|()| group.broadcast(&mut enough[..], 0).and_then(Work::wait))
        {
            complain(start, &error);
        }
        if step == 5 {
            std::fs::write(file(&format!("under-way-{}", group.rank())), "").expect("written");
        }
        if enough[0] > 0 {
            println!("no error in {step} steps");
            return;
        }
    }
}

/// What ranks said of a fault, by rank with their exit status.
struct Told(Vec<(Option<i32>, String)>);

/// Two ranks, each on a machine of its own, and what happens to their network while they work. Where `fault`
/// returns false there is nothing that ends them, and they are told that it is enough.
fn meanwhile(fault: impl FnOnce(&Namespaces) -> bool) -> Option<Told> {
    let machines = namespaces()?;
    let program = std::env::current_exe().expect("this test's own path");
    let (folder, exchange) = (libraries(), Exchange::new());
    let command = |rank: usize| machines.command(rank, &program);
    let running = ranks_of(2, "nccl goes on", command, |command, rank| {
        command.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1");
        command.env("GROUP_RANK", rank.to_string()).env("GROUP_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", ADDRESSES[0]).env("MASTER_PORT", PORT.to_string());
        command.env("LD_LIBRARY_PATH", folder).env_remove("PHALANX_NCCL_LIBRARY");
        command.env("DOUBLE_FOLDER", &exchange.0).env("DOUBLE_UUID", rank.to_string());
    });
    let end = Instant::now() + LIMIT;
    let is_under_way = |rank: usize| exchange.0.join(format!("under-way-{rank}")).exists();
    while !(is_under_way(0) && is_under_way(1)) {
        assert!(Instant::now() < end, "the ranks do not begin");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let is_fatal = fault(&machines);
    let ended = |rank: Running| {
        let (status, output) = rank.finish(LIMIT);
        (status.code(), output)
    };
    if !is_fatal {
        std::fs::write(exchange.0.join("enough"), "").expect("written");
    }
    Some(Told(running.into_iter().map(ended).collect()))
}

impl Told {
    /// Both ranks' errors.
    fn errors(&self) -> Vec<String> {
        let lines = complaints(&self.0);
        assert_eq!(lines.len(), 2, "{:?}", self.0);
        lines
    }
}

#[test]
fn a_link_that_goes_down_ends_both_sides_over_nccl() {
    let fault = |machines: &Namespaces| {
        machines.link_down();
        true
    };
    let Some(told) = meanwhile(fault) else { return };
    for (rank, line) in told.errors().iter().enumerate() {
        let other = format!("rank {} (host ", 1 - rank);
        assert!(line.contains(&other) && line.contains("not responding for 5"), "{line}");
    }
}

#[test]
fn a_reset_data_connection_is_an_error_and_no_death_over_nccl() {
    let reset = |machines: &Namespaces| {
        let connections = machines.connections(PORT);
        machines.reset(connections.last().expect("a data connection"));
        true
    };
    let Some(told) = meanwhile(reset) else { return };
    for line in told.errors() {
        assert!(line.contains("lost, peer alive"), "{line}");
    }
}

#[test]
fn a_reset_control_connection_comes_back_over_nccl() {
    let reset = |machines: &Namespaces| {
        let before = machines.connections(PORT);
        assert_eq!(before.len(), 2, "a control and a data connection: {before:?}");
        machines.reset(&before[0]);
        let at = Instant::now();
        while at.elapsed() < LIMIT {
            let now = machines.connections(PORT);
            if now.len() == 2 && !now.contains(&before[0]) && now.contains(&before[1]) {
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        panic!("not back");
    };
    let Some(told) = meanwhile(reset) else { return };
    for (code, output) in told.0 {
        assert!(code == Some(0) && output.contains("no error in"), "{output}");
    }
}
