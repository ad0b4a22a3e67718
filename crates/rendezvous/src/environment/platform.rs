//! What a container platform says of how ranks are to be launched here: flags of a launcher that nobody gave.
//!
//! Source: torchrun reads `PET_<FLAG>` where a flag is absent (torch 2.11, `distributed/argparse_util.py`), and Kubeflow's
//! trainer sets those; an Indexed Job of Kubernetes numbers its pods in `JOB_COMPLETION_INDEX`.

use super::variables::{invalid, Result, Variables};
use super::EnvironmentError;

/// How many ranks a node starts, where it is not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RanksPerNode {
    /// So many.
    Count(usize),
    /// One a GPU (`gpu`).
    PerGpu,
    /// One a core (`cpu`).
    PerCore,
    /// One a GPU where there are any, else one a core (`auto`).
    Auto,
}

/// Flags of a launcher, as far as the environment gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchDefaults {
    /// `PET_NNODES`, as `N` or `MIN:MAX`: at least, at most.
    pub nnodes: Option<(Option<usize>, usize)>,
    /// `PET_NPROC_PER_NODE`.
    pub ranks_per_node: Option<RanksPerNode>,
    /// `PET_NODE_RANK`.
    pub node_rank: Option<usize>,
    /// `JOB_COMPLETION_INDEX`: a node's number, if the job has several.
    pub completion_index: Option<usize>,
    /// `PET_MASTER_ADDR`, else the host of `PET_RDZV_ENDPOINT`.
    pub master_addr: Option<String>,
    /// `PET_MASTER_PORT`, else the port of `PET_RDZV_ENDPOINT`.
    pub master_port: Option<u16>,
    /// `PET_MAX_RESTARTS`.
    pub max_restarts: Option<u32>,
}

impl LaunchDefaults {
    /// Reads the process's environment.
    ///
    /// # Errors
    ///
    /// [`EnvironmentError::Invalid`] naming the variable, its value and what was expected.
    pub fn from_env() -> std::result::Result<Self, EnvironmentError> {
        Self::read(&Variables::new(&super::process_variable))
    }

