//! Proof of the job token, both ways, before anything else is parsed. Pure: bytes and nonces in, bytes out.
//!
//! ```text
//! server → client   greeting  56 B: magic · version · run mark (8) · restart count · server nonce (32)
//! client → server   proof     64 B: magic · version · role · client nonce (24) · MAC (32)
//! server → client   verdict   40 B: magic · status · MAC (32)
//! ```
//!
//! `MAC = HMAC-SHA256(token, side ‖ |run id| ‖ run id ‖ restart count ‖ version ‖ role ‖ server nonce ‖ client nonce)`.
//! Fresh nonces of both sides make a replay worthless, the side's name stops a reflection, run id and restart count
//! keep left-over processes out. The mark (a hash of the run id) and the restart count in the greeting are not secret
//! and prove nothing: they let an honest client say *why* it does not fit. At most 64 bytes of a stranger are read.
//!
//! Source: the challenge–response of RFC 2195 with HMAC of RFC 2104, done mutually.

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::environment::{JobToken, World};

pub(super) const GREETING_BYTES: usize = 56;
pub(super) const PROOF_BYTES: usize = 64;
pub(super) const VERDICT_BYTES: usize = 40;
pub(super) const SERVER_NONCE_BYTES: usize = 32;
pub(super) const CLIENT_NONCE_BYTES: usize = 24;

pub(super) const VERSION: u16 = 1;
/// The only role so far; bound into the MAC so that a later one cannot be confused with it.
const ROLE_STORE_CLIENT: u16 = 1;
const GREETING_MAGIC: [u8; 4] = *b"PHXG";
const PROOF_MAGIC: [u8; 4] = *b"PHXP";
const VERDICT_MAGIC: [u8; 4] = *b"PHXV";
const WELCOME: u16 = 0;
const REFUSED: u16 = 1;

/// What a process must know to belong to a job.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Names the job; not secret.
    pub run_id: String,
    /// How often the job was restarted: left-over processes of earlier attempts do not fit.
    pub restart_count: u32,
    /// The secret.
    pub job_token: JobToken,
}

impl World {
    /// What this rank shows to the store.
    #[must_use]
    pub(crate) fn credentials(&self) -> Credentials {
        Credentials {
            run_id: self.run_id.clone(),
            restart_count: self.restart_count,
            job_token: self.job_token.clone(),
        }
    }
}

/// Why a client turns away from a server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    NotAStore,
    Version(u16),
    Run([u8; 8]),
    Generation(u32),
    Token,
}

#[derive(Clone, Copy)]
enum Side {
    Client,
    Server,
}

impl Credentials {
    /// First bytes of a hash of the run id.
    pub(super) fn mark(&self) -> [u8; 8] {
        let hash = Sha256::digest(&self.run_id);
        hash.first_chunk().copied().unwrap_or_default()
    }

    fn mac(&self, side: Side, server_nonce: &[u8], client_nonce: &[u8]) -> [u8; 32] {
        let name: &[u8] = match side {
            Side::Client => b"phalanx store client",
            Side::Server => b"phalanx store server",
        };
        // HMAC pads a key shorter than a block with zeros.
        let mut key = hmac::digest::Key::<Hmac<Sha256>>::default();
        key[..32].copy_from_slice(self.job_token.as_bytes());
        let mut mac = Hmac::<Sha256>::new(&key);
        mac.update(name);
        mac.update(&(self.run_id.len() as u64).to_le_bytes());
        mac.update(self.run_id.as_bytes());
        mac.update(&self.restart_count.to_le_bytes());
        mac.update(&VERSION.to_le_bytes());
        mac.update(&ROLE_STORE_CLIENT.to_le_bytes());
        mac.update(server_nonce);
        mac.update(client_nonce);
        mac.finalize().into_bytes().into()
    }

