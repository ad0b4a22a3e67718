//! `phalanx data …` as its user runs it: the real program, its output and its exit codes.

mod converting;
mod looking;
mod records;
mod support;
mod tables;
