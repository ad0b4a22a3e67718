//! What tensor parallelism costs: a step of two ranks with a thread each beside a step of one rank with two threads, in turns in one run.
//!
//! ```text
//! cargo bench -p phalanx-model-parallel --bench tensor -- [--rounds 10] [--blocks 4] [--vocabulary 50257] [--sequence]
//! ```
//!
//! A GPT of 768 columns and 12 heads, of a batch of 4 × 128 tokens: forward, backward, no optimizer. Three processes: rank 0 has the whole model, ranks 1
//! and 2 have half of it each; who has no turn waits in a barrier. A step is done when the slower rank is. The losses and gradients' norms of both are compared in the
//! same run.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{ensure, Context as _, Result};
use phalanx_comm::{Group, GroupOptions, Max, Work};
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_launch::{LaunchOptions, Prefix};
use phalanx_model_parallel::layer::{Builder, Init, Pass};
use phalanx_model_parallel::tensor::{
    cross_entropy, Attention, AttentionOptions, ColumnLinear, Gelu, LayerNorm, LinearOptions, Mlp,
    PositionEmbedding, Projections, RowLinear, TensorParallel, VocabEmbedding,
};
use tch::{nn, Device, Kind, Tensor};

const WIDTH: i64 = 768;
const HEADS: i64 = 12;
const BATCH: i64 = 4;
const TOKENS: i64 = 128;
const INIT: Init = Init::Normal { std: 0.02 };

fn main() -> Result<ExitCode> {
    let flags = Flags::read()?;
    if phalanx_launch::is_worker() {
        return measure(&flags).map(|()| ExitCode::SUCCESS);
    }
    let options = LaunchOptions {
        nproc_per_node: 3,
        threads: Some(1),
        prefix: Prefix::Off,
        ..LaunchOptions::default()
    };
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    Ok(phalanx_launch::run(&options, &std::env::current_exe()?, &args)?.exit_code())
}

/// What is measured.
#[derive(Clone, Copy)]
struct Flags {
    rounds: usize,
    blocks: i64,
    vocabulary: i64,
    sequence: bool,
}

impl Flags {
    fn read() -> Result<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let number = |name: &str, default: i64| {
            let at = args.iter().position(|arg| arg == name);
            let text = at.and_then(|at| args.get(at + 1));
            text.map_or(Ok(default), |text| text.parse()).context(name.to_owned())
        };
        // `cargo bench` passes `--bench`; `cargo test --benches` passes nothing and gets a small run.
        let is_test = !args.iter().any(|arg| arg == "--bench");
        let (rounds, blocks, words) = if is_test { (1, 1, 1000) } else { (10, 4, 50_257) };
        Ok(Self {
            rounds: usize::try_from(number("--rounds", rounds)?)?,
            blocks: number("--blocks", blocks)?,
            vocabulary: number("--vocabulary", words)?,
            sequence: args.iter().any(|arg| arg == "--sequence"),
        })
    }
}

struct Block {
    norms: [LayerNorm; 2],
    attention: Attention,
    mlp: Mlp,
}

struct Gpt {
    vs: nn::VarStore,
    words: VocabEmbedding,
    positions: PositionEmbedding,
    blocks: Vec<Block>,
    last: LayerNorm,
    tp: TensorParallel,
}

