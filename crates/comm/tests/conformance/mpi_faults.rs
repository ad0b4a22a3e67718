//! Faults over MPI under its real launcher: ranks that end by themselves, stop, or are cut off from the others. What MPI
//! itself does about them is in `docs/errors.md`.

use std::fs::DirEntry;
use std::path::PathBuf;
use std::process::Command;
#[cfg(feature = "mpi")]
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use phalanx_comm::recorder::FlightRecord;
use phalanx_comm::{Group, Sum, Work};

use crate::launched::Running;
use crate::mpirun::{between_machines, library, mpirun, program, Library};
use crate::namespaces::{namespaces, Namespaces};

/// Where ranks leave their errors: their output may be cut off with them.
const FOLDER: &str = "PHALANX_TEST_FOLDER";
const LIMIT: Duration = Duration::from_secs(60);

/// What a rank does; rank 1 does what the role says in the middle of its work.
pub(crate) fn rank(role: &str, mut group: Group) {
    let how = role.strip_prefix("mpi fault: ").expect("a fault");
    let place = std::env::var_os(FOLDER).map(PathBuf::from).expect("of the test");
    let file = |name: &str| place.join(format!("{name}-{}", group.rank()));
    let [said, half, under_way] = ["error", "half", "under-way"].map(file);
    let region = group.allocate::<f32>(1 << 16).expect("memory");
    for step in 0..u64::MAX {
        let start = Instant::now();
        let work = group.tagged("step").all_reduce(region.full(), Sum);
        if step == 20 {
            std::fs::write(&under_way, std::process::id().to_string()).expect("written");
        }
        if group.rank() == 1 && step == 20 {
            end(how);
        }
        if let Err(error) = work.and_then(Work::wait) {
            let after = start.elapsed().as_millis();
            let text = format!("{after} ms: {error} | help: {}", error.help().unwrap_or("none"));
            // Whole or not there: the launcher may kill this process at any time.
            std::fs::write(&half, &text).expect("written");
            std::fs::rename(&half, &said).expect("renamed");
            println!("error after {text}");
            std::process::exit(3);
        }
    }
}

fn end(how: &str) {
    let own = std::process::id().to_string();
    match how {
        "exits early" => std::process::exit(0),
        "panics" => panic!("a bug in rank 1"),
        "aborts itself" => std::process::abort(),
        "stops" => drop(Command::new("kill").args(["-STOP", &own]).status()),
        #[cfg(feature = "mpi")]
        "may not send" => crate::mpi_refuses::SENDS.store(true, Ordering::Release),
        #[cfg(feature = "mpi")]
        "may not look" => crate::mpi_refuses::TESTS.store(true, Ordering::Release),
        _ => {}
    }
}

