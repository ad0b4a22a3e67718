//! What the loader promises, measured: `cargo bench --bench data_bars [-- SEQUENCES] [--check]`.
//!
//! L = 512, u16 tokens, batches of 32 as i64, globally shuffled, page-cached and mapped, four shards; 200 000 sequences (205 MB)
//! unless told otherwise. Everything goes through `Loader` and `Feed`. Beside it, in the same run, PyTorch's `DataLoader` and numpy read
//! the same tokens (`scripts/bench_dataloader.py`), if there is a Python with torch and numpy: `PHALANX_PYTHON`, else
//! `third_party/torch-python`, else `python3`. Figures are the best of several runs, ours taken before and after theirs. Of what one
//! thread does the rate on a processor is given too (the time for which the system let it run): on a busy machine compare that.
//! Last comes a table with what is promised. With `--check` a bar that is missed is an error.

mod corpus;
#[path = "../../crates/data/tests/support/counting.rs"]
mod counting;
#[path = "../../crates/data/tests/large/holes.rs"]
mod holes;
mod measure;
mod memory;
mod peers;
#[path = "../../crates/data/tests/support/processor.rs"]
mod processor;
mod table;

use std::io::Write as _;

use measure::{Rate, SECONDS};
use table::Table;

fn main() -> anyhow::Result<()> {
    tch::set_num_threads(1);
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let sequences: u64 = given.unwrap_or(if is_bench { 200_000 } else { 2_000 });
    let seconds = if is_bench { SECONDS } else { SECONDS / 20.0 };
    let folder = tempfile::tempdir()?;
    let corpus = corpus::write(folder.path(), sequences)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "load {} on {} processors", load()?, processors())?;

    let mut ours = Ours::default();
    ours.measure(&corpus, seconds)?;
    let peers = match peers::measure(&corpus.flat, seconds) {
        Ok(peers) => peers,
        Err(error) => {
            writeln!(out, "PyTorch's DataLoader was not measured: {error:#}")?;
            Vec::new()
        }
    };
    ours.measure(&corpus, seconds)?;
    for peer in &peers {
        writeln!(out, "{peer}")?;
    }

    let mut table = Table::default();
    rates(&mut table, &ours, &peers);
    threads(&mut table, &corpus, seconds)?;
    let [first, resumed] = measure::prompt(&corpus)?;
    table.at_most_time("first batch after open, ms", first, 5.0);
    table.at_most_time("resumed at 99 % of an epoch, ms", resumed, 5.0);
    checksums(&mut table, &corpus)?;
    let mebibytes = memory::of_a_billion_samples(folder.path())?;
    table.at_most("memory of an open folder of 10^9 samples, MiB", mebibytes, 1.0, "");
    let percent = measure::pacing(&corpus, seconds * 4.0)?;
    table.at_most(
        "feeding 1 000 sequences/s, % of a core",
        percent,
        0.2,
        "masked, 1 prefetch thread",
    );
    writeln!(out, "load {} at the end\n\n{table}", load()?)?;
    let (is_check, missed) = (arguments.iter().any(|one| one == "--check"), table.missed());
    anyhow::ensure!(!is_check || missed == 0, "{missed} bars are missed");
    Ok(())
}

/// The rates of the loader, the best so far.
#[derive(Debug, Default)]
struct Ours {
    raw: Rate,
    masked: Rate,
    masked_ahead: Rate,
}

impl Ours {
    fn measure(&mut self, corpus: &corpus::Corpus, seconds: f64) -> anyhow::Result<()> {
        self.raw.keep_best(measure::batches(&corpus.raw()?, 0, seconds)?);
        self.masked.keep_best(measure::tensors(&corpus.masked()?, 0, seconds)?);
        self.masked_ahead.keep_best(measure::tensors(&corpus.masked()?, 1, seconds)?);
        Ok(())
    }
}

fn rates(table: &mut Table, ours: &Ours, peers: &[peers::Peer]) {
    let Ours { raw, masked, masked_ahead } = ours;
    table.at_least_rate("raw batches, 1 thread, thousand/s", raw, 2000.0);
    table.at_least_rate("tensors with masks, built by the caller, thousand/s", masked, 600.0);
    table.at_least_rate("tensors with masks, 1 prefetch thread, thousand/s", masked_ahead, 600.0);
    let find = |what: &str, how: &str, workers: u32| {
        let mut all = peers.iter().filter(|peer| peer.what == what && peer.workers == workers);
        all.find(|peer| peer.how == how)
    };
    let styles = ["__getitem__", "__getitems__"];
    for how in styles {
        let bar = if how == "__getitem__" { 9.0 } else { 1.5 };
        if let Some(peer) = find("raw", how, 0) {
            table.ratio(&format!("raw batches / DataLoader {how}, no workers"), raw, peer, bar);
        }
    }
    if let Some(peer) = find("raw", "numpy alone", 0) {
        table.ratio(
            "raw batches / numpy.take of [N, L], no DataLoader, no tensors",
            raw,
            peer,
            1.0,
        );
    }
    for (what, rate) in [("raw", raw), ("masked", masked_ahead)] {
        for how in styles {
            if let Some(peer) = find(what, how, 2) {
                table.ratio(&format!("{what} / DataLoader {how}, two workers"), rate, peer, 15.0);
            }
        }
    }
    for how in styles {
        if let Some(peer) = find("masked", how, 0) {
            table.ratio(
                &format!("masked, by the caller / DataLoader {how}, no workers"),
                masked,
                peer,
                9.0,
            );
        }
    }
}

/// Two producers against one, beside what two threads gain where memory is all that counts.
fn threads(table: &mut Table, corpus: &corpus::Corpus, seconds: f64) -> anyhow::Result<()> {
    let copies = [measure::copying(1, seconds)?, measure::copying(2, seconds)?];
    let about = format!(
        "two threads that only copy: {:.2} ({:.1} GB/s to {:.1})",
        copies[1] / copies[0],
        copies[0] / 1e9,
        copies[1] / 1e9
    );
    for (what, samples) in [("masked", corpus.masked()?), ("raw", corpus.raw()?)] {
        let one = measure::batches(&samples, 1, seconds)?.wall;
        let two = measure::batches(&samples, 2, seconds)?.wall;
        let bar = 1.6_f64.min(copies[1] / copies[0]);
        table.at_least(&format!("{what} batches, 2 prefetch threads / 1"), two / one, bar, &about);
    }
    Ok(())
}

/// The first epoch, whose blocks are compared with their checksums, against later ones.
fn checksums(table: &mut Table, corpus: &corpus::Corpus) -> anyhow::Result<()> {
    let [share, later] = measure::first_touch(corpus)?;
    table.at_most("checksums and first touch, % of the first epoch's thread", share, 25.0, "");
    table.at_most("the same of the epoch after it, %", later, 5.0, "noise is all there may be");
    Ok(())
}

fn load() -> anyhow::Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}
