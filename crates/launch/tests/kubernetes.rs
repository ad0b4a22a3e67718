//! What the manifests of `examples/kubernetes` start, in the environment that they run in.

use std::path::Path;

use clap::Parser as _;
use phalanx_comm::environment::LaunchDefaults;
use phalanx_launch::{LaunchArgs, LaunchOptions};

#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArgs,
    #[arg(last = true)]
    program: Vec<String>,
}

/// The options of the launcher that the manifest's `command` line starts, in this environment, and its program.
fn options(manifest: &str, environment: &[(&str, &str)]) -> (LaunchOptions, Vec<String>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/kubernetes");
    let text = std::fs::read_to_string(folder.join(manifest)).expect("the manifest");
    let command = text.lines().find_map(|line| line.trim().strip_prefix("command: "));
    let command: Vec<String> =
        serde_json::from_str(command.expect("a command")).expect("a list on one line");
    assert_eq!(command[..2], ["phalanx", "launch"]);
    let flags = Flags::try_parse_from(&command[1..]).expect("flags of the launcher");
    let lookup = |name: &str| {
        let found = environment.iter().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    let defaults = LaunchDefaults::from_lookup(&lookup).expect("well-formed");
    (flags.launch.options_with(&defaults).expect("options"), flags.program)
}

#[test]
fn a_pod_of_an_indexed_job_is_the_node_of_its_index() {
    let (options, program) = options("indexed-job.yaml", &[("JOB_COMPLETION_INDEX", "2")]);
    assert_eq!((options.nnodes_min, options.nnodes), (Some(3), 4));
    assert_eq!((options.node_rank, options.nproc_per_node), (Some(2), 8));
    assert_eq!(options.master_addr.as_deref(), Some("bert-0.bert"));
    assert_eq!(options.max_restarts, 10);
    assert_eq!(program[0], "bert_large");
}

#[test]
fn a_pod_of_a_train_job_takes_its_place_from_the_trainer() {
    let environment = [
        ("PET_NNODES", "4"),
        ("PET_NPROC_PER_NODE", "8"),
        ("PET_NODE_RANK", "3"),
        ("PET_MASTER_ADDR", "bert-node-0-0.bert"),
        ("PET_MASTER_PORT", "29400"),
    ];
    let (options, _) = options("trainjob.yaml", &environment);
    assert_eq!((options.nnodes_min, options.nnodes), (None, 4));
    assert_eq!((options.node_rank, options.nproc_per_node), (Some(3), 8));
    assert_eq!(options.master_addr.as_deref(), Some("bert-node-0-0.bert"));
    assert_eq!(options.master_port, Some(29_400));
}

#[test]
fn flags_stand_above_what_the_platform_says() {
    let parse = |flags: &str| {
        let words = std::iter::once("train").chain(flags.split_whitespace());
        Flags::try_parse_from(words).expect("flags").launch
    };
    let lookup = |name: &str| match name {
        "PET_NNODES" => Some("4".to_owned()),
        "PET_MAX_RESTARTS" => Some("9".to_owned()),
        "JOB_COMPLETION_INDEX" => Some("1".to_owned()),
        _ => None,
    };
    let defaults = LaunchDefaults::from_lookup(&lookup).expect("well-formed");
    let options = |flags| parse(flags).options_with(&defaults).expect("options");
    let given = options("--nnodes 2 --max-restarts 0 --node-rank 0 --master-addr a");
    assert_eq!((given.nnodes, given.max_restarts, given.node_rank), (2, 0, Some(0)));
    let absent = options("");
    assert_eq!((absent.nnodes, absent.max_restarts), (4, 9));
    // Where nodes do not meet anywhere, the number of a pod says nothing about them.
    assert_eq!(absent.node_rank, None);
    assert_eq!(options("--master-addr a").node_rank, Some(1));
}
