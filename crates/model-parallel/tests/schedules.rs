//! Every schedule for p ≤ 8, m ≤ 32 and v ≤ 4: right, without deadlock, and as long and as large as the papers' formulas say.

use phalanx_model_parallel::pipeline::schedule::{Costs, Flaw, Schedule, ScheduleKind, Sending};

const RANKS_MAX: usize = 8;
const MICRO_BATCHES_MAX: usize = 32;
const CHUNKS_MAX: usize = 4;

/// Forward, input, weight: all orders of three costs, equal ones, and one that is far from the others.
const COSTS: [(u64, u64, u64); 11] = [
    (1, 1, 1),
    (2, 3, 1),
    (3, 2, 1),
    (1, 2, 3),
    (1, 3, 2),
    (2, 1, 3),
    (3, 1, 2),
    (5, 5, 2),
    (1, 1, 20),
    (1, 20, 1),
    (20, 1, 1),
];

fn costs((forward, backward_input, backward_weight): (u64, u64, u64)) -> Costs {
    Costs { forward, backward_input, backward_weight, transfer: 0 }
}

fn kinds() -> Vec<ScheduleKind> {
    let simple = [ScheduleKind::GPipe, ScheduleKind::OneFOneB, ScheduleKind::ZbH1];
    let interleaved = (2..=CHUNKS_MAX).map(|chunks| ScheduleKind::Interleaved { chunks });
    simple.into_iter().chain(interleaved).collect()
}

/// Every kind and shape that is possible.
fn all(mut body: impl FnMut(ScheduleKind, usize, usize, &Schedule)) {
    let mut count = 0;
    for kind in kinds() {
        for p in 1..=RANKS_MAX {
            for m in 1..=MICRO_BATCHES_MAX {
                let interleaved = matches!(kind, ScheduleKind::Interleaved { .. });
                match Schedule::new(kind, p, m) {
                    Ok(schedule) => {
                        body(kind, p, m, &schedule);
                        count += 1;
                    }
                    Err(error) => assert!(interleaved && m % p != 0, "{kind} {p} {m}: {error}"),
                }
            }
        }
    }
    // 32 + 16 + 10 + 8 + 6 + 5 + 4 + 4 multiples of p for each number of chunks.
    assert_eq!(count, 3 * RANKS_MAX * MICRO_BATCHES_MAX + 3 * 85);
}

#[test]
fn every_schedule_is_right_and_ends() {
    all(|kind, p, m, schedule| {
        schedule.verify().unwrap_or_else(|flaw| panic!("{kind}, p {p}, m {m}: {flaw}"));
    });
}

#[test]
fn ranks_are_idle_as_long_as_the_papers_say() {
    all(|kind, p, m, schedule| {
        for costs in COSTS.map(costs) {
            let timeline = schedule.timeline(&costs).unwrap();
            let Costs { forward: f, backward_input: b, backward_weight: w, .. } = costs;
            let ranks = u64::try_from(p - 1).unwrap();
            let paper = match kind {
                ScheduleKind::ZbH1 if m >= p && w <= f.min(b) => Some(ranks * (f + b - w)),
                ScheduleKind::ZbH1 => None,
                _ => Some(ranks * (f + b + w)),
            };
            for rank in 0..p {
                let idle = timeline.idle(rank);
                assert_eq!(idle, kind.idle(p, m, &costs), "{kind}, p {p}, m {m}, {costs:?}");
                assert!(paper.is_none_or(|paper| paper == idle), "{kind}, p {p}, m {m}, {costs:?}");
            }
        }
    });
}

#[test]
fn ranks_keep_as_many_activations_as_the_papers_say() {
    all(|kind, p, m, schedule| {
        for rank in 0..p {
            let paper = match kind {
                ScheduleKind::GPipe => m,
                ScheduleKind::OneFOneB => m.min(p - rank),
                ScheduleKind::Interleaved { chunks: v } => {
                    (m * v).min(2 * (p - rank - 1) + (v - 1) * p + 1)
                }
                _ => m.min(p),
            };
            assert_eq!(schedule.activations_max(rank), paper, "{kind}, p {p}, m {m}, rank {rank}");
            assert_eq!(kind.activations_max(p, m, rank), paper);
        }
    });
}

/// Whatever it costs, a chunked model's bubble is 1/v and a split backward's is no longer.
#[test]
fn each_schedule_is_better_than_the_one_it_improves_on() {
    for p in 2..=RANKS_MAX {
        let m = 2 * p;
        // A chunk of four costs a quarter of the whole.
        let whole = Costs { forward: 4, backward_input: 4, backward_weight: 4, transfer: 0 };
        let of = |kind| Schedule::new(kind, p, m).unwrap();
        let idle = |kind, costs| of(kind).timeline(costs).unwrap().idle(0);
        let plain = idle(ScheduleKind::OneFOneB, &whole);
        assert_eq!(plain, 4 * idle(ScheduleKind::Interleaved { chunks: 4 }, &Costs::UNIT));
        assert_eq!(plain, 3 * idle(ScheduleKind::ZbH1, &whole), "a third, as in the paper");
        let kept = |kind| (0..p).map(|rank| of(kind).activations_max(rank)).max();
        assert_eq!(kept(ScheduleKind::ZbH1), kept(ScheduleKind::OneFOneB));
    }
}

