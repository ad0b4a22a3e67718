//! The handshake of a control connection that takes the place of a lost one. Pure: bytes and nonces in,
//! bytes out.
//!
//! ```text
//! acceptor → connector   greeting  36 B: magic · nonce (32)
//! connector → acceptor   claim     64 B: magic · rank (4) · frames taken in (8) · nonce (16) · MAC (32)
//! acceptor → connector   answer    44 B: magic · frames taken in (8) · MAC (32)
//! ```
//!
//! `MAC = HMAC-SHA256(key, side ‖ the acceptor's nonce ‖ the claim without MAC [‖ the answer without MAC])`. The key
//! comes from the job token, the run, its generation and the secrets on both ranks' cards: only this pair of
//! this group of this attempt has it. Fresh nonces of both sides make a recording worthless.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use super::card::Card;
use crate::environment::World;

pub(crate) const GREETING_BYTES: usize = 36;
pub(crate) const CLAIM_BYTES: usize = 64;
pub(crate) const ANSWER_BYTES: usize = 44;
pub(crate) const ACCEPTOR_NONCE_BYTES: usize = 32;
pub(crate) const CONNECTOR_NONCE_BYTES: usize = 16;

const GREETING_MAGIC: [u8; 4] = *b"PHXr";
const CLAIM_MAGIC: [u8; 4] = *b"PHXc";
const ANSWER_MAGIC: [u8; 4] = *b"PHXa";
const CLAIM_MAC_AT: usize = 32;
const ANSWER_MAC_AT: usize = 12;

/// What two ranks of a group know and nobody else.
#[derive(Clone)]
pub(crate) struct PairKey([u8; 32]);

impl std::fmt::Debug for PairKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairKey(..)")
    }
}

fn keyed(key: &[u8; 32]) -> Hmac<Sha256> {
    // HMAC pads a key shorter than a block with zeros.
    let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
    block[..32].copy_from_slice(key);
    Hmac::new(&block)
}

impl PairKey {
    /// The key of the rank that accepts and the one that connects.
    pub(crate) fn new(world: &World, acceptor: &Card, connector: &Card) -> Self {
        let mut mac = keyed(world.job_token.as_bytes());
        mac.update(b"phalanx control connection");
        mac.update(&(world.run_id.len() as u64).to_le_bytes());
        mac.update(world.run_id.as_bytes());
        mac.update(&world.restart_count.to_le_bytes());
        mac.update(&acceptor.secret);
        mac.update(&connector.secret);
        Self(mac.finalize().into_bytes().into())
    }

    fn mac(&self, side: &[u8], parts: [&[u8]; 3]) -> [u8; 32] {
        let mut mac = keyed(&self.0);
        mac.update(side);
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// The connector's answer to a greeting; `None` when that is none.
    pub(crate) fn claim(
        &self,
        greeting: &[u8; GREETING_BYTES],
        rank: usize,
        taken_in: u64,
        nonce: [u8; CONNECTOR_NONCE_BYTES],
    ) -> Option<[u8; CLAIM_BYTES]> {
        let server_nonce = greeting.strip_prefix(&GREETING_MAGIC)?;
        let mut claim = [0; CLAIM_BYTES];
        claim[..4].copy_from_slice(&CLAIM_MAGIC);
        claim[4..8].copy_from_slice(&u32::try_from(rank).ok()?.to_le_bytes());
        claim[8..16].copy_from_slice(&taken_in.to_le_bytes());
        claim[16..CLAIM_MAC_AT].copy_from_slice(&nonce);
        let mac = self.mac(b"connector", [server_nonce, &claim[..CLAIM_MAC_AT], &[]]);
        claim[CLAIM_MAC_AT..].copy_from_slice(&mac);
        Some(claim)
    }

    /// How many frames the connector has taken in, if the claim is its own.
    pub(crate) fn check_claim(
        &self,
        nonce: &[u8; ACCEPTOR_NONCE_BYTES],
        claim: &[u8; CLAIM_BYTES],
    ) -> Option<u64> {
        let expected = self.mac(b"connector", [nonce, &claim[..CLAIM_MAC_AT], &[]]);
        let right = claim[..4] == CLAIM_MAGIC && bool::from(claim[CLAIM_MAC_AT..].ct_eq(&expected));
        right.then(|| number(&claim[8..16]))
    }

    /// The acceptor's answer to a claim that is right.
    pub(crate) fn answer(
        &self,
        nonce: &[u8; ACCEPTOR_NONCE_BYTES],
        claim: &[u8; CLAIM_BYTES],
        taken_in: u64,
    ) -> [u8; ANSWER_BYTES] {
        let mut answer = [0; ANSWER_BYTES];
        answer[..4].copy_from_slice(&ANSWER_MAGIC);
        answer[4..ANSWER_MAC_AT].copy_from_slice(&taken_in.to_le_bytes());
        let mac = self.mac(b"acceptor", [nonce, claim, &answer[..ANSWER_MAC_AT]]);
        answer[ANSWER_MAC_AT..].copy_from_slice(&mac);
        answer
    }

    /// How many frames the acceptor has taken in, if the answer is its own.
    pub(crate) fn check_answer(
        &self,
        greeting: &[u8; GREETING_BYTES],
        claim: &[u8; CLAIM_BYTES],
        answer: &[u8; ANSWER_BYTES],
    ) -> Option<u64> {
        let nonce = &greeting[4..];
        let expected = self.mac(b"acceptor", [nonce, claim, &answer[..ANSWER_MAC_AT]]);
        let right =
            answer[..4] == ANSWER_MAGIC && bool::from(answer[ANSWER_MAC_AT..].ct_eq(&expected));
        right.then(|| number(&answer[4..ANSWER_MAC_AT]))
    }
}

fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// The acceptor's first words.
pub(crate) fn greeting(nonce: &[u8; ACCEPTOR_NONCE_BYTES]) -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    greeting[..4].copy_from_slice(&GREETING_MAGIC);
    greeting[4..].copy_from_slice(nonce);
    greeting
}

