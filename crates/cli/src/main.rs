//! The `phalanx` command. What it does stands in the crates; here are flags, reports and exit codes.

#![expect(clippy::print_stderr, reason = "a program talks to its user")]

mod checkpoint;
mod data;
mod failure;
mod flight;
mod launch;
mod report;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Data-parallel training for Rust: launcher and tools.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Training data: convert text and arrays, look at what is there, check it, time the loader.
    #[command(subcommand)]
    Data(data::Command),
    /// Where each rank of a job was: lines up the flight records that the ranks left in a folder.
    Flight(flight::FlightArgs),
    /// Checkpoints: look at what is there, check it, convert it to weights and back, compare two.
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Starts a program as the ranks of a job, on this machine or as one of several nodes, watches them, starts them again.
    Launch(launch::LaunchCommand),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(explanation) => {
            // A closed output is no reason to fail: who asked for help has gone.
            drop(explanation.print());
            let wrong = explanation.use_stderr();
            return ExitCode::from(if wrong { failure::USAGE } else { 0 });
        }
    };
    let done = match cli.command {
        Command::Data(command) => data::run(&command),
        Command::Flight(args) => flight::run(&args),
        Command::Checkpoint(command) => checkpoint::run(&command),
        Command::Launch(args) => launch::run(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {}", failure::message(&error));
        ExitCode::from(failure::exit_code(&error))
    })
}
