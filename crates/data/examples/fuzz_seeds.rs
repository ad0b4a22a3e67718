//! Writes the right files that fuzzers begin with: `cargo run -p phalanx-data --example fuzz_seeds -- fuzz/corpus`.

use std::fs;
use std::path::PathBuf;

use phalanx_data::fuzzing::TARGETS;

fn main() -> anyhow::Result<()> {
    let Some(folder) = std::env::args().nth(1).map(PathBuf::from) else {
        anyhow::bail!("give the folder to write to: fuzz/corpus");
    };
    for target in TARGETS {
        let own = folder.join(target.name);
        fs::create_dir_all(&own)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(own.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
