//! The whole of data-parallel training: `cargo run --release --example minimal -- --nnodes 4`
#![expect(clippy::print_stdout, reason = "a program talks to its user")]
use std::process::ExitCode;

use clap::Parser;
use phalanx::launch::{launch_or_join, Joined, LaunchArgs};
use phalanx::tch::{self, nn, nn::Module, nn::OptimizerConfig, Device, Kind, Tensor};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    launch: LaunchArgs,
}

fn main() -> anyhow::Result<ExitCode> {
    if let Joined::Finished(report) = launch_or_join(&Flags::parse().launch)? {
        return Ok(report.exit_code()); // this was the launcher; from here on we are a rank
    }
    let mut group = Group::from_environment(GroupOptions::default())?;
    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::seq()
        .add(nn::linear(vs.root() / "hidden", 16, 64, Default::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(vs.root() / "output", 64, 1, Default::default()));
    let _ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?; // this line makes it parallel
    let mut opt = nn::AdamW::default().build(&vs, 1e-2)?;

    tch::manual_seed(i64::try_from(group.rank())?); // samples of its own for each rank
    for step in 1..=100 {
        let x = Tensor::randn([32, 16], (Kind::Float, Device::Cpu));
        let target = x.square().mean_dim(1, true, Kind::Float);
        let loss = net.forward(&x).mse_loss(&target, tch::Reduction::Mean);
        opt.backward_step(&loss); // gradients are averaged over the ranks in here
        if group.rank() == 0 && step % 20 == 0 {
            println!("step {step}: loss {:.4}", loss.double_value(&[]));
        }
    }
    Ok(ExitCode::SUCCESS)
}
