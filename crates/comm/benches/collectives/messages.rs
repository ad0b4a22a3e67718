//! How long a message takes from a tensor's memory of one rank into that of another: both ways in turns, half of the time of a round.
//!
//! *there* is a rank that waits for the message, the time until it has it; *send* is how long the sender's own thread is kept from computing.

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use phalanx_comm::{Group, GroupOptions};

use super::{iterations, output_of_ranks, Arguments};

pub(super) fn measure(arguments: &Arguments) -> Result<()> {
    println!("# messages between two ranks, link {}", arguments.link);
    println!(
        "# {:>11} {:>11} {:>11} {:>11} {:>9}",
        "size (B)", "there (us)", "fastest", "send (us)", "GB/s"
    );
    for _ in 0..arguments.rounds {
        print!("{}", output_of_ranks(arguments, 2, &["--worker", "--send"])?);
    }
    Ok(())
}

pub(super) fn worker(sizes: &[usize]) -> Result<()> {
    let mut group = Group::from_environment(GroupOptions::default())?;
    for bytes in sizes {
        let (mine, mut theirs) = (vec![u8::try_from(group.rank())? + 1; *bytes], vec![0; *bytes]);
        let turns = iterations(*bytes) / 4 + 3;
        let mut times = Vec::new();
        let mut sending = Duration::ZERO;
        group.barrier()?.wait()?;
        for turn in 0..turns + turns / 10 + 1 {
            let start = Instant::now();
            let sent = round(&mut group, &mine, &mut theirs)?;
            if turn > turns / 10 {
                times.push(start.elapsed().as_secs_f64() * 1e6 / 2.0);
                sending += sent;
            }
        }
        let peer = u8::try_from(2 - group.rank())?;
        ensure!(theirs.iter().all(|byte| *byte == peer), "a message of {bytes} bytes is wrong");
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        if group.rank() == 0 {
            println!(
                "  {bytes:>11} {median:>11.2} {:>11.2} {:>11.2} {:>9.2}",
                times[0],
                sending.as_secs_f64() * 1e6 / times.len() as f64,
                *bytes as f64 / median / 1e3
            );
        }
    }
    Ok(())
}

/// Rank 0 sends and rank 1 answers; how long the call to send took.
fn round(group: &mut Group, mine: &[u8], theirs: &mut [u8]) -> Result<Duration> {
    let (is_first, peer) = (group.rank() == 0, 1 - group.rank());
    let arriving = group.receive_bytes(theirs.len(), peer)?;
    if is_first {
        let start = Instant::now();
        let sent = group.send(mine, peer)?;
        let sending = start.elapsed();
        arriving.wait_into(theirs)?;
        sent.wait()?;
        return Ok(sending);
    }
    arriving.wait_into(theirs)?;
    let start = Instant::now();
    let sent = group.send(mine, peer)?;
    let sending = start.elapsed();
    sent.wait()?;
    Ok(sending)
}
