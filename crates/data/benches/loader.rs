//! Sequences a second on one thread, page-cached: `cargo bench -p phalanx-data --bench loader [-- SEQUENCES] [--check]`.
//!
//! L = 512, u16 tokens, batches of 32 rows of i64, globally shuffled; 200 000 sequences (205 MB) unless told otherwise. Every
//! figure is the median of five runs over the data after one that is not counted (it verifies the checksums), and is
//! given beside that of a plain copy of the same bytes in the same process. The second figure counts only the time for which
//! this thread had a processor (its clock of processor time): compare that one on a machine that is busy. Sums of what was
//! read are printed, so that nothing is optimised away. Lines with a promise end with whether it is kept, for what one thread does by either
//! figure; with `--check` one that is not is an error.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_data::batches::Scratch;
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter};
use phalanx_data::order::permutation::Permutation;
use phalanx_data::samples::{Documents, RawText};
use phalanx_data::{Access, CausalText, Loader, LoaderOptions, MaskedText, Masking, Samples};

#[path = "../tests/support/processor.rs"]
mod processor;

use processor::{on_processor, paced};

const SEQUENCE_LEN: usize = 512;
const BATCH: usize = 32;
const VOCAB_SIZE: u32 = 8192;
const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, SEP, 4);
const SEP: u32 = 3;
const RUNS: usize = 5;
/// Of a batch, at 1 000 sequences a second.
const PERIOD: Duration = Duration::from_millis(32);

/// What is promised of mapped files: sequences a second, milliseconds, per cent of a processor.
const RAW: f64 = 2e6;
const MASKED: f64 = 6e5;
const PROMPT: f64 = 5.0;
const PACED: f64 = 0.2;

/// Where lines go, and how many promises were not kept.
struct Report {
    out: std::io::StdoutLock<'static>,
    missed: usize,
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let sequences: u64 = given.unwrap_or(if is_bench { 200_000 } else { 2_000 });
    let folder = tempfile::tempdir()?;
    let target = folder.path().join("tokens");
    write(&target, sequences)?;
    let mut report = Report { out: std::io::stdout().lock(), missed: 0 };
    report.rate("copy of the same bytes", sequences, copy(sequences), None)?;
    report.rate("global order alone", sequences, order(sequences)?, None)?;
    for access in [Access::Read, Access::Map] {
        let (name, samples) = (format!("{access:?}").to_lowercase(), open(&target, access)?);
        let promised = |rate: f64| (access == Access::Map).then_some(rate);
        report.rate(&format!("raw rows, {name}"), sequences, raw(&samples)?, None)?;
        prompt(&mut report, &target, access)?;
        let plain: Arc<dyn Samples> =
            Arc::new(RawText::new(open_stream(&target, access)?, SEQUENCE_LEN)?);
        for threads in [0, 1, 2] {
            let label = format!("raw batches, {name}, {threads} prefetch threads");
            let bar = promised(RAW).filter(|_| threads == 0);
            report.rate(&label, sequences, loader(&plain, threads)?, bar)?;
        }
        let causal: Arc<dyn Samples> = Arc::new(CausalText::new(
            open_stream(&target, access)?,
            SEQUENCE_LEN,
            Documents::Joined,
        )?);
        let causal_label = format!("causal batches, {name}, 0 prefetch threads");
        report.rate(&causal_label, sequences, loader(&causal, 0)?, None)?;
        let samples: Arc<dyn Samples> = samples;
        for threads in [0, 1, 2] {
            let label = format!("masked batches, {name}, {threads} prefetch threads");
            let bar = promised(MASKED).filter(|_| threads == 0);
            report.rate(&label, sequences, loader(&samples, threads)?, bar)?;
        }
        let seconds = if is_bench { 4.0 } else { 0.2 };
        for threads in [0, 1] {
            let percent = pacing(&samples, threads, seconds)?;
            let bar = promised(PACED).filter(|_| threads == 1);
            report.most(
                &format!("feeding 1 000 masked sequences/s, {name}, {threads} prefetch threads"),
                (percent, "% of a processor"),
                bar,
            )?;
        }
    }
    let is_check = arguments.iter().any(|argument| argument == "--check");
    anyhow::ensure!(!is_check || report.missed == 0, "{} promises were not kept", report.missed);
    Ok(())
}

