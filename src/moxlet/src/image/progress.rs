//! How a pull gets on: a bar for each layer on a terminal, else a line for each that is complete.

use std::{collections::HashMap, io::IsTerminal};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use moxlet_cri::host::{ImageLayerProgress, ImagePullProgress};

use super::output::{short, size};

/// Bars that are shown at once; a terminal has so many lines.
const MAX_BARS: usize = 40;

/// What is shown of a transfer.
pub(crate) struct Bars {
    name: String,
    look: Look,
}

enum Look {
    Quiet,
    Lines(HashMap<String, bool>),
    Terminal { all: MultiProgress, bars: HashMap<String, ProgressBar> },
}

impl Bars {
    /// Begins; `quiet` shows nothing.
    pub(crate) fn new(name: &str, quiet: bool) -> Self {
        let look = if quiet {
            Look::Quiet
        } else if std::io::stderr().is_terminal() {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8));
            Look::Terminal { all, bars: HashMap::new() }
        } else {
            eprintln!("pulling {name}");
            Look::Lines(HashMap::new())
        };
        Self { name: name.to_owned(), look }
    }

    /// Shows how far it is.
    pub(crate) fn show(&mut self, progress: &ImagePullProgress) {
        match &mut self.look {
            Look::Quiet => {}
            Look::Lines(told) => {
                let count = progress.layers.len();
                for (n, layer) in progress.layers.iter().enumerate() {
                    if layer.complete && told.insert(layer.digest.clone(), true).is_none() {
                        eprintln!(
                            "layer {}/{count} {} {}",
                            n + 1,
                            short(&layer.digest),
                            size(layer.size_bytes)
                        );
                    }
                }
            }
            Look::Terminal { all, bars } => {
                for layer in progress.layers.iter().take(MAX_BARS) {
                    let bar = bars.entry(layer.digest.clone()).or_insert_with(|| all.add(bar(layer)));
                    bar.set_position(layer.done_bytes);
                    if layer.complete && !bar.is_finished() {
                        bar.finish();
                    }
                }
            }
        }
    }

    /// All is there.
    pub(crate) fn finish(self, id: &str, bytes: u64) {
        match self.look {
            Look::Quiet => {}
            Look::Lines(_) => eprintln!("{} is here: {}, {}", self.name, short(id), size(bytes)),
            Look::Terminal { all, .. } => {
                let _ = all.println(format!("{} is here: {}, {}", self.name, short(id), size(bytes)));
                let _ = all.clear();
            }
        }
    }
}

fn bar(layer: &ImageLayerProgress) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{prefix} {bar:30} {bytes:>10} / {total_bytes:10} {bytes_per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let prefix = short(&layer.digest).to_owned();
    ProgressBar::new(layer.size_bytes).with_style(style).with_prefix(prefix)
}
