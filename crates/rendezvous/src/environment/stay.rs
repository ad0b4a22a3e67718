//! The variables of a rank whose process survives a restart of the others: the new rank, world size
//! and address stand before those that the process was started with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Values that stand before those of the process's environment.
static TOLD: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

pub(super) fn told(name: &str) -> Option<String> {
    TOLD.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
}

/// From now on this process has another place: [`World::from_env`](super::World::from_env) and whatever else asks for these variables finds
/// the new values. The process's own environment stays as it is, since other threads may be reading it.
pub fn take_place(variables: impl IntoIterator<Item = (String, String)>) {
    TOLD.lock().unwrap_or_else(PoisonError::into_inner).extend(variables);
}

/// What a launcher offers a rank that would rather stay than be started again (`PHALANX_STAY`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StayOffer {
    /// The pipe in which the launcher says what comes next.
    pub orders: PathBuf,
    /// The pipe in which it wants to hear of the rank.
    pub news: PathBuf,
    /// How long it is to be waited for at most.
    pub patience: Duration,
}

impl StayOffer {
    /// What the launcher has said when it started this process; `None`: nothing, as every launcher but ours.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        Self::decode(&super::given_variable(Self::VARIABLE)?)
    }

    /// Its variable.
    pub const VARIABLE: &str = "PHALANX_STAY";

    /// As the variable has it: `/proc/811/fd/7:/proc/811/fd/10:310`.
    #[must_use]
    pub fn encode(&self) -> String {
        let Self { orders, news, patience } = self;
        format!("{}:{}:{}", orders.display(), news.display(), patience.as_secs())
    }

    fn decode(value: &str) -> Option<Self> {
        let mut parts = value.split(':');
        let (orders, news, seconds) = (parts.next()?, parts.next()?, parts.next()?);
        let patience = Duration::from_secs(seconds.parse().ok()?);
        let is_whole = parts.next().is_none() && !orders.is_empty() && !news.is_empty();
        is_whole.then(|| Self { orders: orders.into(), news: news.into(), patience })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_read_as_it_was_written_and_nothing_else() {
        let offer = StayOffer {
            orders: "/proc/811/fd/7".into(),
            news: "/proc/811/fd/10".into(),
            patience: Duration::from_secs(310),
        };
        assert_eq!(offer.encode(), "/proc/811/fd/7:/proc/811/fd/10:310");
        assert_eq!(StayOffer::decode(&offer.encode()), Some(offer));
        for wrong in ["", "a:b", "a:b:c", "a::1", ":b:1", "a:b:1:2"] {
            assert_eq!(StayOffer::decode(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_place_that_is_taken_stands_before_the_environment() {
        const NAME: &str = "PHALANX_TEST_OF_A_PLACE";
        assert_eq!(super::super::process_variable(NAME), None);
        take_place([(NAME.to_owned(), "7".to_owned())]);
        assert_eq!(super::super::process_variable(NAME).as_deref(), Some("7"));
        assert_eq!(super::super::given_variable(NAME), None);
    }
}
