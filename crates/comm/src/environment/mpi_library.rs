//! What the MPI backend wants to know.

use super::{process_variable, EnvironmentError};

/// Whether an MPI launcher started this process: without one, initialising MPI would make a job of one.
pub(crate) fn is_started_by_mpi() -> bool {
    const SIGNS: [&str; 5] =
        ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];
    SIGNS.iter().any(|sign| process_variable(sign).is_some_and(|value| !value.is_empty()))
}

/// `PHALANX_MPI_THREADS`: whether to ask MPI to let every thread call it.
pub(crate) fn mpi_threads() -> Result<bool, EnvironmentError> {
    const VARIABLE: &str = "PHALANX_MPI_THREADS";
    match process_variable(VARIABLE).unwrap_or_default().as_str() {
        "" | "multiple" => Ok(true),
        "funneled" => Ok(false),
        other => Err(EnvironmentError::Invalid {
            variable: VARIABLE,
            value: other.to_owned(),
            expected: "multiple or funneled".to_owned(),
        }),
    }
}
