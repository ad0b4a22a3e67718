//! [`record_damage`]: writing the list of what is damaged.

use std::fs;
use std::path::Path;

use super::verify::{is_damaged, is_lost, Verified};
use crate::error::{Error, Result};
use crate::format::damage_list::{self, DAMAGE_FILE};
use crate::format::folder::{partial_path, write_synced};
use crate::format::TokenIndex;
use crate::records::RecordIndex;

/// Writes what [`verify`](crate::damage::verify) has found damaged to `damage.json` in the folder,
/// for [`OnDamage::Skip`](crate::OnDamage::Skip): blocks, and shards that are missing, of another
/// size or without a usable header as lost; a list that is there is replaced, or removed if nothing
/// is damaged. Copy it to every machine that has a copy of the folder.
///
/// # Errors
/// What is wrong besides that: a shard that may not be read, say, is not damaged. A
/// `tokenizer.json` of other tokens, or that cannot be read, is passed over. [`Error::Io`].
pub fn record_damage(folder: &Path, found: &Verified) -> Result<()> {
    // Of a tokenizer no sample is made: it has no place in the list.
    let is_beside =
        |error: &Error| matches!(error, Error::OtherTokenizer { .. } | Error::Tokenizer { .. });
    let mut others = found.damage.iter().filter(|error| !is_beside(error));
    let other = others.find(|error| !is_damaged(error) && !is_lost(error));
    if let Some(error) = other {
        let reason =
            "only what is damaged or missing can be left out; see to it that the shard can be read";
        return Err(Error::option("damage", error, reason));
    }
    let path = folder.join(DAMAGE_FILE);
    if found.blocks.is_empty() && found.lost.is_empty() {
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(error))
            }
            _ => Ok(()),
        };
    }
    let fingerprint = if RecordIndex::is_in(folder) {
        RecordIndex::read(folder)?.fingerprint
    } else {
        TokenIndex::read(folder)?.fingerprint
    };
    let json = damage_list::to_json(fingerprint, found.blocks.clone(), found.lost.clone());
    let partial = partial_path(&path);
    write_synced(&partial, &json)?;
    fs::rename(&partial, &path).map_err(Error::io("rename", &partial))
}
