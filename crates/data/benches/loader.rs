//! Sequences a second on one thread, page-cached: `cargo bench -p phalanx-data --bench loader [-- SEQUENCES]`.
//!
//! L = 512, u16 tokens, batches of 32 rows of i64, globally shuffled; 200 000 sequences (205 MB) unless told otherwise. Every
//! figure is the median of five runs over the data after one that is not counted (it verifies the checksums), and is
//! given beside that of a plain copy of the same bytes in the same process. The second figure counts only the time for which
//! this thread had a processor (`/proc/thread-self/schedstat`): compare that one on a machine that is busy. Sums of what was
//! read are printed, so that nothing is optimised away.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use phalanx_data::{
    permutation::Permutation, Access, CausalText, Documents, Loader, LoaderOptions, MaskedText,
    Masking, RawText, Samples, Scratch, SpecialTokens, TokenStream, TokenWriter,
};

const SEQUENCE_LEN: usize = 512;
const BATCH: usize = 32;
const VOCAB_SIZE: u32 = 8192;
const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, SEP, 4);
const SEP: u32 = 3;
const RUNS: usize = 5;

fn main() -> anyhow::Result<()> {
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let sequences: u64 = given.unwrap_or(if is_bench { 200_000 } else { 2_000 });
    let folder = tempfile::tempdir()?;
    let target = folder.path().join("tokens");
    write(&target, sequences)?;
    let mut out = std::io::stdout().lock();
    report(&mut out, "copy of the same bytes", sequences, copy(sequences))?;
    report(&mut out, "global order alone", sequences, order(sequences)?)?;
    for access in [Access::Read, Access::Map] {
        let (name, samples) = (format!("{access:?}").to_lowercase(), open(&target, access)?);
        report(&mut out, &format!("raw rows, {name}"), sequences, raw(&samples)?)?;
        prompt(&mut out, &target, access)?;
        let plain: Arc<dyn Samples> =
            Arc::new(RawText::new(open_stream(&target, access)?, SEQUENCE_LEN)?);
        for threads in [0, 1, 2] {
            let label = format!("raw batches, {name}, {threads} prefetch threads");
            report(&mut out, &label, sequences, loader(&plain, threads)?)?;
        }
        let causal: Arc<dyn Samples> = Arc::new(CausalText::new(
            open_stream(&target, access)?,
            SEQUENCE_LEN,
            Documents::Joined,
        )?);
        let causal_label = format!("causal batches, {name}, 0 prefetch threads");
        report(&mut out, &causal_label, sequences, loader(&causal, 0)?)?;
        let samples: Arc<dyn Samples> = samples;
        for threads in [0, 1, 2] {
            let label = format!("masked batches, {name}, {threads} prefetch threads");
            report(&mut out, &label, sequences, loader(&samples, threads)?)?;
        }
    }
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

/// Seconds for which this thread had a processor.
fn on_processor() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split(' ').next().unwrap_or("0").parse()?;
    Ok(nanoseconds * 1e-9)
}

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
fn prompt(out: &mut impl std::io::Write, target: &Path, access: Access) -> anyhow::Result<()> {
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
    let [first, resumed] = times.map(|mut of_place| {
        of_place.sort_by(f64::total_cmp);
        of_place[of_place.len() / 2]
    });
    let name = format!("{access:?}").to_lowercase();
    writeln!(
        out,
        "first batch after open, {name}: {first:.2} ms; at 99 % of an epoch: {resumed:.2} ms"
    )?;
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

fn report(
    out: &mut impl std::io::Write,
    what: &str,
    sequences: u64,
    (seconds, busy, sum): Measured,
) -> anyhow::Result<()> {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let (rate, busy_rate) = (sequences as f64 / seconds, sequences as f64 / busy);
    writeln!(
        out,
        "{what:<42} {rate:>11.0} sequences/s, {busy_rate:>11.0} on a processor (sum {sum})"
    )?;
    Ok(())
}
