//! How a trainer's configuration file is read, and what is said of one that cannot be.
//!
//! The including module has `Config`, whose sections these are, and `SHIPPED`, the configurations of the source tree.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Config, SHIPPED};

/// [`SHIPPED`], read.
pub(crate) fn shipped() -> Result<Vec<(&'static str, Config)>, ConfigError> {
    SHIPPED.iter().map(|(name, text)| Ok((*name, Config::parse(text, Path::new(name))?))).collect()
}

/// A file that cannot be used, in one message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// Not there, or not readable.
    #[error(
        "cannot read the configuration {path}: {reason}; those that come with phalanx are {}",
        SHIPPED.map(|(name, _)| name).join(", ")
    )]
    Unreadable {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// Not JSON, or a field of an unknown name or another type.
    #[error("{path}: {field}{reason}")]
    IllFormed {
        /// The file.
        path: PathBuf,
        /// The path of the field and a colon, or nothing where the file is not JSON at all.
        field: String,
        /// What serde said, with line and column.
        reason: serde_json::Error,
    },
    /// Fields that cannot stand together, or values out of range.
    #[error("{origin}: {message}")]
    Invalid {
        /// The file, or the flags.
        origin: String,
        /// The field, what is wrong with it and what to do.
        message: String,
    },
}

/// A value of any type that is read over.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Ignored;

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Ignored)
    }
}

impl Config {
    /// Reads and checks a file.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| ConfigError::Unreadable { path: path.into(), reason })?;
        Self::parse(&text, path)
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut json = serde_json::Deserializer::from_str(text);
        let ill_formed =
            |field: String, reason| ConfigError::IllFormed { path: path.into(), field, reason };
        let config: Config = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let field = error.path().to_string();
            let syntax = matches!(
                error.inner().classify(),
                serde_json::error::Category::Syntax | serde_json::error::Category::Eof
            );
            let field = if syntax || field == "." { String::new() } else { format!("{field}: ") };
            ill_formed(field, error.into_inner())
        })?;
        json.end().map_err(|reason| ill_formed(String::new(), reason))?;
        Ok(config)
    }
}