    /// The server's first words.
    pub(super) fn greeting(&self, nonce: &[u8; SERVER_NONCE_BYTES]) -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[..4].copy_from_slice(&GREETING_MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.mark());
        bytes[16..20].copy_from_slice(&self.restart_count.to_le_bytes());
        bytes[24..].copy_from_slice(nonce);
        bytes
    }

    /// The client's answer to a greeting, if the server seems to be of this run.
    pub(super) fn answer(
        &self,
        greeting: &[u8; GREETING_BYTES],
        nonce: &[u8; CLIENT_NONCE_BYTES],
    ) -> Result<[u8; PROOF_BYTES], Mismatch> {
        if greeting[..4] != GREETING_MAGIC {
            return Err(Mismatch::NotAStore);
        }
        let version = u16::from_le_bytes([greeting[4], greeting[5]]);
        if version != VERSION {
            return Err(Mismatch::Version(version));
        }
        let mut mark = [0; 8];
        mark.copy_from_slice(&greeting[8..16]);
        if mark != self.mark() {
            return Err(Mismatch::Run(mark));
        }
        let generation =
            u32::from_le_bytes([greeting[16], greeting[17], greeting[18], greeting[19]]);
        if generation != self.restart_count {
            return Err(Mismatch::Generation(generation));
        }
        let mut bytes = [0; PROOF_BYTES];
        bytes[..4].copy_from_slice(&PROOF_MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&ROLE_STORE_CLIENT.to_le_bytes());
        bytes[8..32].copy_from_slice(nonce);
        bytes[32..].copy_from_slice(&self.mac(Side::Client, &greeting[24..], nonce));
        Ok(bytes)
    }

    /// The server's verdict on a proof: the bytes to send, and whether the client is in.
    pub(super) fn verdict(
        &self,
        server_nonce: &[u8; SERVER_NONCE_BYTES],
        proof: &[u8; PROOF_BYTES],
    ) -> ([u8; VERDICT_BYTES], bool) {
        let nonce = &proof[8..32];
        let head =
            [&PROOF_MAGIC[..], &VERSION.to_le_bytes()[..], &ROLE_STORE_CLIENT.to_le_bytes()[..]]
                .concat();
        let expected = self.mac(Side::Client, server_nonce, nonce);
        let right = proof[..8] == head[..] && bool::from(proof[32..].ct_eq(&expected));
        let mut bytes = [0; VERDICT_BYTES];
        bytes[..4].copy_from_slice(&VERDICT_MAGIC);
        bytes[4..6].copy_from_slice(&if right { WELCOME } else { REFUSED }.to_le_bytes());
        if right {
            bytes[8..].copy_from_slice(&self.mac(Side::Server, server_nonce, nonce));
        }
        (bytes, right)
    }

    /// The client's check that the server knows the token too.
    pub(super) fn check_verdict(
        &self,
        greeting: &[u8; GREETING_BYTES],
        nonce: &[u8; CLIENT_NONCE_BYTES],
        verdict: &[u8; VERDICT_BYTES],
    ) -> Result<(), Mismatch> {
        if verdict[..4] != VERDICT_MAGIC {
            return Err(Mismatch::NotAStore);
        }
        let expected = self.mac(Side::Server, &greeting[24..], nonce);
        let status = u16::from_le_bytes([verdict[4], verdict[5]]);
        if status == WELCOME && bool::from(verdict[8..].ct_eq(&expected)) {
            Ok(())
        } else {
            Err(Mismatch::Token)
        }
    }
}

