//! `phalanx checkpoint inspect`: what is there.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use phalanx_checkpoint::{Checkpoint, Folder, Listed, Opened, State, Tensors};
use serde_json::{json, Value};

use crate::report::{self, bytes, count};

#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "flags")]
pub(crate) struct InspectArgs {
    /// A checkpoint (step-…), a folder of them, or weights (a .safetensors file, an index, a folder with either).
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// List the tensors: name, element type, shape, bytes and pieces. Of a folder, those of the newest checkpoint.
    #[arg(long)]
    tensors: bool,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let listed = Folder::new(&args.path).list().unwrap_or_default();
    if listed.is_empty() {
        show(&Opened::open(&args.path)?, args)?;
    } else {
        show_folder(&args.path, &listed, args)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(opened: &Opened, args: &InspectArgs) -> Result<()> {
    if args.json {
        let mut object = match opened.checkpoint() {
            Some(checkpoint) => about(checkpoint)?,
            None => json!({ "path": args.path, "bytes": total(opened.tensors()) }),
        };
        object["tensors"] = tensors_json(opened);
        return report::print_json(&object);
    }
    let mut out = match opened.checkpoint() {
        Some(checkpoint) => lines(checkpoint)?,
        None => weights_lines(&args.path, opened.tensors())?,
    };
    if args.tensors {
        out += &table(opened)?;
    }
    report::print(&out)
}

fn about(checkpoint: &Checkpoint) -> Result<Value> {
    let files = checkpoint.files().map(|(name, bytes)| json!({ "name": name, "bytes": bytes }));
    Ok(json!({
        "path": checkpoint.path(), "step": checkpoint.step(), "world_size": checkpoint.world_size(),
        "bytes": checkpoint.bytes(), "files": files.collect::<Vec<_>>(), "values": checkpoint.values()?,
    }))
}

fn tensors_json(opened: &Opened) -> Value {
    let tensors = opened.tensors();
    let one = |name: &str| {
        let spec = tensors.spec(name)?;
        let (dtype, bytes) = (spec.dtype.name(), spec.bytes());
        let pieces = opened.checkpoint().map_or(1, |checkpoint| checkpoint.pieces(name).len());
        let (shape, pieces) = (spec.shape, pieces);
        Some(
            json!({ "name": name, "dtype": dtype, "shape": shape, "bytes": bytes, "pieces": pieces }),
        )
    };
    tensors.names().into_iter().filter_map(one).collect()
}

fn lines(checkpoint: &Checkpoint) -> Result<String> {
    let mut out = String::new();
    let files: Vec<_> = checkpoint.files().collect();
    writeln!(out, "checkpoint   {}", checkpoint.path().display())?;
    writeln!(out, "step         {}", checkpoint.step())?;
    writeln!(out, "saved by     {} ranks", checkpoint.world_size())?;
    writeln!(out, "tensors      {}", elements(checkpoint))?;
    writeln!(out, "shards       {} with {}", files.len(), bytes(checkpoint.bytes()))?;
    for (name, size) in files {
        writeln!(out, "  {name}  {}", bytes(size))?;
    }
    writeln!(out, "values       {}", checkpoint.values()?)?;
    Ok(out)
}

fn weights_lines(path: &Path, tensors: &dyn Tensors) -> Result<String> {
    let mut out = String::new();
    writeln!(out, "weights      {}", path.display())?;
    writeln!(out, "tensors      {}", elements(tensors))?;
    writeln!(out, "size         {}", bytes(total(tensors)))?;
    Ok(out)
}

/// `12 with 345 678 elements`
fn elements(tensors: &dyn Tensors) -> String {
    let names = tensors.names();
    let specs = names.iter().filter_map(|name| tensors.spec(name));
    let elements: u64 = specs.map(|spec| spec.shape.iter().product::<u64>()).sum();
    format!("{} with {} elements", names.len(), count(elements))
}

fn total(tensors: &dyn Tensors) -> u64 {
    let names = tensors.names().into_iter();
    names.filter_map(|name| tensors.spec(name)).map(|spec| spec.bytes()).sum()
}

/// A line for each tensor.
fn table(opened: &Opened) -> Result<String> {
    let (tensors, mut out) = (opened.tensors(), String::new());
    let width = tensors.names().iter().map(|name| name.len()).max().unwrap_or(0);
    for name in tensors.names() {
        let Some(spec) = tensors.spec(name) else { continue };
        let size = bytes(spec.bytes());
        write!(out, "  {name:width$}  {:4}  {:?}  {size}", spec.dtype.name(), spec.shape)?;
        match opened.checkpoint().map(|checkpoint| checkpoint.pieces(name)) {
            Some(pieces) if pieces.len() > 1 => writeln!(out, ", {} pieces", pieces.len())?,
            _ => writeln!(out)?,
        }
    }
    Ok(out)
}

fn show_folder(path: &Path, listed: &[Listed], args: &InspectArgs) -> Result<()> {
    if args.json {
        let found: Vec<Value> = listed.iter().map(listed_json).collect();
        return report::print_json(&json!({ "path": path, "checkpoints": found }));
    }
    let mut out = String::new();
    for one in listed {
        let name = one.path.file_name().unwrap_or_default().to_string_lossy();
        match &one.state {
            State::Complete(checkpoint) => {
                let size = bytes(checkpoint.bytes());
                writeln!(out, "{name}  {size}, {} shards, complete", checkpoint.files().count())?;
            }
            State::Damaged(error) => writeln!(out, "{name}  damaged: {error}")?,
            _ => writeln!(out, "{name}  incomplete; the next checkpoint that is saved removes it")?,
        }
    }
    if args.tensors {
        out += &table(&Opened::open(path)?)?;
    }
    report::print(&out)
}

fn listed_json(one: &Listed) -> Value {
    let (state, size, error) = match &one.state {
        State::Complete(checkpoint) => ("complete", Some(checkpoint.bytes()), None),
        State::Damaged(error) => ("damaged", None, Some(error.to_string())),
        _ => ("incomplete", None, None),
    };
    json!({ "step": one.step, "path": one.path, "state": state, "bytes": size, "error": error })
}
