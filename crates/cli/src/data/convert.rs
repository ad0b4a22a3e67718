//! `phalanx data convert`: text to shards of tokens.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use phalanx_data::convert::{convert, BadLines, ConvertOptions, Document, Format, Vocabulary};
use phalanx_data::progress::Progress;
use phalanx_data::records::{convert_safetensors, ConvertedRecords, RecordOptions};
use phalanx_data::Error;
use serde_json::json;

use super::{ProgressFlag, Threads};
use crate::report::{self, bytes, count, real};

#[derive(Args, Debug)]
pub(crate) struct ConvertArgs {
    /// Files, or folders whose files of a known kind are taken (.txt; .jsonl, .ndjson; .parquet; .arrow, .feather). Files
    /// .safetensors with arrays become records (folders of them with --format safetensors), tables with --columns too.
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    input: Vec<PathBuf>,
    /// The folder to make. It appears when it is complete.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    vocabulary: VocabularyArgs,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Make records of these columns of Parquet or Arrow files instead of tokens: names (page.body: inside another), or * for all.
    #[arg(long, value_name = "NAME", value_delimiter = ',', num_args = 1.., conflicts_with_all = ["tokenizer", "vocab_size", "keep_case", "end_token", "field", "document", "skip_bad_lines"])]
    columns: Vec<String>,
    /// A shard is closed at the first end of a document after so many bytes of tokens (1 GiB unless given), or after
    /// so many bytes of records (64 MiB), which stay in memory until then.
    #[arg(long, value_name = "BYTES")]
    shard_bytes: Option<u64>,
    #[command(flatten)]
    threads: Threads,
    /// Drop what another command with this output left half done.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    progress: ProgressFlag,
    #[command(flatten)]
    report: ReportArgs,
}

