//! The command line. Flags come before the configuration file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use phalanx_launch::LaunchArgs;

use super::config::{Config, SHIPPED};
use super::disturbed::Disturbance;
use super::failure;
pub(crate) use super::train_flags::Settings;
use super::train_flags::{put, TrainFlags};

/// Pre-trains BERT on text by masked language modelling, data-parallel over any number of ranks.
#[derive(Debug, Clone, Parser)]
#[command(name = "bert_large")]
pub(crate) struct Flags {
    /// Configuration (JSON) [default: `configs/bert_large.json`].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What trainers have in common.
    #[command(flatten)]
    pub(crate) train: TrainFlags,
    /// Disturbs one rank's loader, to try what becomes of the others: `slow:RANK` (500 ms a batch) or
    /// `panic:RANK`.
    #[arg(long, hide = true, value_name = "TROUBLE:RANK")]
    pub(crate) disturb_loader: Option<Disturbance>,
    /// How ranks are started.
    #[command(flatten)]
    pub(crate) launch: LaunchArgs,
}

impl Flags {
    /// Reads the command line. What is wrong with it, or the help, is printed; the error is the
    /// exit code.
    pub(crate) fn parse_or_explain() -> Result<Flags, u8> {
        Flags::try_parse().map_err(|error| failure::explained(&error))
    }

    /// How ranks are started; the configuration may know how many threads they have.
    pub(crate) fn launch(&self, settings: &Settings) -> LaunchArgs {
        LaunchArgs { threads: settings.config.train.threads, ..self.launch.clone() }
    }

    /// Reads the configuration, lays the flags over it, checks both.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let (default, text) = SHIPPED[SHIPPED.len() - 1];
        let default = (PathBuf::from(default), text);
        self.train.settings(self.config.as_ref(), default, |config| self.laid_over(config))
    }

    fn laid_over(&self, config: Config) -> Config {
        let mut config = self.train.laid_over(config);
        put(&mut config.model.hidden_dropout_prob, self.train.dropout.as_ref());
        put(&mut config.model.attention_probs_dropout_prob, self.train.dropout.as_ref());
        config.train.threads = self.launch.threads.or(config.train.threads);
        config
    }
}
