//! Prometheus' text format for figures that are a snapshot: floats, and samples with the time of their measurement.

use std::fmt::Write;

/// Kinds of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A text under way.
#[derive(Default)]
pub(crate) struct Text {
    out: String,
}

impl Text {
    /// Opens a family: all its samples must follow at once.
    pub(crate) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One sample; `at` is the time of the measurement in milliseconds.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64, at: Option<i64>) {
        self.out.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            self.out.push(if i == 0 { '{' } else { ',' });
            let _ = write!(self.out, "{label}=\"");
            for c in text.chars() {
                match c {
                    '\\' => self.out.push_str("\\\\"),
                    '"' => self.out.push_str("\\\""),
                    '\n' => self.out.push_str("\\n"),
                    c => self.out.push(c),
                }
            }
            self.out.push('"');
        }
        if !labels.is_empty() {
            self.out.push('}');
        }
        self.out.push(' ');
        if value.is_nan() {
            self.out.push_str("NaN");
        } else if value.is_infinite() {
            self.out.push_str(if value > 0.0 { "+Inf" } else { "-Inf" });
        } else {
            let _ = write!(self.out, "{value}");
        }
        if let Some(at) = at {
            let _ = write!(self.out, " {at}");
        }
        self.out.push('\n');
    }

    /// The finished text.
    pub(crate) fn finish(self) -> String {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_floats_are_floats() {
        let mut text = Text::default();
        text.family("a_total", Kind::Counter, "one\ntwo");
        text.sample("a_total", &[("x", "q\"b\\n\n"), ("y", "")], 1.5, Some(7));
        text.sample("b", &[], f64::INFINITY, None);
        text.sample("c", &[], 3e9, None);
        assert_eq!(
            text.finish(),
            "# HELP a_total one\\ntwo\n# TYPE a_total counter\na_total{x=\"q\\\"b\\\\n\\n\",y=\"\"} 1.5 7\nb +Inf\nc 3000000000\n"
        );
    }
}
