//! `phalanx flight`, on what the ranks of a real job left behind.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use phalanx_comm::{Group, GroupOptions, Sum, Work};

const DEADLINE: Duration = Duration::from_secs(60);

/// What the other test starts twice: rank 1 is gone after its second collective.
#[test]
#[ignore = "a rank of the other test"]
fn rank() {
    let mut group = Group::from_environment(GroupOptions::default()).expect("a group");
    for _ in 0..2 {
        let mut values = [1.0_f32; 4];
        group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("both call");
    }
    let folder = std::env::var_os("PHALANX_FLIGHT_RECORDER").expect("the test's folder");
    let begun = std::path::Path::new(&folder).join("begun");
    if group.rank() == 1 {
        // Who has lost a rank begins nothing more: rank 0 is to begin first.
        let end = Instant::now() + DEADLINE;
        while !begun.exists() && Instant::now() < end {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        std::process::abort();
    }
    let mut values = [1.0_f32; 4];
    let work = group.all_reduce(&mut values[..], Sum).expect("rank 1 lives");
    std::fs::write(begun, "").expect("a mark");
    assert!(work.wait().is_err(), "rank 1 is gone");
}

/// A rank that is gone when this is dropped.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(rank: usize, port: u16, folder: &std::path::Path) -> Owned {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--ignored", "--exact", "rank"]);
    command.envs([("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
    command.env("MASTER_PORT", port.to_string()).env("PHALANX_FLIGHT_RECORDER", folder);
    // What a rank complains of stands among this test's own output.
    Owned(command.stdout(Stdio::null()).spawn().expect("it starts"))
}

fn await_end(child: &mut Owned) -> ExitStatus {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.0.try_wait().expect("our own child") {
            return status;
        }
        assert!(Instant::now() < end, "a rank has not ended");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

fn flight(place: &std::path::Path) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_phalanx"));
    command.arg("flight").arg(place).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Owned(command.spawn().expect("the command starts"));
    let (mut out, mut err) = (running.0.stdout.take(), running.0.stderr.take());
    let errors = std::thread::spawn(move || std::io::read_to_string(err.take().expect("piped")));
    let output = std::thread::spawn(move || std::io::read_to_string(out.take().expect("piped")));
    let status = await_end(&mut running);
    let text = [output, errors].map(|text| text.join().expect("a reader").expect("text"));
    (status.success(), text.concat())
}

#[test]
fn the_records_of_a_failed_job_are_lined_up() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (found, explanation) = flight(folder.path());
    assert!(!found && explanation.contains("PHALANX_FLIGHT_RECORDER"), "{explanation}");

    let port = phalanx_comm::testing::free_ports(1);
    let mut children = [0, 1].map(|rank| start(rank, port, folder.path()));
    assert!(await_end(&mut children[0]).success(), "rank 0 loses rank 1, and nothing else");
    assert!(!await_end(&mut children[1]).success(), "rank 1 aborts");
    let (done, text) = flight(folder.path());
    assert!(done, "{text}");
    assert!(text.contains("records of 2 of 2 ranks\n"), "{text}");
    assert!(text.contains("rank 0 in all_reduce #2"), "{text}");
    assert!(text.contains("rank 1 after all_reduce #1"), "{text}");
    assert!(text.contains("crates/cli/tests/flight.rs"), "{text}");
    assert!(text.contains("rank 0 of 2"), "{text}");

    // Of one machine out of two there is a record as well.
    let of_rank_1 = std::fs::read_dir(folder.path())
        .expect("a folder")
        .flatten()
        .find(|entry| flight(&entry.path()).1.contains("rank 1 of 2"));
    let (_, of_one) = flight(&of_rank_1.expect("two records").path());
    assert!(of_one.contains("records of 1 of 2 ranks; none of 0"), "{of_one}");
}
