//! A schedule as a picture: a line a rank, time from left to right.
//!
//! A cell is one unit of time: `3F` micro-batch 3 forward, `3B` backward, `3W` its weights alone, `--` goes on, `..` idle. With several chunks a letter says which: `3bF`. Units are
//! as large as all times allow; choose costs that are small multiples of each other.

use std::fmt;

use super::{Slot, Timeline};

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<Vec<String>> = self.cells();
        let width = lines.iter().flatten().map(String::len).max().unwrap_or(0);
        let number = self.ranks().len().to_string().len();
        for (rank, cells) in lines.iter().enumerate() {
            let cells: Vec<String> =
                cells.iter().map(|cell| format!("{:<width$}", filled(cell, width))).collect();
            let line = if rank == 0 { "" } else { "\n" };
            write!(f, "{line}rank {rank:<number$} {}", cells.join(" "))?;
        }
        Ok(())
    }
}

impl Timeline {
    fn cells(&self) -> Vec<Vec<String>> {
        let times = self.ranks().iter().flatten().flat_map(|slot| [slot.start, slot.end]);
        let unit = times.fold(0, common_divisor).max(1);
        let letters = self.ranks().iter().flatten().any(|slot| slot.part.chunk > 0);
        let len = index(self.end() / unit);
        let line = |slots: &Vec<Slot>| {
            let mut cells = vec![IDLE.to_owned(); len];
            for slot in slots.iter().filter(|slot| slot.end > slot.start) {
                let (start, end) = (index(slot.start / unit), index(slot.end / unit));
                cells[start..end].fill(GOES_ON.to_owned());
                cells[start] = label(slot, letters);
            }
            cells
        };
        self.ranks().iter().map(line).collect()
    }
}

const IDLE: &str = ".";
const GOES_ON: &str = "-";

/// What has no label fills the cell.
fn filled(cell: &str, width: usize) -> String {
    if cell == IDLE || cell == GOES_ON {
        return cell.repeat(width);
    }
    cell.to_owned()
}

fn label(slot: &Slot, letters: bool) -> String {
    let (micro_batch, pass) = (slot.part.micro_batch, slot.pass.letter());
    if !letters {
        return format!("{micro_batch}{pass}");
    }
    let chunk =
        u32::try_from(slot.part.chunk).ok().and_then(|chunk| char::from_digit(chunk + 10, 36));
    format!("{micro_batch}{}{pass}", chunk.unwrap_or('?'))
}

fn common_divisor(left: u64, right: u64) -> u64 {
    if right == 0 {
        return left;
    }
    common_divisor(right, left % right)
}

fn index(time: u64) -> usize {
    usize::try_from(time).unwrap_or(usize::MAX)
}
