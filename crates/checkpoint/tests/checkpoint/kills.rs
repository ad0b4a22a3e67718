//! A program that is killed while it saves, again and again, and goes on each time.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};

use phalanx_checkpoint::{Alone, Folder, Saver, SaverOptions};

use crate::support::{check, save, LONG};

/// Where the program saves.
const FOLDER: &str = "CHECKPOINTS_OF_A_TEST";

#[test]
#[ignore = "the program that the other test kills"]
fn program() {
    let folder = std::env::var_os(FOLDER).expect("started by the other test");
    let mut step = 0;
    if let Some(newest) = Folder::new(&folder).newest().unwrap() {
        step = newest.step();
        check(&newest, step);
    }
    let mut saver = Saver::new(&folder, SaverOptions::default()).unwrap();
    // It is killed long before.
    for _ in 0..100_000 {
        step += 1;
        save(&mut saver, &mut Alone, step);
        println!("\nsaved {step}");
    }
}

/// A program that is running, and the steps that it says it has saved.
struct Program {
    child: Child,
    saved: Receiver<u64>,
}

impl Program {
    fn start(folder: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--ignored", "--exact", "kills::program", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the program");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (told, saved) = channel();
        std::thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            let steps = lines.filter_map(|line| line.strip_prefix("saved ")?.parse().ok());
            steps.into_iter().try_for_each(|step| told.send(step))
        });
        Program { child, saved }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_program_killed_at_any_moment_finds_what_it_had_saved_last() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..25 {
        let program = Program::start(folder.path());
        for _ in 0..=round % 3 {
            let step = program.saved.recv_timeout(LONG).expect("it saves");
            assert!(step > last, "{step} after {last}");
            last = step;
        }
        // Somewhere in the next save.
        (0..round * 997).for_each(|_| std::hint::spin_loop());
        drop(program);
        let newest = Folder::new(folder.path()).newest().unwrap().unwrap();
        assert!(newest.step() >= last, "{} of {last}", newest.step());
        check(&newest, newest.step());
        assert!(newest.verify().damage.is_empty());
    }
}
