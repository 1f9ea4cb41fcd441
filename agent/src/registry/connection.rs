//! The connection to one of etcd's endpoints, and to the next one when that fails.
//!
//! etcd-client balances over its endpoints without looking whether they work: a dead one answers fastest, with an
//! error, and gets its share of the requests. So here a client knows one endpoint only; an error of the endpoint
//! (not of the request) drops the client, and the next request goes to the next endpoint. Every request has a time
//! limit, and HTTP/2 pings end streams over which nothing comes back.

use std::{
    error::Error,
    fmt::Write as _,
    future::Future,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Error as EtcdError, Identity, TlsOptions};
use rand::seq::SliceRandom as _;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Endpoint, EtcdOptions, RegistryError, stats::Stats};

/// For the TCP connection and the TLS handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// For one request at one endpoint. etcd itself gives up on a request after 7 s (5 s and two elections).
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// Silence before a ping. etcd closes connections that ping more often than every 5 s.
const PING_AFTER: Duration = Duration::from_secs(10);
/// Silence after a ping before the connection counts as dead.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// Where requests go.
pub(super) struct Connection {
    options: EtcdOptions,
    endpoints: Vec<Endpoint>,
    current: Mutex<Current>,
    pub(super) stats: Arc<Stats>,
}

/// The endpoint in use (an index, counted on without end) and its client once there is one.
struct Current {
    turn: usize,
    client: Option<Client>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) async fn new(options: EtcdOptions) -> Result<Self, RegistryError> {
        let mut endpoints = Endpoint::parse_all(&options.endpoints)?;
        check_pairs(&options)?;
        // Read once now, so that a wrong path ends the start; read again at every connection, for renewed files.
        tls(&options).await.map_err(RegistryError::Options)?;
        let files = [&options.ca_file, &options.cert_file, &options.key_file];
        if files.iter().any(|file| file.is_some()) && endpoints.iter().any(|endpoint| !endpoint.tls()) {
            warn!(
                "TLS files are given, but not all etcd endpoints are https: those are spoken to in the clear"
            );
        }
        // So that a cluster's nodes spread over etcd's members.
        endpoints.shuffle(&mut rand::rng());
        Ok(Self {
            options,
            endpoints,
            current: Mutex::new(Current { turn: 0, client: None }),
            stats: Arc::default(),
        })
    }

    /// Makes a request, at one endpoint after the other until one answers. The closure may run several times: a
    /// request that writes must tell by its answer whether an earlier try has succeeded.
    pub(super) async fn call<T, F, R>(&self, what: &'static str, request: F) -> Result<T, RegistryError>
    where
        F: Fn(Client) -> R,
        R: Future<Output = Result<T, EtcdError>>,
    {
        self.stats.requests.add();
        self.try_each(what, request).await.inspect_err(|_| self.stats.errors.add())
    }

    /// All endpoints, and the one in use where there is one.
    pub(super) fn endpoints(&self) -> (Vec<String>, Option<String>) {
        let mut urls: Vec<String> = self.endpoints.iter().map(|endpoint| endpoint.url().to_owned()).collect();
        let (turn, client) = self.current();
        let member = client.map(|_| urls[turn % urls.len()].clone());
        urls.sort();
        (urls, member)
    }

    async fn try_each<T, F, R>(&self, what: &'static str, request: F) -> Result<T, RegistryError>
    where
        F: Fn(Client) -> R,
        R: Future<Output = Result<T, EtcdError>>,
    {
        let mut tried = Vec::new();
        // Once more than there are endpoints: the connection at hand may have broken unnoticed.
        for _ in 0..=self.endpoints.len() {
            let (turn, client) = self.current();
            let endpoint = &self.endpoints[turn % self.endpoints.len()];
            let attempt = async {
                let client = match client {
                    Some(client) => client,
                    None => self.open(turn, endpoint).await?,
                };
                request(client).await.map_err(Failure::from)
            };
            let failure = match timeout(REQUEST_LIMIT, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Request(reason))) => return Err(RegistryError::Refused { what, reason }),
                Ok(Err(Failure::Endpoint(reason))) => self.explain(endpoint, reason),
                Err(_) => format!("no answer within {} s", REQUEST_LIMIT.as_secs()),
            };
            debug!(endpoint = endpoint.url(), what, failure, "etcd endpoint failed");
            self.leave(turn);
            let failed = format!("{}: {failure}", endpoint.url());
            if !tried.contains(&failed) {
                tried.push(failed);
            }
        }
        Err(RegistryError::Unreachable { what, tried: tried.join("; ") })
    }

    /// TLS 1.3 tells a client that shows no certificate after the handshake only, and mostly by closing.
    fn explain(&self, endpoint: &Endpoint, reason: String) -> String {
        // What arrives first, the alert or the end of the connection, is a matter of luck; etcd 3.4's Go sends the
        // first of these alerts, newer ones the second.
        let signs =
            ["BadCertificate", "CertificateRequired", "connection closed", "roken pipe", "reset by peer"];
        let closed = signs.iter().any(|sign| reason.contains(sign));
        if endpoint.tls() && self.options.cert_file.is_none() && closed {
            return format!("{reason} (does it want a client certificate? None is given)");
        }
        reason
    }

    fn current(&self) -> (usize, Option<Client>) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        (current.turn, current.client.clone())
    }

    /// Goes on to the next endpoint, unless another request has done so already.
    fn leave(&self, turn: usize) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.turn == turn {
            *current = Current { turn: turn.wrapping_add(1), client: None };
        }
    }

    async fn open(&self, turn: usize, endpoint: &Endpoint) -> Result<Client, Failure> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_LIMIT)
            .with_keep_alive(PING_AFTER, PING_LIMIT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if endpoint.tls() {
            options = options.with_tls(tls(&self.options).await.map_err(Failure::Endpoint)?);
        }
        if let (Some(username), Some(password)) = (&self.options.username, &self.options.password) {
            options = options.with_user(username, password);
        }
        let client = Client::connect([endpoint.url()], Some(options)).await?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.turn == turn {
            current.client = Some(client.clone());
        }
        Ok(client)
    }
}