/// Shards of random tokens, each document about one sequence long.
fn write(target: &Path, sequences: u64) -> anyhow::Result<()> {
    let mut writer = TokenWriter::create(target, b"{}", VOCAB_SIZE, SPECIAL, 64 << 20)?;
    let mut document = vec![0; SEQUENCE_LEN - 2];
    for number in 0..sequences {
        let order = Permutation::new(u64::from(VOCAB_SIZE - 5), number, 0);
        for (token, at) in document.iter_mut().zip(0..) {
            *token = u32::try_from(order.at(at))? + 5;
        }
        document[SEQUENCE_LEN - 3] = SEP;
        writer.tokens(&document)?;
        writer.end_document()?;
    }
    writer.finish(0)?;
    Ok(())
}

fn open_stream(target: &Path, access: Access) -> anyhow::Result<Arc<TokenStream>> {
    Ok(Arc::new(TokenStream::open(target, access)?))
}

fn open(target: &Path, access: Access) -> anyhow::Result<Arc<MaskedText>> {
    let stream = open_stream(target, access)?;
    Ok(Arc::new(MaskedText::new(stream, SEQUENCE_LEN, Masking::default())?))
}

/// Seconds of the median run, of these on a processor, and a sum over what was read.
type Measured = (f64, f64, i64);

fn median(mut run: impl FnMut(u64) -> anyhow::Result<i64>) -> anyhow::Result<Measured> {
    let mut sum = run(0)?;
    let (mut seconds, mut busy) = (Vec::new(), Vec::new());
    for epoch in 1..=RUNS {
        let (started, before) = (Instant::now(), on_processor()?);
        sum = sum.wrapping_add(run(epoch as u64)?);
        seconds.push(started.elapsed().as_secs_f64());
        busy.push(on_processor()? - before);
    }
    seconds.sort_by(f64::total_cmp);
    busy.sort_by(f64::total_cmp);
    Ok((seconds[RUNS / 2], busy[RUNS / 2], sum))
}

/// The bound: memory to memory, widened to i64 as batches are.
fn copy(sequences: u64) -> Measured {
    let tokens: Vec<u16> =
        (0..sequences * (SEQUENCE_LEN as u64)).map(|n| (n % 8192) as u16).collect();
    let mut batch = vec![0_i64; BATCH * SEQUENCE_LEN];
    let measured = median(|_| {
        let mut sum = 0_i64;
        for part in tokens.chunks(BATCH * SEQUENCE_LEN) {
            for (wide, &token) in batch.iter_mut().zip(part) {
                *wide = i64::from(token);
            }
            sum = sum.wrapping_add(std::hint::black_box(&batch)[7]);
        }
        Ok(sum)
    });
    measured.unwrap_or((f64::NAN, f64::NAN, 0))
}

fn order(sequences: u64) -> anyhow::Result<Measured> {
    median(|epoch| {
        let order = Permutation::new(sequences, 1, epoch);
        Ok((0..sequences).fold(0, |sum, at| sum ^ order.at(at)).cast_signed())
    })
}

