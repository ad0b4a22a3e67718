//! Data on a web server: a real one, of this test, on loopback.
#![expect(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test; a thread's handle has the name of what it is a handle of"
)]

mod kept;
mod server;
mod together;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter, Tokens};
use phalanx_data::source::{Folder, HttpFolder, HttpOptions};
use phalanx_data::{Access, Error};
use server::{Answer, Server};

fn prepared() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("tokens");
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(&target, b"{}", 60_000, special, 1 << 20).unwrap();
    for document in 0..1000 {
        let tokens: Vec<u32> = (0..1500).map(|at| 257 + (document * 77 + at) % 50_000).collect();
        writer.tokens(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(0).unwrap();
    (folder, target)
}

const LONG: Duration = Duration::from_secs(60);
/// An attempt where the server stays silent: others that it cuts off are made again.
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn tokens_are_those_of_the_local_folder_over_one_connection() {
    let (_keep, target) = prepared();
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    // An answer that comes late on a busy machine is waited for: another attempt is another connection.
    let patient = HttpOptions { timeout: LONG, attempt_timeout: LONG, ..Default::default() };
    let folder = HttpFolder::new(&format!("http://{}/data/", server.address), patient).unwrap();
    let far = TokenStream::open_from(&folder).unwrap();
    let near = TokenStream::open(&target, Access::Read).unwrap();
    assert_eq!(far.index(), near.index());
    let (mut a, mut b, mut scratch) = ([0; 700], [0; 700], Scratch::default());
    for start in (0..far.token_count() - 700).step_by(9973) {
        far.read(start, &mut a, &mut scratch, &"a sample").unwrap();
        near.read(start, &mut b, &mut scratch, &"a sample").unwrap();
        assert_eq!(a, b);
    }
    far.verify().unwrap();
    assert!(server.requests.load(Ordering::SeqCst) > 100);
    assert_eq!(server.connections.load(Ordering::SeqCst), 1, "the connection is kept");
}

#[test]
fn what_fails_for_the_moment_is_asked_for_again() {
    let (_keep, target) = prepared();
    let bad = [Answer::Status(503), Answer::Cut, Answer::Close, Answer::Silence, Answer::Garbage];
    // Every second request of a file fails, in all ways in turn.
    let server = Server::start(target.clone(), move |number, _| {
        if number % 2 == 0 {
            bad[number / 2 % bad.len()]
        } else {
            Answer::Good
        }
    });
    let far = TokenStream::open_from(&server.folder_of_attempts(LONG, SHORT)).unwrap();
    far.verify().unwrap();
    assert!(server.requests.load(Ordering::SeqCst) > 10);
}

#[test]
fn a_cut_answer_goes_on_from_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..100_000_u32).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    std::fs::write(folder.path().join("f"), &content).unwrap();
    let server = Server::start(folder.path().to_path_buf(), |number, _| {
        if (1..5).contains(&number) {
            Answer::Cut
        } else {
            Answer::Good
        }
    });
    let file = server.folder(LONG).open("f").unwrap();
    let mut out = vec![0; content.len()];
    file.read_at(0, &mut out).unwrap();
    assert_eq!(out, content);
    assert!(file.read_at(99_999, &mut [0; 2]).is_err(), "behind the end");
}

#[test]
fn a_server_that_stays_silent_is_an_error_at_the_deadline() {
    let (_keep, target) = prepared();
    let server =
        Server::start(target, |number, _| if number > 3 { Answer::Silence } else { Answer::Good });
    let folder = server.folder_of_attempts(Duration::from_secs(2), SHORT);
    let error = TokenStream::open_from(&folder).unwrap_err();
    assert!(matches!(&error, Error::Http { reason, .. } if reason.contains("attempts")), "{error}");
}

#[test]
fn a_file_that_changes_on_the_server_is_an_error() {
    let (_keep, target) = prepared();
    let is_new = Arc::new(Mutex::new(false));
    let changed = Arc::clone(&is_new);
    let server = Server::start(target, move |_, _| {
        if *changed.lock().unwrap() {
            Answer::Etag("\"2\"")
        } else {
            Answer::Good
        }
    });
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    *is_new.lock().unwrap() = true;
    let error = far.verify().unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
}

#[test]
fn what_will_not_get_better_is_asked_for_once() {
    let (_keep, target) = prepared();
    let cases = [
        (Answer::Whole, "range requests"),
        (Answer::Status(403), "403"),
        (Answer::WrongRange, "it sent bytes"),
    ];
    for (answer, text) in cases {
        let server = Server::start(target.clone(), move |_, _| answer);
        let error = TokenStream::open_from(&server.folder(LONG)).unwrap_err();
        assert!(matches!(error, Error::Http { .. }), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1, "{error}");
    }
    let server = Server::start(target, |_, _| Answer::Good);
    let error = server.folder(LONG).open("absent file").unwrap_err();
    assert!(
        error.to_string().contains("absent%20file") && error.to_string().contains("404"),
        "{error}"
    );
    assert!(HttpFolder::new("ftp://a/b", HttpOptions::default()).is_err());
}

#[test]
fn an_empty_file_has_no_bytes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("f"), b"").unwrap();
    let server = Server::start(folder.path().to_path_buf(), |_, _| Answer::Good);
    let file = server.folder(LONG).open("f").unwrap();
    assert_eq!(file.size(), 0);
    file.read_at(0, &mut []).unwrap();
}

#[test]
fn a_list_of_damage_is_found_on_a_server_and_its_absence_told_from_other_answers() {
    let (_keep, target) = prepared();
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    assert!(server.folder(LONG).find("damage.json").unwrap().is_none());
    assert!(TokenStream::open_from(&server.folder(LONG)).unwrap().damaged().is_empty());
    let fingerprint = phalanx_data::format::TokenIndex::read(&target).unwrap().fingerprint;
    let list = format!(
        r#"{{"format": "phalanx-damage", "version": 1, "fingerprint": "{fingerprint}",
            "blocks": [{{"file": "tokens-00000.safetensors", "block": 0}}]}}"#
    );
    std::fs::write(target.join("damage.json"), list).unwrap();
    assert_eq!(TokenStream::open_from(&server.folder(LONG)).unwrap().damaged().len(), 1);

    let server = Server::start(target.clone(), |_, name| {
        if name == "damage.json" {
            Answer::Status(403)
        } else {
            Answer::Good
        }
    });
    let error = TokenStream::open_from(&server.folder(LONG)).unwrap_err();
    assert!(matches!(error, Error::Http { .. }), "{error}");
    assert!(error.to_string().contains("list the folder"), "{error}");

    // A file that is taken away while it is read: not found, and named with what was read.
    let server = Server::start(target.clone(), |_, _| Answer::Good);
    let far = TokenStream::open_from(&server.folder(LONG)).unwrap();
    std::fs::remove_file(target.join("tokens-00000.safetensors")).unwrap();
    let error = far.read(9, &mut [0; 8], &mut Scratch::default(), &"sample 3").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("cannot read sample 3 at offset 4114 of "), "{text}");
    assert!(text.contains("404"), "{text}");
}