    /// As [`LaunchDefaults::from_env`] over any environment. Empty counts as unset.
    ///
    /// # Errors
    ///
    /// As [`LaunchDefaults::from_env`].
    pub fn from_lookup(
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> std::result::Result<Self, EnvironmentError> {
        Self::read(&Variables::new(lookup))
    }

    fn read(variables: &Variables<'_>) -> Result<Self> {
        let (endpoint_host, endpoint_port) = endpoint(variables)?.unzip();
        Ok(Self {
            nnodes: nnodes(variables)?,
            ranks_per_node: ranks_per_node(variables)?,
            node_rank: variables.number("PET_NODE_RANK")?,
            completion_index: variables.number("JOB_COMPLETION_INDEX")?,
            master_addr: variables.text("PET_MASTER_ADDR").or(endpoint_host),
            master_port: variables.port("PET_MASTER_PORT")?.or(endpoint_port.flatten()),
            max_restarts: variables.parsed("PET_MAX_RESTARTS", "a whole number, 0 or more")?,
        })
    }
}

fn nnodes(variables: &Variables<'_>) -> Result<Option<(Option<usize>, usize)>> {
    const VARIABLE: &str = "PET_NNODES";
    let Some(text) = variables.text(VARIABLE) else { return Ok(None) };
    let parsed = match text.split_once(':') {
        None => text.parse().ok().map(|max| (None, max)),
        Some((min, max)) => {
            min.parse().ok().zip(max.parse().ok()).map(|(min, max): (usize, _)| (Some(min), max))
        }
    };
    match parsed {
        // `3:3` is torchrun's way of saying 3.
        Some((Some(min), max)) if min == max => Ok(Some((None, max))),
        Some(both) => Ok(Some(both)),
        None => Err(invalid(VARIABLE, text, "N or MIN:MAX")),
    }
}

fn ranks_per_node(variables: &Variables<'_>) -> Result<Option<RanksPerNode>> {
    const VARIABLE: &str = "PET_NPROC_PER_NODE";
    let Some(text) = variables.text(VARIABLE) else { return Ok(None) };
    Ok(Some(match text.as_str() {
        "gpu" => RanksPerNode::PerGpu,
        "cpu" => RanksPerNode::PerCore,
        "auto" => RanksPerNode::Auto,
        number => match number.parse() {
            Ok(count) if count > 0 => RanksPerNode::Count(count),
            _ => return Err(invalid(VARIABLE, text, "a number, auto, gpu or cpu")),
        },
    }))
}

/// Host and port of `PET_RDZV_ENDPOINT`; the port may be left out.
fn endpoint(variables: &Variables<'_>) -> Result<Option<(String, Option<u16>)>> {
    const VARIABLE: &str = "PET_RDZV_ENDPOINT";
    let Some(text) = variables.text(VARIABLE) else { return Ok(None) };
    let Some((host, port)) = text.rsplit_once(':') else { return Ok(Some((text, None))) };
    match port.parse() {
        Ok(port) if port > 0 => Ok(Some((host.to_owned(), Some(port)))),
        _ => Err(invalid(VARIABLE, text, "HOST:PORT")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(environment: &str) -> std::result::Result<LaunchDefaults, String> {
        let lookup = |name: &str| {
            let mut variables = environment.split(' ').filter_map(|one| one.split_once('='));
            variables.find(|(variable, _)| *variable == name).map(|(_, value)| value.to_owned())
        };
        LaunchDefaults::from_lookup(&lookup).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_environment_gives_nothing() {
        assert_eq!(defaults(""), Ok(LaunchDefaults::default()));
        assert_eq!(defaults("PET_NNODES= PET_NODE_RANK="), Ok(LaunchDefaults::default()));
    }

    #[test]
    fn kubeflows_trainer_says_everything() {
        let trainer = "PET_NNODES=4 PET_NPROC_PER_NODE=8 PET_NODE_RANK=2 JOB_COMPLETION_INDEX=2 \
                       PET_MASTER_ADDR=bert-node-0-0.bert PET_MASTER_PORT=29400";
        let expected = LaunchDefaults {
            nnodes: Some((None, 4)),
            ranks_per_node: Some(RanksPerNode::Count(8)),
            node_rank: Some(2),
            completion_index: Some(2),
            master_addr: Some("bert-node-0-0.bert".to_owned()),
            master_port: Some(29_400),
            max_restarts: None,
        };
        assert_eq!(defaults(trainer), Ok(expected));
    }

    #[test]
    fn an_elastic_job_of_kubeflow_has_bounds_and_an_endpoint() {
        let elastic = "PET_NNODES=2:4 PET_NPROC_PER_NODE=auto PET_MAX_RESTARTS=100 \
                       PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=bert-worker-0:23456";
        let found = defaults(elastic).expect("well-formed");
        assert_eq!(found.nnodes, Some((Some(2), 4)));
        assert_eq!(found.ranks_per_node, Some(RanksPerNode::Auto));
        assert_eq!(
            (found.master_addr.as_deref(), found.master_port),
            (Some("bert-worker-0"), Some(23_456))
        );
        assert_eq!(found.max_restarts, Some(100));
        assert_eq!(defaults("PET_NNODES=3:3").expect("well-formed").nnodes, Some((None, 3)));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (environment, variable) in [
            ("PET_NNODES=many", "PET_NNODES"),
            ("PET_NNODES=2:", "PET_NNODES"),
            ("PET_NPROC_PER_NODE=0", "PET_NPROC_PER_NODE"),
            ("PET_NODE_RANK=-1", "PET_NODE_RANK"),
            ("JOB_COMPLETION_INDEX=a", "JOB_COMPLETION_INDEX"),
            ("PET_MASTER_PORT=0", "PET_MASTER_PORT"),
            ("PET_RDZV_ENDPOINT=a:b", "PET_RDZV_ENDPOINT"),
            ("PET_MAX_RESTARTS=x", "PET_MAX_RESTARTS"),
        ] {
            let message = defaults(environment).expect_err(environment);
            assert!(message.starts_with(&format!("{variable}=")), "{message}");
        }
    }
}
