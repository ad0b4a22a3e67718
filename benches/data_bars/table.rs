//! What is promised, what was found, and whether that is enough.

use std::fmt;

use super::measure::Rate;
use super::peers::Peer;

const MISSED: &str = "MISSED";

#[derive(Debug, Default)]
pub(crate) struct Table(Vec<Row>);

#[derive(Debug)]
struct Row {
    what: String,
    found: f64,
    /// By processor time.
    busy: Option<f64>,
    bar: String,
    verdict: &'static str,
    about: String,
}

impl Table {
    pub(crate) fn at_least(&mut self, what: &str, found: f64, bar: f64, about: &str) {
        self.push(what, (found, None), format!(">= {bar:.1}"), found >= bar, about);
    }

    pub(crate) fn at_most(&mut self, what: &str, found: f64, bar: f64, about: &str) {
        self.push(what, (found, None), format!("<= {bar:.1}"), found <= bar, about);
    }

    /// A time against a bar, and the same of processor time.
    pub(crate) fn at_most_time(&mut self, what: &str, (found, busy): (f64, f64), bar: f64) {
        let is_met = found <= bar;
        self.push(what, (found, Some(busy)), format!("<= {bar:.1}"), is_met, "");
        self.forgive(!is_met && busy <= bar);
    }

    /// The last row is missed only because others had the processors.
    fn forgive(&mut self, is_so: bool) {
        if let Some(row) = self.0.last_mut().filter(|_| is_so) {
            row.verdict = "met by processor time";
        }
    }

    /// A rate against a bar in thousands a second.
    pub(crate) fn at_least_rate(&mut self, what: &str, rate: &Rate, bar: f64) {
        self.push_both(what, (rate.wall / 1e3, rate.busy.map(|busy| busy / 1e3)), bar);
    }

    /// Our rate as a multiple of another's.
    pub(crate) fn ratio(&mut self, what: &str, ours: &Rate, peer: &Peer, bar: f64) {
        let busy = ours.busy.zip(peer.busy_rate).map(|(ours, theirs)| ours / theirs);
        self.push_both(what, (ours.wall / peer.rate, busy), bar);
    }

    /// How many bars are missed.
    pub(crate) fn missed(&self) -> usize {
        self.0.iter().filter(|row| row.verdict == MISSED).count()
    }

    fn push_both(&mut self, what: &str, (found, busy): (f64, Option<f64>), bar: f64) {
        let is_met = found >= bar;
        self.push(what, (found, busy), format!(">= {bar:.1}"), is_met, "");
        self.forgive(!is_met && busy.is_some_and(|busy| busy >= bar));
    }

    fn push(
        &mut self,
        what: &str,
        (found, busy): (f64, Option<f64>),
        bar: String,
        is_met: bool,
        about: &str,
    ) {
        let (what, about) = (what.to_owned(), about.to_owned());
        let verdict = if is_met { "met" } else { MISSED };
        self.0.push(Row { what, found, busy, bar, verdict, about });
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<64} {:>9} {:>9} {:>9}  verdict", "", "found", "on a cpu", "bar")?;
        for Row { what, found, busy, bar, verdict, about } in &self.0 {
            let busy = busy.map_or_else(String::new, |busy| format!("{busy:.2}"));
            let about = if about.is_empty() { String::new() } else { format!(" ({about})") };
            writeln!(f, "{what:<64} {found:>9.2} {busy:>9} {bar:>9}  {verdict}{about}")?;
        }
        Ok(())
    }
}
