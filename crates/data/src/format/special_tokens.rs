//! The tokens of a vocabulary that are no text.

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprinter;

/// Ids of the special tokens. A vocabulary need not have all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpecialTokens {
    /// `[PAD]`: fills rows up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad: Option<u32>,
    /// `[UNK]`: stands for what the vocabulary lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unk: Option<u32>,
    /// `[CLS]`: begins a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cls: Option<u32>,
    /// `[SEP]`: ends a sample, and a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sep: Option<u32>,
    /// `[MASK]`: hides a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<u32>,
    /// Ends a document, where that is not `[SEP]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos: Option<u32>,
}

impl SpecialTokens {
    /// The five of BERT: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`.
    pub const fn bert(pad: u32, unk: u32, cls: u32, sep: u32, mask: u32) -> Self {
        SpecialTokens {
            pad: Some(pad),
            unk: Some(unk),
            cls: Some(cls),
            sep: Some(sep),
            mask: Some(mask),
            eos: None,
        }
    }

    /// Those that there are.
    pub(crate) fn all(&self) -> impl Iterator<Item = u32> {
        self.slots().into_iter().flatten()
    }

    /// Whether `id` is one of them.
    pub fn contains(&self, id: i64) -> bool {
        self.all().any(|special| i64::from(special) == id)
    }

    /// The token that closes each document: `eos`, or else `[SEP]`.
    pub fn document_end(&self) -> Option<u32> {
        self.eos.or(self.sep)
    }

    fn slots(&self) -> [Option<u32>; 6] {
        [self.pad, self.unk, self.cls, self.sep, self.mask, self.eos]
    }

    /// BERT's five are numbered as they always were; of others it is also said which there are.
    pub(super) fn add_to(&self, sum: Fingerprinter) -> Fingerprinter {
        let is_bert =
            self.slots().map(|slot| slot.is_some()) == [true, true, true, true, true, false];
        if is_bert {
            return self.all().fold(sum, |sum, id| sum.number(u64::from(id)));
        }
        let slot = |id: Option<u32>| id.map_or(0, |id| u64::from(id) + 1);
        let sum = sum.bytes(b"special");
        self.slots().into_iter().fold(sum, |sum, id| sum.number(slot(id)))
    }
}