/// From opening the folder to the first batch, and the same where a run at 99 % of an epoch is resumed: medians.
fn prompt(report: &mut Report, target: &Path, access: Access) -> anyhow::Result<()> {
    let options = LoaderOptions { global_batch: BATCH, threads: 0, ..Default::default() };
    let mut state = Loader::new(open(target, access)?, options.clone())?.state();
    let count = open(target, access)?.sample_count();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..11 {
        for (place, of_place) in [0, count / 100 * 99].into_iter().zip(&mut times) {
            state.next_global_sample = place;
            let started = Instant::now();
            let mut loader = Loader::resume(open(target, access)?, options.clone(), &state)?;
            drop(loader.next_step()?);
            of_place.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let name = format!("{access:?}").to_lowercase();
    let places = ["after open", "at 99 % of an epoch"];
    for (place, mut of_place) in places.into_iter().zip(times) {
        of_place.sort_by(f64::total_cmp);
        let bar = (access == Access::Map).then_some(PROMPT);
        report.most(&format!("first batch {place}, {name}"), (of_place[5], "ms"), bar)?;
    }
    Ok(())
}

fn raw(samples: &MaskedText) -> anyhow::Result<Measured> {
    let (mut batch, mut scratch) = (vec![0; BATCH * SEQUENCE_LEN], Scratch::default());
    let count = samples.sample_count();
    median(|epoch| {
        let order = Permutation::new(count, 1, epoch);
        let mut sum = 0_i64;
        let content = SEQUENCE_LEN as u64 - 2;
        let mut ids = [0; BATCH];
        for start in (0..count).step_by(BATCH) {
            for (at, id) in (start..count).zip(&mut ids) {
                *id = order.at(at);
            }
            let rows = batch.chunks_mut(SEQUENCE_LEN).take(usize::try_from(count - start)?);
            for (number, row) in rows.enumerate() {
                if let Some(later) = ids.get(number + 2) {
                    samples.stream().expect(later * content, SEQUENCE_LEN - 2);
                }
                samples.read_unmasked(ids[number], row, &mut scratch)?;
            }
            sum = sum.wrapping_add(batch[7]);
        }
        Ok(sum)
    })
}

fn loader(samples: &Arc<dyn Samples>, threads: usize) -> anyhow::Result<Measured> {
    let options = LoaderOptions { global_batch: BATCH, threads, ..Default::default() };
    let mut loader = Loader::new(Arc::clone(samples), options)?;
    median(|_| {
        let mut sum = 0_i64;
        for _ in 0..loader.steps_per_epoch() {
            let step = loader.next_step()?;
            sum = sum.wrapping_add(step.micro_batches[0].input_ids()[9]);
        }
        Ok(sum)
    })
}

/// Per cent of a processor that all threads take to deliver 1 000 sequences a second, beyond what a caller takes that only waits.
fn pacing(samples: &Arc<dyn Samples>, threads: usize, seconds: f64) -> anyhow::Result<f64> {
    let options = LoaderOptions { global_batch: BATCH, threads, ..Default::default() };
    let mut loader = Loader::new(Arc::clone(samples), options)?;
    let with = paced(seconds, PERIOD, || loader.next_step().map(drop).map_err(Into::into))?;
    drop(loader);
    Ok(with - paced(seconds, PERIOD, || Ok(()))?)
}

impl Report {
    fn rate(
        &mut self,
        what: &str,
        sequences: u64,
        (seconds, busy, sum): Measured,
        bar: Option<f64>,
    ) -> anyhow::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let (rate, busy_rate) = (sequences as f64 / seconds, sequences as f64 / busy);
        let verdict = bar.map(|bar| (rate.max(busy_rate) >= bar, format!("at least {bar:.0}")));
        let verdict = self.verdict(verdict);
        writeln!(
            self.out,
            "{what:<42} {rate:>11.0} sequences/s, {busy_rate:>11.0} on a processor (sum {sum}){verdict}"
        )?;
        Ok(())
    }

    fn most(
        &mut self,
        what: &str,
        (found, unit): (f64, &str),
        bar: Option<f64>,
    ) -> anyhow::Result<()> {
        let verdict = self.verdict(bar.map(|bar| (found <= bar, format!("at most {bar}"))));
        writeln!(self.out, "{what}: {found:.2} {unit}{verdict}")?;
        Ok(())
    }

    /// How a line ends that has a promise.
    fn verdict(&mut self, kept: Option<(bool, String)>) -> String {
        let Some((is_kept, bar)) = kept else { return String::new() };
        self.missed += usize::from(!is_kept);
        format!(", {bar}: {}", if is_kept { "met" } else { "MISSED" })
    }
}
