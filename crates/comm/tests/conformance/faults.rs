//! Faults under `mpirun`: a rank that is killed, ranks that exit with codes of their own, wrong set-ups.

use std::process::Command;
use std::time::{Duration, Instant};

use phalanx_comm::{Backend, Group, GroupOptions, Sum, Work};

use crate::launched::Running;
use crate::mpirun::{library, mpirun, program, Library};
use crate::without_gpu::libraries;

const LIMIT: Duration = Duration::from_secs(60);

/// What a rank does.
pub(crate) fn rank(role: &str, options: GroupOptions) {
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let victim = group.rank() == 1;
    match role {
        "killed in large all-reduces" => work_until_death(&mut group, 4 << 20, victim),
        "killed in small all-reduces" => work_until_death(&mut group, 16, victim),
        "exits with its own code" => {
            let mut values = [1.0_f32; 1000];
            group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("a sum");
            if victim {
                std::process::exit(17);
            }
            drop(group);
        }
        "lets works go" => {
            let mut values = vec![1.0_f32; 100_000];
            drop(group.all_reduce(&mut values[..], Sum).expect("started"));
            drop(group);
            println!("let go");
        }
        "forgets its group" => {
            let mut values = vec![1.0_f32; 1 << 20];
            if victim {
                drop(group.all_reduce(&mut values[..], Sum).expect("started"));
                _ = std::mem::ManuallyDrop::new(group);
                return;
            }
            // The other one is at its end by then.
            let (_sender, receiver) = std::sync::mpsc::channel::<()>();
            assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err());
            group.all_reduce(&mut values[..], Sum).and_then(Work::wait).expect("a sum");
            assert!(values.iter().all(|value| *value == 3.0));
            println!("summed");
        }
        other => panic!("no such role: {other}"),
    }
}

/// The victim kills itself in the middle; the others say what they see, how soon, and end.
fn work_until_death(group: &mut Group, len: usize, victim: bool) {
    let region = group.allocate::<f32>(len).expect("memory");
    for step in 0..u64::MAX {
        let start = Instant::now();
        let work = group.tagged("step").all_reduce(region.full(), Sum);
        if victim && step == 20 {
            let own = std::process::id().to_string();
            drop(Command::new("kill").args(["-9", &own]).status());
        }
        if let Err(error) = work.and_then(Work::wait) {
            println!("error after {} ms: {error}", start.elapsed().as_millis());
            std::process::exit(3);
        }
    }
}

/// Where the launcher lets survivors live they end by themselves.
fn killed(role: &str) {
    let Some(mut command) = mpirun(3, role) else { return };
    command.env("LD_LIBRARY_PATH", libraries()); // for those with a GPU
    command.arg(library().lets_survivors_live());
    // So mpirun's own exit status says nothing.
    let (_, output) = Running::start(program(&mut command)).finish(LIMIT);
    let lines: Vec<&str> = output.lines().filter(|line| line.contains("error after")).collect();
    // UCX, beneath MPICH, may abort a process whose peer has died. Who remains may see that end first.
    let is_mpich = library() == Library::Mpich;
    assert!(lines.len() == 2 || is_mpich, "{output}");
    for line in lines {
        let is_told = line.contains("rank 1 (host ") && line.contains("died");
        assert!(is_told || is_mpich && line.contains("died (signal 6)"), "{line}");
    }
}

#[test]
fn survivors_of_kill_9_say_who_died() {
    killed("killed in large all-reduces");
    killed("killed in small all-reduces");
}

#[test]
fn survivors_whose_gpu_memory_is_on_its_way_say_who_died() {
    killed("gpu killed");
}

#[test]
fn a_rank_whose_gpu_memory_does_not_come_is_named() {
    let Some(mut command) = mpirun(3, "gpu absent") else { return };
    command.env("LD_LIBRARY_PATH", libraries()).arg(library().lets_survivors_live());
    let (_, output) = Running::start(program(&mut command)).finish(LIMIT);
    let lines: Vec<&str> = output.lines().filter(|line| line.contains("error after")).collect();
    let named = lines.iter().filter(|line| line.contains("1s passed") && line.contains("rank 1"));
    // Hydra may end the others when the first of them ends.
    assert!(!lines.is_empty() && named.count() == lines.len(), "{output}");
    assert!(lines.len() == 2 || library() == Library::Mpich, "{output}");
}

#[test]
fn kill_9_ends_the_job() {
    let Some(mut command) = mpirun(3, "killed in large all-reduces") else { return };
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(!status.success(), "{output}");
}

#[test]
fn a_rank_keeps_its_exit_code() {
    let Some(mut command) = mpirun(2, "exits with its own code") else { return };
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(!status.success(), "{output}");
    // Hydra kills the others when a rank ends without MPI_Finalize, and may show their code instead.
    assert!(status.code() == Some(17) || library() == Library::Mpich, "{status}\n{output}");
}

#[test]
fn works_and_groups_may_be_dropped_before_the_end() {
    let Some(mut command) = mpirun(3, "lets works go") else { return };
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(status.success(), "{status}\n{output}");
    assert_eq!(output.matches("let go").count(), 3, "{output}");
    assert!(!output.contains("mpirun"), "mpirun complains:\n{output}");
}

#[test]
fn what_was_started_is_finished_though_the_group_is_forgotten() {
    let Some(mut command) = mpirun(3, "forgets its group") else { return };
    let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
    assert!(status.success(), "{status}\n{output}");
    assert_eq!(output.matches("summed").count(), 2, "{output}");
    assert!(!output.contains("mpirun"), "mpirun complains:\n{output}");
}

#[test]
fn without_mpi_the_error_says_what_to_do() {
    let error = Group::single(GroupOptions { backend: Backend::Mpi, ..GroupOptions::default() })
        .unwrap_err();
    let text = error.to_string();
    let what = if cfg!(feature = "mpi") { "mpirun -n 4" } else { "--features mpi" };
    assert!(text.contains("mpi backend is not available") && text.contains(what), "{text}");
}
