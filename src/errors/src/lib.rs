//! An error and its causes as one line of text, for logs, events and answers.

use std::error::Error;

use snafu::CleanedErrorText;

/// The error with all its causes, outermost first, joined by `: `. A cause that its parent's text ends with already is not
/// repeated.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut line = String::new();
    for (_, text, _) in CleanedErrorText::new(error) {
        if !text.is_empty() && !line.contains(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("no route to host")]
    struct Cause;

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error("cannot reach web")]
        Plain(#[source] Cause),
        #[error("cannot reach web: {0}")]
        Repeated(#[source] Cause),
    }

    #[test]
    fn causes_follow_and_are_not_repeated() {
        assert_eq!(chain(&Failed::Plain(Cause)), "cannot reach web: no route to host");
        assert_eq!(chain(&Failed::Repeated(Cause)), "cannot reach web: no route to host");
    }
}
