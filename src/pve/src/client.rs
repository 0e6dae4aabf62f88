//! The client: how it is set up, and how an answer becomes a type.

use std::{fmt, sync::Arc, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    Endpoint, Error, Limits, Observer, Result, Token, Upid,
    http::{Answer, Bounds, Http, Request, unexpected},
};

/// The longest list that is taken: more guests than a cluster has.
const MAX_LIST: usize = 50_000;

/// A client of one cluster. Cloning it is cheap; all clones share connections and places.
#[derive(Clone)]
pub struct Client {
    http: Arc<Http>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("token", &self.http.token).finish_non_exhaustive()
    }
}

/// What a client is made of.
pub struct Builder {
    token: Token,
    endpoints: Vec<Endpoint>,
    bounds: Bounds,
    observer: Option<Arc<dyn Observer>>,
}

impl Builder {
    /// Adds a server. The first is asked first; the others stand in for it.
    #[must_use]
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        self.endpoints.push(endpoint);
        self
    }

    /// Calls at once for each server; see [`Limits`].
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.bounds.limits = limits;
        self
    }

    /// How long a connection may take; 5 seconds if nothing is said.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.bounds.connect = timeout;
        self
    }

    /// How long a call may take from sending to the last byte of its answer; 40 seconds if nothing is said, which is more than
    /// the servers' own 30 between each other.
    #[must_use]
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.bounds.answer = timeout;
        self
    }

    /// The longest answer in bytes; 16 MiB if nothing is said.
    #[must_use]
    pub fn max_answer(mut self, bytes: usize) -> Self {
        self.bounds.max_answer = bytes;
        self
    }

    /// Who gets to see every request.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// The client. It connects with the first call.
    ///
    /// # Errors
    /// [`Error::Setup`]: no endpoint, or a CA file without a usable certificate.
    pub fn build(self) -> Result<Client> {
        let http = Http::new(&self.endpoints, self.token, self.bounds, self.observer)?;
        Ok(Client { http: Arc::new(http) })
    }
}

impl Client {
    /// Begins a client.
    #[must_use]
    pub fn builder(token: Token) -> Builder {
        let bounds = Bounds {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(40),
            max_answer: 16 << 20,
            limits: Limits::default(),
        };
        Builder { token, endpoints: Vec::new(), bounds, observer: None }
    }

    /// The id of our token, `user@realm!id`.
    #[must_use]
    pub fn token_id(&self) -> &str {
        self.http.token.id()
    }

    pub(crate) async fn send(&self, request: Request) -> Result<Answer> {
        self.http.call(&request).await
    }

    /// A call with an object as answer.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        request: Request,
        expected: &'static str,
    ) -> Result<T> {
        let answer = self.send(request).await?;
        // Serde would take a list for a struct, field by field.
        if !answer.data.is_object() {
            return Err(of_another_kind(&answer, expected, "it is no object"));
        }
        decode(answer, expected)
    }

    /// A call with a single value as answer.
    pub(crate) async fn scalar<T: DeserializeOwned>(
        &self,
        request: Request,
        expected: &'static str,
    ) -> Result<T> {
        decode(self.send(request).await?, expected)
    }

    /// A call with a list of objects as answer; null is an empty one.
    pub(crate) async fn list<T: DeserializeOwned>(
        &self,
        request: Request,
        expected: &'static str,
    ) -> Result<Vec<T>> {
        let answer = self.send(request).await?;
        match &answer.data {
            Value::Null => Ok(Vec::new()),
            Value::Array(items) if items.len() > MAX_LIST => {
                let reason = format!("it has {} entries, at most {MAX_LIST} are taken", items.len());
                Err(of_another_kind(&answer, expected, &reason))
            }
            Value::Array(items) if items.iter().all(Value::is_object) => decode(answer, expected),
            _ => Err(of_another_kind(&answer, expected, "it is no list of objects")),
        }
    }

    /// A call whose answer says nothing.
    pub(crate) async fn done(&self, request: Request) -> Result<()> {
        self.send(request).await.map(drop)
    }

    /// A call that starts a task.
    pub(crate) async fn task(&self, request: Request) -> Result<Upid> {
        self.scalar(request, "the id of a task").await
    }
}

fn of_another_kind(answer: &Answer, expected: &'static str, reason: &str) -> Error {
    let start: String = answer.data.to_string().chars().take(400).collect();
    unexpected(&answer.call, expected, reason, start.as_bytes())
}

pub(crate) fn decode<T: DeserializeOwned>(answer: Answer, expected: &'static str) -> Result<T> {
    let Answer { call, data, .. } = answer;
    T::deserialize(&data).map_err(|e| {
        let text = data.to_string();
        unexpected(&call, expected, &e.to_string(), text.as_bytes())
    })
}

impl Error {
    /// An error of our own, before anything is sent.
    pub(crate) fn refused(method: &'static str, path: &str, reason: impl Into<String>) -> Self {
        let call = crate::CallName { method, path: path.into() };
        Self::Refused { call, reason: reason.into() }
    }
}
