//! The GPT example with experts: on every mesh losses, weights and tokens are those of one process.

#![expect(clippy::print_stdout, reason = "how close the numbers are is worth seeing")]
#![expect(clippy::float_cmp, reason = "the same bits")]

#[path = "../examples/gpt/mod.rs"]
#[expect(dead_code, reason = "the tests use a part of the example")]
mod gpt;
#[path = "gpt/training.rs"]
#[expect(dead_code, reason = "the tests use a part of it")]
mod training;

use gpt::config::Config;
use training::{apart, config, Job, Trained};

/// Four blocks, so that there may be four stages; heads, tokens and experts that three and four ranks divide. Every sample is a micro-batch of its own on every mesh, so that
/// the balance of experts, which is of a micro-batch, is the same.
const MIXTRAL: &str = r#""model": { "model_type": "mixtral", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 24,
    "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 24,
    "initializer_range": 0.1, "resid_pdrop": 0.1, "attention_dropout": 0.1, "num_local_experts": 12, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05 }"#;
const OPTIMIZER: &str = r#""optimizer": { "lr": 5e-3, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "schedule": "constant",
    "max_grad_norm": 0.5 }"#;
const STEPS: u64 = 3;
const SAMPLES: usize = 12;

/// Sizes of dp, tp, pp, cp and ep.
type Sizes = [usize; 5];

fn base() -> Config {
    let mut config = config(&format!("{{ {MIXTRAL}, {OPTIMIZER} }}"));
    config.train.steps = STEPS;
    config
}

fn job(config: Config, dp: usize) -> Job {
    Job {
        config,
        global_batch: SAMPLES,
        micro_batches: SAMPLES / dp,
        new_tokens: 4,
        prompts: vec![vec![7, 60]],
        ..Job::default()
    }
}

/// All meshes of so many ranks, with every number of parts of the experts.
fn meshes(ranks: usize) -> Vec<Sizes> {
    let mut all = Vec::new();
    for dp in 1..=ranks {
        for tp in 1..=ranks / dp {
            for pp in 1..=ranks / dp / tp {
                let cp = ranks / dp / tp / pp;
                if dp * tp * pp * cp == ranks {
                    let divisors = (1..=dp * cp).filter(|ep| (dp * cp).is_multiple_of(*ep));
                    all.extend(divisors.map(|ep| [dp, tp, pp, cp, ep]));
                }
            }
        }
    }
    all
}

fn on_mesh([dp, tp, pp, cp, ep]: Sizes) -> Config {
    let mut config = base();
    config.mesh.dp = Some(dp);
    (config.mesh.tp, config.mesh.pp, config.mesh.cp, config.mesh.ep) = (tp, pp, cp, ep);
    config
}

/// As in `gpt_mesh`; experts that a token takes are far enough before the next that roundings choose no others.
fn check(config: Config, one: &Trained) {
    let mesh = config.mesh.clone();
    let dp = mesh.dp.unwrap_or(1);
    let what = format!("{mesh:?}, zero {}", config.ddp.zero);
    let trained = job(config, dp).run(dp * mesh.tp * mesh.pp * mesh.cp);
    for (ours, theirs) in trained.losses.iter().zip(&one.losses) {
        let error = (ours - theirs).abs() / theirs;
        assert!(error < 1e-5, "{what}: losses {:?} and {:?}", trained.losses, one.losses);
    }
    for (ours, theirs) in trained.norms.iter().zip(&one.norms) {
        let error = (ours - theirs).abs() / theirs;
        assert!(error < 1e-4, "{what}: norms {:?} and {:?}", trained.norms, one.norms);
    }
    let (worst, at) = apart(&trained.weights, &one.weights);
    println!("{what}: weights within {worst:.1e} ({at})");
    assert!(worst < 1e-4, "{what}: {at} is off by {worst:.1e}");
    assert_eq!(trained.greedy, one.greedy, "{what}");
}

#[test]
fn meshes_of_up_to_four_ranks_train_experts_as_one_process_does() {
    let one = job(base(), 1).run(1);
    let schedules = ["1f1b", "zb-h1", "gpipe"];
    for (number, sizes) in (2..=4).flat_map(meshes).enumerate() {
        let mut config = on_mesh(sizes);
        config.mesh.sequence_parallel = number % 2 == 0;
        config.mesh.schedule = schedules[number % schedules.len()].into();
        config.ddp.zero = [0, 1, 3][number % 3];
        check(config, &one);
    }
}

#[test]
fn experts_over_two_ranks_train_in_every_stage_of_zero_recomputed_and_interleaved() {
    let one = job(base(), 1).run(1);
    for sizes in [[4, 1, 1, 1, 2], [2, 2, 1, 1, 2], [2, 1, 2, 1, 2]] {
        for zero in [0, 1, 2, 3] {
            let mut config = on_mesh(sizes);
            config.ddp.zero = zero;
            config.train.recompute = zero == 1;
            if sizes[2] > 1 && zero > 1 {
                config.mesh.schedule = "interleaved:2".into();
            }
            check(config, &one);
        }
    }
}

/// The exchange of gradients waits for those of the tied table, and so does that of experts.
#[test]
fn a_tied_head_on_two_stages_trains_with_experts_on_two_ranks() {
    let tied = |mut config: Config| {
        config.model.tie_word_embeddings = Some(true);
        config
    };
    let one = job(tied(base()), 1).run(1);
    check(tied(on_mesh([2, 1, 2, 1, 2])), &one);
}

fn hooked(sizes: Sizes, hook: &str) -> Config {
    let mut config = on_mesh(sizes);
    config.ddp.hook = hook.parse().expect("a hook");
    config
}

/// Hooks that leave nothing out are the plain exchange but for the order of sums, also where experts' gradients are divided by the weights of more ranks than exchange them.
#[test]
fn hooks_that_lose_nothing_train_experts_as_one_process_does() {
    let one = job(base(), 1).run(1);
    for sizes in
        [[4, 1, 1, 1, 2], [4, 1, 1, 1, 4], [2, 2, 1, 1, 2], [2, 1, 2, 1, 1], [1, 1, 1, 4, 2]]
    {
        for hook in ["topk:1", "powersgd:2:100"] {
            check(hooked(sizes, hook), &one);
        }
    }
}

/// The first loss is of the first weights, and so the plain one; what comes after is the hook's own, the same every time.
#[test]
fn hooks_that_lose_something_train_experts_the_same_way_every_time() {
    let one = job(base(), 1).run(1);
    for hook in ["bf16", "fp16", "int8", "topk:0.1", "powersgd:2:0"] {
        let job = job(hooked([4, 1, 1, 1, 2], hook), 4);
        let (first, second) = (job.run(4), job.run(4));
        assert_eq!(first.losses, second.losses, "{hook}");
        assert_eq!(apart(&first.weights, &second.weights).0, 0.0, "{hook}");
        let error = (first.losses[0] - one.losses[0]).abs() / one.losses[0];
        assert!(error < 1e-5, "{hook}: losses {:?} and {:?}", first.losses, one.losses);
        assert!(first.losses[1..] != one.losses[1..], "{hook} loses nothing");
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    let job = job(on_mesh([2, 1, 2, 1, 2]), 2);
    let (first, second) = (job.run(4), job.run(4));
    assert_eq!(first.losses, second.losses);
    assert_eq!(apart(&first.weights, &second.weights).0, 0.0);
}
