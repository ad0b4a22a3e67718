//! Which of a vocabulary's tokens have a meaning: found by the names that models give them.

use crate::error::{Error, Result};
use crate::format::SpecialTokens;

const PAD: &[&str] = &["[PAD]", "<pad>", "<|pad|>", "<|padding|>"];
const UNK: &[&str] = &["[UNK]", "<unk>", "<|unk|>"];
const MASK: &[&str] = &["[MASK]", "<mask>", "<|mask|>"];
const CLS: &[&str] = &["[CLS]"];
const SEP: &[&str] = &["[SEP]"];
/// `RoBERTa` and its kin frame sentences so.
const FRAME: (&str, &str) = ("<s>", "</s>");
const EOS: &[&str] =
    &["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>"];

/// Finds the special tokens; `id` says which id a name has. `end` is the name of the token that
/// closes documents.
///
/// # Errors
/// [`Error::InvalidOption`] if there is no token to close documents with.
pub(crate) fn find(end: Option<&str>, id: impl Fn(&str) -> Option<u32>) -> Result<SpecialTokens> {
    let first = |names: &[&str]| names.iter().find_map(|name| id(name));
    let mask = first(MASK);
    let frame = |name| mask.and_then(|_| id(name));
    let mut special = SpecialTokens {
        pad: first(PAD),
        unk: first(UNK),
        cls: first(CLS).or_else(|| frame(FRAME.0)),
        sep: first(SEP).or_else(|| frame(FRAME.1)),
        mask,
        eos: None,
    };
    if let Some(name) = end {
        let reason = "the tokenizer has no such token; give the name of one that it has";
        let token = id(name).ok_or_else(|| Error::option("end_token", name, reason))?;
        special.eos = Some(token).filter(|_| special.sep != Some(token));
    } else if special.sep.is_none() {
        special.eos = first(EOS);
        if special.eos.is_none() {
            let reason = "the tokenizer has no token of a name that is known to end a document: \
                          say which one does";
            return Err(Error::option("end_token", "not given", reason));
        }
    }
    Ok(special)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str], end: Option<&str>) -> Result<SpecialTokens> {
        find(end, |wanted| (0..).zip(names).find(|(_, name)| **name == wanted).map(|(id, _)| id))
    }

    #[test]
    fn tokens_are_found_by_the_names_of_each_family() {
        let bert = found(&["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], None).unwrap();
        assert_eq!(bert, SpecialTokens::bert(0, 1, 2, 3, 4));
        let gpt = found(&["a", "b", "<|endoftext|>"], None).unwrap();
        assert_eq!(gpt, SpecialTokens { eos: Some(2), ..SpecialTokens::default() });
        let roberta = found(&["<s>", "<pad>", "</s>", "<unk>", "<mask>"], None).unwrap();
        assert_eq!(roberta, SpecialTokens::bert(1, 3, 0, 2, 4));
        let llama = found(&["<unk>", "<s>", "</s>"], None).unwrap();
        assert_eq!((llama.eos, llama.cls, llama.unk), (Some(2), None, Some(0)));
    }

    #[test]
    fn the_end_of_documents_can_be_chosen_and_must_exist() {
        let chosen = found(&["[SEP]", "<end>"], Some("<end>")).unwrap();
        assert_eq!((chosen.eos, chosen.document_end()), (Some(1), Some(1)));
        let same = found(&["[SEP]", "<end>"], Some("[SEP]")).unwrap();
        assert_eq!((same.eos, same.document_end()), (None, Some(0)));
        let missing = found(&["a"], Some("<end>")).unwrap_err().to_string();
        assert!(missing.contains("no such token"), "{missing}");
        let unknown = found(&["a"], None).unwrap_err().to_string();
        assert!(unknown.contains("say which one"), "{unknown}");
    }
}
