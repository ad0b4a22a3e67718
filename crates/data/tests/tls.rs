//! Data of a server that speaks TLS: a real one, of this test, on loopback, with certificates that are made here.
#![expect(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test; each server has its own text"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use phalanx_data::batches::Scratch;
use phalanx_data::format::{SpecialTokens, TokenStream, TokenWriter, Tokens};
use phalanx_data::source::{CachedFolder, HttpFolder, HttpOptions};
use phalanx_data::{Access, Error};
use rcgen::{date_time_ymd, BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// An authority of our own.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut about = CertificateParams::new(Vec::<String>::new()).unwrap();
        about.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = about.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(about, key) }
    }

    /// A server's side of TLS, for `name` and until `year`.
    fn server(&self, name: &str, year: i32) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let mut about = CertificateParams::new(vec![name.to_owned()]).unwrap();
        about.not_after = date_time_ymd(year, 1, 1);
        let certificate = about.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = vec![CertificateDer::from(certificate.der().to_vec())];
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap())
    }
}

struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves the files of a folder. Without `tls` it speaks HTTP alone, and answers what is none as web servers do.
    fn start(folder: PathBuf, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, is_over) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (count, over) = (Arc::clone(&connections), Arc::clone(&is_over));
        let accepting = std::thread::spawn(move || {
            let mut serving = Vec::new();
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let (folder, tls) = (folder.clone(), tls.clone());
                serving.push(std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    drop(match tls {
                        None => stream.read(&mut [0; 1000]).and_then(|_| {
                            stream
                                .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                        }),
                        Some(tls) => serve(
                            StreamOwned::new(ServerConnection::new(tls).unwrap(), stream),
                            &folder,
                        ),
                    });
                }));
            }
            for thread in serving {
                thread.join().unwrap();
            }
        });
        Server { address, connections, is_over, accepting: Some(accepting) }
    }

    fn folder(&self, root: Option<&Path>) -> HttpFolder {
        let options = HttpOptions {
            timeout: Duration::from_secs(60),
            attempt_timeout: Duration::from_secs(30),
            root_certificates: root.map(Path::to_path_buf).into_iter().collect(),
        };
        let address = format!("https://localhost:{}/data", self.address.port());
        HttpFolder::new(&address, options).unwrap()
    }

    /// The error of opening a folder, which must come after one attempt.
    fn refused(&self, root: Option<&Path>) -> String {
        let error = TokenStream::open_from(&self.folder(root)).unwrap_err();
        assert!(matches!(error, Error::Http { .. }), "{error}");
        assert_eq!(self.connections.load(Ordering::SeqCst), 1, "asked once: {error}");
        error.to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.accepting.take() {
            thread.join().unwrap();
        }
    }
}

/// Range requests of one connection, until it is closed.
fn serve(stream: impl Read + Write, folder: &Path) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let name = head.split(' ').nth(1).unwrap_or("").trim_start_matches("/data/").to_owned();
        let Ok(bytes) = std::fs::read(folder.join(name)) else {
            let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
            stream.get_mut().write_all(answer)?;
            continue;
        };
        let lower = head.to_ascii_lowercase();
        let range = lower.split("range: bytes=").nth(1).unwrap().split("\r\n").next().unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last = last.parse::<usize>().unwrap().min(bytes.len() - 1);
        let mut answer = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\nETag: \"1\"\r\n\r\n",
            last + 1 - first,
            bytes.len()
        )
        .into_bytes();
        answer.extend_from_slice(&bytes[first..=last]);
        stream.get_mut().write_all(&answer)?;
        stream.get_mut().flush()?;
    }
}

/// A folder of tokens, and the authority's certificate beside it.
fn prepared(authority: &Authority) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (target, root) = (folder.path().join("tokens"), folder.path().join("root.pem"));
    let special = SpecialTokens::bert(0, 1, 2, 3, 4);
    let mut writer = TokenWriter::create(&target, b"{}", 60_000, special, 1 << 20).unwrap();
    for document in 0..500 {
        let tokens: Vec<u32> = (0..1500).map(|at| 257 + (document * 77 + at) % 50_000).collect();
        writer.tokens(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(0).unwrap();
    std::fs::write(&root, &authority.pem).unwrap();
    (folder, target, root)
}

#[test]
fn a_server_with_a_certificate_of_an_authority_of_our_own_is_read() {
    let authority = Authority::new();
    let (keep, target, root) = prepared(&authority);
    let server = Server::start(target.clone(), Some(authority.server("localhost", 2100)));
    let near = TokenStream::open(&target, Access::Read).unwrap();
    let far = TokenStream::open_from(&server.folder(Some(&root))).unwrap();
    far.verify().unwrap();
    let (mut a, mut b, mut scratch) = ([0; 700], [0; 700], Scratch::default());
    for start in (0..far.token_count() - 700).step_by(9973) {
        far.read(start, &mut a, &mut scratch, &"a sample").unwrap();
        near.read(start, &mut b, &mut scratch, &"a sample").unwrap();
        assert_eq!(a, b);
    }
    let kept = CachedFolder::new(server.folder(Some(&root)), &keep.path().join("kept"), 1 << 30);
    TokenStream::open_from(&kept.unwrap()).unwrap().verify().unwrap();
}

#[test]
fn a_server_that_is_not_trusted_is_an_error_at_once_that_says_what_to_do() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (_keep, target, root) = prepared(&authority);
    let start = |tls| Server::start(target.clone(), tls);

    let text = start(Some(authority.server("localhost", 2100))).refused(None);
    assert!(text.contains("HttpOptions::root_certificates"), "{text}");
    let text = start(Some(stranger.server("localhost", 2100))).refused(Some(&root));
    assert!(text.contains("HttpOptions::root_certificates"), "{text}");
    let text = start(Some(authority.server("elsewhere.example", 2100))).refused(Some(&root));
    assert!(text.contains("the name in the address"), "{text}");
    let text = start(Some(authority.server("localhost", 2001))).refused(Some(&root));
    assert!(text.contains("clock"), "{text}");
    let text = start(None).refused(Some(&root));
    assert!(text.contains("does not speak TLS"), "{text}");
}

#[test]
fn a_file_without_certificates_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.pem");
    let error = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        let options = HttpOptions { root_certificates: vec![path.clone()], ..Default::default() };
        HttpFolder::new("https://localhost/a", options).unwrap_err().to_string()
    };
    assert!(error(b"").contains("no certificate"));
    assert!(error(b"no PEM").contains("no certificate"));
    let key = KeyPair::generate().unwrap().serialize_pem();
    assert!(error(key.as_bytes()).contains("no certificate"));
    std::fs::remove_file(&path).unwrap();
    let options = HttpOptions { root_certificates: vec![path.clone()], ..Default::default() };
    let missing = HttpFolder::new("https://localhost/a", options).unwrap_err().to_string();
    assert!(missing.contains("cannot read") && missing.contains("root.pem"), "{missing}");
}
