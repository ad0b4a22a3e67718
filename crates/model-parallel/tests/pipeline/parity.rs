//! A pipeline has the bits of one process that accumulates.

use phalanx_ddp_core::Zero;
use phalanx_model_parallel::pipeline::schedule::ScheduleKind;

use super::model::{check, Setting};

const KINDS: [ScheduleKind; 4] = [
    ScheduleKind::GPipe,
    ScheduleKind::OneFOneB,
    ScheduleKind::Interleaved { chunks: 2 },
    ScheduleKind::ZbH1,
];

fn is_possible(kind: ScheduleKind, pp: usize, micro_batches: usize) -> bool {
    !matches!(kind, ScheduleKind::Interleaved { .. }) || micro_batches.is_multiple_of(pp)
}

#[test]
fn every_schedule_has_the_bits_of_one_process() {
    for pp in 1..=4 {
        for micro_batches in 1..=6 {
            for kind in KINDS.into_iter().filter(|kind| is_possible(*kind, pp, micro_batches)) {
                check(pp, kind, Setting::of(micro_batches), false);
            }
        }
    }
}

#[test]
fn sharded_data_parallel_ranks_have_the_bits_of_those_without_a_pipeline() {
    for kind in KINDS {
        for zero in [Zero::Off, Zero::One, Zero::Three] {
            for (pp, dp) in [(2, 1), (2, 2)] {
                let setting = Setting { dp, zero, ..Setting::of(4) };
                check(pp, kind, setting, false);
            }
        }
    }
}

#[test]
fn layers_that_are_recomputed_have_the_same_bits() {
    for kind in KINDS {
        for zero in [Zero::Off, Zero::Three] {
            let setting = Setting { dp: 2, zero, recomputes: true, ..Setting::of(2) };
            check(2, kind, setting, false);
        }
    }
}

#[test]
fn messages_that_go_together_end_with_the_same_bits() {
    for kind in KINDS.into_iter().filter(|kind| kind.chunk_count() == 1) {
        for pp in 1..=4 {
            check(pp, kind, Setting::of(5), true);
        }
        check(2, kind, Setting { dp: 2, ..Setting::of(3) }, true);
    }
}
