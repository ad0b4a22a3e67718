//! Prepares a folder of text and times what comes after it: `cargo run --release -p phalanx-data --example prepare_text -- DIR`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use phalanx_data::{convert, progress, Access, Loader, LoaderOptions, MaskedText, Masking};

fn main() -> anyhow::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| anyhow::anyhow!("give a folder with .txt files"))?;
    let started = Instant::now();
    let prepared = convert::prepare(
        &folder,
        &convert::PrepareOptions::default(),
        &progress::Terminal::stderr(),
    )?;
    let prepared_after = started.elapsed();
    let opened = Instant::now();
    let samples = MaskedText::open(&prepared.folder, 128, Masking::default(), Access::Read)?;
    let options = LoaderOptions { threads: 1, ..Default::default() };
    let mut loader = Loader::new(Arc::new(samples), options)?;
    let step = loader.next_step()?;
    let first_after = opened.elapsed();
    let report = serde_json::json!({
        "folder": prepared.folder, "reused": prepared.reused, "vocab_size": prepared.vocab_size,
        "tokens": prepared.token_count, "documents": prepared.document_count,
        "fingerprint": prepared.fingerprint.to_string(),
        "prepare_ms": prepared_after.as_secs_f64() * 1e3,
        "first_step_ms": first_after.as_secs_f64() * 1e3,
        "labels_of_first_step": step.label_count(),
    });
    serde_json::to_writer_pretty(std::io::stdout().lock(), &report)?;
    Ok(())
}