/// A folder for the errors of ranks; when it goes, so does what a launcher that was cut off or killed has left running.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("mpi-fault-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).expect("a folder of our own");
        Self(folder)
    }

    fn error(&self, rank: usize) -> Option<String> {
        std::fs::read_to_string(self.0.join(format!("error-{rank}"))).ok()
    }

    /// How many ranks live.
    fn ranks(&self) -> usize {
        let program = std::env::current_exe().expect("this test's own path");
        let is_rank = |pid: &String| {
            std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)
        };
        self.processes().filter(is_rank).count()
    }

    /// All processes of this test's job: its launchers and ranks.
    fn processes(&self) -> impl Iterator<Item = String> {
        let mark = format!("{FOLDER}={}", self.0.display()).into_bytes();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(move |entry| {
            let environment = std::fs::read(entry.path().join("environ")).ok()?;
            let is_of_job = environment.split(|byte| *byte == 0).any(|one| one == mark);
            is_of_job.then(|| entry.file_name().to_string_lossy().into_owned())
        })
    }

    fn wait_for(&self, what: &str, is_there: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !is_there() {
            assert!(Instant::now() < end, "no {what} after {LIMIT:?}");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for pid in self.processes() {
            // It may be gone by now.
            drop(Command::new("kill").args(["-KILL", &pid]).output());
        }
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Rank 1 of three comes to this end; the others name it, where their launcher lets them live.
fn ends(how: &str, parts: &[&str]) {
    let Some(mut command) = mpirun(3, &format!("mpi fault: {how}")) else { return };
    let place = Place::new(&how.replace(' ', "-"));
    command.arg(library().lets_survivors_live()).env(FOLDER, &place.0);
    let running = Running::start(program(&mut command));
    if how == "stops" {
        place.wait_for("errors", || [0, 2].iter().all(|rank| place.error(*rank).is_some()));
        // Nobody else does that.
        let pid = std::fs::read_to_string(place.0.join("under-way-1")).expect("a process");
        drop(Command::new("kill").args(["-KILL", &pid]).output().expect("kill runs"));
    }
    // The launcher's own exit status is for it to choose.
    let (_, output) = running.finish(LIMIT);
    let errors: Vec<String> = [0, 2].into_iter().filter_map(|rank| place.error(rank)).collect();
    // UCX, beneath MPICH, may abort a process whose peer has died. Who remains may see that end first.
    let is_mpich = library() == Library::Mpich;
    assert!(errors.len() == 2 || is_mpich, "{how}: {errors:?}\n{output}");
    for error in errors {
        let is_told = error.contains("rank 1 (host ") && parts.iter().any(|p| error.contains(p));
        assert!(is_told || is_mpich && error.contains("died (signal 6)"), "{how}: {error}");
    }
}

#[test]
fn a_rank_that_ends_by_itself_is_named_over_mpi() {
    ends("exits early", &["left the group after"]);
    ends("panics", &["(it panicked)"]);
    ends("aborts itself", &["died"]);
}

/// Errors of MPI's own come back as errors, with what was called and the library's text; nobody's process ends by them.
#[test]
fn what_mpi_refuses_is_an_error_on_every_rank() {
    for (how, call) in [("may not send", "MPI_Isend"), ("may not look", "MPI_Test")] {
        let Some(mut command) = mpirun(3, &format!("mpi fault: {how}")) else { return };
        let place = Place::new(&how.replace(' ', "-"));
        command.arg(library().lets_survivors_live()).env(FOLDER, &place.0);
        let (_, output) = Running::start(program(&mut command)).finish(LIMIT);
        let errors: Vec<_> = (0..3).map(|rank| place.error(rank).expect(&output)).collect();
        let own = format!("mpi: {call} failed on rank 1: ");
        for (rank, error) in errors.iter().enumerate() {
            assert!(error.contains(&own), "{how}, rank {rank}: {error}");
        }
        assert!(errors[1].contains("during all_reduce"), "{how}: {errors:?}");
    }
}

/// What a rank has done is there after its death, where somebody has asked for that; else the others say how to ask.
#[test]
fn survivors_say_how_to_keep_a_record_unless_it_is_kept() {
    for keeps in [false, true] {
        let Some(mut command) = mpirun(3, "mpi fault: aborts itself") else { return };
        let place = Place::new(if keeps { "kept" } else { "not-kept" });
        command.arg(library().lets_survivors_live()).env(FOLDER, &place.0);
        if keeps {
            command.env("PHALANX_FLIGHT_RECORDER", &place.0);
        }
        let (_, output) = Running::start(program(&mut command)).finish(LIMIT);
        let errors: Vec<String> = [0, 2].into_iter().filter_map(|rank| place.error(rank)).collect();
        assert!(errors.len() == 2 || library() == Library::Mpich, "{errors:?}\n{output}");
        let help = if keeps { "help: none" } else { "PHALANX_FLIGHT_RECORDER=FOLDER" };
        assert!(errors.iter().all(|error| error.contains(help)), "{errors:?}");
        let entries = std::fs::read_dir(&place.0).expect("our own folder").flatten();
        let is_record = |file: &DirEntry| file.file_name().to_string_lossy().starts_with("flight-");
        let records = entries.filter(is_record).map(|file| {
            let file = std::fs::File::open(file.path()).expect("a record");
            FlightRecord::read(file).expect("readable").expect("of a rank")
        });
        let mut ranks: Vec<usize> = records.map(|record| record.rank).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, if keeps { vec![0, 1, 2] } else { vec![] }, "{output}");
    }
}

#[test]
fn a_stopped_rank_is_named_over_mpi_with_its_state() {
    ends("stops", &["not responding for 5"]);
}

/// Two ranks on each of two machines, in the middle of their work, when something happens; until all have ended, or
/// have left an error.
fn on_two_machines(name: &str, fault: impl FnOnce(&Namespaces)) -> Option<Place> {
    mpirun(4, "")?;
    let machines = namespaces()?;
    let place = Place::new(name);
    let mut command = between_machines(&machines, &place.0, "mpi fault: from outside", &[FOLDER]);
    command.env(FOLDER, &place.0);
    let running = Running::start(program(&mut command));
    let all = |what: &str| (0..4).all(|rank| place.0.join(format!("{what}-{rank}")).exists());
    place.wait_for("steps of all ranks", || all("under-way"));
    fault(&machines);
    place.wait_for("end of all ranks", || all("error") || place.ranks() == 0);
    drop(running);
    Some(place)
}

/// The launchers are cut off from each other as well; the ranks end by themselves.
#[test]
fn a_link_that_goes_down_ends_both_sides_over_mpi() {
    let place = on_two_machines("link", Namespaces::link_down);
    let Some(place) = place else { return };
    for rank in 0..4 {
        let Some(error) = place.error(rank) else {
            // MPICH may end a rank before it has spoken.
            assert!(library() == Library::Mpich, "rank {rank} has said nothing");
            continue;
        };
        let others = if rank < 2 { ["rank 2 (", "rank 3 ("] } else { ["rank 0 (", "rank 1 ("] };
        assert!(others.iter().any(|other| error.contains(other)), "rank {rank}: {error}");
        assert!(error.contains("not responding for 5"), "rank {rank}: {error}");
    }
}

/// Every connection between the machines is reset at once: MPI's own, its launcher's and ours.
#[test]
fn reset_connections_end_the_ranks_over_mpi() {
    let place = on_two_machines("resets", |machines| {
        let mut reset = machines.command(0, "ss");
        let output = reset.args(["-K", "-tnH", "dst", "10.99.0.2"]).output().expect("ss runs");
        assert!(!output.stdout.is_empty(), "nothing was reset: {output:?}");
    });
    let Some(place) = place else { return };
    for (rank, error) in (0..4).filter_map(|rank| Some((rank, place.error(rank)?))) {
        // With all connections gone a peer that lives cannot be told from one that has died.
        assert!(error.contains(" (host ") && error.contains("died"), "rank {rank}: {error}");
    }
}
