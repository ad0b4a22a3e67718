//! `minimal.rs` that survives: `cargo run --release --example resumable -- --nnodes 4 --max-restarts 3`
//!
//! Kill a rank: it is started again, and the others go on with it where the last checkpoint was. Press Ctrl-C, start it again, and it goes on.
#![expect(clippy::print_stdout, reason = "a program talks to its user")]
use std::process::ExitCode;

use clap::Parser;
use phalanx::checkpoint::{Checkpointer, CheckpointerOptions, Next};
use phalanx::launch::{each_generation, launch_or_join, Joined, LaunchArgs};
use phalanx::optim::{AdamW, Optimizer, ParameterGroups};
use phalanx::tch::{self, nn, nn::Module, Device, Kind, Tensor};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions};

#[derive(Parser)]
struct Flags {
    /// Folder of checkpoints.
    #[arg(long, default_value = "runs/resumable")]
    checkpoint: std::path::PathBuf,
    #[command(flatten)]
    launch: LaunchArgs,
}

fn main() -> anyhow::Result<ExitCode> {
    let flags = Flags::parse();
    match launch_or_join(&flags.launch)? {
        Joined::Finished(report) => Ok(report.exit_code()),
        Joined::Worker => each_generation(|| train(&flags)),
    }
}

/// What a rank does, in each generation from the newest checkpoint on.
fn train(flags: &Flags) -> anyhow::Result<ExitCode> {
    let mut group = Group::from_environment(GroupOptions::default())?;
    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::seq()
        .add(nn::linear(vs.root() / "hidden", 16, 64, Default::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(vs.root() / "output", 64, 1, Default::default()));
    let ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
    let rule = AdamW { lr: 1e-2, ..AdamW::default() };
    let mut optimizer = Optimizer::new(&ddp, rule, ParameterGroups::default())?;
    tch::manual_seed(i64::try_from(group.rank())?); // comes back with a checkpoint, like everything else

    let every = CheckpointerOptions { every_steps: 20, ..Default::default() };
    let mut checkpointer = Checkpointer::new(&flags.checkpoint, &ddp, every)?;
    let done = checkpointer.resume(Some(&mut optimizer))?.map_or(0, |resumed| resumed.step);
    for step in done + 1..=100 {
        let x = Tensor::randn([32, 16], (Kind::Float, Device::Cpu));
        let target = x.square().mean_dim(1, true, Kind::Float);
        let loss = net.forward(&x).mse_loss(&target, tch::Reduction::Mean);
        loss.f_backward()?;
        optimizer.step(None)?;
        if group.rank() == 0 && step % 20 == 0 {
            println!("step {step}: loss {:.6}", loss.double_value(&[]));
        }
        if let Next::Stop { signal } = checkpointer.step(step, Some(&mut optimizer), || ())? {
            return Ok(ExitCode::from(128 + u8::try_from(signal)?)); // saved
        }
    }
    checkpointer.finish()?;
    Ok(ExitCode::SUCCESS)
}
