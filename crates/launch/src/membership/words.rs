//! Statuses and orders as text: a few words, of which every one is checked. Pure.

use super::{Command, Condition, Member, Order, Status, Verdict, Wish};
use crate::restart::{Ending, GiveUp};

const STATUS: &str = "status-1";
const ORDER: &str = "order-1";
/// More is no job.
const MEMBERS_MAX: usize = 65_536;

/// The words of a text, read from the left.
struct Words<'t>(std::str::SplitAsciiWhitespace<'t>);

impl<'t> Words<'t> {
    fn of(bytes: &'t [u8], kind: &str) -> Option<Self> {
        let mut words = Self(std::str::from_utf8(bytes).ok()?.split_ascii_whitespace());
        (words.word()? == kind).then_some(words)
    }

    fn word(&mut self) -> Option<&'t str> {
        self.0.next()
    }

    fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.word()?.parse().ok()
    }

    /// `-` stands for none.
    fn optional<T: std::str::FromStr>(&mut self) -> Option<Option<T>> {
        match self.word()? {
            "-" => Some(None),
            word => word.parse().ok().map(Some),
        }
    }

    fn end(mut self) -> Option<()> {
        self.word().is_none().then_some(())
    }
}

fn optional<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub(crate) fn encode_status(status: &Status) -> String {
    let Status { node, life, number, ranks, ran, wish } = status;
    let wish = match wish {
        Wish::Nothing => "nothing".to_owned(),
        Wish::Leave => "leave".to_owned(),
        Wish::End(signal) => format!("end {signal}"),
    };
    let ran = match ran {
        None => "none".to_owned(),
        Some((generation, condition)) => {
            format!("ran {generation} {}", encode_condition(*condition))
        }
    };
    format!("{STATUS} {node} {life} {number} {ranks} {wish} {ran}")
}

fn encode_condition(condition: Condition) -> String {
    match condition {
        Condition::Running => "running".to_owned(),
        Condition::Well => "well".to_owned(),
        Condition::Stopped => "stopped".to_owned(),
        Condition::Failed(Ending::Asked, step) => format!("asked {}", optional(step)),
        Condition::Failed(Ending::Failed, step) => format!("failed {}", optional(step)),
        Condition::Failed(Ending::Certain(code), step) => {
            format!("certain {code} {}", optional(step))
        }
    }
}

pub(crate) fn decode_status(bytes: &[u8]) -> Option<Status> {
    let mut words = Words::of(bytes, STATUS)?;
    let (node, life) = (words.number()?, words.number()?);
    let (number, ranks) = (words.number()?, words.number()?);
    let wish = match words.word()? {
        "nothing" => Wish::Nothing,
        "leave" => Wish::Leave,
        "end" => Wish::End(words.number()?),
        _ => return None,
    };
    let ran = match words.word()? {
        "none" => None,
        "ran" => Some((words.number()?, decode_condition(&mut words)?)),
        _ => return None,
    };
    words.end()?;
    Some(Status { node, life, number, ranks, ran, wish })
}

fn decode_condition(words: &mut Words<'_>) -> Option<Condition> {
    Some(match words.word()? {
        "running" => Condition::Running,
        "well" => Condition::Well,
        "stopped" => Condition::Stopped,
        "asked" => Condition::Failed(Ending::Asked, words.optional()?),
        "failed" => Condition::Failed(Ending::Failed, words.optional()?),
        "certain" => Condition::Failed(Ending::Certain(words.number()?), words.optional()?),
        _ => return None,
    })
}

pub(crate) fn encode_order(order: &Order) -> String {
    let Order { number, generation, members, command } = order;
    let command = match command {
        Command::Wait => "wait".to_owned(),
        Command::Run => "run".to_owned(),
        Command::StopSoon => "stop-soon".to_owned(),
        Command::StopNow => "stop-now".to_owned(),
        Command::Finish(verdict) => format!("finish {}", encode_verdict(*verdict)),
    };
    let mut text = format!("{ORDER} {number} {generation} {command} {}", members.len());
    for Member { node, life, ranks } in members {
        text += &format!(" {node} {life} {ranks}");
    }
    text
}

fn encode_verdict(verdict: Verdict) -> String {
    match verdict {
        Verdict::Well => "well".to_owned(),
        Verdict::NoOrders => "no-orders".to_owned(),
        Verdict::Ended { node, signal } => format!("ended {node} {signal}"),
        Verdict::TooFew { nodes } => format!("too-few {nodes}"),
        Verdict::Failed { node, why } => format!("failed {node} {}", encode_why(why)),
    }
}