#[test]
fn transfers_are_paid_by_gpipe_once_there_and_once_back() {
    for (p, m) in [(2, 3), (4, 8), (8, 32)] {
        let costs = Costs { forward: 2, backward_input: 2, backward_weight: 2, transfer: 5 };
        let timeline = Schedule::new(ScheduleKind::GPipe, p, m).unwrap().timeline(&costs).unwrap();
        let between = u64::try_from(p - 1).unwrap();
        assert!((0..p).all(|rank| timeline.idle(rank) == between * (2 + 4 + 2 * 5)));
    }
}

/// Why the kinds promise what they do: the next stricter sends would end in a deadlock somewhere.
#[test]
fn promises_about_sends_are_as_strict_as_they_can_be() {
    let fails =
        |kind, p, m, sending| Schedule::new(kind, p, m).unwrap().ends_with(sending).is_err();
    assert!(fails(ScheduleKind::OneFOneB, 2, 2, Sending::Synchronous));
    assert!(fails(ScheduleKind::ZbH1, 2, 2, Sending::Synchronous));
    all(|kind, p, m, schedule| {
        if matches!(kind, ScheduleKind::Interleaved { .. }) {
            let ends = schedule.ends_with(Sending::Together).is_ok();
            assert_eq!(ends, p == 1 || m == p, "{kind}, p {p}, m {m}");
        }
    });
}

#[test]
fn stages_go_round_the_ranks() {
    let schedule = Schedule::new(ScheduleKind::Interleaved { chunks: 3 }, 2, 4).unwrap();
    let stages: Vec<_> = (0..6).map(|stage| schedule.place(stage).unwrap()).collect();
    assert_eq!(stages, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
    assert!((0..6).all(|stage| schedule.stage(stages[stage].0, stages[stage].1) == stage));
    assert_eq!(schedule.place(6), None);
}

#[test]
fn what_is_no_step_is_a_flaw_and_too_much_is_an_error() {
    for empty in [Schedule::of(1, 1, vec![]), Schedule::of(0, 1, vec![vec![]])] {
        assert_eq!(empty.verify(), Err(Flaw::Empty));
    }
    assert_eq!(Schedule::of(1, 0, vec![vec![]]).verify(), Err(Flaw::Empty));
    for chunks in [usize::MAX, 1 << 63] {
        let error = Schedule::new(ScheduleKind::Interleaved { chunks }, 2, 2).unwrap_err();
        assert!(error.to_string().contains("are at most"), "{error}");
    }
}

#[test]
fn impossible_schedules_say_what_is_possible() {
    let message = |kind, p, m| Schedule::new(kind, p, m).unwrap_err().to_string();
    let interleaved = ScheduleKind::Interleaved { chunks: 2 };
    assert_eq!(
        message(interleaved, 4, 10),
        "no interleaved:2 schedule of 4 ranks and 10 micro-batches: micro-batches come in rounds of as many as there are ranks; possible: 8 or 12"
    );
    assert!(message(interleaved, 4, 3).ends_with("possible: 4"));
    assert!(message(ScheduleKind::Interleaved { chunks: 1 }, 4, 8).ends_with("or 1f1b"));
    assert!(message(ScheduleKind::GPipe, 0, 8).ends_with("both are at least 1"));
    assert!(message(ScheduleKind::ZbH1, 8, 0).ends_with("both are at least 1"));
}

#[test]
fn schedules_are_read_as_they_are_written() {
    for kind in kinds() {
        assert_eq!(kind.to_string().parse::<ScheduleKind>().unwrap(), kind);
    }
    for name in ["", "1F1B ", "interleaved", "interleaved:x", "zb-h2"] {
        let message = name.parse::<ScheduleKind>().unwrap_err().to_string();
        assert!(message.contains("there are gpipe, 1f1b, interleaved:N"), "{message}");
    }
}

#[test]
fn pictures_show_transfers_and_do_not_grow_with_the_unit() {
    let schedule = Schedule::new(ScheduleKind::GPipe, 2, 2).unwrap();
    let picture = |unit| {
        let costs = Costs {
            forward: 2 * unit,
            backward_input: unit,
            backward_weight: unit,
            transfer: unit,
        };
        schedule.timeline(&costs).unwrap().to_string()
    };
    assert_eq!(
        picture(1),
        "rank 0 0F -- 1F -- .. .. .. .. .. .. 0B -- 1B --\nrank 1 .. .. .. 0F -- 1F -- 0B -- 1B -- .. .. .."
    );
    assert_eq!(picture(1), picture(1_000_000_000));
}