/// Whether the first bytes of a stranger can be the start of a proof: garbage is turned away at once.
pub(super) fn may_be_proof(bytes: &[u8]) -> bool {
    bytes.iter().zip(PROOF_MAGIC).all(|(&byte, magic)| byte == magic)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER_NONCE: [u8; SERVER_NONCE_BYTES] = [7; SERVER_NONCE_BYTES];
    const CLIENT_NONCE: [u8; CLIENT_NONCE_BYTES] = [9; CLIENT_NONCE_BYTES];

    fn credentials(run_id: &str, restart_count: u32, secret: &str) -> Credentials {
        let job_token = JobToken::derive(&[secret]);
        Credentials { run_id: run_id.to_owned(), restart_count, job_token }
    }

    /// Runs the handshake; `Ok` only when both sides are satisfied.
    fn meet(server: &Credentials, client: &Credentials) -> Result<(), Mismatch> {
        let greeting = server.greeting(&SERVER_NONCE);
        let proof = client.answer(&greeting, &CLIENT_NONCE)?;
        let (verdict, welcome) = server.verdict(&SERVER_NONCE, &proof);
        client.check_verdict(&greeting, &CLIENT_NONCE, &verdict)?;
        // A client that is satisfied with a server that refused it would be a hole: no variant fits, any will do.
        if welcome {
            Ok(())
        } else {
            Err(Mismatch::NotAStore)
        }
    }

    #[test]
    fn only_equal_run_generation_and_token_meet() {
        let ours = credentials("run", 2, "secret");
        assert_eq!(meet(&ours, &ours), Ok(()));
        let stale = credentials("old", 2, "secret");
        assert_eq!(meet(&stale, &ours), Err(Mismatch::Run(stale.mark())));
        assert_eq!(meet(&credentials("run", 3, "secret"), &ours), Err(Mismatch::Generation(3)));
        assert_eq!(meet(&credentials("run", 2, "other"), &ours), Err(Mismatch::Token));
    }

    #[test]
    fn a_client_that_ignores_the_greeting_is_refused_by_the_proof() {
        let server = credentials("run", 3, "secret");
        for liar in [credentials("run", 2, "secret"), credentials("old", 3, "secret")] {
            // The liar answers as if the greeting were of its own run.
            let proof = liar.answer(&liar.greeting(&SERVER_NONCE), &CLIENT_NONCE).unwrap();
            assert!(!server.verdict(&SERVER_NONCE, &proof).1);
        }
    }

    #[test]
    fn a_recorded_proof_is_worthless_under_another_nonce() {
        let ours = credentials("run", 0, "secret");
        let proof = ours.answer(&ours.greeting(&SERVER_NONCE), &CLIENT_NONCE).unwrap();
        assert!(ours.verdict(&SERVER_NONCE, &proof).1);
        assert!(!ours.verdict(&[8; SERVER_NONCE_BYTES], &proof).1);
    }

    #[test]
    fn a_server_without_the_token_cannot_pass_for_the_store() {
        let ours = credentials("run", 0, "secret");
        let greeting = ours.greeting(&SERVER_NONCE);
        let proof = ours.answer(&greeting, &CLIENT_NONCE).unwrap();
        let mut forged = [0; VERDICT_BYTES];
        forged[..4].copy_from_slice(&VERDICT_MAGIC);
        // The best it can do is to send the client's own MAC back.
        forged[8..].copy_from_slice(&proof[32..]);
        assert_eq!(ours.check_verdict(&greeting, &CLIENT_NONCE, &forged), Err(Mismatch::Token));
    }

    #[test]
    fn every_flipped_bit_of_a_proof_is_refused() {
        let ours = credentials("run", 0, "secret");
        let proof = ours.answer(&ours.greeting(&SERVER_NONCE), &CLIENT_NONCE).unwrap();
        for bit in 0..PROOF_BYTES * 8 {
            let mut wrong = proof;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!ours.verdict(&SERVER_NONCE, &wrong).1, "bit {bit}");
        }
    }

    #[test]
    fn what_is_no_greeting_is_told_apart() {
        let ours = credentials("run", 0, "secret");
        assert_eq!(ours.answer(&[b'S'; GREETING_BYTES], &CLIENT_NONCE), Err(Mismatch::NotAStore));
        assert!(may_be_proof(b"PH") && may_be_proof(b"") && !may_be_proof(b"GET / HTTP/1.1"));
    }
}
