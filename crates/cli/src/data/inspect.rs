//! `phalanx data inspect`: what a folder holds, and some of it.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use phalanx_data::batches::Scratch;
use phalanx_data::format::{TokenIndex, TokenStream, Tokens};
use phalanx_data::records::RecordIndex;
use phalanx_data::text::Detokenizer;
use phalanx_data::Access;
use serde_json::{json, Value};

use super::{megatron, records, Data, Folder};
use crate::report::{self, bytes, count, real};

/// Tokens of a sample.
const SAMPLE_TOKENS: u64 = 48;

#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    folder: Folder,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Show the text at so many places, evenly spaced.
    #[arg(long, value_name = "N", default_value_t = 0)]
    sample: u64,
}

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let folder = match args.folder.checked()? {
        Data::Folder(folder) => folder,
        Data::Megatron(prefix) => {
            megatron::inspect(&prefix, args.json, args.sample)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    if RecordIndex::is_in(folder) {
        records::inspect(folder, args.json, args.sample)?;
    } else {
        tokens(folder, args)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tokens(folder: &Path, args: &InspectArgs) -> Result<()> {
    // Opening checks sizes and headers: what is shown of a folder can be read.
    let stream = TokenStream::open(folder, Access::Read)?;
    let samples = samples(&stream, args.sample)?;
    if args.json {
        return report::print_json(&as_json(stream.index(), &samples));
    }
    report::print(&as_lines(folder, stream.index(), &samples)?)
}

fn file_bytes(index: &TokenIndex) -> u64 {
    index.shards.iter().map(|shard| shard.file_bytes).sum()
}

fn as_json(index: &TokenIndex, samples: &[Sample]) -> Value {
    let shards: Vec<Value> = index
        .shards
        .iter()
        .map(|shard| {
            json!({ "file": shard.file, "bytes": shard.file_bytes, "tokens": shard.token_count,
                "documents": shard.document_count })
        })
        .collect();
    let samples: Vec<Value> = samples
        .iter()
        .map(|sample| json!({ "at": sample.at, "tokens": sample.tokens, "text": sample.text }))
        .collect();
    json!({
        "format": index.format, "version": index.version, "creator": index.creator,
        "dtype": index.dtype, "vocab_size": index.vocab_size, "special": index.special,
        "tokens": index.token_count, "documents": index.document_count,
        "source_bytes": index.source_bytes, "bytes": file_bytes(index),
        "tokenizer": index.tokenizer, "fingerprint": index.fingerprint,
        "shards": shards, "samples": samples,
    })
}

fn as_lines(folder: &Path, index: &TokenIndex, samples: &[Sample]) -> Result<String> {
    let mut out = String::new();
    let special = match serde_json::to_value(index.special)? {
        Value::Object(ids) => ids
            .iter()
            .filter(|(_, id)| !id.is_null())
            .map(|(name, id)| format!("{name} {id}"))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    };
    let total = file_bytes(index);
    writeln!(out, "folder       {}", folder.display())?;
    writeln!(out, "format       {} {}, by {}", index.format, index.version, index.creator)?;
    writeln!(out, "tokens       {} of {:?}", count(index.token_count), index.dtype)?;
    writeln!(out, "documents    {}", count(index.document_count))?;
    writeln!(out, "vocabulary   {} entries; {special}", count(index.vocab_size.into()))?;
    write!(out, "text         {} bytes", count(index.source_bytes))?;
    if index.token_count > 0 && index.source_bytes > 0 {
        write!(out, ", {:.2} a token", real(index.source_bytes) / real(index.token_count))?;
    }
    writeln!(out, "\nshards       {} with {}", index.shards.len(), bytes(total))?;
    writeln!(out, "tokenizer    {}", index.tokenizer)?;
    writeln!(out, "fingerprint  {}", index.fingerprint)?;
    for shard in &index.shards {
        let (tokens, documents) = (count(shard.token_count), count(shard.document_count));
        let size = bytes(shard.file_bytes);
        writeln!(out, "  {}  {size}, {tokens} tokens, {documents} documents", shard.file)?;
    }
    for Sample { at, tokens, text } in samples {
        match text {
            Some(text) => writeln!(out, "token {}: {text}", count(*at))?,
            None => writeln!(out, "token {}: {tokens:?}", count(*at))?,
        }
    }
    Ok(out)
}

/// Some tokens, and their text where the folder has a tokenizer.
struct Sample {
    at: u64,
    tokens: Vec<i64>,
    text: Option<String>,
}

fn samples(stream: &TokenStream, wanted: u64) -> Result<Vec<Sample>> {
    let total = stream.token_count();
    if wanted == 0 || total == 0 {
        return Ok(Vec::new());
    }
    let detokenizer = Detokenizer::open(stream.folder())?;
    let len = SAMPLE_TOKENS.min(total);
    let (places, mut scratch) = (wanted.min(total), Scratch::default());
    (0..places)
        .map(|number| {
            // Evenly spaced, the last one at the end; in 128 bits because the product may not fit.
            let steps = u128::from((places - 1).max(1));
            let at = u128::from(total - len) * u128::from(number) / steps;
            let at = u64::try_from(at).unwrap_or(0);
            let mut tokens = vec![0; usize::try_from(len).unwrap_or(0)];
            stream.read(at, &mut tokens, &mut scratch, &format_args!("token {at}"))?;
            let text = detokenizer.as_ref().map(|known| known.decode(&tokens)).transpose()?;
            Ok(Sample { at, tokens, text })
        })
        .collect()
}
