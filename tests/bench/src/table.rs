//! The table: a line a number, with the bound and whether it holds.

use std::time::Duration;

#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<[String; 5]>,
    failed: bool,
}

/// What a number is held against.
pub(crate) enum Bound {
    /// At most so many times the peer's.
    TimesPeer(f64),
    /// At least so many times faster than the peer.
    Faster(f64),
    /// Under a fixed value.
    Under(f64),
    /// For information: how many times the peer's it is.
    None,
}

impl Table {
    pub(crate) fn row(&mut self, what: &str, ours: f64, peer: Option<f64>, bound: &Bound) {
        let (wanted, held) = match *bound {
            Bound::TimesPeer(times) => {
                let than = |p: f64| format!("≤ {times} × peer ({:.2})", ours / p);
                (peer.map_or_else(String::new, than), peer.map(|p| ours <= p * times))
            }
            Bound::Faster(times) => {
                let than = |p: f64| format!("{times} × faster ({:.1})", p / ours);
                (peer.map_or_else(String::new, than), peer.map(|p| ours * times <= p))
            }
            Bound::Under(limit) => (format!("< {limit}"), Some(ours < limit)),
            Bound::None => (peer.map_or_else(String::new, |p| format!("{:.2} × peer", ours / p)), None),
        };
        self.failed |= held == Some(false);
        let verdict = held.map_or("", |h| if h { "pass" } else { "FAIL" });
        let row = [
            what.to_owned(),
            format!("{ours:.1}"),
            peer.map_or_else(String::new, |p| format!("{p:.1}")),
            wanted,
            verdict.to_owned(),
        ];
        eprintln!("{}: {} (peer {}) {} {}", row[0], row[1], row[2], row[3], row[4]);
        self.rows.push(row);
    }

    /// A row without a number, and why.
    pub(crate) fn without(&mut self, what: &str, why: &str) {
        eprintln!("{what}: {why}");
        self.rows.push([what.to_owned(), "-".into(), "-".into(), why.to_owned(), String::new()]);
    }

    /// Whether all bounds hold so far.
    pub(crate) fn holds(&self) -> bool {
        !self.failed
    }

    pub(crate) fn print(&self) {
        let head = ["number", "moxlet", "peer", "bound", ""].map(str::to_owned);
        let width =
            |i: usize| self.rows.iter().chain([&head]).map(|r| r[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            println!(
                "{:<a$}  {:>b$}  {:>c$}  {:<d$}  {}",
                row[0],
                row[1],
                row[2],
                row[3],
                row[4],
                a = widths[0],
                b = widths[1],
                c = widths[2],
                d = widths[3]
            );
        }
    }
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The value below which this part of the sample lies (nearest rank).
pub(crate) fn quantile(sample: &[Duration], part: f64) -> Duration {
    let mut sorted = sample.to_vec();
    sorted.sort_unstable();
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_that_does_not_hold_fails_the_table_and_what_is_told_does_not() {
        let mut table = Table::default();
        table.row("told", 3.0, Some(1.0), &Bound::None);
        table.without("not measured", "nobody is there");
        table.row("half", 1.0, Some(2.0), &Bound::TimesPeer(0.5));
        table.row("twice as fast", 1.0, Some(2.0), &Bound::Faster(2.0));
        assert!(table.holds());
        table.row("too much", 64.0, None, &Bound::Under(64.0));
        assert!(!table.holds());
    }

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let sample: Vec<Duration> = (1..=50).map(Duration::from_millis).collect();
        assert_eq!(quantile(&sample, 0.5), Duration::from_millis(25));
        assert_eq!(quantile(&sample, 0.99), Duration::from_millis(50));
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }
}