/// Who says that it sends this claim.
pub(crate) fn claimed_rank(claim: &[u8; CLAIM_BYTES]) -> usize {
    u32::from_le_bytes([claim[4], claim[5], claim[6], claim[7]]) as usize
}

/// Whether the first bytes of a stranger can be the start of a claim.
pub(crate) fn may_be_claim(bytes: &[u8]) -> bool {
    bytes.iter().zip(CLAIM_MAGIC).all(|(&byte, magic)| byte == magic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::JobToken;

    const NONCE: [u8; ACCEPTOR_NONCE_BYTES] = [7; ACCEPTOR_NONCE_BYTES];

    fn card(secret: u8) -> Card {
        Card {
            host: "a".into(),
            pid: 1,
            machine: String::new(),
            unix_name: Vec::new(),
            address: "10.0.0.1:4000".parse().unwrap(),
            secret: [secret; 32],
            checks: true,
        }
    }

    fn world() -> World {
        World { run_id: "run".into(), restart_count: 2, ..World::threads(0, 2) }
    }

    fn claim_of(key: &PairKey) -> [u8; CLAIM_BYTES] {
        key.claim(&greeting(&NONCE), 1, 5, [9; CONNECTOR_NONCE_BYTES]).unwrap()
    }

    #[test]
    fn both_sides_learn_what_the_other_has_taken_in() {
        let key = PairKey::new(&world(), &card(1), &card(2));
        let claim = claim_of(&key);
        assert_eq!(claimed_rank(&claim), 1);
        assert_eq!(key.check_claim(&NONCE, &claim), Some(5));
        let answer = key.answer(&NONCE, &claim, 8);
        assert_eq!(key.check_answer(&greeting(&NONCE), &claim, &answer), Some(8));
    }

    #[test]
    fn other_runs_generations_groups_tokens_and_nonces_do_not_fit() {
        let key = PairKey::new(&world(), &card(1), &card(2));
        let right = claim_of(&key);
        let worlds = [
            World { run_id: "old".into(), ..world() },
            World { restart_count: 1, ..world() },
            World { job_token: JobToken::derive(&["x"]), ..world() },
        ];
        let mut others: Vec<PairKey> =
            worlds.iter().map(|world| PairKey::new(world, &card(1), &card(2))).collect();
        others.push(PairKey::new(&world(), &card(3), &card(2)));
        others.push(PairKey::new(&world(), &card(1), &card(3)));
        others.push(PairKey::new(&world(), &card(2), &card(1)));
        for other in others {
            assert_eq!(key.check_claim(&NONCE, &claim_of(&other)), None);
            let forged = other.answer(&NONCE, &right, 0);
            assert_eq!(key.check_answer(&greeting(&NONCE), &right, &forged), None);
        }
        assert_eq!(key.check_claim(&[8; ACCEPTOR_NONCE_BYTES], &right), None, "a recording");
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let key = PairKey::new(&world(), &card(1), &card(2));
        let claim = claim_of(&key);
        for bit in 0..CLAIM_BYTES * 8 {
            let mut wrong = claim;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.check_claim(&NONCE, &wrong), None, "bit {bit} of the claim");
        }
        let answer = key.answer(&NONCE, &claim, 8);
        for bit in 0..ANSWER_BYTES * 8 {
            let mut wrong = answer;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key.check_answer(&greeting(&NONCE), &claim, &wrong), None, "bit {bit}");
        }
        assert!(key.claim(&[0; GREETING_BYTES], 1, 0, [0; CONNECTOR_NONCE_BYTES]).is_none());
        assert!(may_be_claim(b"PH") && may_be_claim(b"") && !may_be_claim(b"GET / HTTP"));
    }
}
