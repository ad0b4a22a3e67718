//! Text and data that tests are made of.

use std::path::Path;
use std::sync::Arc;

use phalanx_data::batches::{Rows, Scratch};
use phalanx_data::fingerprint::Fingerprint;
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter};
use phalanx_data::order::Sample;
use phalanx_data::{Access, Batch, Column, DType, Error, MaskedText, Masking, Result, Samples};

pub(crate) const SPECIAL: SpecialTokens = SpecialTokens::bert(0, 1, 2, 3, 4);
pub(crate) const SEP: u32 = 3;

/// The id of a special token that the vocabulary has.
pub(crate) fn special_id(id: Option<u32>) -> i64 {
    i64::from(id.expect("the vocabulary has it"))
}

/// Sentences of varied words, the same on every run.
pub(crate) fn write_text(folder: &Path, files: usize, sentences: usize) {
    let nouns = ["king", "queen", "sword", "castle", "river", "winter", "messenger", "crown"];
    let verbs = ["loves", "breaks", "remembers", "carries", "crosses", "forgets"];
    for file in 0..files {
        let mut content = String::new();
        for sentence in 0..sentences {
            let n = file * 31 + sentence * 7;
            let (a, b) = (nouns[n % 8], nouns[(n / 3 + sentence) % 8]);
            content.push_str(&format!("The {a} {} the {b}, scene {n}.\n", verbs[(n / 5) % 6]));
        }
        std::fs::write(folder.join(format!("play-{file}.txt")), content).expect("write a text");
    }
}

/// A prepared folder of `documents` documents with 90 to 110 tokens each, in shards of about `shard_bytes`.
pub(crate) fn write_tokens(target: &Path, documents: u32, vocab_size: u32, shard_bytes: u64) {
    let mut writer = TokenWriter::create(target, b"{}", vocab_size, SPECIAL, shard_bytes)
        .expect("start a prepared folder");
    for document in 0..documents {
        let len = 90 + document % 21;
        let tokens: Vec<u32> = (0..len)
            .map(|at| 5 + (document * 1009 + at * at * 31) % (vocab_size - 5))
            .chain([SEP])
            .collect();
        writer.tokens(&tokens).expect("write tokens");
        writer.end_document().expect("end a document");
    }
    writer.finish(0).expect("finish the folder");
}

pub(crate) fn open(folder: &Path, sequence_len: usize) -> Arc<MaskedText> {
    let stream = Arc::new(TokenStream::open(folder, Access::Read).expect("open the folder"));
    Arc::new(MaskedText::new(stream, sequence_len, Masking::default()).expect("samples"))
}

/// What a batch holds, to be compared.
pub(crate) fn content(batch: &Batch) -> (Vec<Sample>, Vec<i64>, Vec<i64>) {
    (batch.samples().to_vec(), batch.input_ids().to_vec(), batch.labels().to_vec())
}

/// Samples that do what a test asks for, and otherwise hold their own number.
pub(crate) struct Scripted<F> {
    count: u64,
    columns: [Column; 2],
    script: F,
}

impl<F> Scripted<F> {
    /// `count` samples of `len` tokens.
    pub(crate) fn new(count: u64, len: usize, script: F) -> Self {
        let columns = ["input_ids", "labels"].map(|name| Column::new(name, DType::I64, [len]));
        Scripted { count, columns, script }
    }
}

impl<F> Samples for Scripted<F>
where
    F: Fn(Sample) -> Result<()> + Send + Sync + 'static,
{
    fn sample_count(&self) -> u64 {
        self.count
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint(self.count)
    }

    fn fill(&self, _: u64, rows: &mut Rows<'_>, _: &mut Scratch) -> Result<()> {
        for at in 0..rows.len() {
            let (sample, _) = rows.sample(at);
            (self.script)(sample)?;
            let mut row = rows.part(at..at + 1);
            let [input_ids, labels] = row.columns_mut::<i64, 2>([0, 1])?;
            input_ids.fill(i64::try_from(sample.id).unwrap_or(i64::MAX));
            labels.fill(0);
        }
        Ok(())
    }
}

/// An error for scripts.
pub(crate) fn broken() -> Error {
    Error::NoSuchSample { sample: 4711, samples: 1 }
}
