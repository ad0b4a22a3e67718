//! The command line. Flags come before the configuration file.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use phalanx_launch::LaunchArgs;

use super::config::{Config, SHIPPED};
use super::failure;
pub(crate) use super::train_flags::Settings;
use super::train_flags::{put, TrainFlags};

/// Trains GPT-2, Llama or Mixtral on the next tokens of text, on a mesh of data, tensor, pipeline and context parallelism.
#[derive(Debug, Clone, Parser)]
#[command(name = "gpt")]
pub(crate) struct Flags {
    /// Configuration (JSON) [default: `configs/gpt_tiny.json`].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What trainers have in common.
    #[command(flatten)]
    pub(crate) train: TrainFlags,
    /// Ranks that compute different samples [default: what is left of the world].
    #[arg(long, value_name = "N")]
    pub(crate) dp: Option<usize>,
    /// Ranks that have parts of the same matrices.
    #[arg(long, value_name = "N")]
    pub(crate) tp: Option<usize>,
    /// Ranks that have different layers.
    #[arg(long, value_name = "N")]
    pub(crate) pp: Option<usize>,
    /// Ranks that have parts of the same sequences.
    #[arg(long, value_name = "N")]
    pub(crate) cp: Option<usize>,
    /// Ranks that have different experts.
    #[arg(long, value_name = "N")]
    pub(crate) ep: Option<usize>,
    /// Cut tokens between blocks over tp, too.
    #[arg(long)]
    pub(crate) sequence_parallel: bool,
    /// What the ranks of a pipeline do, and when: gpipe, 1f1b, interleaved:CHUNKS or zb-h1.
    #[arg(long, value_name = "NAME")]
    pub(crate) schedule: Option<String>,
    /// Dropout probability of the attention alone.
    #[arg(long, value_name = "P")]
    pub(crate) attention_dropout: Option<f64>,
    /// Tokens to write at the end; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) sample: usize,
    /// How random they are; 0 always takes the most likely.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub(crate) temperature: f64,
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
        let (default, text) = SHIPPED[0];
        let default = (PathBuf::from(default), text);
        self.train.settings(self.config.as_ref(), default, |config| self.laid_over(config))
    }

    fn laid_over(&self, config: Config) -> Config {
        let mut config = self.train.laid_over(config);
        let (model, mesh) = (&mut config.model, &mut config.mesh);
        let dropout = self.train.dropout.as_ref();
        put(&mut model.embd_pdrop, dropout);
        put(&mut model.resid_pdrop, dropout);
        put(&mut model.attn_pdrop, self.attention_dropout.as_ref().or(dropout));
        mesh.dp = self.dp.or(mesh.dp);
        put(&mut mesh.tp, self.tp.as_ref());
        put(&mut mesh.pp, self.pp.as_ref());
        put(&mut mesh.cp, self.cp.as_ref());
        put(&mut mesh.ep, self.ep.as_ref());
        mesh.sequence_parallel |= self.sequence_parallel;
        put(&mut mesh.schedule, self.schedule.as_ref());
        config.train.threads = self.launch.threads.or(config.train.threads);
        config
    }
}
