//! `phalanx checkpoint diff`: how two checkpoints or weights differ.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use phalanx_checkpoint::{
    diff, diff_values, Checkpoint, Opened, Selected, TensorDifference, Tensors, What,
};
use serde_json::{json, Value};

use crate::report::{self, count};

/// Exit code for two that are not the same, as diff(1) has it.
const DIFFERENT: u8 = 1;

#[derive(Args, Debug)]
pub(crate) struct DiffArgs {
    /// A checkpoint, a folder of them (the newest is taken), or weights.
    left: PathBuf,
    /// Another.
    right: PathBuf,
    /// Compare only tensors whose names begin so; in weights, which are written without it, all. Values are not compared.
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode> {
    let (left, right) = (Opened::open(&args.left)?, Opened::open(&args.right)?);
    let prefix = args.prefix.as_deref().unwrap_or_default();
    let tensors = diff(&select(&left, prefix), &select(&right, prefix))?;
    let values = match (left.checkpoint(), right.checkpoint()) {
        (Some(left), Some(right)) if args.prefix.is_none() => values(left, right)?,
        _ => Vec::new(),
    };
    if args.json {
        let tensors: Vec<Value> = tensors.iter().map(as_json).collect();
        report::print_json(&json!({ "tensors": tensors, "values": values }))?;
    } else {
        report::print(&as_lines(&tensors, &values))?;
    }
    let is_same = tensors.is_empty() && values.is_empty();
    Ok(ExitCode::from(if is_same { 0 } else { DIFFERENT }))
}

/// The tensors with a prefix; weights that have none of them were written without it.
fn select<'a>(opened: &'a Opened, prefix: &'a str) -> Selected<'a> {
    let selected = Selected::new(opened.tensors(), prefix);
    if opened.checkpoint().is_none() && selected.names().is_empty() {
        return Selected::new(opened.tensors(), "");
    }
    selected
}

/// Differences of values, all ranks' and each rank's.
fn values(left: &Checkpoint, right: &Checkpoint) -> Result<Vec<String>> {
    let mut found = diff_values(&left.values()?, &right.values()?);
    for rank in 0..left.world_size().max(right.world_size()) {
        let value = |side: &Checkpoint| side.rank_values(rank).map(Option::unwrap_or_default);
        let differences = diff_values(&value(left)?, &value(right)?);
        found.extend(differences.into_iter().map(|text| format!("rank {rank} {text}")));
    }
    Ok(found)
}

fn as_json(one: &TensorDifference) -> Value {
    let name = &one.name;
    match &one.what {
        What::OnlyLeft => json!({ "name": name, "only": "left" }),
        What::OnlyRight => json!({ "name": name, "only": "right" }),
        What::Spec { left, right } => {
            let side = |(dtype, shape): &(phalanx_checkpoint::Dtype, Vec<u64>)| json!({ "dtype": dtype.name(), "shape": shape });
            json!({ "name": name, "left": side(left), "right": side(right) })
        }
        What::Elements { count, max } => {
            json!({ "name": name, "elements": count, "max_abs_difference": max })
        }
        _ => json!({ "name": name }),
    }
}

fn as_lines(tensors: &[TensorDifference], values: &[String]) -> String {
    let mut out = String::new();
    for TensorDifference { name, what } in tensors {
        out += &match what {
            What::OnlyLeft => format!("{name}: only on the left\n"),
            What::OnlyRight => format!("{name}: only on the right\n"),
            What::Spec { left, right } => {
                format!("{name}: {} {:?}, {} {:?}\n", left.0, left.1, right.0, right.1)
            }
            What::Elements { count: n, max } => {
                format!("{name}: {} elements differ, by {max:e} at most\n", count(*n))
            }
            _ => format!("{name}: differs\n"),
        };
    }
    out.extend(values.iter().map(|text| format!("values {text}\n")));
    if out.is_empty() {
        out = "the same\n".to_owned();
    }
    out
}
