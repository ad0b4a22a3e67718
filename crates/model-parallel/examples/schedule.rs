//! Prints a pipeline schedule: `cargo run -p phalanx-model-parallel --example schedule -- zb-h1 4 8`.
//!
//! Arguments: the kind (`gpipe`, `1f1b`, `interleaved:N`, `zb-h1`), ranks and micro-batches.

use std::error::Error;
use std::io::Write as _;

use phalanx_model_parallel::pipeline::schedule::{Costs, Schedule, ScheduleKind};

fn main() -> Result<(), Box<dyn Error>> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let [kind, ranks, micro_batches] = given.as_slice() else {
        return Err("give a kind, ranks and micro-batches: zb-h1 4 8".into());
    };
    let kind: ScheduleKind = kind.parse()?;
    let schedule = Schedule::new(kind, ranks.parse()?, micro_batches.parse()?)?;
    schedule.verify()?;
    let timeline = schedule.timeline(&Costs::UNIT)?;
    let kept: Vec<usize> =
        (0..schedule.rank_count()).map(|it| schedule.activations_max(it)).collect();
    let (idle, end) = (timeline.idle(0), timeline.end());
    let chunks = kind.chunk_count();
    writeln!(std::io::stdout(), "{timeline}\n\nidle {idle} of {end}; activations kept, by rank: {kept:?} (1/{chunks} of a rank's layers each)")?;
    Ok(())
}
