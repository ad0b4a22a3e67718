//! `phalanx data bench`: what the loader delivers from a folder when the model costs nothing.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, ValueEnum};
use phalanx_data::fingerprint::Fingerprint;
use phalanx_data::format::TokenStream;
use phalanx_data::order::Quality;
use phalanx_data::records::{RecordIndex, RecordSamples, Records};
use phalanx_data::samples::{Documents, RawText};
use phalanx_data::{CausalText, Error, Loader, LoaderOptions, MaskedText, Masking, Order, Samples};
use serde_json::json;

use super::{megatron, AccessFlag, Data, Folder};
use crate::report::{self, count, real};

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    folder: Folder,
    /// Tokens of a sequence.
    #[arg(long, value_name = "L", default_value_t = 512)]
    seq_len: usize,
    /// Sequences of a batch.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Threads that build batches ahead; 0: the caller builds them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// What a sequence is for: masked unless the data is Megatron's, which does not know its mask.
    #[arg(long, value_enum)]
    samples: Option<SamplesFlag>,
    /// How files are read.
    #[arg(long, value_enum, default_value_t = AccessFlag::Auto)]
    access: AccessFlag,
    /// The order: `shuffled`, `sequential`, or two levels for data larger than memory: `b65536x16` reads blocks of 65536 samples
    /// in random order and shuffles 16 of them together.
    #[arg(long, default_value_t = Order::Shuffled)]
    order: Order,
    /// How long to run.
    #[arg(long, value_name = "S", default_value_t = 5.0, value_parser = seconds, allow_negative_numbers = true)]
    seconds: f64,
    /// Seed of order and masks.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// What is trained on.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum SamplesFlag {
    /// Masked tokens, as BERT is trained.
    Masked,
    /// The next token, as GPT is trained.
    Next,
    /// Tokens and nothing else.
    Raw,
}

