//! The flags that trainers have in common, and the configuration with them in it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::batching::{Batching, Wanted};
use super::config::{Backend, Config, ConfigError, Hook, NonFinite, Precision, Resume, Rule};

/// Each lies over the field of the configuration that has its name.
#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line, each by itself")]
pub(crate) struct TrainFlags {
    /// Optimizer steps.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Folder of text files, or of prepared shards.
    #[arg(long, value_name = "DIR", conflicts_with = "batches")]
    pub(crate) data: Option<PathBuf>,
    /// Fixed batches: `input_ids`, `labels` and optional `attention_mask`, i64 [N, L].
    #[arg(long, value_name = "FILE")]
    pub(crate) batches: Option<PathBuf>,
    /// Take the samples as they lie.
    #[arg(long)]
    pub(crate) no_shuffle: bool,
    /// Start from these weights (safetensors, names as in transformers), which every machine must have there.
    #[arg(long, value_name = "FILE")]
    pub(crate) init_weights: Option<PathBuf>,
    /// Folder for weights and plot [default: the next free runs/NAME-NUMBER].
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Type of the matrix products.
    #[arg(long)]
    pub(crate) precision: Option<Precision>,
    /// Keep one input a layer for backward and compute the layer again there: less memory, a second forward, the same bits.
    #[arg(long)]
    pub(crate) recompute: bool,
    /// Samples a step over all ranks.
    #[arg(long, value_name = "N")]
    pub(crate) global_batch: Option<usize>,
    /// Samples that a rank computes at once.
    #[arg(long, value_name = "N")]
    pub(crate) micro_batch: Option<usize>,
    /// Micro-batches a step on each rank.
    #[arg(long, value_name = "N", alias = "micro-batches")]
    pub(crate) accumulate: Option<usize>,
    /// Peak learning rate.
    #[arg(long)]
    pub(crate) lr: Option<f64>,
    /// Steps in which the learning rate rises.
    #[arg(long, value_name = "N")]
    pub(crate) warmup_steps: Option<u64>,
    /// Update rule.
    #[arg(long)]
    pub(crate) optimizer: Option<Rule>,
    /// Of what each rank holds a part: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
    #[arg(long, value_name = "STAGE")]
    pub(crate) zero: Option<u8>,
    /// How gradients travel: none, noop, bf16, fp16, int8, topk:SHARE or powersgd:RANK, and :STEPS that travel plainly first.
    #[arg(long, value_name = "HOOK")]
    pub(crate) hook: Option<Hook>,
    /// What to do with gradients that are not finite.
    #[arg(long, value_name = "POLICY")]
    pub(crate) non_finite: Option<NonFinite>,
    /// All dropout probabilities.
    #[arg(long, value_name = "P")]
    pub(crate) dropout: Option<f64>,
    /// Of weights, order, masks and dropout.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// What moves the bytes.
    #[arg(long)]
    pub(crate) backend: Option<Backend>,
    /// After how many silent seconds a rank counts as dead [default: 5].
    #[arg(long, value_name = "SECONDS")]
    pub(crate) dead_after: Option<f64>,
    /// Folder of checkpoints, which all machines see.
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// Steps from checkpoint to checkpoint [default: only when a signal asks for one, and at the end].
    #[arg(long, value_name = "N")]
    pub(crate) save_every: Option<u64>,
    /// Steps from snapshot to snapshot in the launcher's memory, with which --max-restarts needs no disk [default: none].
    #[arg(long, value_name = "N")]
    pub(crate) memory_every: Option<u64>,
    /// Where to begin: at the newest checkpoint if there is one, at one in any case, or at the first step.
    #[arg(long, value_name = "WHEN")]
    pub(crate) resume: Option<Resume>,
    /// One JSON object a step, and a summary.
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) metrics: Option<PathBuf>,
    /// Start although the estimate says that memory will not do.
    #[arg(long)]
    pub(crate) ignore_memory: bool,
    /// Do not exchange gradients, to measure what the exchange costs; the ranks' models drift
    /// apart.
    #[arg(long, hide = true)]
    pub(crate) no_exchange: bool,
}

