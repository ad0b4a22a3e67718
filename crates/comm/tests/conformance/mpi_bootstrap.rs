//! MPI as bootstrap alone: rank, size, place and the way to the store come from it, and the data goes over NCCL (the
//! stand-in for it).

use phalanx_comm::GroupOptions;
#[cfg(feature = "mpi")]
use phalanx_comm::{Backend, Group, Sum, Work};

use crate::launched::Running;
use crate::mpirun::{mpirun, program};
use crate::without_gpu::{libraries, Exchange, LIMIT};

/// What a rank does.
#[cfg(feature = "mpi")]
pub(crate) fn rank(options: GroupOptions) {
    let launched = |name: &str| std::env::var_os(name).is_some();
    assert!(!launched("MASTER_ADDR") && !launched("MASTER_PORT"), "MPI alone knows the way");
    let mut group = Group::from_mpi(GroupOptions { backend: Backend::Nccl, ..options })
        .expect("the ranks meet");
    assert_eq!(group.backend(), Backend::Nccl);
    let region = group.allocate::<f32>(1000).expect("memory");
    region.write(0, &vec![group.rank() as f32 + 1.0; 1000]);
    group.all_reduce(region.full(), Sum).and_then(Work::synchronize).expect("a sum");
    let sum = (1..=group.world_size()).sum::<usize>() as f32;
    assert!(region.read(0..1000).iter().all(|value| *value == sum), "{:?}", region.read(0..1));
    // A second communicator: its id is exchanged over the group itself.
    let mut half = group.duplicate().expect("a second communicator");
    let other = half.allocate::<f32>(10).expect("memory");
    other.write(0, &[2.0; 10]);
    half.all_reduce(other.full(), Sum).and_then(Work::synchronize).expect("a sum");
    assert_eq!(other.read(0..1), [2.0 * half.world_size() as f32]);
    println!("rank {} of {} sums over NCCL", group.rank(), group.world_size());
}

#[cfg(not(feature = "mpi"))]
pub(crate) fn rank(_: GroupOptions) {
    panic!("built without MPI");
}

#[test]
fn ranks_meet_over_mpi_and_sum_over_nccl() {
    let exchange = Exchange::new();
    for ranks in [2, 3] {
        let Some(mut command) = mpirun(ranks, "bootstrap") else { return };
        command.env_remove("MASTER_PORT").env_remove("PHALANX_NCCL_LIBRARY");
        command.env("LD_LIBRARY_PATH", libraries()).env("DOUBLE_FOLDER", &exchange.0);
        command.env("DOUBLE_GPUS", ranks.to_string());
        let (status, output) = Running::start(program(&mut command)).finish(LIMIT);
        assert!(status.success(), "{ranks} ranks: {status}\n{output}");
        assert_eq!(output.matches("sums over NCCL").count(), ranks, "{output}");
    }
}
