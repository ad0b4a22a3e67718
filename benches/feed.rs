//! Sequences a second as tensors, with masks: `cargo bench --bench feed [-- SEQUENCES]`.
//!
//! L = 512, u16 tokens, batches of 32, globally shuffled, page-cached; 200 000 sequences (205 MB) unless told otherwise. Beside
//! it, if Python with torch is there (`PHALANX_PYTHON`, else `python3`), `scripts/bench_dataloader.py` reads the same
//! tokens with PyTorch's `DataLoader`, masks and all, in the same run.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use phalanx::data::{
    permutation::Permutation, Access, LoaderOptions, MaskedText, Masking, SpecialTokens,
    TokenWriter,
};
use phalanx::ddp::feed::Feed;
use tch::Device;

const LEN: usize = 512;
const BATCH: usize = 32;
const VOCAB_SIZE: u32 = 8192;
const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, SEP, 4);
const SEP: u32 = 3;

fn main() -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let sequences: u64 = given.unwrap_or(if is_bench { 200_000 } else { 2_000 });
    let folder = tempfile::tempdir()?;
    let target = folder.path().join("tokens");
    write(&target, sequences)?;
    let mut out = std::io::stdout().lock();
    for threads in [0, 1] {
        let masking = Masking::default();
        let samples = Arc::new(MaskedText::open(&target, LEN, masking, Access::Map)?);
        let options = LoaderOptions { global_batch: BATCH, threads, ..Default::default() };
        let opened = Instant::now();
        let mut feed = Feed::new(samples, options, Device::Cpu)?;
        drop(feed.next_step()?);
        let first = opened.elapsed();
        let steps = feed.steps_per_epoch();
        let (mut best, mut sum) = (f64::INFINITY, 0);
        for epoch in 0..4 {
            let started = Instant::now();
            for _ in 0..steps {
                sum += feed.next_step()?.label_count();
            }
            if epoch > 0 {
                best = best.min(started.elapsed().as_secs_f64());
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = sequences as f64 / best;
        writeln!(
            out,
            "phalanx, tensors with masks, {threads} prefetch threads: {rate:>9.0} sequences/s, first batch {:.2} ms (sum {sum})",
            first.as_secs_f64() * 1e3
        )?;
    }
    let python = std::env::var("PHALANX_PYTHON").unwrap_or_else(|_unset| "python3".to_owned());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench_dataloader.py");
    let of_script = [script.as_os_str(), target.as_os_str()];
    match Command::new(&python).args(of_script).output() {
        Ok(output) if output.status.success() => out.write_all(&output.stdout)?,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or_default();
            writeln!(out, "PyTorch's DataLoader was not measured ({python}: {last})")?;
        }
        Err(error) => writeln!(out, "PyTorch's DataLoader was not measured ({python}: {error})")?,
    }
    Ok(())
}

/// Shards of random tokens, each document about one sequence long.
fn write(target: &Path, sequences: u64) -> anyhow::Result<()> {
    let mut writer = TokenWriter::create(target, b"{}", VOCAB_SIZE, SPECIAL, 64 << 20)?;
    let mut document = vec![0; LEN - 2];
    for number in 0..sequences {
        let order = Permutation::new(u64::from(VOCAB_SIZE - 5), number, 0);
        for (token, at) in document.iter_mut().zip(0..) {
            *token = u32::try_from(order.at(at))? + 5;
        }
        document[LEN - 3] = SEP;
        writer.tokens(&document)?;
        writer.end_document()?;
    }
    writer.finish(0)?;
    Ok(())
}
