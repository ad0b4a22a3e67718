//! What the store does with a request: contents and waiting reads. Pure: the time is an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::super::frame::{join_keys, Reply, ReplyStatus, Request};
use super::super::table::{KeyTable, VALUE_BYTES_MAX};
use super::super::StoreError;

/// A connection's number; never used twice by a server.
pub(super) type ConnectionId = u64;

/// Longest wait that a `get` may ask for; a job's own deadlines are far shorter.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Contents and waiting reads.
#[derive(Debug, Default)]
pub(super) struct Engine {
    table: KeyTable,
    /// By connection, which waits for one key at a time.
    waits: BTreeMap<ConnectionId, Wait>,
}

#[derive(Debug)]
struct Wait {
    key: String,
    deadline: Instant,
}

/// Replies that became due, with the connections they go to.
pub(super) type Due = Vec<(ConnectionId, Reply)>;

impl Engine {
    /// Carries out `request`; the replies that are due now may be for other connections too (reads that waited for
    /// this key), and may be none (a read that waits).
    pub(super) fn handle(
        &mut self,
        from: ConnectionId,
        request: &Request<'_>,
        now: Instant,
    ) -> Due {
        match *request {
            Request::Get { key, wait_ms } => match self.table.get(key) {
                Some(value) => vec![(from, done(0, value.to_vec()))],
                None => {
                    let wait = Duration::from_millis(u64::try_from(wait_ms).unwrap_or(0));
                    let deadline = now + wait.min(WAIT_MAX);
                    self.waits.insert(from, Wait { key: key.to_owned(), deadline });
                    self.expired(now)
                }
            },
            Request::Set { key, value } => {
                let result = self.table.set(key, value);
                self.changed(from, key, result.map(|()| done(0, Vec::new())))
            }
            Request::Add { key, delta } => {
                let result = self.table.add(key, delta);
                self.changed(from, key, result.map(|sum| done(sum, Vec::new())))
            }
            Request::CompareSet { key, expected, desired } => {
                let result = self.table.compare_set(key, expected, desired);
                let reply = result.map(|value| match value {
                    Some(value) => done(0, value),
                    None => Reply { status: ReplyStatus::Absent, number: 0, value: Vec::new() },
                });
                self.changed(from, key, reply)
            }
            Request::Delete { key } => {
                vec![(from, done(i64::from(self.table.delete(key)), Vec::new()))]
            }
            Request::Check { keys } => {
                let all = self.table.has_all(&keys.to_vec());
                vec![(from, done(i64::from(all), Vec::new()))]
            }
            Request::List { prefix } => vec![(from, done(0, self.list(prefix)))],
        }
    }

    /// The reply to a change of `key`, and those to the reads that waited for it.
    fn changed(&mut self, from: ConnectionId, key: &str, result: Result<Reply, StoreError>) -> Due {
        let reply = result.unwrap_or_else(|error| {
            let status = match error {
                StoreError::NotACounter { .. } => ReplyStatus::NotACounter,
                // The decoder has checked the lengths: what is left is that the store is full.
                _ => ReplyStatus::Full,
            };
            Reply { status, number: 0, value: Vec::new() }
        });
        let mut due = vec![(from, reply)];
        if let Some(value) = self.table.get(key) {
            let ready: Vec<ConnectionId> = self
                .waits
                .iter()
                .filter(|(_, wait)| wait.key == key)
                .map(|(&connection, _)| connection)
                .collect();
            for connection in ready {
                self.waits.remove(&connection);
                due.push((connection, done(0, value.to_vec())));
            }
        }
        due
    }

    /// As many keys as fit into one reply.
    fn list(&self, prefix: &str) -> Vec<u8> {
        let keys = self.table.list(prefix);
        let mut bytes = 0;
        let fitting = keys.iter().take_while(|key| {
            bytes += 4 + key.len();
            bytes <= VALUE_BYTES_MAX
        });
        join_keys(&fitting.map(String::as_str).collect::<Vec<_>>())
    }