/// A time that can be waited for.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 86_400.0 => Ok(value),
        _ => Err("give a number of seconds above 0 and at most 86400".to_owned()),
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    let data = args.folder.checked()?;
    let opened = Instant::now();
    let samples = match &data {
        Data::Folder(folder) => open(folder, args)?,
        Data::Megatron(prefix) => open_megatron(prefix, args)?,
    };
    let measured = measure(samples, args, opened)?;
    if matches!(data, Data::Folder(folder) if RecordIndex::is_in(folder)) {
        return measured.tell_records(args);
    }
    if args.json {
        report::print_json(&json!({
            "sequences_per_second": measured.rate(args.batch),
            "tokens_per_second": measured.rate(args.batch * args.seq_len),
            "first_batch_ms": measured.first_batch.as_secs_f64() * 1e3,
            "data_wait_us_mean": measured.wait_us(),
            "steps": measured.steps, "seconds": measured.elapsed.as_secs_f64(),
            "seq_len": args.seq_len, "batch": args.batch, "threads": args.threads,
            "order": args.order.to_string(), "order_distance": measured.quality.distance,
            "order_entropy": measured.quality.entropy,
            "order_hash": measured.hash, "order_hash_samples": measured.hashed,
        }))?;
    } else {
        report::print(&measured.as_lines(args))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn open(folder: &Path, args: &BenchArgs) -> Result<Arc<dyn Samples>> {
    if RecordIndex::is_in(folder) {
        let records = Records::open(folder, args.access.into())?;
        return Ok(Arc::new(RecordSamples::new(records)?));
    }
    let stream = Arc::new(TokenStream::open(folder, args.access.into())?);
    Ok(match args.samples.unwrap_or(SamplesFlag::Masked) {
        SamplesFlag::Masked => Arc::new(MaskedText::new(stream, args.seq_len, Masking::default())?),
        SamplesFlag::Next => Arc::new(CausalText::new(stream, args.seq_len, Documents::Joined)?),
        SamplesFlag::Raw => Arc::new(RawText::new(stream, args.seq_len)?),
    })
}

fn open_megatron(prefix: &Path, args: &BenchArgs) -> Result<Arc<dyn Samples>> {
    if let Some(SamplesFlag::Masked) = args.samples {
        let (option, value) = ("samples", "masked".to_owned());
        let reason = "Megatron's files do not say which token is the mask: use --samples next";
        return Err(Error::InvalidOption { option, value, reason: reason.to_owned() }.into());
    }
    let tokens = Arc::new(megatron::open(prefix, args.access.into())?);
    Ok(match args.samples {
        Some(SamplesFlag::Raw) => Arc::new(RawText::new(tokens, args.seq_len)?),
        _ => Arc::new(CausalText::new(tokens, args.seq_len, Documents::Joined)?),
    })
}

/// What one run gave.
struct Measured {
    steps: u64,
    elapsed: Duration,
    /// From opening the folder to the first batch.
    first_batch: Duration,
    waited: Duration,
    /// Of the order.
    quality: Quality,
    hash: Fingerprint,
    /// Samples that the hash is of.
    hashed: u64,
}

fn measure(samples: Arc<dyn Samples>, args: &BenchArgs, opened: Instant) -> Result<Measured> {
    let options = LoaderOptions {
        seed: args.seed,
        order: args.order,
        global_batch: args.batch,
        threads: args.threads,
        ..LoaderOptions::default()
    };
    let sample_count = samples.sample_count();
    let mut loader = Loader::new(samples, options)?;
    drop(loader.next_step()?);
    let first_batch = opened.elapsed();
    let (started, limit) = (Instant::now(), Duration::from_secs_f64(args.seconds));
    let (mut steps, mut waited) = (0, Duration::ZERO);
    while started.elapsed() < limit {
        waited += loader.next_step()?.data_wait;
        steps += 1;
    }
    let elapsed = started.elapsed();
    let quality = args.order.quality(sample_count, args.seed)?;
    let hash = args.order.hash(sample_count, args.seed)?;
    let hashed = sample_count.min(Order::HASHED_MAX);
    Ok(Measured { steps, elapsed, first_batch, waited, quality, hash, hashed })
}

impl Measured {
    /// Things a second, of which each step has `per_step`.
    fn rate(&self, per_step: usize) -> f64 {
        let per_step = u64::try_from(per_step).unwrap_or(u64::MAX);
        real(self.steps) * real(per_step) / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn wait_us(&self) -> f64 {
        self.waited.as_secs_f64() * 1e6 / real(self.steps.max(1))
    }

    /// The same of records, which have no tokens.
    fn tell_records(&self, args: &BenchArgs) -> Result<ExitCode> {
        let (rate, first) = (self.rate(args.batch), self.first_batch.as_secs_f64() * 1e3);
        if args.json {
            report::print_json(&json!({
                "records_per_second": rate, "first_batch_ms": first,
                "data_wait_us_mean": self.wait_us(), "steps": self.steps,
                "seconds": self.elapsed.as_secs_f64(), "batch": args.batch, "threads": args.threads,
                "order": args.order.to_string(), "order_distance": self.quality.distance,
                "order_entropy": self.quality.entropy,
                "order_hash": self.hash, "order_hash_samples": self.hashed,
            }))?;
        } else {
            report::print(&format!(
                "batches of {} records, {} prefetch threads, {} steps in {:.1} s\n\
                 records/s    {rate:.0}\n\
                 first batch  {first:.2} ms after opening\n\
                 data wait    {:.1} µs a step (nothing is computed between steps)\n\
                 order        {}: {}\n\
                 order hash   {}\n",
                args.batch,
                args.threads,
                count(self.steps),
                self.elapsed.as_secs_f64(),
                self.wait_us(),
                args.order,
                self.quality,
                self.hash_line(),
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn as_lines(&self, args: &BenchArgs) -> String {
        let whole = |rate: f64| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
            let rounded = rate.round() as u64;
            count(rounded)
        };
        let BenchArgs { seq_len, batch, threads, .. } = args;
        format!(
            "batches of {batch} sequences of {seq_len} tokens, {threads} prefetch threads, {} steps in {:.1} s\n\
             sequences/s  {}\n\
             tokens/s     {}\n\
             first batch  {:.2} ms after opening\n\
             data wait    {:.1} µs a step (nothing is computed between steps)\n\
             order        {}: {}\n\
             order hash   {}\n",
            count(self.steps),
            self.elapsed.as_secs_f64(),
            whole(self.rate(*batch)),
            whole(self.rate(batch * seq_len)),
            self.first_batch.as_secs_f64() * 1e3,
            self.wait_us(),
            args.order,
            self.quality,
            self.hash_line(),
        )
    }

    fn hash_line(&self) -> String {
        format!("{} (the first {} samples of epoch 0)", self.hash, count(self.hashed))
    }
}
