//! Parquet without the cargo feature `parquet`: an error that says how to get it.

use std::path::Path;

use super::block::{Block, Place};
use crate::error::{Error, Result};

/// Nothing: it cannot be opened.
#[derive(Debug)]
pub(crate) enum Rows {}

impl Rows {
    pub(crate) fn open(_path: &Path, _field: &str, _start: Place) -> Result<Self> {
        Err(Error::NotCompiledIn { what: "Parquet", feature: "parquet" })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Block>> {
        match *self {}
    }
}
