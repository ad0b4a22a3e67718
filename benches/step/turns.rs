//! Steps on demand: `scripts/bench_ddp.sh` lets this program and PyTorch take turns, so that what drifts meets both.
//!
//! Each rank reads requests from its standard input, a line each, and answers with a JSON line: `with 3` is three
//! steps with the exchange of gradients, `without 3` the same without it. While a rank waits for a line it uses no
//! processor. The end of the input ends the rank. `benches/peers/ddp_step.py` is the other end, and answers alike.

use std::io::BufRead as _;

use anyhow::{bail, Context as _, Result};

use phalanx::Group;

use super::Stepper;

/// Serves requests until the input ends.
pub(super) fn serve(group: &mut Group, stepper: &mut Stepper) -> Result<()> {
    println!("{{\"parameters\": {}}}", stepper.parameter_elements);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (kind, count) = line.split_once(' ').with_context(|| format!("request {line:?}"))?;
        let with = match kind {
            "with" => true,
            "without" => false,
            other => bail!("request {other:?}: expected with or without"),
        };
        let count: usize = count.parse().with_context(|| format!("request {line:?}"))?;
        let times = (0..count).map(|_| stepper.time(group, with)).collect::<Result<Vec<f64>>>()?;
        println!("{{\"ms\": {times:?}}}");
    }
    Ok(())
}