/// A configuration with the flags in it.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The file's name without folder and ending.
    pub(crate) name: String,
    /// File and flags together, checked.
    pub(crate) config: Config,
    /// What the file says about batches.
    pub(crate) file_batches: Wanted,
    /// What the flags say about batches.
    pub(crate) flag_batches: Wanted,
}

impl Settings {
    /// The cut of the batch for so many ranks.
    pub(crate) fn batching(&self, world_size: usize) -> Result<Batching, ConfigError> {
        Batching::resolve(world_size, self.flag_batches, self.file_batches)
    }
}

impl TrainFlags {
    /// Reads the configuration (`default`: its path and text, where none is given), lays the flags over it, checks both.
    pub(crate) fn settings(
        &self,
        given: Option<&PathBuf>,
        (default_path, text): (PathBuf, &str),
        laid_over: impl FnOnce(Config) -> Config,
    ) -> Result<Settings> {
        let path = given.unwrap_or(&default_path);
        // Outside the source tree the default is the one that was built in.
        let config = if given.is_none() && !path.exists() {
            Config::parse(text, path)?
        } else {
            Config::read(path)?
        };
        // A file is checked for what this run uses of it.
        let config = self.source_laid_over(config);
        config.validate(&path.display().to_string())?;
        let file_batches = Wanted::from(&config.train);
        let config = laid_over(config);
        config.validate("command line")?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        Ok(Settings {
            name: stem.unwrap_or_else(|| "run".into()),
            config,
            file_batches,
            flag_batches: self.batches_wanted(),
        })
    }

    /// What the flags say about batches.
    pub(crate) fn batches_wanted(&self) -> Wanted {
        Wanted {
            global_batch: self.global_batch,
            micro_batch: self.micro_batch,
            accumulate: self.accumulate,
        }
    }

    /// The configuration with the data that the flags name.
    fn source_laid_over(&self, mut config: Config) -> Config {
        let data = &mut config.data;
        put(&mut data.path, self.data.as_ref());
        if self.data.is_some() {
            data.batches = None;
        }
        data.batches = self.batches.clone().or(data.batches.take());
        config
    }

    /// The configuration with the flags in it, but for those that a model knows.
    pub(crate) fn laid_over(&self, mut config: Config) -> Config {
        let Config { data, optimizer, train, ddp, checkpoint, .. } = &mut config;
        data.shuffle &= !self.no_shuffle;
        put(&mut optimizer.rule, self.optimizer.as_ref());
        put(&mut optimizer.lr, self.lr.as_ref());
        put(&mut optimizer.warmup_steps, self.warmup_steps.as_ref());
        put(&mut train.steps, self.steps.as_ref());
        put(&mut train.precision, self.precision.as_ref());
        train.recompute |= self.recompute;
        put(&mut train.seed, self.seed.as_ref());
        train.global_batch = self.global_batch.or(train.global_batch);
        train.micro_batch = self.micro_batch.or(train.micro_batch);
        train.accumulate = self.accumulate.or(train.accumulate);
        train.output = self.output.clone().or(train.output.take());
        put(&mut ddp.zero, self.zero.as_ref());
        put(&mut ddp.hook, self.hook.as_ref());
        put(&mut ddp.non_finite, self.non_finite.as_ref());
        put(&mut ddp.backend, self.backend.as_ref());
        put(&mut ddp.dead_after_s, self.dead_after.as_ref());
        checkpoint.folder = self.checkpoint.clone().or(checkpoint.folder.take());
        put(&mut checkpoint.every_steps, self.save_every.as_ref());
        put(&mut checkpoint.memory_every_steps, self.memory_every.as_ref());
        put(&mut checkpoint.resume, self.resume.as_ref());
        config
    }
}

/// A flag that is given takes the place of the file's value.
pub(crate) fn put<T: Clone>(field: &mut T, flag: Option<&T>) {
    if let Some(value) = flag {
        field.clone_from(value);
    }
}
