//! The commands on Megatron's files, `PREFIX.bin` and `PREFIX.idx`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use phalanx_data::batches::Scratch;
use phalanx_data::format::{MegatronTokens, Tokens};
use phalanx_data::{Access, Error};
use serde_json::json;

use crate::report::{self, count, real};

/// Tokens of a sample.
const SAMPLE_TOKENS: u64 = 16;

/// Tokens read at once.
const PART: u64 = 1 << 20;

/// No token is as large: the files do not say how large their vocabulary is.
const ANY: u32 = u32::MAX;

/// The prefix that a path stands for: it is one, or the name of one of the two files.
pub(super) fn prefix(path: &Path) -> Option<PathBuf> {
    let has_both = |prefix: &Path| {
        [".idx", ".bin"].iter().all(|end| {
            let mut name = prefix.as_os_str().to_owned();
            name.push(end);
            Path::new(&name).is_file()
        })
    };
    let named = path.extension().is_some_and(|end| end == "idx" || end == "bin");
    let candidates = [Some(path.to_path_buf()), named.then(|| path.with_extension(""))];
    candidates.into_iter().flatten().find(|prefix| has_both(prefix))
}

pub(super) fn inspect(prefix: &Path, as_json: bool, samples: u64) -> Result<()> {
    let tokens = MegatronTokens::open(prefix, ANY, Access::Read)?;
    let mut shown = Vec::new();
    let (total, mut scratch) = (tokens.token_count(), Scratch::default());
    let len = SAMPLE_TOKENS.min(total);
    for number in 0..samples.min(total) {
        let steps = u128::from(samples.min(total).saturating_sub(1).max(1));
        let at = u128::from(total - len) * u128::from(number) / steps;
        let (at, mut some) = (u64::try_from(at)?, vec![0; usize::try_from(len)?]);
        tokens.read(at, &mut some, &mut scratch, &format_args!("token {at}"))?;
        shown.push((at, some));
    }
    if as_json {
        return report::print_json(&json!({
            "format": "megatron", "tokens": total, "sequences": tokens.sequence_count(),
            "documents": tokens.document_count(),
            "samples": shown.iter().map(|(at, some)| json!({"at": at, "tokens": some})).collect::<Vec<_>>(),
        }));
    }
    let mut out = String::new();
    writeln!(out, "files        {0}.bin, {0}.idx", prefix.display())?;
    writeln!(out, "format       Megatron, version 1")?;
    writeln!(out, "tokens       {}", count(total))?;
    writeln!(out, "sequences    {}", count(tokens.sequence_count()))?;
    writeln!(out, "documents    {}", count(tokens.document_count()))?;
    for (at, some) in shown {
        writeln!(out, "token {}: {some:?}", count(at))?;
    }
    report::print(&out)
}

/// Opening reads and checks the whole index; then every token is read.
pub(super) fn verify(prefix: &Path, as_json: bool) -> Result<()> {
    let started = Instant::now();
    let tokens = MegatronTokens::open(prefix, ANY, Access::Read)?;
    let (total, mut scratch, mut largest) = (tokens.token_count(), Scratch::default(), 0);
    let mut part = vec![0; usize::try_from(PART.min(total))?];
    let mut at = 0;
    while at < total {
        let len = usize::try_from(PART.min(total - at))?;
        tokens.read(at, &mut part[..len], &mut scratch, &"everything")?;
        largest = part[..len].iter().fold(largest, |largest, &token| largest.max(token));
        at += PART;
    }
    let seconds = started.elapsed().as_secs_f64();
    if as_json {
        return report::print_json(&json!({
            "good": true, "tokens": total, "sequences": tokens.sequence_count(),
            "documents": tokens.document_count(), "largest_token": largest, "seconds": seconds,
        }));
    }
    let rate = real(total) / seconds.max(1e-9) / 1e6;
    report::print(&format!(
        "{} tokens in {} documents at {rate:.0} M/s: the index is sound and every token is there; the largest is {largest}. \
         These files have no checksums: whether tokens are those that were written cannot be said\n",
        count(total),
        count(tokens.document_count()),
    ))
}

/// The tokens, of a vocabulary of any size.
pub(super) fn open(prefix: &Path, access: Access) -> Result<MegatronTokens, Error> {
    MegatronTokens::open(prefix, ANY, access)
}
