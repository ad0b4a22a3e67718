//! What the MPI backend reads of the environment.

use super::variables::Variables;
use super::{process_variable, EnvironmentError, HostLink, Launcher, World};

/// Whether an MPI launcher started this process: without one, initialising MPI would make a job of one.
pub fn is_started_by_mpi() -> bool {
    const SIGNS: [&str; 5] =
        ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];
    SIGNS.iter().any(|sign| process_variable(sign).is_some_and(|value| !value.is_empty()))
}

/// The launcher, the rank and how many there are, by the launcher's own variables, where it is one that starts MPI programs.
pub fn launched() -> Option<(Launcher, usize, usize)> {
    let world = World::from_env().ok()?;
    let starts_mpi = matches!(
        world.launcher,
        Launcher::OpenMpi | Launcher::Pmi | Launcher::Mvapich | Launcher::Slurm
    );
    starts_mpi.then_some((world.launcher, world.rank, world.world_size))
}

/// `MASTER_ADDR`.
pub fn master_addr() -> Option<String> {
    Variables::new(&process_variable).text("MASTER_ADDR")
}

/// `PHALANX_HOST_LINK`.
///
/// # Errors
///
/// [`EnvironmentError::Invalid`]: the variable has another value.
pub fn host_link() -> Result<HostLink, EnvironmentError> {
    Variables::new(&process_variable).host_link()
}

/// `PHALANX_DATA_CHECKS`.
///
/// # Errors
///
/// [`EnvironmentError::Invalid`]: the variable has another value.
pub fn data_checks() -> Result<bool, EnvironmentError> {
    Variables::new(&process_variable).data_checks()
}

/// `PHALANX_MPI_CUDA_AWARE`: whether the MPI library takes addresses of a GPU, whatever it says itself.
///
/// # Errors
///
/// [`EnvironmentError::Invalid`]: the variable has another value.
pub fn mpi_cuda_aware() -> Result<Option<bool>, EnvironmentError> {
    const VARIABLE: &str = "PHALANX_MPI_CUDA_AWARE";
    match process_variable(VARIABLE).unwrap_or_default().as_str() {
        "" => Ok(None),
        "1" => Ok(Some(true)),
        "0" => Ok(Some(false)),
        other => Err(EnvironmentError::Invalid {
            variable: VARIABLE,
            value: other.to_owned(),
            expected: "1 or 0".to_owned(),
        }),
    }
}

/// `MASTER_PORT`: the port of the store where ranks meet over MPI; any free one if it is not set.
///
/// # Errors
///
/// [`EnvironmentError::Invalid`]: the variable has another value.
pub fn store_port() -> Result<u16, EnvironmentError> {
    Ok(Variables::new(&process_variable).port("MASTER_PORT")?.unwrap_or(0))
}

/// `PHALANX_MPI_THREADS`: whether to ask MPI to let every thread call it.
///
/// # Errors
///
/// [`EnvironmentError::Invalid`]: the variable has another value.
pub fn mpi_threads() -> Result<bool, EnvironmentError> {
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