/// Whose fault an error is, as one line.
enum Failure {
    Endpoint(String),
    Request(String),
}

impl From<EtcdError> for Failure {
    fn from(error: EtcdError) -> Self {
        use etcd_client::Error::{EndpointError, GRpcStatus, IoError, TransportError};
        let of_endpoint = match &error {
            TransportError(_) | IoError(_) | EndpointError(_) => true,
            // Unavailable: also what etcd says without a leader or in an election. Unknown and Internal: what tonic
            // says where the connection ended in the middle.
            GRpcStatus(status) => {
                let code = status.code() as i32;
                let source = status.source().is_some();
                // A token from before the last change to users and roles, or (16) one that etcd does not know any
                // more: a new client gets a new one.
                let old_token = code == 16 || status.message().contains("revision of auth store is old");
                // Codes by number: etcd-client does not export tonic's type. 1 cancelled, 2 unknown, 4 deadline
                // exceeded, 13 internal, 14 unavailable, 16 unauthenticated (grpc/doc/statuscodes.md).
                old_token || matches!(code, 4 | 14) || (source && matches!(code, 1 | 2 | 13))
            }
            _ => false,
        };
        let reason = one_line(&error);
        if of_endpoint { Self::Endpoint(reason) } else { Self::Request(reason) }
    }
}

/// The error and what is behind it, each part once: tonic's own texts say as little as "transport error".
pub(super) fn one_line(error: &EtcdError) -> String {
    let mut text = match error {
        EtcdError::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut source = match error {
        EtcdError::GRpcStatus(status) => status.source(),
        EtcdError::TransportError(error) => error.source(),
        other => other.source(),
    };
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            let _ = write!(text, ": {part}");
        }
        source = error.source();
    }
    text.replace('\n', " ")
}

fn check_pairs(options: &EtcdOptions) -> Result<(), RegistryError> {
    let refuse = |text: &str| Err(RegistryError::Options(text.into()));
    match (&options.cert_file, &options.key_file, &options.username, &options.password) {
        (Some(_), None, ..) => refuse("a certificate file is given without its key file"),
        (None, Some(_), ..) => refuse("a key file is given without its certificate file"),
        (.., Some(_), None) => refuse("a user name is given without a password"),
        (.., None, Some(_)) => refuse("a password is given without a user name"),
        _ => Ok(()),
    }
}

async fn tls(options: &EtcdOptions) -> Result<TlsOptions, String> {
    let mut tls = TlsOptions::new();
    tls = match &options.ca_file {
        Some(file) => tls.ca_certificate(Certificate::from_pem(pem(file, "CERTIFICATE").await?)),
        None => tls.with_enabled_roots(),
    };
    if let (Some(cert), Some(key)) = (&options.cert_file, &options.key_file) {
        tls =
            tls.identity(Identity::from_pem(pem(cert, "CERTIFICATE").await?, pem(key, "PRIVATE KEY").await?));
    }
    Ok(tls)
}

/// Reads a PEM file; rustls says nothing where there is none of what it looks for inside.
async fn pem(file: &Path, holds: &str) -> Result<Vec<u8>, String> {
    let bytes =
        tokio::fs::read(file).await.map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let found = String::from_utf8_lossy(&bytes)
        .lines()
        .any(|line| line.starts_with("-----BEGIN") && line.contains(holds));
    if found {
        Ok(bytes)
    } else {
        Err(format!("{} holds no PEM block of a {}", file.display(), holds.to_lowercase()))
    }
}