    /// Ends the waits whose deadline has come.
    pub(super) fn expired(&mut self, now: Instant) -> Due {
        let over: Vec<ConnectionId> = self
            .waits
            .iter()
            .filter(|(_, wait)| wait.deadline <= now)
            .map(|(&connection, _)| connection)
            .collect();
        over.into_iter()
            .map(|connection| {
                self.waits.remove(&connection);
                (connection, Reply { status: ReplyStatus::TimedOut, number: 0, value: Vec::new() })
            })
            .collect()
    }

    /// When [`Engine::expired`] has work next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.waits.values().map(|wait| wait.deadline).min()
    }

    /// Forgets the wait of a connection that is gone.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.waits.remove(&connection);
    }

    pub(super) fn is_waiting(&self, connection: ConnectionId) -> bool {
        self.waits.contains_key(&connection)
    }
}

const fn done(number: i64, value: Vec<u8>) -> Reply {
    Reply { status: ReplyStatus::Done, number, value }
}

#[cfg(test)]
mod tests {
    use super::super::super::frame::split_keys;
    use super::*;

    fn value(due: &Due, connection: ConnectionId) -> Option<(ReplyStatus, Vec<u8>)> {
        let (_, reply) = due.iter().find(|(to, _)| *to == connection)?;
        Some((reply.status, reply.value.clone()))
    }

    #[test]
    fn a_set_answers_all_who_wait_for_the_key_and_no_others() {
        let (mut engine, now) = (Engine::default(), Instant::now());
        for (connection, key) in [(1, "k"), (2, "k"), (3, "other")] {
            assert_eq!(engine.handle(connection, &Request::Get { key, wait_ms: 1000 }, now), []);
        }
        let due = engine.handle(4, &Request::Set { key: "k", value: b"v" }, now);
        assert_eq!(due.len(), 3);
        for connection in [1, 2] {
            assert_eq!(value(&due, connection), Some((ReplyStatus::Done, b"v".to_vec())));
        }
        assert!(engine.is_waiting(3) && !engine.is_waiting(1));
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_not_before() {
        let (mut engine, now) = (Engine::default(), Instant::now());
        engine.handle(1, &Request::Get { key: "k", wait_ms: 500 }, now);
        assert_eq!(engine.next_deadline(), Some(now + Duration::from_millis(500)));
        assert_eq!(engine.expired(now + Duration::from_millis(499)), []);
        let due = engine.expired(now + Duration::from_millis(500));
        assert_eq!(value(&due, 1), Some((ReplyStatus::TimedOut, vec![])));
        assert_eq!(engine.next_deadline(), None);
    }

    #[test]
    fn a_get_that_may_not_wait_is_answered_at_once() {
        let (mut engine, now) = (Engine::default(), Instant::now());
        for wait_ms in [0, -1, i64::MIN] {
            let due = engine.handle(1, &Request::Get { key: "k", wait_ms }, now);
            assert_eq!(value(&due, 1), Some((ReplyStatus::TimedOut, vec![])));
        }
        engine.handle(1, &Request::Get { key: "k", wait_ms: i64::MAX }, now);
        assert_eq!(engine.next_deadline(), Some(now + WAIT_MAX));
    }

    #[test]
    fn who_is_gone_is_not_answered() {
        let (mut engine, now) = (Engine::default(), Instant::now());
        engine.handle(1, &Request::Get { key: "k", wait_ms: 500 }, now);
        engine.forget(1);
        assert_eq!(engine.handle(2, &Request::Add { key: "k", delta: 1 }, now).len(), 1);
    }

    #[test]
    fn a_list_holds_whole_keys_of_the_prefix() {
        let (mut engine, now) = (Engine::default(), Instant::now());
        for key in ["a/1", "a/2", "b"] {
            engine.handle(1, &Request::Set { key, value: b"" }, now);
        }
        let due = engine.handle(1, &Request::List { prefix: "a/" }, now);
        assert_eq!(split_keys(&due[0].1.value).unwrap(), ["a/1", "a/2"]);
    }
}
