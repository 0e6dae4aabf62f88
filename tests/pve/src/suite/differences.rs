//! Where a server that is known differs from the real one: one table. Whatever is not in it is a failure.

use crate::{recorder::without_indices, schema::Violation};

/// One difference.
#[derive(Debug)]
pub struct Difference {
    /// The server, by the `repoid` that its version has.
    pub server: &'static str,
    /// Which test or which answer it shows in.
    pub shows_in: ShowsIn,
    /// What this server does.
    pub server_does: &'static str,
    /// What the real one does.
    pub real_does: &'static str,
}

/// Where a difference shows.
#[derive(Debug)]
pub enum ShowsIn {
    /// In a test.
    Test(&'static str),
    /// In a place of an answer: method, path template, place without list indices (or what it begins with).
    Answer(&'static str, &'static str, &'static str),
}

use ShowsIn::{Answer, Test};

/// All of them.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        server: "fakepve",
        shows_in: Test("the_version_is_one_that_we_can_work_with"),
        server_does: "fakepve 0.5.0 calls itself 9.0.10",
        real_does: "9.1 and later are supported; before it unmanaged CTs fail to start",
    },
    Difference {
        server: "fakepve",
        shows_in: Answer("GET", "/version", "answer.repoid"),
        server_does: "the commit is its own name",
        real_does: "the commit is eight or more hexadecimal digits",
    },
    Difference {
        server: "fakepve",
        shows_in: Test("nodes_are_listed_and_have_a_status"),
        server_does: "a node's status is made up from the schema: all figures are zero",
        real_does: "a node has memory and processors",
    },
    Difference {
        server: "fakepve",
        shows_in: Answer("GET", "/cluster/status", "answer.online"),
        server_does: "the entry of the cluster itself has the number of nodes that are online",
        real_does: "`online` is a boolean of a node's entry",
    },
];

pub(super) fn of_test(server: &str, test: &str) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|d| d.server == server && matches!(d.shows_in, Test(name) if name == test))
}

pub(super) fn of_answer(server: &str, violation: &Violation) -> Option<&'static Difference> {
    let place = without_indices(&violation.place);
    DIFFERENCES.iter().find(|d| {
        d.server == server
            && matches!(d.shows_in, Answer(method, path, start)
                if method == violation.method && path == violation.path && place.starts_with(start))
    })
}
