//! Running the program, and data to run it on.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use phalanx_data::convert::{prepare, PrepareOptions};
use phalanx_data::progress::Silent;

/// No command of these tests takes as long on any machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Output {
    /// The output of a command that went well.
    pub(crate) fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{}\n{}", self.out, self.err);
        self.out
    }

    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.good()).expect("one JSON object")
    }
}

/// A started command; killed when the test lets go of it.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(args: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_phalanx"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the command");
        Running(child)
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("ask for the status").is_some()
    }

    pub(crate) fn finish(mut self) -> Output {
        let mut out = self.0.stdout.take().expect("piped");
        let mut err = self.0.stderr.take().expect("piped");
        let read = |pipe: &mut dyn Read| {
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes).expect("read the output");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (out, err) = std::thread::scope(|scope| {
            let errors = scope.spawn(|| read(&mut err));
            let out = scope.spawn(|| read(&mut out));
            let deadline = Instant::now() + LONG;
            while !self.has_ended() {
                if Instant::now() > deadline {
                    // Ends both pipes, so that the threads come back.
                    drop(self.0.kill());
                    drop(self.0.wait());
                    panic!("the command took longer than {LONG:?}");
                }
                std::thread::park_timeout(Duration::from_millis(2));
            }
            (out.join().expect("the output"), errors.join().expect("the errors"))
        });
        let code = self.0.wait().expect("the status").code();
        Output { code, out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

pub(crate) fn phalanx(args: &[&str]) -> Output {
    Running::start(args).finish()
}

/// A command that ends with `code` and says `part` in its message.
pub(crate) fn refused(args: &[&str], code: i32, part: &str) {
    let ended = phalanx(args);
    assert_eq!(ended.code, Some(code), "{args:?}: {ended:?}");
    assert!(ended.err.contains(part), "{args:?}: `{part}` in: {}", ended.err);
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// Lines of varied words, the same on every run; `number` makes files differ.
pub(crate) fn lines(number: usize, count: usize) -> String {
    let nouns = ["king", "queen", "sword", "castle", "river", "winter", "messenger", "crown"];
    let verbs = ["loves", "breaks", "remembers", "carries", "crosses", "forgets"];
    let mut text = String::new();
    for line in 0..count {
        let n = number * 31 + line * 7;
        let (a, b) = (nouns[n % 8], nouns[(n / 3 + line) % 8]);
        text.push_str(&format!("The {a} {} the {b}, scene {n}.\n", verbs[(n / 5) % 6]));
    }
    text
}

/// A prepared folder of some hundred thousand tokens in several shards.
pub(crate) fn prepared(folder: &Path) -> PathBuf {
    for file in 0..4 {
        let path = folder.join(format!("play-{file}.txt"));
        std::fs::write(path, lines(file, 12_000)).expect("write a text");
    }
    let options =
        PrepareOptions { vocab_size: 512, shard_bytes: 400_000, ..PrepareOptions::default() };
    prepare(folder, &options, &Silent).expect("prepare the text").folder
}

/// Flips a bit of a file.
pub(crate) fn damage(path: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read a byte");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("write a byte");
}

/// All files of a folder.
pub(crate) fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(folder)
        .expect("list the folder")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).expect("read a file"))
        })
        .collect()
}

/// Starts a conversion, kills it (`SIGKILL`) when it has finished at least two shards; says whether it came in time.
pub(crate) fn kill_in_the_middle(args: &[&str], journal: &Path) -> bool {
    let mut running = Running::start(args);
    let deadline = Instant::now() + LONG;
    loop {
        let shards = std::fs::read_to_string(journal).map_or(0, |text| text.lines().count());
        if shards > 2 {
            break;
        }
        if running.has_ended() {
            return false;
        }
        assert!(Instant::now() < deadline, "it never finished a shard");
        std::thread::park_timeout(Duration::from_micros(200));
    }
    drop(running);
    true
}