fn encode_why(why: GiveUp) -> String {
    match why {
        GiveUp::NotWanted => "not-wanted".to_owned(),
        GiveUp::Certain { code } => format!("certain {code}"),
        GiveUp::NoProgress { step, attempts } => format!("no-progress {step} {attempts}"),
        GiveUp::BudgetSpent { restarts, window } => {
            format!("spent {restarts} {}", optional(window.map(|window| window.as_millis())))
        }
    }
}

pub(crate) fn decode_order(bytes: &[u8]) -> Option<Order> {
    let mut words = Words::of(bytes, ORDER)?;
    let (number, generation) = (words.number()?, words.number()?);
    let command = match words.word()? {
        "wait" => Command::Wait,
        "run" => Command::Run,
        "stop-soon" => Command::StopSoon,
        "stop-now" => Command::StopNow,
        "finish" => Command::Finish(decode_verdict(&mut words)?),
        _ => return None,
    };
    let count: usize = words.number()?;
    let mut members = Vec::new();
    for _ in 0..Some(count).filter(|count| *count <= MEMBERS_MAX)? {
        let (node, life, ranks) = (words.number()?, words.number()?, words.number()?);
        members.push(Member { node, life, ranks });
    }
    words.end()?;
    Some(Order { number, generation, members, command })
}

fn decode_verdict(words: &mut Words<'_>) -> Option<Verdict> {
    Some(match words.word()? {
        "well" => Verdict::Well,
        "no-orders" => Verdict::NoOrders,
        "ended" => Verdict::Ended { node: words.number()?, signal: words.number()? },
        "too-few" => Verdict::TooFew { nodes: words.number()? },
        "failed" => Verdict::Failed { node: words.number()?, why: decode_why(words)? },
        _ => return None,
    })
}

fn decode_why(words: &mut Words<'_>) -> Option<GiveUp> {
    Some(match words.word()? {
        "not-wanted" => GiveUp::NotWanted,
        "certain" => GiveUp::Certain { code: words.number()? },
        "no-progress" => GiveUp::NoProgress { step: words.number()?, attempts: words.number()? },
        "spent" => {
            let restarts = words.number()?;
            let window = words.optional()?.map(std::time::Duration::from_millis);
            GiveUp::BudgetSpent { restarts, window }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn statuses_are_read_as_they_were_written() {
        let conditions = [
            Condition::Running,
            Condition::Well,
            Condition::Stopped,
            Condition::Failed(Ending::Asked, None),
            Condition::Failed(Ending::Failed, Some(120)),
            Condition::Failed(Ending::Certain(64), Some(0)),
        ];
        let each = conditions.map(|condition| Some((3, condition)));
        for ran in each.into_iter().chain([None]) {
            for wish in [Wish::Nothing, Wish::Leave, Wish::End(15)] {
                let status = Status { node: 1, life: 2, number: 3, ranks: 4, ran, wish };
                let text = encode_status(&status);
                assert_eq!(decode_status(text.as_bytes()), Some(status), "{text}");
                for wrong in [&text[1..], &format!("{text} 1"), "", "status-1 1 2"] {
                    assert_eq!(decode_status(wrong.as_bytes()), None, "{wrong}");
                }
            }
        }
    }

    #[test]
    fn orders_are_read_as_they_were_written() {
        let spent = |window| GiveUp::BudgetSpent { restarts: 3, window };
        let reasons = [
            GiveUp::NotWanted,
            GiveUp::Certain { code: 65 },
            GiveUp::NoProgress { step: 120, attempts: 3 },
            spent(None),
            spent(Some(Duration::from_millis(1500))),
        ];
        let failed = reasons.map(|why| Command::Finish(Verdict::Failed { node: 1, why }));
        let others = [
            Command::Wait,
            Command::Run,
            Command::StopSoon,
            Command::StopNow,
            Command::Finish(Verdict::Well),
            Command::Finish(Verdict::NoOrders),
            Command::Finish(Verdict::Ended { node: 0, signal: 2 }),
            Command::Finish(Verdict::TooFew { nodes: 1 }),
        ];
        for command in failed.into_iter().chain(others) {
            for count in 0..3 {
                let members = (0..count).map(|node| Member { node, life: 9, ranks: 2 }).collect();
                let order = Order { number: 5, generation: 6, members, command };
                let text = encode_order(&order);
                assert_eq!(decode_order(text.as_bytes()), Some(order), "{text}");
                assert_eq!(decode_order(format!("{text} 7").as_bytes()), None);
            }
        }
        assert_eq!(decode_order(b"order-1 1 1 run 4000000000 1 1 1"), None);
        assert_eq!(decode_order(&[0xff]), None);
    }
}
