//! From tokens back to text, with the tokenizer of a prepared folder.

use std::path::Path;

use tokenizers::Tokenizer;

use super::encoder;
use super::split::{about, caught, tokenizer_error};
use crate::error::{Error, Result};
use crate::format::continuations::TOKENIZER_FILE;

/// A tokenizer is some megabytes; more is not one.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// Turns tokens of a prepared folder back into text, to look at them.
pub struct Detokenizer(Tokenizer);

impl Detokenizer {
    /// The tokenizer of a prepared folder; `None` if the folder has none, or an empty one.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Tokenizer`].
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(TOKENIZER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let json = read_bounded(&path)?;
        if json.trim_ascii() == b"{}" {
            return Ok(None);
        }
        Ok(Some(Detokenizer(encoder::read(&json).map_err(about(&path))?)))
    }

    /// The text of `tokens`, special tokens included.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, tokens: &[i64]) -> Result<String> {
        let known = |&token: &i64| u32::try_from(token).ok();
        let ids: Vec<u32> = tokens.iter().filter_map(known).collect();
        let action = "decode tokens";
        caught(action, || self.0.decode(&ids, false).map_err(tokenizer_error(action)))
    }
}

impl std::fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detokenizer").finish_non_exhaustive()
    }
}

/// A tokenizer file as it stands.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.len() > TOKENIZER_BYTES_MAX {
        let message = format!("{} has {} bytes, too many", path.display(), metadata.len());
        return Err(Error::Tokenizer { action: "read the tokenizer", message });
    }
    std::fs::read(path).map_err(Error::io("read", path))
}
