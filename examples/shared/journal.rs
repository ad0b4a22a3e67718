//! What rank 0 keeps and shows: progress, metrics, and at the end the output and a screen.

use std::path::{Path, PathBuf};

use anyhow::Result;
use phalanx_data::loader::WaitShares;

use super::config::Config;
use super::metrics::{MetricsFile, StepRecord, Summary};
use super::output::Output;
use super::progress::Progress;
use super::report;

/// Kept by rank 0 alone.
#[derive(Debug)]
pub(crate) struct Journal {
    output: Output,
    metrics: Option<MetricsFile>,
    progress: Progress,
    records: Vec<StepRecord>,
    waits: WaitShares,
}

impl Journal {
    /// Opens everything that will be written: a place that cannot be written is found before the
    /// first step.
    pub(crate) fn open(
        config: &Config,
        name: &str,
        metrics: Option<&Path>,
        world_size: usize,
    ) -> Result<Journal> {
        let may_go_on = config.checkpoint.is_on();
        let open = if may_go_on { MetricsFile::reopen } else { MetricsFile::create };
        Ok(Journal {
            output: Output::create(config.train.output.as_deref(), name)?,
            metrics: metrics.map(open).transpose()?,
            progress: Progress::new(config.train.steps),
            records: Vec::new(),
            waits: WaitShares::new(world_size),
        })
    }

    /// The run begins behind `step`: what an earlier one has kept up to there belongs to it.
    pub(crate) fn go_on(&mut self, step: u64) -> Result<()> {
        if let Some(file) = &mut self.metrics {
            self.records = file.go_on(step)?;
            self.records.iter_mut().for_each(|record| record.data_wait_ms_by_rank = Vec::new());
        }
        Ok(())
    }

    /// After each step.
    pub(crate) fn step(&mut self, mut record: StepRecord) -> Result<()> {
        self.progress.step(&record);
        let slow = self.waits.step(&record.data_wait_ms_by_rank, record.step_ms);
        if !slow.is_empty() {
            self.progress.say(&format!("note   {}", report::waiting(&slow)));
        }
        let written = self.metrics.as_mut().map_or(Ok(()), |file| file.write(&record));
        // The file and the sums have it; many ranks over many steps would fill the memory.
        record.data_wait_ms_by_rank = Vec::new();
        self.records.push(record);
        written
    }

    /// Where the weights go.
    pub(crate) fn weights(&self) -> PathBuf {
        self.output.weights()
    }

    /// Writes plot and summary beside the weights; returns the screen to be shown.
    pub(crate) fn close(mut self, config: &Config, summary: &Summary) -> Result<String> {
        self.progress.finish();
        let mut written = self.output.write(&config.model, &self.records)?;
        if let Some(file) = &mut self.metrics {
            file.write(&serde_json::json!({ "summary": summary }))?;
            written.push(file.path().display().to_string());
        }
        Ok(report::screen(&self.records, summary, &self.waits.slow(), &written))
    }
}
