//! A look at every request, for whoever counts or checks them.

use std::{borrow::Cow, time::Duration};

use serde_json::Value;

/// One request that was sent (or tried), after it ended. A call that is tried three times is observed three times.
#[derive(Debug)]
pub struct Observed<'a> {
    /// The method.
    pub method: &'static str,
    /// The path's template, such as `/nodes/{node}/lxc/{vmid}/config`: a good label for a metric.
    pub template: &'static str,
    /// The path below `/api2/json`, percent-encoded.
    pub path: &'a str,
    /// The parameters of the query or the form.
    pub parameters: &'a [(Cow<'static, str>, String)],
    /// The server asked.
    pub endpoint: &'a str,
    /// 1 for the first try.
    pub attempt: u32,
    /// The HTTP status; none if there was no answer.
    pub status: Option<u16>,
    /// `data` of an answer that is a success.
    pub data: Option<&'a Value>,
    /// From the first try to send until the whole answer was there; waiting for a free place is not in it.
    pub duration: Duration,
}

/// Gets to see every request. It is called on the task that made the call and should return at once.
pub trait Observer: Send + Sync {
    /// A request has ended.
    fn observe(&self, request: &Observed<'_>);
}

impl<F: Fn(&Observed<'_>) + Send + Sync> Observer for F {
    fn observe(&self, request: &Observed<'_>) {
        self(request);
    }
}
