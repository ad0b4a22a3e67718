//! What is wrong with a schedule is found, whatever it is.

use phalanx_model_parallel::pipeline::schedule::{
    Action, Flaw, Part, Pass, Payload, Schedule, ScheduleKind, Sending,
};

fn small() -> Vec<Schedule> {
    let kinds = ["gpipe", "1f1b", "zb-h1", "interleaved:2", "interleaved:3"];
    let shapes = [(1, 2), (2, 2), (2, 4), (3, 3), (4, 4)];
    let all =
        kinds.iter().flat_map(|kind| shapes.map(|(p, m)| (kind.parse().expect("a kind"), p, m)));
    all.map(|(kind, p, m): (ScheduleKind, _, _)| {
        Schedule::new(kind, p, m).expect("a possible shape")
    })
    .collect()
}

fn actions(schedule: &Schedule) -> Vec<Vec<Action>> {
    (0..schedule.rank_count()).map(|rank| schedule.actions(rank).to_vec()).collect()
}

/// The schedule with one rank's actions changed.
fn changed(schedule: &Schedule, change: impl Fn(&mut Vec<Vec<Action>>)) -> Result<(), Flaw> {
    let mut ranks = actions(schedule);
    change(&mut ranks);
    Schedule::of(schedule.micro_batch_count(), schedule.chunk_count(), ranks).verify()
}

/// Every place of every small schedule.
fn everywhere(body: impl Fn(&Schedule, usize, usize)) {
    for schedule in small() {
        for rank in 0..schedule.rank_count() {
            for at in 0..schedule.actions(rank).len() {
                body(&schedule, rank, at);
            }
        }
    }
}

#[test]
fn an_action_that_is_missing_is_found() {
    everywhere(|schedule, rank, at| {
        changed(schedule, |ranks| {
            ranks[rank].remove(at);
        })
        .unwrap_err();
    });
}

#[test]
fn an_action_that_is_done_twice_is_found() {
    everywhere(|schedule, rank, at| {
        let action = schedule.actions(rank)[at];
        for later in at + 1..=schedule.actions(rank).len() {
            let flaw = changed(schedule, |ranks| ranks[rank].insert(later, action)).unwrap_err();
            assert!(matches!(flaw, Flaw::Repeated { .. }), "{flaw}");
        }
    });
}

#[test]
fn a_message_to_or_from_another_rank_is_found() {
    everywhere(|schedule, rank, at| {
        for other in 0..=schedule.rank_count() {
            let mut action = schedule.actions(rank)[at];
            match &mut action {
                Action::Send { peer, .. } | Action::Receive { peer, .. } if *peer != other => {
                    *peer = other;
                }
                _ => continue,
            }
            let flaw = changed(schedule, |ranks| ranks[rank][at] = action).unwrap_err();
            assert!(matches!(flaw, Flaw::Stray { .. }), "{flaw}");
        }
    });
}

#[test]
fn another_micro_batch_or_chunk_is_found() {
    everywhere(|schedule, rank, at| {
        for (micro_batch, chunk) in [(0, 0), (1, 0), (0, 1), (1, 1), (99, 0), (0, usize::MAX)] {
            let wrong = Part { micro_batch, chunk };
            let mut action = schedule.actions(rank)[at];
            let (Action::Compute { part, .. }
            | Action::Send { part, .. }
            | Action::Receive { part, .. }) = &mut action;
            if *part != wrong {
                *part = wrong;
                changed(schedule, |ranks| ranks[rank][at] = action).unwrap_err();
            }
        }
    });
}

const fn part(micro_batch: usize) -> Part {
    Part { micro_batch, chunk: 0 }
}

const fn compute(pass: Pass, micro_batch: usize) -> Action {
    Action::Compute { pass, part: part(micro_batch) }
}

#[test]
fn sums_in_another_order_are_found() {
    let backward = [1, 0].map(|at| compute(Pass::Backward, at));
    let actions = [0, 1].map(|at| compute(Pass::Forward, at)).into_iter().chain(backward).collect();
    let flaw = Schedule::of(2, 1, vec![actions]).verify().unwrap_err();
    assert_eq!(
        flaw.to_string(),
        "rank 0, action 2: Backward (micro-batch 1, chunk 0) comes out of the order of micro-batches, so that sums would have other bits"
    );
}

#[test]
fn work_before_what_it_needs_is_found() {
    let early = vec![compute(Pass::BackwardWeight, 0), compute(Pass::Forward, 0)];
    let flaw = Schedule::of(1, 1, vec![early]).verify().unwrap_err();
    assert!(matches!(flaw, Flaw::TooEarly { rank: 0, index: 0, .. }), "{flaw}");
    let half = vec![compute(Pass::Forward, 0), compute(Pass::BackwardInput, 0)];
    let missing = Schedule::of(1, 1, vec![half]).verify().unwrap_err().to_string();
    assert_eq!(missing, "rank 0 does not take micro-batch 0 backward through chunk 0");
}

/// Right on each rank and between them, and yet: the second waits for micro-batch 1 before it goes backward, the first for that.
#[test]
fn ranks_that_wait_for_each_other_are_named() {
    let send = |payload, at, peer| Action::Send { payload, part: part(at), peer };
    let receive = |payload, at, peer| Action::Receive { payload, part: part(at), peer };
    let (activation, gradient) = (Payload::Activation, Payload::Gradient);
    let first = |at| {
        [
            compute(Pass::Forward, at),
            send(activation, at, 1),
            receive(gradient, at, 1),
            compute(Pass::Backward, at),
        ]
    };
    let forward = |at| [receive(activation, at, 0), compute(Pass::Forward, at)];
    let backward = |at| [compute(Pass::Backward, at), send(gradient, at, 0)];
    let second = [0, 1].map(forward).concat().into_iter().chain([0, 1].map(backward).concat());
    let ranks = vec![[0, 1].map(first).concat(), second.collect()];
    let flaw = Schedule::of(2, 1, ranks).verify().unwrap_err();
    assert_eq!(
        flaw.to_string(),
        "with Buffered sends these ranks wait for each other: rank 0 at Receive Gradient from rank 1 (micro-batch 0, chunk 0); \
         rank 1 at Receive Activation from rank 0 (micro-batch 1, chunk 0)"
    );
}

#[test]
fn messages_in_another_order_are_found() {
    let schedule = Schedule::new(ScheduleKind::GPipe, 2, 2).unwrap();
    let sends = |ranks: &mut Vec<Vec<Action>>| {
        let at: Vec<usize> =
            (0..ranks[0].len()).filter(|at| matches!(ranks[0][*at], Action::Send { .. })).collect();
        let first = ranks[0].remove(at[0]);
        ranks[0].insert(at[1], first);
    };
    let flaw = changed(&schedule, sends).unwrap_err();
    assert!(matches!(flaw, Flaw::Unmatched { from: 0, to: 1, index: 0, .. }), "{flaw}");
}

/// A schedule of one's own promises what its actions allow at least; the stricter ends are for `ends_with`.
#[test]
fn schedules_of_ones_own_promise_buffered_sends() {
    let made = Schedule::new(ScheduleKind::GPipe, 3, 4).unwrap();
    let own = Schedule::of(4, 1, actions(&made));
    assert_eq!((made.sending(), own.sending()), (Sending::Synchronous, Sending::Buffered));
    own.verify().unwrap();
    own.ends_with(Sending::Synchronous).unwrap();
}
