//! Every launcher's variables as observed, every way to get them wrong, and who wins when several are there.

use proptest::prelude::*;

use super::slurm::{expand_nodes, expand_tasks};
use super::variables::Variables;
use super::{derived_port, launchers, EnvironmentError, HostLink, Launcher, StoreHost, World};

type Pair = (&'static str, &'static str);

/// `base` with changes; an empty value unsets.
fn with(base: &[Pair], changes: &[Pair]) -> Vec<Pair> {
    let kept = base.iter().filter(|(name, _)| changes.iter().all(|(other, _)| name != other));
    kept.chain(changes).copied().collect()
}

fn parse(variables: &[Pair]) -> Result<World, EnvironmentError> {
    World::from_lookup(&|name| {
        variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
    })
}

/// rank, world size, local rank, local world size, node rank, node count
fn numbers(world: &World) -> [usize; 6] {
    [
        world.rank,
        world.world_size,
        world.local_rank,
        world.local_world_size,
        world.node_rank,
        world.node_count,
    ]
}

fn message(variables: &[Pair]) -> String {
    parse(variables).expect_err("this environment is wrong").to_string()
}

const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

const OWN: &[Pair] = &[
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "2"),
    ("GROUP_RANK", "2"),
    ("GROUP_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "10.0.0.1"),
    ("MASTER_PORT", "29500"),
    ("PHALANX_RUN_ID", "a1b2"),
    ("PHALANX_JOB_TOKEN", TOKEN),
    ("PHALANX_RESTART_COUNT", "3"),
    ("PHALANX_AGENT_STORE", "1"),
];