/// How the result is told.
#[derive(Args, Debug)]
struct ReportArgs {
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// Where the vocabulary comes from.
#[derive(Args, Debug)]
struct VocabularyArgs {
    /// A tokenizer.json of Hugging Face's tokenizers.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Train a WordPiece vocabulary of so many entries on the text (8192 if neither is given).
    #[arg(long, value_name = "N", conflicts_with = "tokenizer")]
    vocab_size: Option<u32>,
    /// Keep upper and lower case apart when training the vocabulary.
    #[arg(long, conflicts_with = "tokenizer")]
    keep_case: bool,
    /// The token that closes each document, by name. Found by itself where the tokenizer has [SEP], </s>, <|endoftext|> or the like.
    #[arg(long, value_name = "TOKEN")]
    end_token: Option<String>,
}

/// How files are read.
#[derive(Args, Debug)]
struct ReadingArgs {
    /// The kind of the files; told from their names if not given.
    #[arg(long, value_enum)]
    format: Option<FormatFlag>,
    /// Where JSON objects or rows have their text: a field or column, or a path of them (page.body).
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// What a document is in plain text.
    #[arg(long, value_enum, default_value_t = DocumentFlag::File)]
    document: DocumentFlag,
    /// Leave lines out that are no JSON (nor UTF-8), lack the field or have more than 256 MiB, and rows without text, and say how many, instead of ending.
    #[arg(long)]
    skip_bad_lines: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormatFlag {
    /// UTF-8 text.
    Text,
    /// A JSON object a line.
    Jsonl,
    /// A column of strings in Parquet files.
    Parquet,
    /// A column of strings in Arrow files or streams.
    Arrow,
    /// Arrays [N, …] in safetensors files, to records.
    Safetensors,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DocumentFlag {
    /// Each file.
    File,
    /// Each line.
    Line,
    /// Lines up to an empty one.
    BlankLine,
}

impl ConvertArgs {
    fn is_arrays(&self) -> bool {
        let named = || {
            let mut names = self.input.iter();
            names.all(|path| path.extension().is_some_and(|end| end == "safetensors"))
        };
        self.reading.format.map_or_else(named, |format| matches!(format, FormatFlag::Safetensors))
    }

    /// What the flag says, of the formats that have text or columns.
    fn format(&self) -> Option<Format> {
        self.reading.format.and_then(|format| match format {
            FormatFlag::Text => Some(Format::Text),
            FormatFlag::Jsonl => Some(Format::JsonLines),
            FormatFlag::Parquet => Some(Format::Parquet),
            FormatFlag::Arrow => Some(Format::Arrow),
            FormatFlag::Safetensors => None,
        })
    }

    fn record_options(&self) -> RecordOptions {
        let shard_bytes = self.shard_bytes.unwrap_or(RecordOptions::default().shard_bytes);
        let threads = self.threads.threads;
        RecordOptions { shard_bytes, threads, restart: self.restart }
    }

    fn options(&self) -> ConvertOptions {
        let vocabulary = match &self.vocabulary.tokenizer {
            Some(path) => Vocabulary::File(path.clone()),
            None => Vocabulary::Train {
                vocab_size: self.vocabulary.vocab_size.unwrap_or(8192),
                min_frequency: 2,
                lowercase: !self.vocabulary.keep_case,
            },
        };
        ConvertOptions {
            vocabulary,
            format: self.format(),
            field: self.reading.field.clone(),
            document: match self.reading.document {
                DocumentFlag::File => Document::File,
                DocumentFlag::Line => Document::Line,
                DocumentFlag::BlankLine => Document::BlankLine,
            },
            end_token: self.vocabulary.end_token.clone(),
            bad_lines: if self.reading.skip_bad_lines { BadLines::Skip } else { BadLines::Refuse },
            shard_bytes: self.shard_bytes.unwrap_or(1 << 30),
            threads: self.threads.threads,
            restart: self.restart,
        }
    }
}

/// The columns of tables become records.
#[cfg(feature = "parquet")]
fn columns(args: &ConvertArgs, progress: &dyn Progress) -> Result<ExitCode> {
    let all = args.columns == ["*"];
    let columns = if all { &[] } else { &*args.columns };
    let ConvertArgs { input, output, .. } = args;
    let (format, options) = (args.format(), args.record_options());
    let started = Instant::now();
    let made =
        phalanx_data::records::convert_columns(input, output, format, columns, &options, progress)?;
    tell_records(args, &made, started)
}

#[cfg(not(feature = "parquet"))]
fn columns(args: &ConvertArgs, _progress: &dyn Progress) -> Result<ExitCode> {
    Err(phalanx_data::Error::InvalidOption {
        option: "columns",
        value: args.columns.join(","),
        reason: "this program was built without tables: install it with --features parquet"
            .to_owned(),
    }
    .into())
}

/// Arrays become records, which need no vocabulary.
fn arrays(args: &ConvertArgs, progress: &dyn Progress) -> Result<ExitCode> {
    let VocabularyArgs { tokenizer, vocab_size, keep_case, end_token } = &args.vocabulary;
    let given = [
        ("tokenizer", tokenizer.is_some()),
        ("vocab_size", vocab_size.is_some()),
        ("keep_case", *keep_case),
        ("end_token", end_token.is_some()),
        ("skip_bad_lines", args.reading.skip_bad_lines),
    ];
    if let Some((option, _)) = given.into_iter().find(|(_, is_given)| *is_given) {
        let reason = "it is for text; arrays of safetensors files become records".to_owned();
        return Err(Error::InvalidOption { option, value: "given".to_owned(), reason }.into());
    }
    let started = Instant::now();
    let made = convert_safetensors(&args.input, &args.output, &args.record_options(), progress)?;
    tell_records(args, &made, started)
}

fn tell_records(args: &ConvertArgs, made: &ConvertedRecords, started: Instant) -> Result<ExitCode> {
    let (index, seconds) = (&made.index, started.elapsed().as_secs_f64());
    if args.report.json {
        report::print_json(&json!({
            "output": args.output, "records": index.record_count, "shards": index.shards.len(),
            "source_bytes": made.source_bytes, "fingerprint": index.fingerprint,
            "resumed_shards": made.resumed_shards, "reused": made.reused, "seconds": seconds,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    report::print(&format!(
        "{} are {} records in {} ({} shards, fingerprint {}): {}\n",
        bytes(made.source_bytes),
        count(index.record_count),
        args.output.display(),
        index.shards.len(),
        index.fingerprint,
        how_long(made.reused, made.source_bytes, seconds),
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn how_long(reused: bool, source_bytes: u64, seconds: f64) -> String {
    if reused {
        return "was converted before".to_owned();
    }
    format!("{seconds:.1} s, {:.1} MB/s", real(source_bytes) / seconds.max(1e-9) / 1e6)
}

pub(crate) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    let progress = &*args.progress.reporter();
    let started = Instant::now();
    if !args.columns.is_empty() {
        return columns(args, progress);
    }
    if args.is_arrays() {
        return arrays(args, progress);
    }
    let made = convert(&args.input, &args.output, &args.options(), progress)?;
    let (index, seconds) = (&made.index, started.elapsed().as_secs_f64());
    if args.report.json {
        report::print_json(&json!({
            "output": args.output, "tokens": index.token_count, "documents": index.document_count,
            "vocab_size": index.vocab_size, "shards": index.shards.len(),
            "source_bytes": index.source_bytes, "fingerprint": index.fingerprint,
            "skipped_lines": made.skipped_lines, "resumed_shards": made.resumed_shards,
            "reused": made.reused, "seconds": seconds,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    report::print(&format!(
        "{} in {} documents are {} tokens of a vocabulary of {} in {} ({} shards, fingerprint {}): {}\n",
        bytes(index.source_bytes),
        count(index.document_count),
        count(index.token_count),
        count(index.vocab_size.into()),
        args.output.display(),
        index.shards.len(),
        index.fingerprint,
        how_long(made.reused, index.source_bytes, seconds),
    ))?;
    if made.skipped_lines > 0 {
        report::print(&format!("{} bad lines were left out\n", count(made.skipped_lines)))?;
    }
    Ok(ExitCode::SUCCESS)
}