impl Block {
    fn new(h: &Builder<'_>, tp: &TensorParallel) -> phalanx_model_parallel::Result<Self> {
        let norm = |name: &str| LayerNorm::new(&(h / name), WIDTH, 1e-5, tp);
        let linear = LinearOptions { transposed: true, ..LinearOptions::default() };
        let options = AttentionOptions::new(WIDTH, HEADS);
        let all =
            LinearOptions { parts: options.parts(), unit: options.head_dim, ..linear.clone() };
        let all = ColumnLinear::new(&(h / "c_attn"), WIDTH, 3 * WIDTH, all, tp)?;
        let out = RowLinear::new(&(h / "attn"), WIDTH, WIDTH, linear.clone(), tp)?;
        let up = ColumnLinear::new(&(h / "c_fc"), WIDTH, 4 * WIDTH, linear.clone(), tp)?;
        let down = RowLinear::new(&(h / "c_proj"), 4 * WIDTH, WIDTH, linear, tp)?;
        Ok(Self {
            norms: [norm("ln_1")?, norm("ln_2")?],
            attention: Attention::new(Projections::Fused(all), out, options)?,
            mlp: Mlp::new(up, down, Gelu::Tanh)?,
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let y = self.attention.forward(&self.norms[0].forward(x)?, pass)?;
        let x = x.f_add(&y)?;
        Ok(x.f_add(&self.mlp.forward(&self.norms[1].forward(&x)?)?)?)
    }
}

impl Gpt {
    fn new(flags: &Flags, tp: TensorParallel) -> Result<Self> {
        let vs = nn::VarStore::new(Device::Cpu);
        let root = Builder::new(vs.root(), 1);
        let words = VocabEmbedding::new(&(&root / "wte"), flags.vocabulary, WIDTH, INIT, &tp)?;
        let positions = PositionEmbedding::new(&(&root / "wpe"), TOKENS, WIDTH, INIT, &tp)?;
        let block = |at: i64| Block::new(&(&root / "h" / at), &tp);
        let blocks = (0..flags.blocks).map(block).collect::<phalanx_model_parallel::Result<_>>()?;
        let last = LayerNorm::new(&(&root / "ln_f"), WIDTH, 1e-5, &tp)?;
        Ok(Self { vs, words, positions, blocks, last, tp })
    }

    /// The loss of a step, whose gradients are left in the variables.
    fn step(&self, ids: &Tensor) -> Result<f64> {
        for (_, variable) in self.vs.variables() {
            let mut gradient = variable.grad();
            if gradient.defined() {
                drop(gradient.f_zero_()?);
            }
        }
        let pass = Pass::training(0, 0);
        let mut x = self.words.forward(ids)?.f_add(&self.positions.forward(TOKENS, &pass)?)?;
        for block in &self.blocks {
            x = block.forward(&x, &pass)?;
        }
        let hidden = self.last.forward(&x)?;
        let loss = cross_entropy(&hidden, self.words.weight(), ids, &self.tp)?;
        loss.f_mean(Kind::Float)?.f_backward()?;
        Ok(loss.f_double_value(&[])?)
    }
}

fn measure(flags: &Flags) -> Result<()> {
    let mut world = Group::from_environment(GroupOptions::default())?;
    let alone = world.rank() == 0;
    let group = world.split(Some(u32::from(!alone)), 0)?.context("every rank has a group")?;
    let sequence = flags.sequence && !alone;
    tch::set_num_threads(if alone { 2 } else { 1 });
    let gpt = Gpt::new(flags, TensorParallel { group: TensorGroup::new(group), sequence })?;
    let places = Tensor::f_arange(BATCH * TOKENS, (Kind::Int64, Device::Cpu))?;
    let ids = places.f_mul_scalar(7919)?.f_remainder(flags.vocabulary)?.f_view([BATCH, TOKENS])?;
    let (mut ones, mut twos, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..flags.rounds + 2 {
        // Both in one round, in this order and the other: what the machine does besides meets both.
        let (one, two) = if round % 2 == 0 {
            let one = turn(&mut world, alone, &gpt, &ids)?;
            (one, turn(&mut world, !alone, &gpt, &ids)?)
        } else {
            let two = turn(&mut world, !alone, &gpt, &ids)?;
            (turn(&mut world, alone, &gpt, &ids)?, two)
        };
        let (loss, other) = (one.1, two.1);
        // Sums of so many terms in single precision, at the size of the loss.
        ensure!((loss - other).abs() < 1e-3 * loss.abs(), "losses {loss} and {other}");
        // Allocators and caches are warm after two rounds.
        if round >= 2 {
            ones.push(one.0);
            twos.push(two.0);
            ratios.push(two.0 / one.0);
        }
    }
    if alone {
        println!("ranks × threads  median ms  least ms");
        println!("1 × 2            {:9.1}  {:8.1}", 1e3 * median(&mut ones), 1e3 * ones[0]);
        println!("2 × 1            {:9.1}  {:8.1}", 1e3 * median(&mut twos), 1e3 * twos[0]);
        println!("ratio            {:9.3}  {:8.3}", median(&mut ratios), twos[0] / ones[0]);
    }
    Ok(())
}

/// Seconds of a step of those whose turn it is, and its loss.
fn turn(world: &mut Group, is_mine: bool, gpt: &Gpt, ids: &Tensor) -> Result<(f64, f64)> {
    world.barrier()?.wait()?;
    let (mut seconds, mut loss) = (0.0, 0.0);
    if is_mine {
        let start = Instant::now();
        loss = gpt.step(ids)?;
        seconds = start.elapsed().as_secs_f64();
    }
    let mut told = [seconds, loss];
    world.all_reduce(&mut told[..], Max).and_then(Work::wait)?;
    Ok((told[0], told[1]))
}

/// The middle one; sorts them.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