const TORCHRUN: &[Pair] = &[
    ("RANK", "0"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_RANK", "0"),
    ("LOCAL_WORLD_SIZE", "2"),
    ("GROUP_RANK", "0"),
    ("GROUP_WORLD_SIZE", "2"),
    ("ROLE_RANK", "0"),
    ("ROLE_NAME", "default"),
    ("ROLE_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "node0"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RESTART_COUNT", "1"),
    ("TORCHELASTIC_MAX_RESTARTS", "3"),
    ("TORCHELASTIC_RUN_ID", "none"),
    ("TORCHELASTIC_USE_AGENT_STORE", "True"),
    ("TORCHELASTIC_ERROR_FILE", ""),
];

const OPEN_MPI: &[Pair] = &[
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ("OMPI_COMM_WORLD_NODE_RANK", "3"),
    ("OMPI_UNIVERSE_SIZE", "4"),
    ("PMIX_RANK", "3"),
    ("PMIX_NAMESPACE", "1234567890"),
];

const HYDRA: &[Pair] = &[
    ("PMI_RANK", "1"),
    ("PMI_SIZE", "2"),
    ("PMI_PORT", "host:40321"),
    ("MPI_LOCALRANKID", "1"),
    ("MPI_LOCALNRANKS", "2"),
];

const SLURM: &[Pair] = &[
    ("SLURM_JOB_ID", "77"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "6"),
    ("SLURM_NTASKS", "8"),
    ("SLURM_NPROCS", "8"),
    ("SLURM_STEP_NUM_TASKS", "8"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "2"),
    ("SLURM_NNODES", "4"),
    ("SLURM_STEP_NUM_NODES", "4"),
    ("SLURM_STEP_NODELIST", "n[3-6]"),
    ("SLURM_JOB_NODELIST", "n[1-6]"),
    ("SLURM_STEP_TASKS_PER_NODE", "5,1(x3)"),
    ("SLURM_GTIDS", "6"),
];

#[test]
fn an_empty_environment_is_a_world_of_one() {
    let world = parse(&[]).unwrap();
    assert_eq!(numbers(&world), [0, 1, 0, 1, 0, 1]);
    assert_eq!((world.launcher, world.store_host), (Launcher::Single, StoreHost::ThisRank));
    // Left lying around by other tools, or by a batch script that srun did not start.
    for noise in [
        &[("WORLD_SIZE", "8")][..],
        &[("MASTER_ADDR", "x"), ("MASTER_PORT", "nonsense")],
        &[("SLURM_JOB_ID", "1"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")],
        &[("RANK", "  ")],
    ] {
        assert_eq!(parse(noise).unwrap().launcher, Launcher::Single, "{noise:?}");
    }
}

#[test]
fn our_launcher_says_everything() {
    let world = parse(OWN).unwrap();
    assert_eq!(numbers(&world), [5, 8, 1, 2, 2, 4]);
    assert_eq!(world.store_address(), ("10.0.0.1", 29500));
    assert_eq!((world.run_id.as_str(), world.restart_count), ("a1b2", 3));
    assert_eq!(world.job_token.to_hex(), TOKEN);
    assert_eq!((world.launcher, world.store_host), (Launcher::Phalanx, StoreHost::Elsewhere));
    let rank_0 = with(OWN, &[("RANK", "0"), ("LOCAL_RANK", "0"), ("GROUP_RANK", "0")]);
    assert_eq!(parse(&rank_0).unwrap().store_host, StoreHost::Elsewhere);
}

#[test]
fn by_hand_rank_0_hosts_the_store_and_each_rank_is_a_node_unless_told_otherwise() {
    const HAND: &[Pair] =
        &[("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "m"), ("MASTER_PORT", "4000")];
    let world = parse(HAND).unwrap();
    assert_eq!(numbers(&world), [0, 3, 0, 1, 0, 3]);
    assert_eq!((world.launcher, world.store_host), (Launcher::Manual, StoreHost::ThisRank));
    let other = parse(&with(HAND, &[("RANK", "2")])).unwrap();
    assert_eq!(other.store_host, StoreHost::Elsewhere);
    assert_eq!((other.run_id, other.job_token), (world.run_id, world.job_token));
    let local = with(HAND, &[("RANK", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")]);
    assert_eq!(numbers(&parse(&local).unwrap()), [2, 3, 0, 2, 1, 2]);
}

#[test]
fn under_torchrun_the_agents_store_leads_to_rank_0() {
    let world = parse(TORCHRUN).unwrap();
    assert_eq!(numbers(&world), [0, 4, 0, 2, 0, 2]);
    assert_eq!((world.launcher, world.store_host), (Launcher::Torchrun, StoreHost::Agent));
    assert_eq!(world.store_address(), ("node0", 29500));
    let other = parse(&with(TORCHRUN, &[("RANK", "3")])).unwrap();
    assert_eq!(other.store_host, StoreHost::Agent);
    // Restart counts of different nodes cannot be compared; those of one can. What was exported once would not change.
    assert_eq!(world.restart_count, 0);
    let one_node = with(TORCHRUN, &[("GROUP_WORLD_SIZE", "1"), ("PHALANX_RESTART_COUNT", "7")]);
    assert_eq!(parse(&one_node).unwrap().restart_count, 1);
}

#[test]
fn without_the_agents_store_rank_0_hosts_where_torch_would() {
    // Python's spelling, exactly, as torch compares it.
    for value in ["False", "true", "1", ""] {
        let rank_0 = with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", value)]);
        let world = parse(&rank_0).unwrap();
        assert_eq!((world.store_host, world.master_port), (StoreHost::ThisRank, 29500), "{value}");
        let rank_1 = parse(&with(&rank_0, &[("RANK", "1")])).unwrap();
        assert_eq!(rank_1.store_host, StoreHost::Elsewhere);
    }
    let chosen = parse(&with(TORCHRUN, &[("PHALANX_STORE_PORT", "4000")])).unwrap();
    assert_eq!((chosen.store_host, chosen.master_port), (StoreHost::ThisRank, 4000));
}

#[test]
fn torchrun_jobs_without_an_id_differ_by_their_address() {
    let here = parse(TORCHRUN).unwrap();
    let there = parse(&with(TORCHRUN, &[("MASTER_PORT", "29600")])).unwrap();
    assert_ne!(here.run_id, there.run_id);
    assert_ne!(here.job_token, there.job_token);
    let secret = parse(&with(TORCHRUN, &[("PHALANX_JOB_TOKEN", TOKEN)])).unwrap();
    assert_eq!(secret.job_token.to_hex(), TOKEN);
}

#[test]
fn open_mpi_on_one_machine_meets_on_loopback_at_a_port_of_the_job() {
    let world = parse(OPEN_MPI).unwrap();
    assert_eq!(numbers(&world), [3, 4, 3, 4, 0, 1]);
    assert_eq!(world.launcher, Launcher::OpenMpi);
    assert_eq!(world.store_address(), ("127.0.0.1", derived_port("openmpi-1234567890")));
    let rank_0 =
        with(OPEN_MPI, &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")]);
    let rank_0 = parse(&rank_0).unwrap();
    assert_eq!(rank_0.store_host, StoreHost::ThisRank);
    assert_eq!(rank_0.store_address(), world.store_address());
    assert_eq!(rank_0.job_token, world.job_token);
    let other_job = parse(&with(OPEN_MPI, &[("PMIX_NAMESPACE", "999")])).unwrap();
    assert_ne!(other_job.master_port, world.master_port);
}

#[test]
fn open_mpi_on_several_machines_needs_an_address() {
    let several =
        with(OPEN_MPI, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "2"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")]);
    let text = message(&several);
    assert!(text.contains("set MASTER_ADDR") && text.contains("2 of 4 ranks"), "{text}");
    let told =
        parse(&with(&several, &[("MASTER_ADDR", "node0"), ("MASTER_PORT", "4000")])).unwrap();
    assert_eq!(numbers(&told), [3, 4, 1, 2, 1, 2]);
    assert_eq!(told.store_address(), ("node0", 4000));
}

#[test]
fn hydra_gives_a_place_by_pmi() {
    let world = parse(HYDRA).unwrap();
    assert_eq!(numbers(&world), [1, 2, 1, 2, 0, 1]);
    assert_eq!((world.launcher, world.run_id.as_str()), (Launcher::Pmi, "pmi-host:40321"));
    let text = message(&with(HYDRA, &[("PMI_PORT", "")]));
    assert!(text.contains("PHALANX_RUN_ID"), "{text}");
}

#[test]
fn mpich_names_no_job_so_the_user_does() {
    // As Hydra 4.0 leaves it by default.
    let bare = with(HYDRA, &[("PMI_PORT", ""), ("PMI_FD", "8")]);
    let text = message(&bare);
    assert!(text.contains("-genv PHALANX_RUN_ID"), "{text}");
    let named = parse(&with(&bare, &[("PHALANX_RUN_ID", "job-17")])).unwrap();
    assert_eq!(named.store_address(), ("127.0.0.1", derived_port("job-17")));
    let port = parse(&with(&bare, &[("MASTER_PORT", "4000")])).unwrap();
    assert_eq!(port.store_address(), ("127.0.0.1", 4000));
}

#[test]
fn with_mpi_built_in_ranks_meet_over_it_where_the_launcher_says_too_little() {
    let parse = |variables: &[Pair]| {
        let lookup = |name: &str| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        };
        launchers::world(&Variables::new(&lookup).meeting_over_mpi(true))
    };
    let several =
        with(OPEN_MPI, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "2"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")]);
    let unnamed = with(HYDRA, &[("PMI_PORT", "")]);
    let bare = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
    for (variables, launcher) in
        [(&several[..], Launcher::OpenMpi), (&unnamed, Launcher::Pmi), (&bare, Launcher::Pmi)]
    {
        let world = parse(variables).unwrap();
        assert_eq!((world.store_host, world.launcher), (StoreHost::Mpi, launcher));
    }
    // What is enough without MPI is enough with it.
    for variables in [OPEN_MPI, HYDRA] {
        assert_ne!(parse(variables).unwrap().store_host, StoreHost::Mpi);
    }
    // A horovodrun may well start programs without MPI.
    let horovod = [("HOROVOD_RANK", "0"), ("HOROVOD_SIZE", "2")];
    assert!(parse(&horovod).is_err());
}

#[test]
fn crays_pmi_has_names_of_its_own_for_a_machines_ranks() {
    let local = [("PMI_LOCAL_RANK", "1"), ("PMI_LOCAL_SIZE", "2"), ("PMI_JOBID", "a.17")];
    let nodes = [("PMI_RANK", "5"), ("PMI_SIZE", "8"), ("MASTER_ADDR", "node0")];
    let world = parse(&with(&nodes, &local)).unwrap();
    assert_eq!((numbers(&world), &*world.run_id), ([5, 8, 1, 2, 2, 4], "pmi-a.17"));
}

#[test]
fn mvapich_and_horovod_are_read_by_their_names() {
    const MVAPICH: &[Pair] = &[
        ("MV2_COMM_WORLD_RANK", "2"),
        ("MV2_COMM_WORLD_SIZE", "4"),
        ("MV2_COMM_WORLD_LOCAL_RANK", "0"),
        ("MV2_COMM_WORLD_LOCAL_SIZE", "2"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "4000"),
    ];
    const HOROVOD: &[Pair] = &[
        ("HOROVOD_RANK", "3"),
        ("HOROVOD_SIZE", "4"),
        ("HOROVOD_LOCAL_RANK", "0"),
        ("HOROVOD_LOCAL_SIZE", "1"),
        ("HOROVOD_CROSS_RANK", "1"),
        ("HOROVOD_CROSS_SIZE", "2"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "4000"),
    ];
    let world = parse(MVAPICH).unwrap();
    assert_eq!((world.launcher, numbers(&world)), (Launcher::Mvapich, [2, 4, 0, 2, 1, 2]));
    assert!(message(&with(MVAPICH, &[("MASTER_ADDR", "")])).contains("set MASTER_ADDR"));
    let other = parse(HOROVOD).unwrap();
    assert_eq!((other.launcher, numbers(&other)), (Launcher::Horovod, [3, 4, 0, 1, 1, 2]));
    assert_eq!(other.store_address(), ("node0", 4000));
}

#[test]
fn pmix_alone_does_not_say_how_many_ranks_there_are() {
    let alone = [("PMIX_RANK", "1"), ("PMIX_NAMESPACE", "prterun-1")];
    let text = message(&alone);
    assert!(text.starts_with("WORLD_SIZE is not set") && text.contains("PMIX_RANK"), "{text}");
    // srun --mpi=pmix sets both, and Slurm knows everything.
    let both = parse(&with(SLURM, &[("PMIX_RANK", "6")])).unwrap();
    assert_eq!(both.launcher, Launcher::Slurm);
}

#[test]
fn a_batch_script_and_an_interactive_shell_are_no_steps() {
    for step in ["4294967291", "4294967290"] {
        let world = parse(&with(SLURM, &[("SLURM_STEP_ID", step)])).unwrap();
        assert_eq!(world.launcher, Launcher::Single, "{step}");
    }
}

#[test]
fn a_slurm_step_may_be_uneven_and_meets_on_its_first_node() {
    let world = parse(SLURM).unwrap();
    assert_eq!(numbers(&world), [6, 8, 0, 1, 2, 4]);
    assert_eq!((world.launcher, world.run_id.as_str()), (Launcher::Slurm, "slurm-77.0"));
    assert_eq!(world.store_address(), ("n3", derived_port("slurm-77.0")));
    let by_list = with(
        SLURM,
        &[
            ("SLURM_GTIDS", ""),
            ("SLURM_NODEID", "0"),
            ("SLURM_PROCID", "4"),
            ("SLURM_LOCALID", "4"),
        ],
    );
    assert_eq!(numbers(&parse(&by_list).unwrap()), [4, 8, 4, 5, 0, 4]);
    let other_step = parse(&with(SLURM, &[("SLURM_STEP_ID", "1")])).unwrap();
    assert_ne!(other_step.master_port, world.master_port);
    let told = parse(&with(SLURM, &[("MASTER_ADDR", "10.1.1.1"), ("MASTER_PORT", "5000")]));
    assert_eq!(told.unwrap().store_address(), ("10.1.1.1", 5000));
}

#[test]
fn the_more_specific_launcher_wins() {
    let everything = with(&with(SLURM, OPEN_MPI), &with(HYDRA, OWN));
    assert_eq!(parse(&everything).unwrap().launcher, Launcher::Phalanx);
    // mpirun inside sbatch: every rank inherits the batch step's SLURM_PROCID=0.
    let batch = with(&with(SLURM, &[("SLURM_PROCID", "0")]), OPEN_MPI);
    assert_eq!(parse(&batch).unwrap().launcher, Launcher::OpenMpi);
    let hydra = with(SLURM, HYDRA);
    assert_eq!(parse(&hydra).unwrap().launcher, Launcher::Pmi);
    // srun --mpi=pmi2: both say the same, and Slurm knows the nodes.
    let pmi2 = with(SLURM, &[("PMI_RANK", "6"), ("PMI_SIZE", "8")]);
    assert_eq!(parse(&pmi2).unwrap().launcher, Launcher::Slurm);
    // Ranks from Slurm, address from the user: not by hand, RANK is absent.
    let told = with(SLURM, &[("MASTER_ADDR", "x"), ("WORLD_SIZE", "99")]);
    assert_eq!(numbers(&parse(&told).unwrap()), [6, 8, 0, 1, 2, 4]);
}

#[test]
fn every_absent_variable_is_named() {
    let cases: &[(&[Pair], &[&str])] = &[
        (OWN, &["MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"]),
        (
            OPEN_MPI,
            &[
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
                "PMIX_NAMESPACE",
            ],
        ),
        (HYDRA, &["PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]),
        (SLURM, &["SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"]),
    ];
    for (base, variables) in cases {
        for &variable in *variables {
            let text = message(&with(base, &[(variable, "")]));
            assert!(text.starts_with(&format!("{variable} is not set")), "{text}");
        }
    }
}

#[test]
fn every_wrong_value_is_named_with_what_was_expected() {
    let cases: &[(&[Pair], Pair, &str)] = &[
        (OWN, ("RANK", "-1"), "a whole number"),
        (OWN, ("RANK", "8"), "below WORLD_SIZE=8"),
        (OWN, ("RANK", "99999999999999999999999"), "a whole number"),
        (OWN, ("WORLD_SIZE", "0"), "1 or more"),
        (OWN, ("WORLD_SIZE", "four"), "a whole number"),
        (OWN, ("LOCAL_RANK", "2"), "below LOCAL_WORLD_SIZE=2"),
        (OWN, ("LOCAL_WORLD_SIZE", "9"), "at most WORLD_SIZE=8"),
        (OWN, ("GROUP_RANK", "4"), "below GROUP_WORLD_SIZE=4"),
        (OWN, ("GROUP_WORLD_SIZE", "9"), "at most WORLD_SIZE=8"),
        (OWN, ("MASTER_PORT", "0"), "1 to 65535"),
        (OWN, ("MASTER_PORT", "65536"), "1 to 65535"),
        (OWN, ("PHALANX_RESTART_COUNT", "x"), "a whole number"),
        (OWN, ("PHALANX_AGENT_STORE", "yes"), "0 or 1"),
        (OWN, ("PHALANX_HOST_LINK", "rdma"), "auto, shm or tcp"),
        (TORCHRUN, ("TORCHELASTIC_RESTART_COUNT", "x"), "a whole number"),
        (TORCHRUN, ("PHALANX_STORE_PORT", "0"), "1 to 65535"),
        (OPEN_MPI, ("OMPI_COMM_WORLD_SIZE", "x"), "a whole number"),
        (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "4"), "below OMPI_COMM_WORLD_SIZE=4"),
        (SLURM, ("SLURM_GTIDS", "a,b"), "a list of task numbers"),
        (SLURM, ("SLURM_STEP_NODELIST", "n[3-"), "a node list"),
        (SLURM, ("SLURM_LOCALID", "1"), "below tasks of this node=1"),
        (&[], ("PHALANX_HOST_LINK", "x"), "auto, shm or tcp"),
        (OWN, ("PHALANX_DATA_CHECKS", "1"), "on or off"),
    ];
    for (base, change, expected) in cases {
        let text = message(&with(base, &[*change]));
        assert!(text.starts_with(change.0), "{text}");
        assert!(text.contains(&format!("{:?}", change.1)) || change.1 == "0", "{text}");
        assert!(text.contains(expected), "{text}");
    }
    let text = message(&with(SLURM, &[("SLURM_GTIDS", ""), ("SLURM_STEP_TASKS_PER_NODE", "5")]));
    assert!(text.contains("reaches node 2"), "{text}");
}

#[test]
fn a_wrong_token_is_not_shown() {
    let text = message(&with(OWN, &[("PHALANX_JOB_TOKEN", "hunter2")]));
    assert!(text.contains("7 characters") && text.contains("openssl rand -hex 32"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn jobs_on_one_machine_meet_on_loopback_whatever_the_machine_is_called() {
    let one = with(OWN, &[("GROUP_WORLD_SIZE", "1"), ("GROUP_RANK", "0")]);
    assert_eq!(parse(&one).unwrap().store_address(), ("127.0.0.1", 29500));
}

#[test]
fn the_link_between_ranks_of_a_machine_can_be_chosen() {
    for (value, link) in [("auto", HostLink::Auto), ("shm", HostLink::Shm), ("tcp", HostLink::Tcp)]
    {
        assert_eq!(parse(&with(OWN, &[("PHALANX_HOST_LINK", value)])).unwrap().host_link, link);
        assert_eq!(parse(&[("PHALANX_HOST_LINK", value)]).unwrap().host_link, link);
    }
}

#[test]
fn checks_of_data_can_be_turned_off() {
    for (value, checks) in [("", true), ("on", true), ("off", false)] {
        for base in [OWN, &[]] {
            let given = with(base, &[("PHALANX_DATA_CHECKS", value)]);
            assert_eq!(parse(&given).unwrap().data_checks, checks, "{value}");
        }
    }
}

#[test]
fn derived_ports_are_below_the_range_of_client_ports() {
    for job in 0..2000 {
        let port = derived_port(&format!("slurm-{job}.0"));
        assert!((20_000..32_000).contains(&port), "{port}");
    }
}

proptest! {
    #[test]
    fn no_node_list_makes_the_parser_panic(list in r"[a-c0-9\[\],\-]{0,30}") {
        if let Some(nodes) = expand_nodes(&list) {
            prop_assert!(!nodes.is_empty());
        }
        if let Some(tasks) = expand_tasks(&list) {
            prop_assert!(tasks.iter().all(|&count| count > 0));
        }
    }

    #[test]
    fn a_range_expands_to_its_numbers(prefix in "[a-z]{1,8}", low in 0_usize..500, more in 0_usize..50, width in 1_usize..5) {
        let high = low + more;
        let nodes = expand_nodes(&format!("{prefix}[{low:0width$}-{high:0width$}]")).expect("well-formed");
        prop_assert_eq!(nodes.len(), more + 1);
        for (node, number) in nodes.iter().zip(low..) {
            prop_assert_eq!(node, &format!("{prefix}{number:0width$}"));
        }
    }

    #[test]
    fn no_environment_makes_the_parser_panic(values in prop::collection::vec("[0-9a-z\\[\\],.-]{0,6}", SLURM.len())) {
        let lookup = |name: &str| {
            let at = SLURM.iter().position(|(other, _)| *other == name)?;
            Some(values[at].clone())
        };
        if let Ok(world) = World::from_lookup(&lookup) {
            prop_assert!(world.rank < world.world_size);
            prop_assert!(world.local_rank < world.local_world_size);
        }
    }
}
