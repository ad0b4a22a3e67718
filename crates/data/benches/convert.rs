//! MB of text a second that `convert` makes tokens of: `cargo bench -p phalanx-data --bench convert [-- MB] [--check]`.
//!
//! Every line is a document; shards are written and synced to disk as ever, on all processors. Two texts: the plays of
//! `third_party/text` over and over, whose words are soon all known (made-up verse if they are not there), and made-up lines of which one
//! word in twenty is new and one in ten is not English. Tokenizers are trained on the text and read from a file. Beside it, if
//! there is a Python (`PHALANX_PYTHON`, else `python3`) with `tokenizers`, its `encode_batch` on the same lines. Each figure is the
//! best of three; the second is MB for each second of processor time, which on a busy machine says more. Last comes a table with
//! the bar of 20 MB/s; with `--check` missing it is an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use phalanx_data::convert::{convert, ConvertOptions, Document, Vocabulary};
use phalanx_data::order::permutation::Permutation;
use phalanx_data::progress::Silent;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

const RUNS: usize = 3;
/// MB/s on two processors.
const BAR: f64 = 20.0;
const LLAMA: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn main() -> anyhow::Result<()> {
    // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let given = arguments.iter().find_map(|argument| argument.parse().ok());
    let megabytes: usize = given.unwrap_or(if is_bench { 64 } else { 1 });
    let folder = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for (name, text) in [("plays", plays(megabytes << 20)?), ("varied", varied(megabytes << 20)?)] {
        let input = folder.path().join(format!("{name}.txt"));
        fs::write(&input, &text)?;
        let trained = Vocabulary::Train { vocab_size: 8192, min_frequency: 2, lowercase: true };
        let mut add = |what: &str, vocabulary: Vocabulary, ready: Option<&Path>| {
            let found =
                measure(&input, &vocabulary, folder.path(), if is_bench { RUNS } else { 1 })?;
            let peer = ready.map(|file| python(file, &input)).transpose();
            let peer = match peer {
                Ok(None) => String::new(),
                Ok(Some(said)) => format!("python tokenizers: {said} MB/s"),
                Err(error) => format!("python tokenizers was not measured: {error:#}"),
            };
            rows.push((format!("{name}: {what}"), found, peer));
            anyhow::Ok(())
        };
        add("vocabulary trained first, WordPiece of 8 192", trained.clone(), None)?;
        let wordpiece = ready_wordpiece(&input, &trained, folder.path())?;
        add("WordPiece of 8 192", Vocabulary::File(wordpiece.clone()), Some(&wordpiece))?;
        for (what, expression) in [("GPT-2", None), ("Llama 3", Some(LLAMA))] {
            let file = byte_level(&text, expression, &folder.path().join("bytes.json"))?;
            let what = format!("byte-level BPE of 8 000, {what}'s pattern");
            add(&what, Vocabulary::File(file.clone()), Some(&file))?;
        }
    }
    tell(&rows)?;
    let missed = rows.iter().filter(|(_, (found, _), _)| *found < BAR).count();
    let is_check = arguments.iter().any(|argument| argument == "--check");
    anyhow::ensure!(!is_check || missed == 0, "{missed} of {} bars are missed", rows.len());
    Ok(())
}

fn tell(rows: &[(String, (f64, f64), String)]) -> anyhow::Result<()> {
    use std::io::Write as _;
    let load = fs::read_to_string("/proc/loadavg")?;
    let processors = std::thread::available_parallelism()?;
    let load = load.split(' ').next().unwrap_or_default();
    let mut out = std::io::stdout().lock();
    writeln!(out, "load {load} on {processors} processors\n")?;
    writeln!(out, "{:<58} {:>7} {:>8} {:>7}  verdict", "", "MB/s", "MB/cpu s", "bar")?;
    for (what, (found, busy), peer) in rows {
        let verdict = if *found >= BAR { "met" } else { "MISSED" };
        writeln!(
            out,
            "{what:<58} {found:>7.1} {busy:>8.1} {:>7}  {verdict:<6}  {peer}",
            format!(">= {BAR:.0}")
        )?;
    }
    Ok(())
}

fn options(vocabulary: &Vocabulary) -> ConvertOptions {
    ConvertOptions {
        vocabulary: vocabulary.clone(),
        document: Document::Line,
        ..Default::default()
    }
}

fn measure(
    input: &Path,
    vocabulary: &Vocabulary,
    folder: &Path,
    runs: usize,
) -> anyhow::Result<(f64, f64)> {
    let output = folder.join("tokens");
    let mut best = (0.0_f64, 0.0_f64);
    for _ in 0..runs {
        let (started, before) = (Instant::now(), processor_seconds()?);
        let made = convert(&[input.to_path_buf()], &output, &options(vocabulary), &Silent)?;
        let seconds = started.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let megabytes = made.index.source_bytes as f64 / 1e6;
        let busy = processor_seconds()? - before;
        best = (best.0.max(megabytes / seconds), best.1.max(megabytes / busy.max(0.01)));
        fs::remove_dir_all(&output)?;
    }
    Ok(best)
}

