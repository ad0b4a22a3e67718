//! What checksums cost an `all_reduce` over TCP: two groups of the same processes, one with them and one without, in turns.
//!
//! Beside the time the processor time of rank 0, which other processes of the machine hardly change.
//! Over the loopback device of one machine the processor copies what a network card would, so the share is the largest there is.

use std::time::Instant;

use anyhow::Result;
use phalanx_comm::rendezvous;
use phalanx_comm::{Group, GroupOptions, Sum, World};

use super::{iterations, output_of_ranks, Arguments};

pub(super) fn measure(arguments: &Arguments, ranks: usize) -> Result<()> {
    println!(
        "# {ranks} ranks, all_reduce over TCP on one machine, with and without checksums in turns"
    );
    println!(
        "# {:>11} {:>11} {:>11} {:>9} {:>9} | {:>11} {:>11} {:>9}",
        "size (B)", "with (us)", "without", "median", "fastest", "cpu (us)", "without", "cost"
    );
    for _ in 0..arguments.rounds {
        print!("{}", output_of_ranks(arguments, ranks, &["--worker", "--checks"])?);
    }
    Ok(())
}

pub(super) fn worker(sizes: &[usize]) -> Result<()> {
    let world = World { host_link: phalanx_comm::environment::HostLink::Tcp, ..World::from_env()? };
    let options = GroupOptions::default();
    let store = rendezvous::connect(&world, Instant::now() + options.connect_timeout)?;
    // The generation names where a group meets.
    let unchecked =
        World { data_checks: false, restart_count: world.restart_count + 1, ..world.clone() };
    let mut groups = [
        Group::new(world, store.clone(), options.clone())?,
        Group::new(unchecked, store, options)?,
    ];
    for bytes in sizes {
        let count = bytes / size_of::<f32>();
        let regions = [groups[0].allocate::<f32>(count)?, groups[1].allocate::<f32>(count)?];
        regions.iter().for_each(|region| region.write(0, &vec![0.0; count]));
        let mut times = [Vec::new(), Vec::new()];
        let mut cpu = [0.0, 0.0];
        let turns = (iterations(*bytes) / 2).max(10);
        for turn in 0..turns + turns / 10 + 1 {
            // Who is first changes from turn to turn.
            for which in [turn % 2, 1 - turn % 2] {
                groups[which].barrier()?.wait()?;
                let (start, cpu_start) = (Instant::now(), cpu_time());
                groups[which].all_reduce(regions[which].full(), Sum)?.wait()?;
                if turn > turns / 10 {
                    times[which].push(start.elapsed().as_secs_f64() * 1e6);
                    cpu[which] += cpu_time() - cpu_start;
                }
            }
        }
        times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let [with, without] = times;
        let median = (with[with.len() / 2], without[without.len() / 2]);
        if groups[0].rank() == 0 {
            let runs = with.len() as f64;
            println!(
                "  {bytes:>11} {:>11.2} {:>11.2} {:>8.1}% {:>8.1}% | {:>11.2} {:>11.2} {:>8.1}%",
                median.0,
                median.1,
                (median.0 / median.1 - 1.0) * 100.0,
                (with[0] / without[0] - 1.0) * 100.0,
                cpu[0] / runs,
                cpu[1] / runs,
                (cpu[0] / cpu[1] - 1.0) * 100.0
            );
        }
    }
    Ok(())
}

/// Of all threads of this process, in microseconds.
fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}
