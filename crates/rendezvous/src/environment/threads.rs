//! What the environment says of how many threads a rank computes with.

use super::variables::Variables;

/// The variables that libtorch's thread pools heed, as they stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadVariables {
    /// `OMP_NUM_THREADS`. torchrun sets it to `1` where it is not set and a node has several ranks.
    pub omp_num_threads: Option<String>,
    /// `MKL_NUM_THREADS`.
    pub mkl_num_threads: Option<String>,
}

impl ThreadVariables {
    /// Reads the process's environment.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_lookup(&super::process_variable)
    }

    /// As [`ThreadVariables::from_env`] over any environment. Empty counts as unset.
    #[must_use]
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Self {
        let variables = Variables::new(lookup);
        Self {
            omp_num_threads: variables.text("OMP_NUM_THREADS"),
            mkl_num_threads: variables.text("MKL_NUM_THREADS"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let lookup =
            |name: &str| Some(if name == "OMP_NUM_THREADS" { " 4 " } else { "" }.to_owned());
        let expected =
            ThreadVariables { omp_num_threads: Some("4".to_owned()), mkl_num_threads: None };
        assert_eq!(ThreadVariables::from_lookup(&lookup), expected);
    }
}
