//! Sees every request of a client, counts it and holds it and its answer against the schema.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use moxlet_pve::{Observed, Observer};

use crate::schema::{Schema, Violation};

/// What was seen. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    calls: BTreeMap<(&'static str, &'static str), u64>,
    requests: BTreeMap<String, Violation>,
    answers: BTreeMap<String, Violation>,
}

impl Observer for Recorder {
    fn observe(&self, request: &Observed<'_>) {
        let schema = Schema::official();
        let parameters: Vec<(String, String)> =
            request.parameters.iter().map(|(k, v)| (k.clone().into_owned(), v.clone())).collect();
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *seen.calls.entry((request.method, request.template)).or_default() += 1;
        for violation in schema.check_request(request.method, request.path, &parameters) {
            seen.requests.insert(violation.to_string(), violation);
        }
        for violation in
            request.data.map(|d| schema.check_answer(request.method, request.path, d)).unwrap_or_default()
        {
            // The index in a list would make each entry of it another one.
            let text =
                format!("{} {} {}", violation.method, violation.path, without_indices(&violation.place));
            seen.answers.entry(text).or_insert(violation);
        }
    }
}

impl Recorder {
    /// How often each call was sent, by method and path template.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).calls.clone()
    }

    /// What is wrong with requests: the client's fault.
    #[must_use]
    pub fn wrong_requests(&self) -> Vec<Violation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).requests.values().cloned().collect()
    }

    /// What is wrong with answers: the server's fault. One for each place, whichever entry of a list it was.
    #[must_use]
    pub fn wrong_answers(&self) -> Vec<Violation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).answers.values().cloned().collect()
    }
}

/// `answer[3].status` as `answer.status`.
#[must_use]
pub fn without_indices(place: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in place.chars() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            c if !inside => out.push(c),
            _ => {}
        }
    }
    out
}
