//! The data: shards for us, and the same tokens in one flat file for the others.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use phalanx::data::format::{SpecialTokens, TokenWriter};
use phalanx::data::order::permutation::Permutation;
use phalanx::data::samples::RawText;
use phalanx::data::{Access, MaskedText, Masking, Samples};

/// Tokens of a sequence.
pub(crate) const LEN: usize = 512;
const VOCAB_SIZE: u32 = 8192;
const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, SEP, 4);
const SEP: u32 = 3;
const SHARDS: u64 = 4;

pub(crate) struct Corpus {
    pub(crate) shards: PathBuf,
    pub(crate) flat: PathBuf,
}

impl Corpus {
    /// Rows of tokens.
    pub(crate) fn raw(&self) -> anyhow::Result<Arc<dyn Samples>> {
        Ok(Arc::new(RawText::open(&self.shards, LEN, Access::Map)?))
    }

    /// Rows for masked training.
    pub(crate) fn masked(&self) -> anyhow::Result<Arc<dyn Samples>> {
        Ok(Arc::new(MaskedText::open(&self.shards, LEN, Masking::default(), Access::Map)?))
    }
}

/// Random tokens, each document one sequence long.
pub(crate) fn write(folder: &Path, sequences: u64) -> anyhow::Result<Corpus> {
    let corpus = Corpus { shards: folder.join("tokens"), flat: folder.join("flat") };
    let shard_bytes = (sequences * 2 * LEN as u64).div_ceil(SHARDS);
    let mut writer = TokenWriter::create(&corpus.shards, b"{}", VOCAB_SIZE, SPECIAL, shard_bytes)?;
    let mut flat = std::io::BufWriter::new(std::fs::File::create(&corpus.flat)?);
    let mut document = vec![0; LEN];
    for number in 0..sequences {
        let order = Permutation::new(u64::from(VOCAB_SIZE - 5), number, 0);
        for (token, at) in document.iter_mut().zip(0..) {
            *token = u32::try_from(order.at(at))? + 5;
        }
        document[LEN - 1] = SEP;
        writer.tokens(&document)?;
        writer.end_document()?;
        for &token in &document {
            flat.write_all(&u16::try_from(token)?.to_le_bytes())?;
        }
    }
    writer.finish(0)?;
    flat.flush()?;
    Ok(corpus)
}