/// Seconds for which all threads of this process, ended ones too, had a processor.
fn processor_seconds() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/self/stat")?;
    let (_, after_name) = text.rsplit_once(") ").context("no name")?;
    let ticks = after_name.split(' ').skip(11).take(2).map(str::parse::<f64>);
    // Linux counts them in hundredths for programs, whatever its own clock is.
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

/// The vocabulary that a conversion trains, as a file.
fn ready_wordpiece(input: &Path, train: &Vocabulary, folder: &Path) -> anyhow::Result<PathBuf> {
    let (output, file) = (folder.join("trained"), folder.join("wordpiece.json"));
    convert(&[input.to_path_buf()], &output, &options(train), &Silent)?;
    fs::rename(output.join("tokenizer.json"), &file)?;
    fs::remove_dir_all(&output)?;
    Ok(file)
}

/// A tokenizer of GPT-2's kind, trained on some of the text.
fn byte_level(text: &str, expression: Option<&str>, file: &Path) -> anyhow::Result<PathBuf> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| anyhow::anyhow!("{error}");
    let mut tokenizer = Tokenizer::new(BPE::default());
    match expression {
        None => tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true))),
        Some(expression) => {
            let pattern = SplitPattern::Regex(expression.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let split = split.map_err(failed)?;
            let bytes = ByteLevel::new(false, true, false);
            tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])))
        }
    };
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(8000)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .build()
        .into();
    let lines = text.lines().take(60_000);
    tokenizer.train(&mut trainer, lines).map_err(failed)?;
    tokenizer.save(file, false).map_err(failed)?;
    Ok(file.to_path_buf())
}

/// MB/s of Python's library, and its version.
fn python(tokenizer: &Path, input: &Path) -> anyhow::Result<String> {
    let python = std::env::var_os("PHALANX_PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/bench_tokenizers.py");
    let output = Command::new(&python)
        .arg(script)
        .args([tokenizer, input])
        .arg("3")
        .output()
        .with_context(|| format!("{} cannot be started", python.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("{}", said.lines().last().unwrap_or_default().to_owned());
    }
    let said = String::from_utf8(output.stdout)?;
    let mut words = said.split_whitespace();
    let rate: f64 = words.next().context("no figure")?.parse()?;
    Ok(format!("{rate:.1} ({})", words.next().unwrap_or_default()))
}

/// Text of so many bytes: all plays, again and again.
fn plays(bytes: usize) -> anyhow::Result<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../third_party/text/shakespeare");
    let mut all = String::new();
    if folder.is_dir() {
        let mut files: Vec<PathBuf> = Vec::new();
        walk(&folder, &mut files)?;
        files.sort();
        for file in files {
            all.push_str(&fs::read_to_string(file)?);
            all.push('\n');
        }
    }
    if all.is_empty() {
        all = varied(4 << 20)?;
    }
    let mut text = all.repeat(bytes.div_ceil(all.len()));
    text.truncate(text.floor_char_boundary(bytes));
    Ok(text)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                walk(&path, files)?;
            }
        } else if path.extension().is_some_and(|end| end == "txt") {
            files.push(path);
        }
    }
    Ok(())
}

/// Lines of words, of which few are frequent, some are not English and some never come again.
fn varied(bytes: usize) -> anyhow::Result<String> {
    const SYLLABLES: [&str; 16] = [
        "ka", "mor", "the", "in", "sel", "tra", "o", "ver", "lin", "ed", "qua", "st", "er", "un",
        "phi", "ly",
    ];
    const FOREIGN: [&str; 6] = ["größer", "été", "мир", "слово", "文字", "ναι"];
    let random = Permutation::new(1 << 40, 5, 0);
    let (mut text, mut number) = (String::with_capacity(bytes + 64), 0);
    let mut next = || {
        number += 1;
        random.at(number)
    };
    while text.len() < bytes {
        let draw = next();
        let word = match draw % 20 {
            0 => next(),
            // A product of two draws: small numbers, which are the frequent words, come often.
            _ => next() % 200 * (next() % 200),
        };
        if draw % 10 == 9 {
            text.push_str(FOREIGN[usize::try_from(draw / 10 % 6)?]);
        } else {
            let mut rest = word + 1;
            while rest > 0 {
                text.push_str(SYLLABLES[usize::try_from(rest % 16)?]);
                rest /= 16;
            }
        }
        text.push_str(match draw / 100 % 12 {
            0 => ", ",
            1 => ".\n",
            2 if draw % 7 == 0 => " 1234 ",
            _ => " ",
        });
    }
    text.truncate(text.floor_char_boundary(bytes));
    Ok(text)
}
