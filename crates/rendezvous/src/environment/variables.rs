//! Typed access to the variables, with errors that name them. Pure over a lookup.

use super::{EnvironmentError, HostLink, JobToken};

pub(super) type Result<T> = std::result::Result<T, EnvironmentError>;

/// Typed access to the variables, with errors that name them.
pub(super) struct Variables<'l> {
    lookup: &'l dyn Fn(&str) -> Option<String>,
    /// Whether ranks that an MPI launcher started can meet over MPI.
    pub(super) over_mpi: bool,
}

impl<'l> Variables<'l> {
    pub(super) fn new(lookup: &'l dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup, over_mpi: false }
    }

    pub(super) fn meeting_over_mpi(self, over_mpi: bool) -> Self {
        Self { over_mpi, ..self }
    }

    pub(super) fn text(&self, variable: &str) -> Option<String> {
        (self.lookup)(variable).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty())
    }

    pub(super) fn has(&self, variable: &str) -> bool {
        self.text(variable).is_some()
    }

    pub(super) fn parsed<T: std::str::FromStr>(
        &self,
        variable: &'static str,
        expected: &str,
    ) -> Result<Option<T>> {
        let Some(value) = self.text(variable) else { return Ok(None) };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(_) => Err(invalid(variable, value, expected)),
        }
    }

    pub(super) fn number(&self, variable: &'static str) -> Result<Option<usize>> {
        self.parsed(variable, "a whole number, 0 or more")
    }

    pub(super) fn count(&self, variable: &'static str) -> Result<Option<usize>> {
        match self.number(variable)? {
            Some(0) => Err(invalid(variable, "0".to_owned(), "a whole number, 1 or more")),
            other => Ok(other),
        }
    }

    pub(super) fn port(&self, variable: &'static str) -> Result<Option<u16>> {
        const EXPECTED: &str = "a port, 1 to 65535";
        match self.parsed(variable, EXPECTED)? {
            Some(0) => Err(invalid(variable, "0".to_owned(), EXPECTED)),
            other => Ok(other),
        }
    }

    pub(super) fn text_needed(&self, variable: &'static str, because: &str) -> Result<String> {
        self.text(variable).ok_or_else(|| missing(variable, because))
    }

    pub(super) fn number_needed(&self, variable: &'static str, because: &str) -> Result<usize> {
        self.number(variable)?.ok_or_else(|| missing(variable, because))
    }

    pub(super) fn count_needed(&self, variable: &'static str, because: &str) -> Result<usize> {
        self.count(variable)?.ok_or_else(|| missing(variable, because))
    }

    /// The token of `PHALANX_JOB_TOKEN`, else one derived from what everybody in the job (and, alas, beyond) knows.
    pub(super) fn job_token(&self, facts: &[&str]) -> Result<JobToken> {
        Ok(self.given_token()?.unwrap_or_else(|| JobToken::derive(facts)))
    }

    pub(super) fn given_token(&self) -> Result<Option<JobToken>> {
        const VARIABLE: &str = "PHALANX_JOB_TOKEN";
        match self.text(VARIABLE) {
            None => Ok(None),
            // The value stays out of the message: it is, or nearly is, a secret.
            Some(text) => JobToken::from_hex(&text).map(Some).ok_or_else(|| {
                let shown = format!("({} characters)", text.chars().count());
                invalid(
                    VARIABLE,
                    shown,
                    "64 hexadecimal digits (make one with: openssl rand -hex 32)",
                )
            }),
        }
    }

    pub(super) fn host_link(&self) -> Result<HostLink> {
        const VARIABLE: &str = "PHALANX_HOST_LINK";
        match self.text(VARIABLE) {
            None => Ok(HostLink::Auto),
            Some(value) => match value.as_str() {
                "auto" => Ok(HostLink::Auto),
                "shm" => Ok(HostLink::Shm),
                "tcp" => Ok(HostLink::Tcp),
                _ => Err(invalid(VARIABLE, value, "auto, shm or tcp")),
            },
        }
    }

    pub(super) fn data_checks(&self) -> Result<bool> {
        const VARIABLE: &str = "PHALANX_DATA_CHECKS";
        match self.text(VARIABLE).as_deref() {
            None | Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(other) => Err(invalid(VARIABLE, other.to_owned(), "on or off")),
        }
    }

    pub(super) fn restart_count(&self) -> Result<u32> {
        Ok(self.parsed("PHALANX_RESTART_COUNT", "a whole number, 0 or more")?.unwrap_or(0))
    }
}

pub(super) fn invalid(variable: &'static str, value: String, expected: &str) -> EnvironmentError {
    EnvironmentError::Invalid { variable, value, expected: expected.to_owned() }
}

pub(super) fn missing(variable: &'static str, because: &str) -> EnvironmentError {
    EnvironmentError::Missing { variable, because: because.to_owned() }
}
