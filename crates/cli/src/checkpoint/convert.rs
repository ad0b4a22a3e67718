//! `phalanx checkpoint convert`: a checkpoint or weights, written anew.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{bail, Result};
use clap::{Args, ValueEnum};
use phalanx_checkpoint::fs::{Fs, Real};
use phalanx_checkpoint::{write_weights, Dtype, Error, Opened, Selected, Tensors, WeightsOptions};

use crate::failure::Usage;
use crate::report;

#[derive(Args, Debug)]
pub(crate) struct ConvertArgs {
    /// A checkpoint (step-…), a folder of them (the newest is taken), or weights.
    from: PathBuf,
    /// A folder for weights, or a path that ends in .safetensors; with --shards a folder of checkpoints.
    to: PathBuf,
    /// Write a checkpoint of this many shards instead of weights.
    #[arg(long, value_name = "N", conflicts_with_all = ["prefix", "dtype", "shard_bytes_max"])]
    shards: Option<NonZeroUsize>,
    /// Only tensors whose names begin so; they are written without it.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,
    /// Convert floating-point tensors.
    #[arg(long)]
    dtype: Option<DtypeFlag>,
    /// Several files, none of them with more bytes of tensors.
    #[arg(long = "max-shard-bytes", value_name = "BYTES", default_value_t = 5_000_000_000)]
    shard_bytes_max: u64,
}

/// A floating-point type.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeFlag {
    F32,
    Bf16,
    F16,
}

impl From<DtypeFlag> for Dtype {
    fn from(flag: DtypeFlag) -> Dtype {
        match flag {
            DtypeFlag::F32 => Dtype::F32,
            DtypeFlag::Bf16 => Dtype::BF16,
            DtypeFlag::F16 => Dtype::F16,
        }
    }
}

pub(crate) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let opened = Opened::open(&args.from)?;
    match args.shards {
        Some(shards) => to_checkpoint(&opened, args, shards)?,
        None => to_weights(&opened, args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn to_checkpoint(opened: &Opened, args: &ConvertArgs, shards: NonZeroUsize) -> Result<()> {
    let Some(checkpoint) = opened.checkpoint() else {
        bail!(Usage(format!("{} is not a checkpoint: --shards needs one", args.from.display())));
    };
    let fs: Arc<dyn Fs> = Arc::new(Real);
    let written = checkpoint.rewrite(&args.to, shards, &fs)?;
    report::print(&format!("{}\n", written.display()))
}

fn to_weights(opened: &Opened, args: &ConvertArgs) -> Result<()> {
    let selected = Selected::new(opened.tensors(), &args.prefix);
    if selected.names().is_empty() {
        let (path, prefix) = (args.from.display(), &args.prefix);
        bail!(Usage(format!("{path} has no tensor whose name begins with `{prefix}`")));
    }
    let is_file = args.to.extension().is_some_and(|end| end == "safetensors");
    let file = if is_file { args.to.clone() } else { args.to.join("model.safetensors") };
    if file.exists() {
        return Err(Error::Exists { path: file }.into());
    }
    let (dtype, shard_bytes_max) = (args.dtype.map(Dtype::from), args.shard_bytes_max);
    let options = WeightsOptions { shard_bytes_max, dtype };
    let written = write_weights(&Real, &args.to, &selected, &options)?;
    let lines: String = written.iter().map(|path| format!("{}\n", path.display())).collect();
    report::print(&lines)
}
