//! The table as nccl-tests prints it, and the same as JSON.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Arguments, Row};

pub(super) fn print_table(ranks: usize, arguments: &Arguments, rows: &[Row]) {
    println!(
        "# {ranks} ranks, all_reduce in place on registered memory, {} backend, link {}",
        arguments.backend, arguments.link
    );
    println!(
        "# {:>11} {:>11} {:>6} {:>6} {:>11} {:>8} {:>8} {:>7} | {:>11} {:>8} | {:>11} {:>8}",
        "size",
        "count",
        "type",
        "redop",
        "time",
        "algbw",
        "busbw",
        "#wrong",
        "MPI time",
        "vs MPI",
        "limit time",
        "of limit"
    );
    println!(
        "# {:>11} {:>11} {:>6} {:>6} {:>11} {:>8} {:>8}",
        "(B)", "(elements)", "", "", "(us)", "(GB/s)", "(GB/s)"
    );
    for row in rows {
        let bandwidth = row.bytes as f64 / row.ours / 1e3;
        let bus = bandwidth * 2.0 * (ranks - 1) as f64 / ranks as f64;
        println!(
            "  {:>11} {:>11} {:>6} {:>6} {:>11.2} {:>8.2} {:>8.2} {:>7} | {:>11.2} {:>7.2}x | {:>11.2} {:>7.0}%",
            row.bytes,
            row.bytes / 4,
            "f32",
            "sum",
            row.ours,
            bandwidth,
            bus,
            row.wrong,
            row.mpi,
            row.mpi / row.ours,
            row.limit,
            row.limit / row.ours * 100.0
        );
    }
}

pub(super) fn write_json(json: &mut String, ranks: usize, row: &Row) -> Result<()> {
    let Row { bytes, ours, mpi, limit, wrong } = row;
    writeln!(
        json,
        "  {{\"ranks\": {ranks}, \"bytes\": {bytes}, \"us\": {ours:.3}, \"mpi_us\": {mpi:.3}, \"limit_us\": {limit:.3}, \"wrong\": {wrong}}},"
    )?;
    Ok(())
}
